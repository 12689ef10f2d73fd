"""Time grid, survival losses, baselines and survival curves.

Shapes: B patients, C cancer types, K intervals of the grid. Times are in months.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import numpy as np
import torch
from oncofed.common.classical.risk_sets import grid_cells
from torch import Tensor

PUBLIC_EDGES = np.concatenate([np.arange(0, 24, 1), np.arange(24, 120, 3), np.arange(120, 361, 12)]).astype(np.float64)
"""Candidate interval starts in months, fixed and public: monthly to 2 years, quarterly to 10, yearly to 30."""

RISK_EDGES = np.arange(-500, 501, 5) / 100.0
"""Edges of the public bins in which log hazards are counted: 0.05 wide, from -5 to 5."""


@dataclass(frozen=True)
class TimeGrid:
    """Starts of K follow-up intervals in months; the first is 0 and the last interval is open-ended.

    An event at exactly a start belongs to the interval before it, as in `(start_k, start_{k+1}]`.
    """

    starts: tuple[float, ...]

    def __post_init__(self) -> None:
        s = np.asarray(self.starts)
        if s.size == 0 or s[0] != 0 or (np.diff(s) <= 0).any():
            raise ValueError(f"starts of the time grid must begin at 0 and increase, got {self.starts}")

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def widths(self) -> np.ndarray:
        """Months `[K]` of each interval; the open last one counts as wide as the one before it (of a single one, a year)."""
        inner = np.diff(np.asarray(self.starts, dtype=np.float64))
        return np.append(inner, inner[-1] if len(inner) else YEAR)

    def interval(self, time: np.ndarray) -> np.ndarray:
        """Index `[B]` of the interval that holds each time."""
        return grid_cells(time, np.asarray(self.starts))

    def exposure(self, time: np.ndarray) -> np.ndarray:
        """Months `[B, K]` that each patient spends under observation in each interval."""
        starts = np.asarray(self.starts)
        ends = np.append(starts[1:], np.inf)
        return np.clip(np.asarray(time)[:, None], starts, ends) - starts

    @classmethod
    def from_events(cls, events: np.ndarray, intervals: int) -> TimeGrid:
        """At most `intervals` intervals with about equal numbers of events, from event counts on `PUBLIC_EDGES`."""
        total = float(events.sum())
        if total == 0:
            return cls((0.0,))
        before = np.concatenate([[0.0], np.cumsum(events)[:-1]]) / total
        wanted = np.arange(intervals) / intervals
        chosen = sorted({int(np.argmin(np.abs(before - w))) for w in wanted} | {0})
        return cls(tuple(float(PUBLIC_EDGES[i]) for i in chosen))


PUBLIC_GRID = TimeGrid(tuple(PUBLIC_EDGES))


def event_table(
    time: np.ndarray, event: np.ndarray, cancer: np.ndarray, cancers: int, fine: TimeGrid = PUBLIC_GRID
) -> tuple[np.ndarray, np.ndarray]:
    """Events and months of exposure by cancer type on `PUBLIC_EDGES`, or on another grid: two `[C, K]` sums over patients."""
    events = np.zeros((cancers, len(fine)))
    np.add.at(events, (cancer, fine.interval(time)), event.astype(np.float64))
    exposure = np.zeros((cancers, len(fine)))
    np.add.at(exposure, cancer, fine.exposure(time))
    return events, exposure


def coarsen(table: np.ndarray, grid: TimeGrid) -> np.ndarray:
    """Sum a table on `PUBLIC_EDGES` into the intervals of `grid`: `[C, public]` -> `[C, K]`."""
    owner = np.searchsorted(np.asarray(grid.starts), PUBLIC_EDGES, side="right") - 1
    return table @ np.eye(len(grid))[owner]


def initial_log_baseline(events: np.ndarray, exposure: np.ndarray, prior_events: float = 2.0) -> np.ndarray:
    """Log hazards `[C, K]` at zero risk: occurrence over exposure, shrunk to the cancer's and then the pooled hazard.

    The shrinkage adds `prior_events` events at the coarser level's hazard, so empty cells and absent cancers stay finite.
    """
    pooled = (events.sum() + 0.5) / (exposure.sum() + 0.5)
    by_interval = (events.sum(0) + prior_events) / (exposure.sum(0) + prior_events / pooled)
    by_cancer = (events.sum(1) + prior_events) / (exposure.sum(1) + prior_events / pooled)
    prior = by_interval[None] * (by_cancer / pooled)[:, None]
    return np.log((events + prior_events) / (exposure + prior_events / prior))


MOST = 20.0
"""Log hazards end here: e^20 a month is certain death, and an overflow would make a gradient that no clipping bounds."""

YEAR = 12.0
"""Months; a Weibull baseline counts time in years, so that its two numbers are of the order of 1."""


def piecewise_exponential_loss(
    risk_B: Tensor, log_baseline_BK: Tensor, exposure_BK: Tensor, interval_B: Tensor, event_B: Tensor
) -> Tensor:
    """Negative log-likelihood `[B]` of each patient, a plain sum over patients (Holford 1980; Friedman 1982).

    L_i = sum_k exp(a_ik + risk_i) exposure_ik - event_i (a_ik(i) + risk_i), with the baseline row of the patient's cancer type.
    """
    log_hazard_BK = log_baseline_BK + risk_B[:, None]
    cumulative_B = (log_hazard_BK.clamp(max=MOST).exp() * exposure_BK).sum(1)
    return cumulative_B - event_B * log_hazard_BK.gather(1, interval_B[:, None]).squeeze(1)


def discrete_time_loss(
    risk_B: Tensor, log_baseline_BK: Tensor, width_BK: Tensor, interval_B: Tensor, event_B: Tensor
) -> Tensor:
    """Negative log-likelihood `[B]` when only the interval of a time is known (Prentice & Gloeckler 1978, grouped hazards).

    P(event in k | alive at its start) = 1 - exp(-exp(a_ik + risk_i) width_k); who is censored in k has lived through those
    before. The baseline is the same log hazard a month as in the piecewise-exponential model, so the curves are too.
    """
    cumulative_BK = (log_baseline_BK + risk_B[:, None]).clamp(max=MOST).exp() * width_BK
    before_BK = torch.arange(cumulative_BK.shape[1], device=risk_B.device) < interval_B[:, None]
    here_B = cumulative_BK.gather(1, interval_B[:, None]).squeeze(1)
    log_event_B = torch.log(-torch.expm1(-here_B.clamp(1e-12, 1e4)))
    return (cumulative_BK * before_BK).sum(1) - event_B * log_event_B


def weibull_loss(risk_B: Tensor, baseline_B2: Tensor, time_B: Tensor, event_B: Tensor) -> Tensor:
    """Negative log-likelihood `[B]` of H(t) = exp(b + risk) (t / 12)^k: two numbers `(b, log k)` a cancer type, for small sites."""
    shape_B = baseline_B2[:, 1].clamp(-2.0, 2.0)
    log_years_B = torch.log(time_B.clamp(min=1e-2) / YEAR)
    log_cumulative_B = baseline_B2[:, 0] + risk_B + shape_B.exp() * log_years_B
    log_hazard_B = log_cumulative_B + shape_B - log_years_B - math.log(YEAR)
    return log_cumulative_B.clamp(max=MOST).exp() - event_B * log_hazard_B


def weibull_on_grid(baseline_C2: np.ndarray, grid: TimeGrid) -> np.ndarray:
    """The mean log hazard `[C, K]` of Weibull baselines in each interval of the grid."""
    starts = np.asarray(grid.starts, dtype=np.float64)
    ends = starts + grid.widths
    b, k = baseline_C2[:, :1].astype(np.float64), np.exp(np.clip(baseline_C2[:, 1:].astype(np.float64), -2.0, 2.0))
    months = np.exp(b) * (np.power(ends / YEAR, k) - np.power(starts / YEAR, k))
    return np.log(np.maximum(months / grid.widths, 1e-12))


def baseline_on_grid(loss: str, baseline: np.ndarray, grid: TimeGrid) -> np.ndarray:
    """The log hazard `[C, K]` in each interval of the grid that a head's baselines, `[C, K]` or a Weibull's `[C, 2]`, say."""
    return weibull_on_grid(baseline, grid) if loss == "weibull" else baseline.astype(np.float64)


def initial_baseline(loss: str, events: np.ndarray, exposure: np.ndarray, grid: TimeGrid) -> np.ndarray:
    """First baselines `[C, K]` of a loss, or the `[C, 2]` of a Weibull, from events and months of exposure on `PUBLIC_EDGES`."""
    return on_grid(loss, coarsen(events, grid), coarsen(exposure, grid))


def on_grid(loss: str, events: np.ndarray, exposure: np.ndarray) -> np.ndarray:
    """The same from events and months of exposure `[C, K]` on the grid itself."""
    if loss == "weibull":
        rate = initial_log_baseline(events.sum(1, keepdims=True), exposure.sum(1, keepdims=True))
        return np.concatenate([rate + np.log(YEAR), np.zeros_like(rate)], axis=1)
    return initial_log_baseline(events, exposure)


def cox_loss(risk_B: Tensor, time_B: Tensor, event_B: Tensor, cancer_B: Tensor) -> Tensor:
    """Mean negative log partial likelihood, stratified by cancer type, Efron ties (torchsurv); 0 without events."""
    from torchsurv.loss.cox import neg_partial_log_likelihood  # slow to import, and other losses do without

    if not bool((event_B > 0).any()):
        return risk_B.sum() * 0.0
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Ties in `time` detected")  # Efron is what we ask for, at every step
        return neg_partial_log_likelihood(risk_B, event_B.bool(), time_B, ties_method="efron", strata=cancer_B)


def survival_curve(log_baseline_K: np.ndarray, grid: TimeGrid, risk: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Survival probabilities `[B, len(times)]` at `times` (months): S(t) = exp(-exp(risk) * H0(t))."""
    cumulative = grid.exposure(np.asarray(times, dtype=np.float64)) @ np.exp(log_baseline_K)
    return np.exp(-np.exp(np.asarray(risk))[:, None] * cumulative[None])


def median_survival(log_baseline_K: np.ndarray, grid: TimeGrid, risk: np.ndarray) -> np.ndarray:
    """Months `[B]` until S(t) = 1/2; infinity where the hazard of the open last interval is needed to get there."""
    starts, hazard = np.asarray(grid.starts), np.exp(log_baseline_K)
    reached = np.concatenate([[0.0], np.cumsum(hazard[:-1] * np.diff(starts))])  # cumulative hazard at each start
    wanted = np.log(2.0) * np.exp(-np.asarray(risk))
    k = np.clip(np.searchsorted(reached, wanted, side="left") - 1, 0, len(grid) - 1)
    return np.where(wanted <= reached[-1], starts[k] + (wanted - reached[k]) / hazard[k], np.inf)


def risk_percentile(counts: np.ndarray, risk: np.ndarray) -> np.ndarray:
    """Percentile 0 to 100 of each risk among the patients counted in the bins of `RISK_EDGES` `[bins]`; NaN without any.

    Within a bin patients are taken as evenly spread; in the open bins at both ends as being in its middle.
    """
    total = counts.sum()
    if not total:
        return np.full(len(risk), np.nan)
    bin_ = np.searchsorted(RISK_EDGES, risk)
    low, high = np.append(-np.inf, RISK_EDGES)[bin_], np.append(RISK_EDGES, np.inf)[bin_]
    inner = np.isfinite(low) & np.isfinite(high)
    share = np.divide(risk - low, high - low, out=np.full(len(risk), 0.5), where=inner)
    before = np.concatenate([[0.0], np.cumsum(counts)[:-1]])
    return 100.0 * (before[bin_] + share * counts[bin_]) / total
