"""Patients as a classical analysis sees them: follow-up, covariates, group and stratum, from the clinical table alone.

Shapes: N patients, P covariate inputs.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from oncofed.client.data.cohort import clinical_by_patient, encode_covariates
from oncofed.client.data.read import as_text
from oncofed.client.data.site import SiteFolder
from oncofed.client.disclosure import shown
from oncofed.common.covariates import parse_covariates
from oncofed.common.errors import Refusal
from oncofed.common.plan import SITE, Grouping, Plan

log = logging.getLogger("oncofed.client")

Levels = Mapping[str, Sequence[str]]
"""The agreed levels of each grouping's column, in order."""

CODES = 5
"""A covariate with so few different numbers holds codes: who has a rare one is not shown, as of a level."""


@dataclass(frozen=True)
class Outcomes:
    """Those patients of a site whom an analysis includes: times in months, events 0 or 1, group and stratum by number."""

    patient: np.ndarray
    time: np.ndarray
    event: np.ndarray
    x_NP: np.ndarray
    group: np.ndarray
    stratum: np.ndarray

    def __len__(self) -> int:
        return len(self.patient)

    @classmethod
    def read(cls, site: SiteFolder, plan: Plan, levels: Levels, least: int, *, test: bool = False) -> Outcomes:
        """Patients whom `where` (and not `test`, or, with `test`, that as well) chooses and of whom all is known that is asked.

        Nobody shows whom fewer than `least` others are like. Raises `Refusal` where nobody is left, in the same words whether
        nobody was there or too few; with `least` 0, where noise covers everything, nobody is an answer too.
        """
        table = chosen(site, plan, test=test)
        for c in parse_covariates(plan.covariates):
            if c.column not in table.columns:
                raise Refusal(
                    f"site {site.name}: no clinical column '{c.column}', which the analysis takes as a covariate; add it, or leave it out"
                )
            if not c.levels and pd.to_numeric(table[c.column], errors="coerce").isna().all() and len(table):
                raise Refusal(
                    f"site {site.name}: the covariate '{c.column}' holds no number; where it has levels name them: '{c.column}=a|b'"
                )
        time = pd.to_numeric(table["time"], errors="coerce") * site.description.months_per_unit
        event = pd.to_numeric(table["event"], errors="coerce")
        x = encode_covariates(table, plan.covariates, site.name, np.float64)
        group = _number(table, plan.compared, levels, site.name)
        stratum = _number(table, plan.stratified, levels, site.name)
        usable = (time >= 0).to_numpy() & event.isin([0, 1]).to_numpy() & ~np.isnan(x).any(axis=1)
        usable &= (group >= 0) & (stratum >= 0)
        if (~usable).any():
            log.warning("%s: %d of %d patients lack a value of the analysis", site.name, (~usable).sum(), len(usable))
        patient = table.index.to_numpy(dtype=str)
        alike = [group * (stratum.max(initial=0) + 1) + stratum, *_rare(x, plan)]
        # whoever lacks a value, or is of another level, counts among those left out, who are never few
        kept = np.flatnonzero(shown(alike, patient, least, usable))
        if least and not len(kept):
            raise Refusal(
                f"site {site.name}: nobody to show in this analysis: no patients, or fewer of a kind than its policy wants; its own log has "
                "the count, `oncofed site check` the columns"
            )
        t, e = time.to_numpy(dtype=np.float64), event.to_numpy(dtype=np.float64)
        return cls(patient[kept], t[kept], e[kept], x[kept], group[kept], stratum[kept])


def chosen(site: SiteFolder, plan: Plan, *, test: bool = False) -> pd.DataFrame:
    """Rows of the clinical table, by patient, whom the plan's filters choose."""
    table = clinical_by_patient(site, outcome=True)
    keep = np.ones(len(table), dtype=bool)
    for text in plan.where:
        keep &= _matches(table, Grouping.parse(text), site.name)
    if plan.test:
        tested = np.all([_matches(table, Grouping.parse(text), site.name) for text in plan.test], axis=0)
        keep &= tested if test else ~tested
    return table[keep]


def held_levels(site: SiteFolder, plan: Plan, least: int) -> list[str]:
    """Lines `column<TAB>level` of what a site's patients are, where the plan leaves it open; levels of few are not told."""
    lines = []
    table = chosen(site, plan)
    for grouping in plan.groupings:
        if grouping.column == SITE or grouping.levels:
            continue
        count = _text(table, grouping.column, site.name).value_counts()
        lines += [f"{grouping.column}\t{level}" for level in sorted(count.index[count >= least])]
    return lines


def _number(table: pd.DataFrame, groupings: Sequence[Grouping], levels: Levels, site: str) -> np.ndarray:
    """The number of each patient's combination of levels `[N]`, the last grouping counting fastest; -1 where one is unknown."""
    number = np.zeros(len(table), dtype=np.int64)
    for grouping in groupings:
        named = [level.lower() for level in levels[grouping.column]]
        if grouping.column == SITE:
            index = np.full(len(table), named.index(site.lower()) if site.lower() in named else -1)
        else:
            text = _text(table, grouping.column, site).str.lower()
            index = text.map({level: i for i, level in enumerate(named)}).fillna(-1).to_numpy(dtype=np.int64)
        number = np.where((number < 0) | (index < 0), -1, number * len(named) + index)
    return number


def _rare(x_NP: np.ndarray, plan: Plan) -> list[np.ndarray]:
    """Who is alike in each covariate with levels: one grouping `[N]` each."""
    out, at = [], 0
    for c in parse_covariates(plan.covariates):
        width = len(c.inputs)
        part = x_NP[:, at : at + width]
        # a column of a few values is one with levels, however it is written
        if c.levels or len(np.unique(part[~np.isnan(part)])) <= CODES:
            out.append(np.nan_to_num(part) @ (1 + np.arange(width)))
        at += width
    return out


def _matches(table: pd.DataFrame, grouping: Grouping, site: str) -> np.ndarray:
    if grouping.column == SITE:
        return np.full(len(table), site.lower() in [level.lower() for level in grouping.levels])
    text = _text(table, grouping.column, site).str.lower()
    return text.isin([level.lower() for level in grouping.levels]).to_numpy(dtype=bool, na_value=False)


def _text(table: pd.DataFrame, column: str, site: str) -> pd.Series:
    if column not in table.columns:
        raise Refusal(
            f"site {site}: no clinical column '{column}', which the analysis groups by; add it, or leave it out"
        )
    text = as_text(table[column]).str.strip()
    return text.where(text != "")
