"""The one table that evaluation needs of a site: patients by cancer type, event, risk bin and time bin.

Each patient is in exactly one cell, so one patient more or less changes one count by one: noise for differential privacy
has sensitivity 1 for everything that is computed from the table.
Shapes: C cancer types, R risk bins, T time bins. Risks are log hazards (higher = earlier event), times are in months.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np


def risk_time_table(
    risk: np.ndarray,
    time: np.ndarray,
    event: np.ndarray,
    cancer: np.ndarray,
    risk_edges: np.ndarray,
    time_edges: np.ndarray,
) -> np.ndarray:
    """Counts `[C, 2, R, T]` (cancer type, event 0 or 1, risk bin, time bin), float64 as sums travel.

    Patients `[B]` each; `risk_edges` `[C, R - 1]`; `time_edges` `[T - 1]`. Bins are `(edge[b - 1], edge[b]]`, open at
    both ends.
    """
    risk_edges, time_edges = np.asarray(risk_edges, dtype=np.float64), np.asarray(time_edges, dtype=np.float64)
    counts = np.zeros((len(risk_edges), 2, risk_edges.shape[1] + 1, len(time_edges) + 1))
    risk, time, event = np.asarray(risk), np.asarray(time), np.asarray(event).astype(np.intp)
    cancer = np.asarray(cancer, dtype=np.intp)
    if not (np.isfinite(risk).all() and np.isfinite(time).all()):
        raise ValueError("risk and time must be finite; a patient without them must be left out before the table")
    if cancer.size and not 0 <= cancer.min() <= cancer.max() < len(counts):
        raise ValueError(
            f"cancer types must be 0 to {len(counts) - 1}, the rows of the risk edges; got {cancer.min()} to {cancer.max()}"
        )
    time_bin = np.searchsorted(time_edges, time, side="left")
    for c in np.unique(cancer):
        rows = cancer == c
        risk_bin = np.searchsorted(risk_edges[c], risk[rows], side="left")
        np.add.at(counts[c], (event[rows], risk_bin, time_bin[rows]), 1.0)
    return counts


@dataclass(frozen=True)
class RiskTimeTable:
    """Summed counts `[..., C, 2, R, T]` with the edges of their bins and the mean risk of the patients in each risk bin."""

    counts: np.ndarray
    risk_edges: np.ndarray  # [C, R - 1]
    time_edges: np.ndarray  # [T - 1]
    mean_risk: np.ndarray  # [C, R], of the training patients

    def __post_init__(self) -> None:
        C, two, R, T = self.counts.shape[-4:]
        shapes = (self.risk_edges.shape, self.time_edges.shape, self.mean_risk.shape)
        if two != 2 or shapes != ((C, R - 1), (T - 1,), (C, R)):
            raise ValueError(
                f"counts {self.counts.shape} want risk edges {(C, R - 1)}, time edges {(T - 1,)} and mean risk {(C, R)}; got {shapes}"
            )
        if (np.diff(self.risk_edges) <= 0).any() or (np.diff(self.time_edges) <= 0).any():
            raise ValueError("risk edges and time edges must increase strictly; make them with evaluation.edges")

    def __add__(self, other: RiskTimeTable) -> RiskTimeTable:
        """The table of both groups of patients; their edges must be the same."""
        same = np.array_equal(self.risk_edges, other.risk_edges) and np.array_equal(self.time_edges, other.time_edges)
        if not same:
            raise ValueError("tables can be added only on the same risk and time edges")
        return replace(self, counts=self.counts + other.counts)

    def of(self, cancers: Sequence[int]) -> RiskTimeTable:
        """The table of some cancer types, in the order given."""
        rows = np.asarray(cancers, dtype=np.intp)
        return RiskTimeTable(
            self.counts[..., rows, :, :, :], self.risk_edges[rows], self.time_edges, self.mean_risk[rows]
        )

    def until(self, horizon: float) -> int:
        """Number of time bins up to a horizon in months, which must be one of the edges."""
        found = np.flatnonzero(np.isclose(self.time_edges, horizon))
        if not found.size:
            known = ", ".join(f"{t:g}" for t in self.time_edges)
            raise ValueError(
                f"horizon {horizon:g} months is not an edge of the time bins ({known}); name it as a horizon before evaluation"
            )
        return int(found[0]) + 1

    @property
    def patients(self) -> np.ndarray:
        """Patients `[..., C]`."""
        return self.counts.sum((-3, -2, -1))


def in_rows(values: np.ndarray, axis: int) -> np.ndarray:
    """Merge the axis of cancer types, `axis` from the end, into the risk bins: `[..., C, 2, R, T]` -> `[..., 2, C * R, T]`.

    With `axis=-4` for counts and `axis=-3` for values `[..., C, R, T]`: all cancer types together, each risk bin of
    each a row of its own. The rows are in no order of risk; `concordance.by_score` puts them in order.
    """
    moved = np.moveaxis(values, axis, -3)
    return moved.reshape(*moved.shape[:-3], -1, moved.shape[-1])


def events_and_leaving(
    counts: np.ndarray, owner: np.ndarray | None = None, groups: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Events, and all who leave with an event or without, `[..., G, T]` each, of groups of whole risk bins.

    `counts` `[..., 2, R, T]`; `owner` `[R]` says to which group 0 to G - 1 a risk bin belongs, of `groups` in all (by default the last is the highest that is there). Without `owner`,
    everybody is in one group and both are `[..., T]`. They are what `classical.life_table` takes.
    """
    if owner is None:
        events, leaving = counts[..., 1, :, :].sum(-2), counts.sum((-3, -2))
        return events, leaving
    member = np.eye(groups or int(owner.max()) + 1)[owner].T  # [G, R]
    return member @ counts[..., 1, :, :], member @ counts.sum(-3)
