"""Evaluation as sums that merge: pair counts of the C-index, log-likelihoods, routing tables."""

from __future__ import annotations

import numpy as np


def ratio(a: np.ndarray | float, b: np.ndarray | float) -> np.ndarray:
    """a / b; NaN where b is 0."""
    a, b = np.broadcast_arrays(np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64))
    return np.divide(a, b, out=np.full(a.shape, np.nan), where=b > 0)


def mean_known(values: np.ndarray, axis: int = -1) -> np.ndarray:
    """Mean over an axis of what is not NaN; NaN where nothing is known."""
    known = ~np.isnan(values)
    return ratio(np.where(known, values, 0.0).sum(axis), known.sum(axis))


def comparable_pairs(time: np.ndarray, event: np.ndarray) -> np.ndarray:
    """`[B, B]` booleans: patient i had the event while j was known to live longer (Harrell 1996).

    Two events at the same time are not comparable; an event and a censoring at the same time are.
    """
    earlier = (time[:, None] < time[None]) | ((time[:, None] == time[None]) & (event[None] == 0))
    return earlier & (event[:, None] == 1)


def pair_counts(risk: np.ndarray, time: np.ndarray, event: np.ndarray) -> tuple[float, float]:
    """Concordant pairs (ties in risk count one half) and comparable pairs. Both add up over groups of patients."""
    pairs = comparable_pairs(time, event)
    score = (risk[:, None] > risk[None]) + 0.5 * (risk[:, None] == risk[None])
    return float((score * pairs).sum()), float(pairs.sum())


def pair_table(risk: np.ndarray, time: np.ndarray, event: np.ndarray, cancer: np.ndarray, cancers: int) -> np.ndarray:
    """Comparable pairs within each cancer type as whole numbers `[2, C]`: twice the concordant and twice the others, ties in risk in both.

    A patient is in fewer pairs than her cancer type has patients n, and each changes the two numbers by 2 together: 2 n bounds
    what one patient changes (L1). C is the first over the sum of both.
    """
    out = np.zeros((2, cancers))
    for c in np.unique(cancer):
        rows = cancer == c
        pairs, r = comparable_pairs(time[rows], event[rows]), risk[rows]
        above, below, tied = ((pairs & t).sum() for t in (r[:, None] > r, r[:, None] < r, r[:, None] == r))
        out[:, c] = 2 * above + tied, 2 * below + tied
    return out


def concordance_index(risk: np.ndarray, time: np.ndarray, event: np.ndarray) -> float:
    """Harrell's C of `risk` (higher = earlier event); NaN without comparable pairs."""
    concordant, comparable = pair_counts(risk, time, event)
    return concordant / comparable if comparable else float("nan")


def bootstrap_concordance(
    risk: np.ndarray, time: np.ndarray, event: np.ndarray, draws: int, rng: np.random.Generator
) -> np.ndarray:
    """C-index `[draws]` over resampled patients: weights w turn the counts into w' P w, so no pair is counted twice."""
    n = len(risk)
    pairs = comparable_pairs(time, event).astype(np.float64)
    score = ((risk[:, None] > risk[None]) + 0.5 * (risk[:, None] == risk[None])) * pairs
    weights = rng.multinomial(n, np.full(n, 1 / n), size=draws).astype(np.float64)
    comparable = ((weights @ pairs) * weights).sum(1)
    concordant = ((weights @ score) * weights).sum(1)
    return np.divide(concordant, comparable, out=np.full(draws, np.nan), where=comparable > 0)


def survival_sums(
    risk: np.ndarray, time: np.ndarray, event: np.ndarray, loss: np.ndarray, cancer: np.ndarray, cancers: int
) -> dict[str, np.ndarray]:
    """One site's evaluation by cancer type, each `[C]`: patients, events, loss, concordant and comparable pairs."""
    out = {name: np.zeros(cancers) for name in ("patients", "events", "loss", "concordant", "comparable")}
    for c in np.unique(cancer):
        rows = cancer == c
        out["patients"][c], out["events"][c], out["loss"][c] = rows.sum(), event[rows].sum(), loss[rows].sum()
        out["concordant"][c], out["comparable"][c] = pair_counts(risk[rows], time[rows], event[rows])
    return out


def mean_within_cancer(concordant: np.ndarray, comparable: np.ndarray) -> float:
    """Mean over cancer types of the C-index; types without comparable pairs do not count."""
    known = comparable > 0
    return float((concordant[known] / comparable[known]).mean()) if known.any() else float("nan")
