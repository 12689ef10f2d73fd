"""The statistics phase: what the sites' sums fix before training: scale of genes and covariates, time grid, first baselines."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
from oncofed.common import wire
from oncofed.common.blocks import Sum
from oncofed.common.covariates import input_names
from oncofed.common.scaling import MIN_SD, POWERS, Scaling
from oncofed.common.sections import Task
from oncofed.common.survival import PUBLIC_EDGES, TimeGrid, coarsen, initial_baseline, initial_log_baseline
from oncofed.common.tables import CLASSES, scale_prefix, sum_prefix, table_widths
from oncofed.server.inquiry import Inquiry

log = logging.getLogger("oncofed.server")

POWER_BITS = 20
"""Resolution 1e-6 of sums of powers, which reach further than others: up to 4.4e12 in total."""


@dataclass(frozen=True)
class Frame:
    """How every site looks at patients in a fold: `arrays` (scaling, covariate mean and deviation, in a classification the
    patients of each class) and the time grid."""

    arrays: Sum
    grid: TimeGrid

    @property
    def config(self) -> wire.Config:
        return {"grid": list(self.grid.starts)}


@dataclass(frozen=True)
class FollowUp:
    """Training patients' `events` and months of `exposure` `[C, public intervals]`, and the `log_baseline [C, K]` of both on the grid."""

    events: np.ndarray
    exposure: np.ndarray
    log_baseline: np.ndarray


def gather_statistics(inquiry: Inquiry) -> tuple[Frame, np.ndarray, FollowUp]:
    """Federated sums over training patients -> the frame, the first baselines of the study's loss, and follow-up by month."""
    study, cancers = inquiry.study, len(inquiry.cancers)
    widths = table_widths(study, inquiry.beside, len(inquiry.panel))
    count = cancers if study.scale_by_cancer else 1
    covariates, edges = len(input_names(study.panel.covariates)), len(PUBLIC_EDGES)
    shapes: dict[str, tuple[int, ...]] = {}
    for m, width in widths.items():
        shapes |= {sum_prefix(m) + k: (count, width) for k in ("n", "sum", "squares")}
    shapes |= {f"covariate_{k}": (covariates,) for k in ("n", "sum", "squares")}
    shapes |= {"events": (cancers, edges), "exposure": (cancers, edges)}
    classification = study.task.kind == "classification"
    shapes |= {CLASSES: (cancers,)} if classification else {}
    total = inquiry.add_up(wire.STATISTICS, {"genes": inquiry.panel.lines}, None, shapes)
    scales = {}
    for m in widths:
        sums = {k: total[sum_prefix(m) + k] for k in ("n", "sum", "squares")}
        empty = int((sums["n"].sum(0) == 0).sum())
        if empty:
            log.warning("fold %d: %d numbers of %s have no value at any site and stay at 0", inquiry.fold, empty, m)
        scales[m] = Scaling.from_moments(sums)
    if study.panel.powers:
        scales = _with_powers(inquiry, scales, widths, count)
    grid = grid_of(study.task, total["events"])
    baseline = initial_log_baseline(coarsen(total["events"], grid), coarsen(total["exposure"], grid))
    first = initial_baseline(study.task.loss, total["events"], total["exposure"], grid).astype(np.float32)
    arrays = covariate_scale(total) | ({CLASSES: total[CLASSES]} if classification else {})
    for m, scale in scales.items():
        arrays |= scale.arrays(scale_prefix(m))
    return Frame(arrays, grid), first, FollowUp(total["events"], total["exposure"], baseline)


def _with_powers(
    inquiry: Inquiry, scales: dict[str, Scaling], widths: dict[str, int], count: int
) -> dict[str, Scaling]:
    """The second question of the statistics: which power makes each number of a table symmetric."""
    shapes: dict[str, tuple[int, ...]] = {}
    for m, width in widths.items():
        shapes |= {sum_prefix(m) + k: (count, width) for k in ("n", "log_jacobian")}
        shapes |= {sum_prefix(m) + k: (count, len(POWERS), width) for k in ("power_sum", "power_squares")}
    sent: Sum = {}
    for m, scale in scales.items():
        sent |= scale.arrays(scale_prefix(m))
    total = inquiry.add_up(wire.STATISTICS, {"powers": True}, sent, shapes, bits=POWER_BITS)
    keys = ("n", "log_jacobian", "power_sum", "power_squares")
    return {m: scale.with_powers({k: total[sum_prefix(m) + k] for k in keys}) for m, scale in scales.items()}


def grid_of(task: Task, events: np.ndarray) -> TimeGrid:
    """The study's own time edges, or intervals of equal events, from events by cancer type on `PUBLIC_EDGES`."""
    return TimeGrid(task.time_edges) if task.time_edges else TimeGrid.from_events(events.sum(0), task.intervals)


def covariate_scale(total: Sum) -> Sum:
    """`covariate_mean`, `covariate_sd` `[V]`; one that is nowhere known, or the same everywhere, gets 0 and 1."""
    n = np.maximum(total["covariate_n"], 1.0)
    mean = total["covariate_sum"] / n
    sd = np.sqrt(np.maximum(total["covariate_squares"] / n - np.square(mean), 0.0))
    return {"covariate_mean": mean, "covariate_sd": np.where(sd < MIN_SD, 1.0, sd)}
