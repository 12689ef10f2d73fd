"""Calibration at a horizon, and risk groups, both of whole risk bins.

Shapes: counts `[2, R, T]` of one table, its risk bins in any order (`table.in_rows` puts several cancer types together).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from oncofed.common.classical.life_table import Cells, LifeTable, kaplan_meier
from oncofed.common.evaluation.table import events_and_leaving
from oncofed.common.metrics import ratio


@dataclass(frozen=True, eq=False)
class Calibration:
    """Predicted and observed survival `[G]` at a horizon, in groups of rising predicted survival; NaN for what is unknown."""

    predicted: np.ndarray
    observed: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    patients: np.ndarray


def equal_groups(patients: np.ndarray, score: np.ndarray, groups: int = 5) -> np.ndarray:
    """Group 0 to at most `groups` - 1 of each risk bin `[R]`, in order of `score` `[R]`, with about equally many `patients` `[R]`.

    A risk bin belongs where its middle patient does. No group is without a bin, so that there may be fewer groups.
    """
    order = np.argsort(score, kind="stable")
    filled = np.maximum(patients[order], 0.0)
    total = filled.sum()
    middle = (np.cumsum(filled) - filled / 2) / total if total > 0 else (np.arange(len(order)) + 0.5) / len(order)
    owner = np.empty(len(order), dtype=np.intp)
    owner[order] = np.unique(np.minimum((middle * groups).astype(np.intp), groups - 1), return_inverse=True)[1]
    return owner


def halves(bins: int) -> np.ndarray:
    """Group 0 (low) or 1 (high) of each risk bin `[bins]`: the split at the training median, see `edges.risk_bins`."""
    return np.repeat([0, 1], bins // 2)


def calibration(
    counts: np.ndarray, survival: np.ndarray, time_edges: np.ndarray, until: int, groups: int = 5
) -> Calibration:
    """Mean predicted survival against Kaplan-Meier with its 95 % interval at the end of the first `until` bins.

    `survival` `[R, T - 1]` as for `scores.brier`. Groups are about equally large.
    """
    at_horizon, patients = survival[:, until - 1], counts.sum((0, 2))
    owner = equal_groups(patients, at_horizon, groups)
    events, leaving = events_and_leaving(counts, owner)
    of_group = np.eye(len(events))[owner].T
    n = of_group @ patients
    cells = Cells.grid([0.0, *time_edges])
    rows = [kaplan_meier(LifeTable("", cells, *row)) for row in zip(n.tolist(), events, leaving, strict=True)]
    observed, lower, upper = (np.array([getattr(r, k)[until - 1] for r in rows]) for k in ("value", "lower", "upper"))
    known = n > 0
    return Calibration(
        ratio(of_group @ (patients * at_horizon), n),
        np.where(known, observed, np.nan),
        np.where(known, lower, np.nan),
        np.where(known, upper, np.nan),
        n,
    )
