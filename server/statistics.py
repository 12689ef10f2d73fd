"""The statistics phase: what the sites' sums fix before training: scale of genes and covariates, time grid, first baselines."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
from oncofed.common import wire
from oncofed.common.blocks import Sum
from oncofed.common.covariates import input_names
from oncofed.common.privacy.sharing import SHARED_BITS
from oncofed.common.saved import SavedModel
from oncofed.common.scaling import MIN_SD, POWERS, Scaling
from oncofed.common.sections import Task
from oncofed.common.survival import (
    PUBLIC_EDGES,
    YEAR,
    TimeGrid,
    baseline_on_grid,
    coarsen,
    initial_baseline,
    initial_log_baseline,
    on_grid,
)
from oncofed.common.tables import CLASSES, scale_prefix, sum_prefix, table_widths
from oncofed.server.inquiry import Inquiry
from oncofed.server.noise import in_months

log = logging.getLogger("oncofed.server")

PUBLIC_LOG_HAZARD = -np.log(60.0)
"""Where baselines begin that nobody's patients may set: one death in five years."""

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


def gather_statistics(inquiry: Inquiry, start: SavedModel | None = None) -> tuple[Frame, np.ndarray | None, FollowUp]:
    """Federated sums over training patients -> the frame, the first baselines of the study's loss, and follow-up by month.

    A model that the study starts from brings its own frame and baselines (None here). Under privacy nothing is asked without noise.
    """
    if inquiry.study.privacy.on:
        return private_statistics(inquiry, start)
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
    if start is not None:
        scales = start.scales
    elif study.panel.scale_by == "patient":
        scales = {m: Scaling.none(width) for m, width in widths.items()}
    elif study.panel.powers:
        scales = _with_powers(inquiry, scales, widths, count)
    grid = start.grid if start is not None else grid_of(study.task, total["events"])
    baseline = initial_log_baseline(coarsen(total["events"], grid), coarsen(total["exposure"], grid))
    first = initial_baseline(study.task.loss, total["events"], total["exposure"], grid).astype(np.float32)
    arrays = (covariate_scale(total) if start is None else saved_covariate_scale(start)) | (
        {CLASSES: total[CLASSES]} if classification else {}
    )
    for m, scale in scales.items():
        arrays |= scale.arrays(scale_prefix(m))
    return (
        Frame(arrays, grid),
        None if start is not None else first,
        FollowUp(total["events"], total["exposure"], baseline),
    )


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


def private_statistics(inquiry: Inquiry, start: SavedModel | None) -> tuple[Frame, np.ndarray | None, FollowUp]:
    """The frame of a study with privacy: of a public model, or of what needs no patients; baselines also from sums with noise.

    The question brings the panel to the sites, and counts who is there.
    """
    study, cancers = inquiry.study, len(inquiry.cancers)
    noised = study.privacy.statistics == "noised"
    edges = tuple(start.grid.starts) if start is not None else study.task.time_edges or tuple(PUBLIC_EDGES)
    shapes = dict.fromkeys(("events", "exposure"), (cancers, len(edges))) if noised else {}
    config: wire.Config = {"genes": inquiry.panel.lines, "edges": [float(e) for e in edges]}
    total = inquiry.add_up(wire.STATISTICS, config, None, shapes, bits=SHARED_BITS)
    if noised and study.privacy.sharing is not None:
        total = in_months(total)
    grid = TimeGrid(edges)
    flat = np.full((cancers, len(PUBLIC_EDGES)), 0.0)
    first: np.ndarray | None = np.full((cancers, len(grid)), PUBLIC_LOG_HAZARD)
    if study.task.loss == "weibull":
        first = np.tile([PUBLIC_LOG_HAZARD + np.log(YEAR), 0.0], (cancers, 1))
    if noised:
        events, exposure = np.maximum(total["events"], 0.0), np.maximum(total["exposure"], 1.0)
        if not study.task.time_edges and start is None:
            grid = TimeGrid.from_events(events.sum(0), study.task.intervals)
            events, exposure = coarsen(events, grid), coarsen(exposure, grid)
        first = on_grid(study.task.loss, events, exposure)
    elif start is not None:
        first = None
    if start is not None:
        arrays, scales = saved_covariate_scale(start), start.scales
        baseline = start.weights.get("head.log_baseline")
    else:
        arrays = {"covariate_mean": np.zeros(0), "covariate_sd": np.zeros(0)}
        scales = {m: Scaling.none(n) for m, n in table_widths(study, inquiry.beside, len(inquiry.panel)).items()}
        baseline = first
    if study.task.kind == "classification":
        arrays |= {CLASSES: np.ones(cancers)}
    for m, scale in scales.items():
        arrays |= scale.arrays(scale_prefix(m))
    told = flat[:, : len(grid)] if baseline is None else baseline_on_grid(study.task.loss, baseline, grid)
    return Frame(arrays, grid), None if first is None else first.astype(np.float32), FollowUp(flat, flat, told)


def saved_covariate_scale(start: SavedModel) -> Sum:
    """A saved model's mean and deviation of covariates, as they travel."""
    return {"covariate_mean": start.covariates[0], "covariate_sd": start.covariates[1]}


def covariate_scale(total: Sum) -> Sum:
    """`covariate_mean`, `covariate_sd` `[V]`; one that is nowhere known, or the same everywhere, gets 0 and 1."""
    n = np.maximum(total["covariate_n"], 1.0)
    mean = total["covariate_sum"] / n
    sd = np.sqrt(np.maximum(total["covariate_squares"] / n - np.square(mean), 0.0))
    return {"covariate_mean": mean, "covariate_sd": np.where(sd < MIN_SD, 1.0, sd)}
