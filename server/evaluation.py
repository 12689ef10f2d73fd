"""What a fold's held-out patients say of its model: one table of risk and time that the sites' tables add up to.

Shapes: C cancer types, R risk bins, T time bins. Edges and predictions rest on training patients alone.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from oncofed.common import wire
from oncofed.common.blocks import Sum, part, under
from oncofed.common.evaluation.edges import bins_for, noisy_time_bins, risk_bins, time_bins
from oncofed.common.evaluation.scores import predicted_survival
from oncofed.common.survival import TimeGrid
from oncofed.server.aggregate import STATISTICS_BITS, Accumulator
from oncofed.server.checkpoint import load_arrays, save_arrays
from oncofed.server.inquiry import Inquiry
from oncofed.server.roster import NotEnoughSites
from oncofed.server.secure_sum import Shapes
from oncofed.server.statistics import FollowUp, Frame

log = logging.getLogger("oncofed.server")


@dataclass(frozen=True)
class FoldTable:
    """One fold's table `counts [C, 2, R, T]` and pairs within sites `pairs [2, C]` (common/metrics.py, `pair_table`).

    `survival [C, R, T - 1]` is what the model predicts for a patient of each risk bin at the time edges, `null [C, 1, T - 1]`
    what the training patients of her cancer type together would. `sites` has each site's own `table` and `pairs`, or nothing of
    each where the server sees the total alone.
    """

    counts: np.ndarray
    pairs: np.ndarray
    time_edges: np.ndarray
    mean_risk: np.ndarray
    survival: np.ndarray
    null: np.ndarray
    sites: dict[str, Sum]

    def save(self, file: Path) -> None:
        """Write it for a report that is drawn later."""
        arrays = {k: getattr(self, k) for k in ("counts", "pairs", "time_edges", "mean_risk", "survival", "null")}
        for i, sums in enumerate(self.sites.values()):
            arrays |= under(f"site-{i}/", sums)
        save_arrays(file, arrays, {"sites": list(self.sites)})

    @classmethod
    def load(cls, file: Path) -> FoldTable:
        arrays, about = load_arrays(file)
        sites = {site: part(f"site-{i}/", arrays) for i, site in enumerate(about["sites"])}
        return cls(**{k: v for k, v in arrays.items() if "/" not in k}, sites=sites)


def table_file(out: Path, fold: int) -> Path:
    """Where a fold's table lies."""
    return out / "evaluation" / f"fold-{fold}.safetensors"


def gather_table(
    inquiry: Inquiry, frame: Frame, weights: Sum, explanation: Sum, follow_up: FollowUp
) -> FoldTable | None:
    """Ask the sites for the table of a finished model; None where nobody lets it out, with the reasons in the log.

    `explanation` has the training patients' risks and the baselines that fit them. With noise there are fewer bins, where it harms
    least (common/evaluation/edges.py).
    """
    wanted = inquiry.study.evaluation
    if "risk_counts" not in explanation:
        return None
    risk, times, c = wanted.risk_bins, wanted.time_bins, len(inquiry.cancers)
    if wanted.epsilon:
        noises = len(inquiry.roster.hellos)
        # each is held out in one fold, and half of epsilon is the table's
        patients = float(explanation["risk_counts"].sum()) / c / max(inquiry.study.splits.folds - 1, 1)
        risk = times = min(bins_for(patients, wanted.epsilon / 2, noises), risk, times)
        time_edges = noisy_time_bins(
            follow_up.events,
            follow_up.exposure,
            times,
            wanted.horizons,
            patients=patients,
            risk_bins=risk,
            epsilon=wanted.epsilon / 2,
            noises=noises,
        )
    else:
        time_edges = time_bins(follow_up.events, times, wanted.horizons)
    risk_edges, mean_risk = risk_bins(explanation["risk_counts"], risk)
    asked = {"evaluation/risk_edges": risk_edges, "evaluation/time_edges": time_edges}
    shapes = {"table": (c, 2, risk, len(time_edges) + 1), "pairs": (2, c)}
    arrays = frame.arrays | under("weights/", weights) | asked
    sums, sites = _tables(inquiry, frame.config | {"table": True}, arrays, shapes)
    if not sites:
        log.warning("fold %d: no site lets a table of risk and time out; there is no pooled evaluation", inquiry.fold)
        return None
    grid = TimeGrid(frame.grid.starts)
    survival = predicted_survival(mean_risk, explanation["log_baseline"], grid, time_edges)
    null = predicted_survival(np.zeros((c, 1)), follow_up.log_baseline, grid, time_edges)
    ordered = {site: sites[site] for site in sorted(sites)}
    return FoldTable(sums["table"], sums["pairs"], time_edges, mean_risk, survival, null, ordered)


def _tables(inquiry: Inquiry, config: wire.Config, arrays: Sum, shapes: Shapes) -> tuple[Sum, dict[str, Sum]]:
    """The sum of the sites' tables, and each site's own; of a sum under masks the sites' names alone."""
    if inquiry.study.privacy.secure_sum:
        try:
            summed = inquiry.add_under_masks(wire.EVALUATE, config, arrays, shapes)
        except NotEnoughSites as error:  # what is measured of a model must not cost the model
            log.warning("fold %d: no pooled evaluation: %s", inquiry.fold, error)
            return {}, {}
        return summed.total, {answer.site: {} for answer in summed.answers}
    total, sites = Accumulator(shapes, STATISTICS_BITS), {}
    for answer in inquiry.ask(wire.EVALUATE, config, arrays):
        try:
            total.add(answer.arrays, answer.site)
            sites[answer.site] = {k: np.array(v) for k, v in answer.arrays.items()}
        except ValueError as error:
            inquiry.roster.leave_out(answer.site, wire.EVALUATE, 0, str(error))
    return total.total(), sites


def load_tables(out: Path, folds: list[dict[str, Any]]) -> list[FoldTable]:
    """The tables of those folds that have one."""
    files = [table_file(out, f["fold"]) for f in folds if f["fold"] >= 0]
    return [FoldTable.load(file) for file in files if file.exists()]
