"""Disclosure control: which patients may show in a table, and how fine its axis of time may be.

Both are settled before a sum is taken, so that all questions of one analysis rest on the same patients; the door
(release.py) holds every table against the same bound once more.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np


def shown(groups: Sequence[np.ndarray], patients: np.ndarray, least: int) -> np.ndarray:
    """Who may show `[N]` booleans: nobody of a group of fewer than `least` patients in any of the groupings `[N]` each.

    Complementary suppression: patients who are left out are never so few that they could be had as a difference from the
    site's whole. Where they are, others join them, by a digest of their names: the same ones in every analysis.
    """
    keep = np.ones(len(patients), dtype=bool)
    if least <= 1 or not len(patients):
        return keep
    digests = [hashlib.sha256(str(p).encode()).digest() for p in patients]
    order = np.array(sorted(range(len(patients)), key=digests.__getitem__))
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


def merged_cells(cell: np.ndarray, group: np.ndarray, least: int) -> np.ndarray:
    """Cells of time `[N]` so coarse that in every group each holds at least `least` patients.

    Neighbouring cells of a group are taken together until they hold enough; what is left at the end joins the last ones. All
    their patients are placed in the cell of the middle patient (microaggregation, Domingo-Ferrer & Mateo-Sanz 2002).
    A group of fewer patients becomes one cell; `shown` has left it out.
    """
    if least <= 1:
        return cell
    out = cell.copy()
    for g in np.unique(group):
        rows = np.flatnonzero(group == g)
        rows = rows[np.argsort(cell[rows], kind="stable")]
        ordered = cell[rows]
        starts, begin = [0], 0
        for end in range(1, len(rows)):
            if ordered[end] != ordered[end - 1] and end - begin >= least:
                starts.append(end)
                begin = end
        if len(starts) > 1 and len(rows) - starts[-1] < least:
            starts.pop()
        for start, end in zip(starts, [*starts[1:], len(rows)], strict=True):
            out[rows[start:end]] = ordered[(start + end - 1) // 2]
    return out
