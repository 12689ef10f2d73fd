"""Edges of the risk and time bins of the evaluation table, from sums over the training patients.

Shapes: C cancer types, R risk bins, T time bins. Risks are log hazards, times are in months.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from oncofed.common.survival import PUBLIC_EDGES, RISK_EDGES

# The open bins at both ends are taken to be as wide as their neighbours.
_RISK_BOUNDS = np.concatenate([[2 * RISK_EDGES[0] - RISK_EDGES[1]], RISK_EDGES, [2 * RISK_EDGES[-1] - RISK_EDGES[-2]]])
_TIME_BOUNDS = np.append(PUBLIC_EDGES, 2 * PUBLIC_EDGES[-1] - PUBLIC_EDGES[-2])


def risk_bins(risk_counts: np.ndarray, bins: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """Edges `[C, bins - 1]` of equally filled risk bins of each cancer type, and the mean risk `[C, bins]` in each.

    `risk_counts` `[C, len(RISK_EDGES) + 1]` counts the training patients in the bins of `RISK_EDGES`; within such a bin
    they are taken as evenly spread, so edges increase strictly even if all patients share one. The middle edge is the
    training median, which makes high and low risk groups of whole bins. A cancer type without patients takes the edges
    of all types together. Negative counts, which noise makes, count as none.
    """
    risk_counts = np.asarray(risk_counts, dtype=np.float64)
    if risk_counts.ndim != 2 or risk_counts.shape[1] != len(RISK_EDGES) + 1:
        raise ValueError(f"risk counts must be [cancers, {len(RISK_EDGES) + 1}], got {risk_counts.shape}")
    if bins < 2 or bins % 2:
        raise ValueError(f"bins must be even and 2 or more, so that the median is an edge; got {bins}")
    counts = np.maximum(risk_counts, 0.0)
    everyone = counts.sum(0)
    everyone = everyone if everyone.any() else np.ones_like(everyone)
    share = np.arange(bins + 1) / bins
    edges, means = [], []
    for row in counts:
        filled = row if row.any() else everyone
        inner = _quantiles(filled, _RISK_BOUNDS, share[1:-1])
        edges.append(inner)
        means.append(_means(filled, _RISK_BOUNDS, inner))
    return np.array(edges), np.array(means)


def time_bins(events: np.ndarray, bins: int = 32, horizons: Sequence[float] = (12.0, 24.0, 36.0, 60.0)) -> np.ndarray:
    """Edges `[bins - 1]` in months: the horizons, and between them quantiles that follow training events and time alike.

    `events` `[C, len(PUBLIC_EDGES)]` are the training events on `PUBLIC_EDGES`. Half of the weight lies on them, half evenly on
    time up to the end of the last one: by events alone all bins would be early, where noise in a count weighs most and
    the integral over time is coarse. Each stretch between horizons gets edges in proportion to its weight, at equal
    shares, so no bin is a sliver beside a horizon. The last edge is where the training events end, because pairs in the
    open bin after it are the worst known. Negative counts, which noise makes, count as none.
    """
    events = np.asarray(events, dtype=np.float64)
    if events.shape[-1] != len(PUBLIC_EDGES):
        raise ValueError(f"events must be counted on the {len(PUBLIC_EDGES)} public intervals, got {events.shape}")
    cuts = np.asarray(horizons, dtype=np.float64)
    if (np.diff(cuts) <= 0).any() or (len(cuts) and not 0 < cuts[0] <= cuts[-1] < _TIME_BOUNDS[-1]):
        raise ValueError(f"horizons must increase within 0 to {_TIME_BOUNDS[-1]:g} months, got {tuple(horizons)}")
    free = bins - 1 - len(cuts)
    if free < 0:
        raise ValueError(f"{bins} time bins cannot hold {len(cuts)} horizons; ask for {len(cuts) + 1} bins or more")
    counts = np.maximum(events.reshape(-1, len(PUBLIC_EDGES)).sum(0), 0.0)
    width = np.diff(_TIME_BOUNDS)
    if counts.any():
        counts = counts / counts.sum()
        seen = np.where(np.cumsum(counts[::-1])[::-1] > 0, width, 0.0)
        counts = (counts + seen / seen.sum()) / 2
    else:
        counts = width
    before = _share_below(counts, _TIME_BOUNDS, np.concatenate([[0.0], cuts, _TIME_BOUNDS[-1:]]))
    share = _proportional(np.diff(before), free)
    edges = [cuts]
    for low, high, n in zip(before[:-2], before[1:-1], share[:-1], strict=True):
        edges.append(_quantiles(counts, _TIME_BOUNDS, low + (high - low) * np.arange(1, n + 1) / (n + 1)))
    if share[-1]:
        inner = before[-2] + (1.0 - before[-2]) * np.arange(1, share[-1]) / share[-1]
        edges += [_quantiles(counts, _TIME_BOUNDS, inner), _TIME_BOUNDS[np.flatnonzero(counts)[-1:] + 1]]
    return np.sort(np.concatenate(edges))


def _quantiles(counts: np.ndarray, bounds: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Values below which each share (inside 0 to 1) of the counted lies; the middle of a gap where nobody lies."""
    cumulative = np.concatenate([[0.0], np.cumsum(counts)])
    wanted = share * cumulative[-1]
    ends = []
    for side in ("left", "right"):
        i = np.clip(np.searchsorted(cumulative, wanted, side=side), 1, len(counts))
        within = (wanted - cumulative[i - 1]) / counts[i - 1]
        ends.append(bounds[i - 1] + within * (bounds[i] - bounds[i - 1]))
    return (ends[0] + ends[1]) / 2


def _share_below(counts: np.ndarray, bounds: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Share of the counted below each value."""
    return np.interp(value, bounds, np.concatenate([[0.0], np.cumsum(counts)])) / counts.sum()


def _means(counts: np.ndarray, bounds: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Mean value of the counted between successive edges, everyone within a bin evenly spread."""
    cut = np.unique(np.concatenate([bounds, edges]))  # no piece crosses an edge or a bound
    mass = np.diff(_share_below(counts, bounds, cut))
    owner = np.searchsorted(edges, cut[:-1], side="right")
    total = np.bincount(owner, mass * (cut[:-1] + cut[1:]) / 2, minlength=len(edges) + 1)
    return total / np.bincount(owner, mass, minlength=len(edges) + 1)


def _proportional(share: np.ndarray, total: int) -> np.ndarray:
    """`total` things given out in proportion to `share`, by largest remainder; none where the share is 0."""
    wanted = total * share / share.sum()
    given = np.floor(wanted + 1e-9).astype(int)
    rest = np.argsort(given - wanted, kind="stable")[: total - given.sum()]
    given[rest] += 1
    return given
