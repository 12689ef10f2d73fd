"""C-index from the evaluation table: Harrell's, its certified bounds, Uno's, and the one over mixed cancer types.

Shapes: counts `[..., 2, R, T]` (event, risk bin in order of risk, time bin), any leading axes: cancer types, draws of a
bootstrap. Nothing is cut off at zero: noise cancels in sums, cut-off noise does not.

Of two patients in different risk bins and different time bins the table knows everything. What it does not know is filled
in to second order in the width of the bins:

1. Same risk bin, times apart. Which risk is higher is unknown. Concordance is 1/2 as the gap in risk goes to 0 and grows with
   the gap; the mean gap of two values spread evenly over one bin is 1/3 of the mean gap between neighbouring bins.
   So it is 1/2 + (q - 1/2) / 3 with q the concordance of pairs in neighbouring risk bins.
2. Two events in one time bin. Which came first is unknown, but one did. By the same argument concordance is
   1/2 + (q' - 1/2) / 3 with q' that of events in neighbouring time bins.
3. An event and a censoring in one time bin. The pair is comparable if the event came first: one half of the pairs, as both
   times are spread over the bin alike. Where it is comparable the risk bins say whether it is concordant.
"""

from __future__ import annotations

import numpy as np
from oncofed.common.evaluation.censoring import uncensored
from oncofed.common.evaluation.table import in_rows
from oncofed.common.metrics import ratio


def concordance(counts: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Harrell's C `[...]` with ties filled in as above; NaN without comparable pairs.

    `weights` `[..., T]` of a pair by the time bin of its event; without them every pair counts once.
    """
    censored, events = counts[..., 0, :, :], counts[..., 1, :, :]
    d, c = events.sum(-2), censored.sum(-2)  # [..., T]
    w = np.ones_like(d) if weights is None else weights
    weighted = events * w[..., None, :]
    later = _later(events + censored)

    tied_risk = concordance_of_ties(*neighbouring_pairs(weighted, later))[..., None]
    pairs = (weighted.sum(-2) * later.sum(-2)).sum(-1)
    concordant = concordant_pairs(weighted, later, tied_risk)

    following = np.zeros_like(events)
    following[..., :-1] = events[..., 1:]
    right = concordant_pairs(weighted, following, np.full_like(tied_risk, 0.5))
    tied_time = concordance_of_ties(right, (weighted.sum(-2) * following.sum(-2)).sum(-1) - right)
    both_events = (w * d * (d - 1) / 2).sum(-1)

    event_first = (w * d * c).sum(-1) / 2
    concordant = concordant + tied_time * both_events + concordant_pairs(weighted, censored, tied_risk) / 2
    return ratio(concordant, pairs + both_events + event_first)


def comparable(counts: np.ndarray) -> np.ndarray:
    """Comparable pairs `[...]`, those in one time bin as `concordance` counts them."""
    censored, events = counts[..., 0, :, :], counts[..., 1, :, :]
    d, c = events.sum(-2), censored.sum(-2)
    later = _later(events + censored).sum(-2)
    return (d * later + d * (d - 1) / 2 + d * c / 2).sum(-1)


def concordance_bounds(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Least and greatest Harrell's C `[...]` that any patients with these (noise-free) counts can have.

    Pairs in one risk bin may all be discordant or all concordant. In one time bin pairs of events may be comparable or
    not, and either way round; an event and a censoring may be comparable or not, but which way round the risk bins
    say: for the least C we count none of the concordant ones and all the others, for the greatest the reverse.
    """
    censored, events = counts[..., 0, :, :], counts[..., 1, :, :]
    d = events.sum(-2)
    later = _later(events + censored)
    sure, tied = (events * _below(later)).sum((-2, -1)), (events * later).sum((-2, -1))
    apart = (d * later.sum(-2)).sum(-1)  # comparable for sure
    both_events = (d * (d - 1) / 2).sum(-1)
    right, same = (events * _below(censored)).sum((-2, -1)), (events * censored).sum((-2, -1))
    wrong = (d * censored.sum(-2)).sum(-1) - right - same
    low = ratio(sure, apart + both_events + same + wrong)
    most = both_events + same + right
    high = ratio(sure + tied + most, apart + most)
    return np.where(np.isnan(low), 0.0, low), np.where(np.isnan(high), 1.0, high)


def uno_concordance(counts: np.ndarray, until: int | None = None) -> np.ndarray:
    """Uno's C `[...]` (Uno et al. 2011), pairs weighted by G(time of the event)^-2, for events in the first `until` bins.

    Truncation at a horizon tau is `until = table.until(tau)`; without it events of all bins count.
    """
    weights = uncensored(counts)[0] ** -2.0
    if until is not None:
        weights[..., until:] = 0.0
    return concordance(counts, weights)


def by_score(counts: np.ndarray, score: np.ndarray) -> np.ndarray:
    """Counts `[..., 2, U, T]` of all cancer types mixed, in order of the U distinct scores, from `[..., C, 2, R, T]`.

    `score` `[C, R]` of each risk bin of each cancer type, higher = earlier event (the negative predicted survival at a
    horizon, or the mean risk): `concordance(by_score(counts, score))` is the pooled C, which mostly says how well
    cancer types are told apart.
    """
    C, _, R, _ = counts.shape[-4:]
    if score.shape != (C, R):
        raise ValueError(f"score {score.shape} must give a value for each of {C} cancer types and {R} risk bins")
    rows = in_rows(counts, -4)[..., np.argsort(score.ravel(), kind="stable"), :]
    starts = np.searchsorted(np.sort(score.ravel()), np.unique(score))
    return np.add.reduceat(rows, starts, axis=-2)


def _below(x: np.ndarray) -> np.ndarray:
    """Sum over the lower risk bins."""
    return np.cumsum(x, -2) - x


def _later(x: np.ndarray) -> np.ndarray:
    """Sum over the later time bins."""
    return np.flip(np.cumsum(np.flip(x, -1), -1), -1) - x


def concordant_pairs(earlier: np.ndarray, later: np.ndarray, tied: np.ndarray) -> np.ndarray:
    """Pairs `[...]` of one time column in which the earlier one is in a higher risk bin, those in one bin counted as `tied`."""
    return (earlier * (_below(later) + tied[..., None] * later)).sum((-2, -1))


def neighbouring_pairs(earlier: np.ndarray, later: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Concordant and discordant pairs `[...]` in neighbouring risk bins."""
    right = (earlier[..., 1:, :] * later[..., :-1, :]).sum((-2, -1))
    wrong = (earlier[..., :-1, :] * later[..., 1:, :]).sum((-2, -1))
    return right, wrong


def concordance_of_ties(right: np.ndarray, wrong: np.ndarray) -> np.ndarray:
    """1/2 + (q - 1/2) / 3 for the concordance q of neighbouring bins; 1/2 where it is unknown."""
    q = np.clip(np.nan_to_num(ratio(right, right + wrong), nan=0.5), 0.0, 1.0)
    return 0.5 + (q - 0.5) / 3
