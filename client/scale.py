"""Sums of a cohort from which the federation's scales are made, and the lens through which patients are then seen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from oncofed.client.batch import Lens
from oncofed.client.data.cohort import Cohort
from oncofed.common.blocks import Sum, under
from oncofed.common.modalities import PATHOLOGY, Beside
from oncofed.common.scaling import Scaling, groups, moments, power_moments
from oncofed.common.study import Study
from oncofed.common.survival import TimeGrid
from oncofed.common.tables import sum_prefix

Cells = dict[str, np.ndarray]
"""Patients of each group who have a number, as they broadcast against the arrays of a sum: small cells are withheld at the door."""


def moment_sums(cohort: Cohort, names: Iterable[str], count: int) -> tuple[Sum, Cells]:
    """First moments of each table's numbers over `count` groups: one for all patients, or one a cancer type."""
    group = groups(cohort.cancer, count > 1)
    return _named({name: moments(cohort.table(name), group, count) for name in names})


def power_sums(cohort: Cohort, names: Iterable[str], count: int, scales: Mapping[str, Scaling]) -> tuple[Sum, Cells]:
    """Moments of the candidate powers of each table's numbers, standardised by `scales`."""
    group = groups(cohort.cancer, count > 1)
    return _named({name: power_moments(cohort.table(name), group, scales[name]) for name in names})


def _named(by_table: Mapping[str, Sum]) -> tuple[Sum, Cells]:
    """The sums of several tables as one, each behind its table's prefix, and the patients behind each."""
    total: Sum = {}
    cells: Cells = {}
    for name, sums in by_table.items():
        total |= under(sum_prefix(name), sums)
        behind = {k: sums["n"] if v.ndim == 2 else sums["n"][:, None] for k, v in sums.items()}
        cells |= under(sum_prefix(name), behind)
    return total, cells


def lens_of(
    study: Study,
    beside: Beside,
    scales: Mapping[str, Scaling],
    covariates: tuple[np.ndarray, np.ndarray],
    grid: TimeGrid,
) -> Lens:
    """The lens of a study whose sites agreed on `beside`."""
    bags = PATHOLOGY in study.modalities and beside.image_kind == "bag"
    return Lens(scales, covariates, grid, beside.image_width if bags else 0, study.fusion.tiles, study.ranked)
