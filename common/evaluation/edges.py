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
_WIDTHS = np.diff(_TIME_BOUNDS)

GAIN = 0.4
"""What time bins tell apart, as a variance of C times patients (its sampling variance is near 0.15). Measured at epsilon 1,
700 to 5000 patients: 0.3 to 0.7 do alike."""
TYPICAL_C = 0.75
"""The C for which noise is weighed: it is not known before, and at 0.7 the edges are about the same."""


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
    time up to the end of the last one: by events alone all bins would be early, and the integral over time coarse. Each
    stretch between horizons gets edges in proportion to its weight, at equal shares, so no bin is a sliver beside a
    horizon. The last edge is where the training events end, because pairs in the open bin after it are the worst known.
    Negative counts, which noise makes, count as none.
    """
    counts = np.maximum(_on_public_intervals(events, "events"), 0.0)
    if not counts.any():
        return _edges_by_weight(_WIDTHS, bins, horizons, ends=True)
    seen = np.where(np.cumsum(counts[::-1])[::-1] > 0, _WIDTHS, 0.0)
    return _edges_by_weight((counts / counts.sum() + seen / seen.sum()) / 2, bins, horizons, ends=True)


def noisy_time_bins(
    events: np.ndarray,
    exposure: np.ndarray,
    bins: int,
    horizons: Sequence[float],
    *,
    patients: float,
    risk_bins: int,
    epsilon: float,
    noises: int = 1,
) -> np.ndarray:
    """Edges `[bins - 1]` in months for a table that gets noise: the horizons, and between them edges that keep C close.

    `events` and months of `exposure`, both `[C, len(PUBLIC_EDGES)]`, are of the training patients. `patients` of one cancer
    type are evaluated in `risk_bins`; the table spends `epsilon`, and its sum holds `noises` noises.
    A time bin adds to the variance of C what the noise of its cells is worth (`_noise_of_a_bin`), most of it while many
    are under observation; in exchange it tells apart the patients who leave. With v(t) of the former, u(t) who leave and
    a gain of `GAIN / patients` times the log density of the edges for all who leave, the best density is u / (v + m), v in
    units of that gain and m such that `bins` come out. Where noise is small that is u, bins that hold equally many
    patients; where it is large, edges lie where v is small, and those that too few patients can fill do little harm.
    """
    at_risk = _at_risk(_on_public_intervals(exposure, "exposure"))
    if at_risk[0] <= 0 or patients <= 0:
        return time_bins(events, bins, horizons)
    leaving = -np.diff(at_risk) / at_risk[0]
    observed = (at_risk[:-1] + at_risk[1:]) / (2 * at_risk[0])
    died = np.maximum(_on_public_intervals(events, "events"), 0.0) / at_risk[0]
    pairs = max((died * observed).sum(), 0.01)  # comparable pairs over the square of the patients
    variance = risk_bins * cell_variance(epsilon, noises) / (patients * pairs) ** 2
    v = variance * _noise_of_a_bin(observed, np.cumsum(died) - died / 2) * patients / GAIN
    return _edges_by_weight(leaving / (v + _constant(leaving, v, bins)), bins, horizons, ends=False)


def bins_for(patients: float, epsilon: float, noises: int = 1) -> int:
    """Risk bins and as many time bins for `patients` of a cancer type, where the table spends `epsilon` (0: no noise).

    Without noise 32: what the bins hide is then below 0.001. The error of C from noise grows with the number of bins and
    falls with patients (measured at epsilon 1, times patients: 7 with 8 bins, 13 to 18 with 16, 26 with 32), what bins hide
    does not fall (0.003 with 8 bins, 0.001 with 16). So 8 until noise is as small as that, near 5000 patients for one noise
    at epsilon 1, in proportion to its standard deviation. Never 32: where noise lets them be better, both errors are far
    below the sampling error of C.
    """
    if epsilon <= 0:
        return 32
    return 16 if patients >= 5000 * np.sqrt(cell_variance(epsilon, noises) / cell_variance(1.0)) else 8


def cell_variance(epsilon: float, noises: int = 1) -> float:
    """Variance of `noises` two-sided geometric noises of sensitivity 1, which the sum of a count holds."""
    if epsilon <= 0:
        return 0.0
    return float(noises * 2 * np.exp(-epsilon) / np.expm1(-epsilon) ** 2)


def _noise_of_a_bin(observed: np.ndarray, died: np.ndarray) -> np.ndarray:
    """Mean square of what one more count does to C, summed over event and censoring, for noise at each time.

    `observed` share under observation and `died` share dead by then. With a the share of lower risks, one more event changes
    concordant less C times comparable pairs by (a - C) `observed` as the earlier one and by (1 - a - C) `died` as the later
    one, one more censoring by the second alone. Means over a even from 0 to 1.
    """
    off = (TYPICAL_C - 0.5) ** 2
    event = (observed - died) ** 2 / 12 + off * (observed + died) ** 2
    return event + died**2 * (1 / 12 + off)


def _constant(leaving: np.ndarray, v: np.ndarray, bins: int) -> float:
    """m with `sum(leaving / (v + m)) = bins`, by bisection; no less than minus 0.9 of the least v, else all edges would come to lie where it is."""
    low, high = -0.9 * float(v[leaving > 0].min()), 1.0 / bins
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if (leaving / (v + middle)).sum() > bins else (low, middle)
    return high


def _at_risk(exposure: np.ndarray) -> np.ndarray:
    """Patients under observation `[len(PUBLIC_EDGES) + 1]` at the bounds of the intervals: never more, none at the end."""
    middle = (_TIME_BOUNDS[:-1] + _TIME_BOUNDS[1:]) / 2
    known = np.interp(_TIME_BOUNDS, middle, np.maximum(exposure, 0.0) / _WIDTHS)
    known[-1] = 0.0
    return np.minimum.accumulate(known)


def _on_public_intervals(table: np.ndarray, name: str) -> np.ndarray:
    """Sum over cancer types of a table on `PUBLIC_EDGES`."""
    table = np.asarray(table, dtype=np.float64)
    if table.shape[-1] != len(PUBLIC_EDGES):
        raise ValueError(f"{name} must be counted on the {len(PUBLIC_EDGES)} public intervals, got {table.shape}")
    return table.reshape(-1, len(PUBLIC_EDGES)).sum(0)


def _edges_by_weight(weight: np.ndarray, bins: int, horizons: Sequence[float], ends: bool) -> np.ndarray:
    """Edges at equal shares of `weight` between the horizons; `ends`: the last edge is where the weight ends."""
    cuts = np.asarray(horizons, dtype=np.float64)
    if (np.diff(cuts) <= 0).any() or (len(cuts) and not 0 < cuts[0] <= cuts[-1] < _TIME_BOUNDS[-1]):
        raise ValueError(f"horizons must increase within 0 to {_TIME_BOUNDS[-1]:g} months, got {tuple(horizons)}")
    free = bins - 1 - len(cuts)
    if free < 0:
        raise ValueError(f"{bins} time bins cannot hold {len(cuts)} horizons; ask for {len(cuts) + 1} bins or more")
    before = _share_below(weight, _TIME_BOUNDS, np.concatenate([[0.0], cuts, _TIME_BOUNDS[-1:]]))
    share = _proportional(np.diff(before), free)
    edges = [cuts]
    for i, n in enumerate(share):
        last = ends and n > 0 and i == len(share) - 1
        inner = np.arange(1, n + 1 - last) / (n + 1 - last)
        edges.append(_quantiles(weight, _TIME_BOUNDS, before[i] + (before[i + 1] - before[i]) * inner))
        if last:
            edges.append(_TIME_BOUNDS[np.flatnonzero(weight)[-1:] + 1])
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
