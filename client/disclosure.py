"""Disclosure control: which patients may show in a table, and how fine its axis of time may be.

Both are settled before a sum is taken, so that all questions of one analysis rest on the same patients; the door
(release.py) holds every table against the same bound once more.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq


def shown(
    groups: Sequence[np.ndarray], patients: np.ndarray, least: int, usable: np.ndarray | None = None
) -> np.ndarray:
    """Who may show `[N]` booleans: of the `usable`, nobody of a group of fewer than `least` in any of the groupings `[N]` each.

    Complementary suppression: patients who are left out are never so few that they could be had as a difference from the
    site's whole. Where they are, others join them, by a digest of their names: the same ones in every analysis.
    """
    keep = np.ones(len(patients), dtype=bool) if usable is None else usable.copy()
    if least <= 1 or not len(patients):
        return keep
    order = np.argsort(_by_digest(patients))
    while True:
        before = keep.sum()
        for group in groups:
            values, index = np.unique(group, return_inverse=True)
            size = np.bincount(index[keep], minlength=len(values))
            keep &= size[index] >= least
        out = len(keep) - keep.sum()
        if 0 < out < least:
            rest = order[keep[order]]
            keep[rest[: least - out]] = False
        if keep.sum() < least:
            return np.zeros(len(keep), dtype=bool)
        if keep.sum() == before:
            return keep


@dataclass(frozen=True)
class Runs:
    """Neighbouring cells of time taken together: for each patient her `cell [N]` and `run [N]`; of each run its `low` and `high`
    cell, its `group`, `[R]` each, and the `share` of each of its cells.

    Cells are spread over a run: of a run its ends leave, its mean, and how many died.
    """

    cell: np.ndarray
    run: np.ndarray
    low: np.ndarray
    high: np.ndarray
    group: np.ndarray
    share: tuple[np.ndarray, ...]

    @property
    def shared(self) -> np.ndarray:
        """Patients `[N]` in each patient's run."""
        return np.bincount(self.run, minlength=len(self.low))[self.run]

    def worth(self, weight: np.ndarray) -> np.ndarray:
        """How many patients `[R]` the weights `[N]` of each run amount to: (sum w)^2 / sum w^2 (Kish 1965)."""
        size = len(self.low)
        return np.bincount(self.run, weight, size) ** 2 / np.bincount(self.run, weight**2, size)

    def spread(self, by_run: np.ndarray, groups: int, cells: int) -> np.ndarray:
        """Sums over runs `[R, ...]` given to their cells by their shares: `[groups, cells, ...]`."""
        out = np.zeros((groups, cells, *by_run.shape[1:]))
        for r, value in enumerate(by_run):
            out[self.group[r], self.low[r] : self.high[r] + 1] += np.multiply.outer(self.share[r], value)
        return out

    def shared_by(self, groups: int, cells: int) -> np.ndarray:
        """Patients `[groups, cells]` of the run that each cell belongs to."""
        out = np.zeros((groups, cells))
        for r, size in enumerate(np.bincount(self.run, minlength=len(self.low))):
            out[self.group[r], self.low[r] : self.high[r] + 1] = size
        return out


def spread_cells(cell: np.ndarray, event: np.ndarray, group: np.ndarray, patients: np.ndarray, least: int) -> Runs:
    """Cells of time that tell of nobody when she left.

    Neighbouring cells of a group are taken together into runs of at least `least` patients, so that times change least
    (univariate microaggregation as a shortest path, Hansen & Mukherjee 2003). Within a run events, and those who are
    censored, are spread over its cells in an order of names that knows no times, more of them at the end where the mean of
    the run's patients lies: evenly, survival would come out too long, as most of a long run leave early in it. A group of
    fewer patients is one run; `shown` has left it out.
    """
    out, run, order = cell.copy(), np.zeros(len(cell), dtype=np.int64), _by_digest(patients)
    spans: list[tuple[int, int, int]] = []
    shares: list[np.ndarray] = []
    for g in np.unique(group):
        rows = np.flatnonzero(group == g)
        for low, high in _runs(cell[rows], least):
            members = rows[(cell[rows] >= low) & (cell[rows] <= high)]
            share = _decaying(high + 1 - low, float((cell[members] - low).mean()))
            for kind in (0, 1):
                mine = members[event[members] == kind]
                mine = mine[np.argsort(order[mine])]
                place = np.searchsorted(np.cumsum(share), (np.arange(len(mine)) + 0.5) / max(len(mine), 1))
                out[mine] = low + np.minimum(place, high - low)
            run[members] = len(spans)
            spans.append((low, high, int(g)))
            shares.append(share)
    first, last, of = np.array(spans, dtype=np.int64).reshape(-1, 3).T
    return Runs(out, run, first, last, of, tuple(shares))


def _decaying(cells: int, mean: float) -> np.ndarray:
    """Shares `[cells]` that fall, or rise, by one factor from cell to cell and have this mean: what is likeliest if no more is known."""
    if cells == 1:
        return np.ones(1)
    k = np.arange(cells)

    def shares(log_factor: float) -> np.ndarray:
        weight = np.exp(log_factor * (k - (cells - 1 if log_factor > 0 else 0)))
        return np.asarray(weight / weight.sum())

    reach = 20.0
    target = float(np.clip(mean, shares(-reach) @ k, shares(reach) @ k))
    return shares(brentq(lambda f: float(shares(f) @ k) - target, -reach, reach))


def _runs(cell: np.ndarray, least: int) -> list[tuple[int, int]]:
    """First and last cell of each run of at least `least` patients: least in all of patients times squared length of run."""
    cells, counts = np.unique(cell, return_counts=True)
    n = np.append(0, np.cumsum(counts))
    best, start = np.full(len(cells) + 1, np.inf), np.zeros(len(cells) + 1, dtype=np.int64)
    best[0] = 0.0
    for end in range(1, len(cells) + 1):
        size = n[end] - n[:end]
        length = cells[end - 1] - cells[:end]
        total = np.where(size >= least, best[:end] + size * length.astype(np.float64) ** 2, np.inf)
        start[end] = int(np.argmin(total))
        best[end] = total[start[end]]
    if not np.isfinite(best[-1]):
        return [(int(cells[0]), int(cells[-1]))]
    runs, end = [], len(cells)
    while end:
        runs.append((int(cells[start[end]]), int(cells[end - 1])))
        end = int(start[end])
    return runs[::-1]


def _by_digest(patients: np.ndarray) -> np.ndarray:
    """The rank `[N]` of each patient in an order that depends on her name alone."""
    digests = [hashlib.sha256(str(p).encode()).digest() for p in patients]
    rank = np.empty(len(patients), dtype=np.int64)
    rank[sorted(range(len(patients)), key=digests.__getitem__)] = np.arange(len(patients))
    return rank
