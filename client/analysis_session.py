"""One message of a classical analysis at a site: the request, the patients as the plan sees them, and their cells of time."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil, prod
from pathlib import Path

import numpy as np
from flwr.app import RecordDict
from oncofed.client.admission import Admission
from oncofed.client.data.cohort import fingerprint
from oncofed.client.data.outcomes import Outcomes
from oncofed.client.data.site import SiteFolder
from oncofed.client.disclosure import Runs, spread_cells
from oncofed.client.policy import Policy
from oncofed.client.release import Door, Release
from oncofed.client.resident import Resident
from oncofed.client.secure_sum import SecureSums
from oncofed.common import wire
from oncofed.common.blocks import Sum, digests
from oncofed.common.classical.life_table import Cells
from oncofed.common.classical.risk_sets import exact_cells, grid_cells
from oncofed.common.errors import Refusal
from oncofed.common.files import write_text
from oncofed.common.plan import Grouping, Plan
from oncofed.common.privacy.accounting import Mechanism
from oncofed.common.signed_study import identity_text
from oncofed.common.sum_coding import ANALYSIS_BITS, Form

LARGEST = 1e6
"""A standardised covariate beyond this is none."""

MOST_GROUPS = 500
"""Combinations of levels: tables have a row for each, whoever is here."""

NOISED = "table"
"""The step of a plan with epsilon whose counts get noise."""

TESTED = ("pairs", "scores")
"""Steps about the plan's test patients."""


@dataclass(frozen=True)
class AnalysisSession:
    """A validated request of a classical analysis at a site."""

    ask: wire.Config
    arrays: Sum
    plan: Plan
    site: SiteFolder
    work: Path
    resident: Resident
    policy: Policy

    @classmethod
    def of(
        cls, content: RecordDict, site: SiteFolder, work: Path, resident: Resident, own_device: str, policy: Policy
    ) -> AnalysisSession:
        """Read a request, whose form is checked; raises `Refusal` on a plan that is not valid here."""
        ask = wire.read_config(content, "ask")
        try:
            plan = Plan.from_json(str(ask["plan_json"]))
        except RecursionError:
            raise Refusal(
                f"site {site.name}: the plan in the message is not valid here: it is nested too deep"
            ) from None
        except (ValueError, KeyError, TypeError) as error:
            raise Refusal(f"site {site.name}: the plan in the message is not valid here: {error}") from None
        return cls(ask, wire.read_arrays(content), plan, site, work, resident, policy)

    def admit(self, door: Door, kind: str) -> None:
        """Refuse what the site's policy does not allow, and keep the plan's text beside the log that names its digest."""
        signature = str(self.ask.get("signature", ""))
        Admission(self.site.name, self.policy, self.site.path, door.simulated).plan(kind, self.plan, signature)
        if self.plan.secure_sum:
            self._check_place()
            door.masks.append(lambda total: self._under_masks(total, forget=door.simulated))
        if self.plan.epsilon and self.step == NOISED:
            door.expect(self._release())
        file = door.log.parent / "plans" / f"{self.stamp['plan']}.json"
        if not file.exists():
            write_text(file, self.plan.model_dump_json(indent=1))

    def _release(self) -> Release:
        """The plan's one table with noise: asked again, the hospital gives the very same answer."""
        about = f"{self.plan.name} {self.stamp['plan']}"
        cost = (Mechanism("pure", self.plan.epsilon),)
        return Release(
            f"analysis {about}/{self.step}",
            self._asked,
            about,
            f"{wire.ANALYSE} {about} {self.step}",
            cost,
            (self.plan.epsilon, self.policy.delta_budget),
        )

    @property
    def _asked(self) -> str:
        """A digest of all that was asked: the plan, the request and every number in it. Every site that is asked alike has it."""
        asked = sorted((k, v) for k, v in self.ask.items() if k not in ("plan_json", "signature", "package"))
        return _digest([wire.ANALYSE, identity_text(self.plan), asked, digests(self.arrays)])

    @property
    def step(self) -> str:
        return str(self.ask.get("step", ""))

    @property
    def stamp(self) -> wire.Config:
        """What every answer repeats, so that the server can refuse an answer to another question; the plan by its digest, for the log."""
        digest = hashlib.sha256(identity_text(self.plan).encode()).hexdigest()[:16]
        return {"analysis": self.plan.name, "plan": digest, "step": self.step, "round": int(self.ask.get("round", 0))}  # type: ignore[arg-type]

    # -- under masks ---------------------------------------------------------------------------------------------------

    @property
    def place(self) -> int:
        """The number of the question among those of its step, from 1."""
        return int(self.ask.get("place", 0))  # type: ignore[arg-type]

    def _check_place(self) -> None:
        """Refuse more questions of a step than the plan has."""
        most = {"greeting": 0, "moments": 2, "cox": self.plan.steps}.get(self.step, 1)
        if not min(most, 1) <= self.place <= most:
            raise Refusal(
                f"site {self.site.name}: question {self.place} of '{self.step}', the plan has {most}; each has one total under masks"
            )

    def _under_masks(self, total: Sum, *, forget: bool) -> wire.Config:
        """Keep a sum that may leave for the exchanges that add it to the others' under masks; what the answer says of it.

        All totals of an analysis are of the same hospitals, those of its test patients apart.
        """
        plan, step = self.stamp["plan"], self.step
        text = identity_text(self.plan)
        # moments come in whatever units first: no fixed point would hold them
        form: Form = "exact" if (step, self.place) == ("moments", 1) else "fine"
        sums = SecureSums(self.work, self.site.path, self.site.name, self.policy.min_members)
        return sums.begin(
            self._asked,
            _digest([wire.ANALYSE, text, step, self.place]),
            f"analysis {self.plan.name} {plan}",
            {name: value.astype(np.float64) for name, value in total.items()},
            ANALYSIS_BITS,
            self.plan.secure_threshold,
            form=form,
            series=_digest([wire.ANALYSE, text, step in TESTED]),
            forget=forget,
        )

    # -- patients ------------------------------------------------------------------------------------------------------

    @property
    def levels(self) -> dict[str, list[str]]:
        """The agreed levels by column, from lines `column<TAB>level`."""
        out: dict[str, list[str]] = {}
        for line in self.ask.get("levels", []):  # type: ignore[union-attr]
            column, _, level = str(line).partition("\t")
            out.setdefault(column, []).append(level)
        return out

    @property
    def numbers(self) -> int:
        """Patients who could be solved for of all sums that questions have in a cell.

        A Newton step tells 1 + P + P (P + 1) / 2 sums of a run whose patients have P numbers each.
        """
        if self.plan.kind != "cox":
            return 2
        p = len(self.plan.inputs)
        return ceil(self.policy.max_newton_steps * (1 / p + 1 + (p + 1) / 2))

    @cached_property
    def outcomes(self) -> Outcomes:
        least = 0 if self.plan.epsilon else self.policy.least(self.numbers)  # with noise no group is too small
        test = self.step in TESTED
        key = fingerprint(self.site), self.plan, str(self.levels), least, test
        return self.resident.outcomes(
            self.work, key, lambda: Outcomes.read(self.site, self.plan, self.levels, least, test=test)
        )

    @cached_property
    def cells(self) -> Cells:
        """The agreed cells of time."""
        if self.plan.times == "grid":
            return Cells.grid(self.plan.starts)
        times = self.arrays.get("times", np.zeros(0))
        if times.ndim != 1:
            raise Refusal(f"site {self.site.name}: 'times' must be a row of times, got shape {times.shape}")
        return Cells.exact(times)

    @cached_property
    def event(self) -> np.ndarray:
        """Events `[N]` before follow-up ends."""
        return np.where(self.outcomes.time > self.plan.end, 0.0, self.outcomes.event)

    @cached_property
    def runs(self) -> Runs | None:
        """Cells of time taken together where they hold few patients; None where no rule asks for it."""
        o = self.outcomes
        if not self.coarsened:
            return None
        cell = grid_cells(o.time, self.cells.starts)
        alike, least, last = self.alike, self.policy.least(self.numbers), len(self.cells) - 1
        # whoever outlives the horizon leaves at it, and nobody else seems to, where there are enough of both
        beyond = cell == last
        after, before = (np.bincount(alike, which)[alike] for which in (beyond, ~beyond))
        cell = np.where(beyond & (after < least), last - 1, cell)
        apart = np.where((cell == last) & (before >= least), alike.max(initial=0) + 1 + alike, alike)
        runs = spread_cells(cell, self.event, apart, o.patient, least)
        return replace(runs, group=runs.group % (alike.max(initial=0) + 1))

    @property
    def coarsened(self) -> bool:
        """Whether cells of time must not hold few patients: not with noise, nor with exact times, which the site has allowed."""
        return self.plan.times == "grid" and not self.plan.epsilon and self.policy.min_cell > 1

    @cached_property
    def cell(self) -> np.ndarray:
        """The last cell of time `[N]` in which each patient is at risk."""
        o = self.outcomes
        if self.plan.times == "exact":
            return exact_cells(np.minimum(o.time, self.plan.end), self.event, self.cells.starts)
        return grid_cells(o.time, self.cells.starts) if self.runs is None else self.runs.cell

    @property
    def coarse(self) -> wire.Config:
        """What the coordinator is told of disclosure control here: the rule, not whom it met."""
        return {"merged": self.coarsened}

    @property
    def groups(self) -> int:
        """How many groups are compared."""
        return self._combinations(self.plan.compared)

    @property
    def strata(self) -> int:
        return self._combinations(self.plan.stratified)

    def _combinations(self, groupings: tuple[Grouping, ...]) -> int:
        count = prod(len(self.levels.get(g.column, [])) for g in groupings)
        if count > MOST_GROUPS:
            raise Refusal(
                f"site {self.site.name}: {count} groups are compared or kept apart, at most {MOST_GROUPS} are"
            )
        return count

    @cached_property
    def alike(self) -> np.ndarray:
        """The number of each patient's stratum and group together `[N]`."""
        return self.outcomes.stratum * self.groups + self.outcomes.group

    def array(self, name: str, *shape: int) -> np.ndarray:
        """An array of the message; raises `Refusal` unless it is there, has the shape, and is finite: another shape would be spread over patients."""
        value = self.arrays.get(name)
        if value is None or value.shape != shape or not np.isfinite(value).all():
            seen = "none" if value is None else f"shape {value.shape}"
            raise Refusal(
                f"site {self.site.name}: '{self.step}' wants finite numbers '{name}' of shape {shape}, got {seen}"
            )
        return value.astype(np.float64)

    @cached_property
    def scaled(self) -> np.ndarray:
        """Covariates on the federation's scale `[N, P]`."""
        width = len(self.plan.inputs)
        mean, sd = self.array("mean", width), self.array("sd", width)
        with np.errstate(all="ignore"):
            x = (self.outcomes.x_NP - mean) / sd
        # the first moments are asked before there is a scale, in whatever units
        most = np.inf if self.step == "moments" else LARGEST
        if (sd <= 0).any() or not (np.abs(x) < most).all() or (np.abs(mean) > most * sd).any():
            raise Refusal(f"site {self.site.name}: 'mean' and 'sd' do not bring its covariates to one scale")
        return x

    @cached_property
    def beta(self) -> np.ndarray:
        """The coefficients of the message `[P]`, on that scale."""
        return self.array("beta", len(self.plan.inputs))

    @property
    def risk(self) -> np.ndarray:
        """Log hazards `[N]` by the coefficients of the message."""
        return self.scaled @ self.beta

    @property
    def died(self) -> tuple[frozenset[str], ...]:
        """Those who had the event before follow-up ends, by group and stratum."""
        return tuple(self._names((self.alike == g) & (self.event == 1)) for g in np.unique(self.alike))

    @property
    def grid(self) -> str:
        """How fine times are told, in words; empty with exact times."""
        return f"{self.plan.grid_months!r} months" if self.plan.times == "grid" else ""

    @property
    def everybody(self) -> tuple[frozenset[str], ...]:
        return (self._names(np.ones(len(self.outcomes), dtype=bool)),)

    def _names(self, rows: np.ndarray) -> frozenset[str]:
        return frozenset(self.outcomes.patient[rows].tolist())


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
