"""Plan: the typed description of one classical analysis: Cox regression, survival curves, log-rank test.

Every party holds the same text, as with a study: the server sends it with each message, a site holds it against its policy.
"""

from __future__ import annotations

import difflib
import json
import tomllib
from pathlib import Path
from typing import Any, Literal

import numpy as np
from oncofed.common.covariates import OUTCOME, Covariate, input_names, parse_covariates
from oncofed.common.section import Section, split_text
from pydantic import Field, ValidationError, model_validator

SITE, CANCER = "site", "cancer_type"
"""Groupings that are no covariates: the hospital itself, and the cancer type of the clinical table."""

MOST_CELLS = 2000
"""Intervals of a grid."""

LISTS = ("covariates", "strata", "where", "test")

GRID_END = 120.0
"""Months at which follow-up ends on a grid, unless the plan says otherwise."""


class Plan(Section, allow_inf_nan=False):
    """One analysis. A grouping is `site`, `cancer_type`, a column whose values are its levels, or `column=level|level`."""

    kind: Literal["cox", "km", "logrank"] = Field(
        "km",
        description="Cox regression; survival curves (Kaplan-Meier, Nelson-Aalen) with a log-rank test of groups; the test alone",
    )
    name: str = Field("analysis", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", description="names the report")
    covariates: tuple[str, ...] = Field(
        (),
        description='of cox: clinical columns, "age" is a number, "sex=female|male" has levels, the first is the reference',
    )
    group: str = Field("", description="of km and logrank: the grouping that is compared")
    strata: tuple[str, ...] = Field((), description="groupings: a baseline hazard each in cox, a table each in logrank")
    where: tuple[str, ...] = Field((), description='whose patients: "column=level|level", all of them must hold')
    test: tuple[str, ...] = Field(
        (), description="of cox: patients on whom the fit is evaluated, not fitted; as in where"
    )
    times: Literal["grid", "exact"] = Field(
        "grid", description="grid: intervals of grid_months leave; exact: event times leave, and with them nearly rows"
    )
    grid_months: float = Field(3.0, gt=0, description="width of an interval of the agreed grid")
    horizon_months: float = Field(
        0.0,
        ge=0,
        description="follow-up ends here, later events do not count; 0: at 120 on a grid, never with exact times",
    )
    ties: Literal["efron", "breslow"] = Field("efron", description="how cox takes events at one time")
    ridge: float = Field(0.0, ge=0, description="penalty of cox: loglik / patients - ridge / 2 * sum beta^2")
    standardise: bool = Field(True, description="the penalty is on coefficients of standardised covariates")
    steps: int = Field(
        10,
        ge=1,
        le=50,
        description="questions of cox at most, one a Newton step and one before the first",
    )
    robust: bool = Field(False, description="sandwich standard errors beside the model's own")
    transform: Literal["km", "rank", "log", "identity"] = Field(
        "km", description="of time, against which the check of proportional hazards looks for a trend"
    )
    rho: float = Field(0.0, ge=0, description="of the log-rank test: weights S(t)^rho; 0: log-rank, 1: Peto and Peto")
    epsilon: float = Field(0.0, ge=0, description="differential privacy of km and logrank: cost to a patient; 0: none")
    secure_sum: bool = Field(
        False, description="the server sees sums over all hospitals alone, added under masks, and no hospital's own"
    )
    secure_threshold: int = Field(
        0, ge=0, description="hospitals that must be there at every step of such a sum; 0: floor(2n/3) + 1 of n"
    )
    min_sites: int = Field(2, ge=1, description="fewer good answers stop the analysis")
    wait_sites_s: float = Field(300.0, gt=0, description="deadline for min_sites to come online")
    timeout_s: float = Field(3600.0, gt=0, description="a site that has not answered by then is left out")
    roster: str = Field(
        "",
        description="roster.json of the coordinator's folder: nodes that are no member's by it are left out; empty: any node",
    )
    signature: str = Field(
        "",
        pattern="^([0-9a-f]{128})?$",
        description="the coordinator's, of the plan (oncofed study sign); empty: unsigned",
    )
    out: str = Field("analysis", description="folder for the report; the coordinator's own")

    @model_validator(mode="before")
    @classmethod
    def _text(cls, data: Any) -> Any:
        return split_text(data, *LISTS)

    @model_validator(mode="after")
    def _consistent(self) -> Plan:
        parse_covariates(self.covariates)
        for text in (self.group, *self.strata):
            if text:
                Grouping.parse(text)
        for text in (*self.where, *self.test):
            if not Grouping.parse(text).levels:
                raise ValueError(f"{text!r} chooses nobody; write column=level, or column=level|level")
        if self.kind == "cox" and not self.covariates:
            raise ValueError("a Cox regression needs covariates, such as 'age' or 'sex=female|male'")
        if self.kind == "cox" and self.group:
            raise ValueError("group is of km and logrank; in cox name it among covariates or strata")
        if self.kind != "cox" and (self.covariates or self.test or self.robust):
            raise ValueError(f"covariates, test and robust are of cox, not of {self.kind}")
        if self.kind == "logrank" and not self.group:
            raise ValueError("a log-rank test needs a group, such as 'sex' or 'arm=a|b'")
        if self.epsilon and self.kind == "cox":
            raise ValueError(
                "Newton terms of a Cox model with noise enough for differential privacy say nothing; set epsilon = 0"
            )
        if self.epsilon and self.times == "exact":
            raise ValueError(
                "noise hides counts, not the event times that times = 'exact' lets out; use times = 'grid'"
            )
        if self.times == "grid" and len(self.starts) > MOST_CELLS:
            raise ValueError(
                f"grid_months = {self.grid_months} makes {len(self.starts)} intervals, at most {MOST_CELLS} are asked for; widen it"
            )
        self._check_hidden()
        columns = [g.column for g in self.groupings]
        if len(set(columns)) < len(columns):
            raise ValueError(f"a column groups twice: {columns}")
        return self

    def _check_hidden(self) -> None:
        """Refuse what needs one hospital's own numbers, where totals alone are shown."""
        if not self.secure_sum:
            if self.secure_threshold:
                raise ValueError("secure_threshold is of sums under masks; set secure_sum = true, or leave it at 0")
            return
        if self.secure_threshold in (1, 2):
            raise ValueError(
                f"secure_threshold = {self.secure_threshold}: of two hospitals each would know the other's sums; set it to 3 or more, or to 0"
            )
        if self.times == "exact":
            raise ValueError(
                "times = 'exact' has every hospital name its event times, which are no sum; with secure_sum use times = 'grid', as fine as "
                "hospitals let it be (grid_months)"
            )
        named = [
            g for g in (self.group, *self.strata, *self.where, *self.test) if g and Grouping.parse(g).column == SITE
        ]
        if named:
            raise ValueError(
                f"{named[0]!r} sets hospitals apart, and the total of one hospital's patients is its own; with secure_sum leave it out"
            )

    @property
    def compared(self) -> tuple[Grouping, ...]:
        """The grouping of `group`; none without."""
        return (Grouping.parse(self.group),) if self.group else ()

    @property
    def stratified(self) -> tuple[Grouping, ...]:
        """Those of `strata`."""
        return tuple(map(Grouping.parse, self.strata))

    @property
    def groupings(self) -> tuple[Grouping, ...]:
        """All of them, the group first."""
        return self.compared + self.stratified

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns whose values a hospital must allow to be heard: those of groupings, filters and covariates with levels."""
        named = [g.column for g in (*self.groupings, *map(Grouping.parse, (*self.where, *self.test)))]
        named += [c.column for c in parse_covariates(self.covariates) if c.levels]
        return tuple(dict.fromkeys(column for column in named if column != SITE))

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the coefficients."""
        return input_names(self.covariates)

    @property
    def end(self) -> float:
        """Months at which follow-up ends; infinity without an end."""
        return self.horizon_months or (GRID_END if self.times == "grid" else float("inf"))

    @property
    def starts(self) -> np.ndarray:
        """Starts of the grid's intervals (start, next start] in months; the last one begins at the horizon and has no end."""
        count = max(1, int(np.ceil(self.end / self.grid_months - 1e-9)))
        return np.append(self.grid_months * np.arange(count), self.end)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Plan:
        """From flat keys, with the first mistake as a `ValueError` that names it."""
        try:
            return cls.model_validate(config)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            if first["type"] == "extra_forbidden":
                near = difflib.get_close_matches(where, cls.model_fields, 1)
                raise ValueError(
                    f"a plan has no key '{where}'" + (f"; did you mean '{near[0]}'?" if near else "")
                ) from None
            told = first["msg"].removeprefix("Value error, ")
            raise ValueError(f"{where}: {told} (got {first['input']!r})" if where else told) from None

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The inverse of `model_dump_json`."""
        return cls.from_config(json.loads(text))

    @classmethod
    def read(cls, text: str) -> Plan:
        """Of JSON, or of the TOML file that the text names."""
        if text.lstrip().startswith("{"):
            return cls.from_json(text)
        try:
            return cls.from_config(tomllib.loads(Path(text).read_text()))
        except (OSError, tomllib.TOMLDecodeError) as error:
            raise ValueError(f"plan = {text}: {error}") from None


class Grouping(Section):
    """Patients by the value of a clinical column; without levels, those that the sites hold."""

    column: str
    levels: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Grouping:
        """Raises `ValueError` on a column that names the patient or her outcome, or on levels that are empty or repeated."""
        column, sign, rest = (part.strip() for part in text.partition("="))
        if column in (SITE, CANCER):
            levels = tuple(level.strip() for level in rest.split("|")) if sign else ()
        elif sign and "|" not in rest:
            levels = (rest,)
            if not rest or column in OUTCOME:
                raise ValueError(f"{text!r} chooses nobody; write column=level, or column=level|level")
        else:
            levels = Covariate.parse(text).levels
        if "" in levels or len({level.lower() for level in levels}) < len(levels):
            raise ValueError(f"{text!r} needs different levels, as in 'sex=female|male'")
        return cls(column=column, levels=levels)
