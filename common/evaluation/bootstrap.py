"""Intervals for whatever is computed from the evaluation table.

Drawing patients with replacement gives each a weight that is nearly Poisson(1) (Hanley and MacGibbon 2006), so the counts of a
resampled federation are Poisson draws of the summed counts: no site need do anything.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

CHUNK = 2_000_000
"""Counts that are held at once."""


def interval(
    statistic: Callable[[np.ndarray], np.ndarray],
    counts: np.ndarray,
    rng: np.random.Generator,
    *,
    draws: int = 1000,
    epsilon: float = 0.0,
    noises: int = 1,
    level: float = 0.95,
    bounds: tuple[float, float] = (-np.inf, np.inf),
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Point estimate and lower and upper limits of a statistic of summed counts, each of the statistic's shape.

    `statistic` takes counts with one leading axis more, `[draws, *counts.shape]`, and gives `[draws, ...]`.
    Without noise draws are Poisson, and the limits are percentiles moved so that the median of the draws is at the
    point: a patient who is drawn twice is as good as tied with her copy, which takes a C-index towards 1/2, the more the
    fewer patients there are.
    With `epsilon` > 0 the counts hold `noises` two-sided geometric noises each (1 where the sites share one, else one a
    site), and the bootstrap is parametric: the spread of the counts is Poisson's plus that of as much noise drawn anew,
    around the counts as they are. Percentiles then stay where they are: copies are nothing beside noise, and a point that
    noise took far off would take limits along that hold the truth (measured: at 60 patients 0.88 of them instead of 0.95).
    Limits are kept within `bounds`, (0, 1) for a probability; NaN where the statistic is known in fewer than half of the
    draws.
    """
    point = statistic(counts[None])[0]
    held = max(1, CHUNK // counts.size)
    parts = [
        statistic(redraw(counts, min(held, draws - start), rng, epsilon=epsilon, noises=noises))
        for start in range(0, draws, held)
    ]
    values = np.concatenate(parts)
    known = (~np.isnan(values)).mean(0) >= 0.5
    tail = (1.0 - level) / 2
    filled = np.where(known, values, 0.0)
    low, middle, high = np.nanquantile(filled, [tail, 0.5, 1.0 - tail], axis=0)
    moved = point - middle if epsilon <= 0 else 0.0
    low, high = np.clip(low + moved, *bounds), np.clip(high + moved, *bounds)
    return point, np.where(known, low, np.nan), np.where(known, high, np.nan)


def redraw(
    counts: np.ndarray, draws: int, rng: np.random.Generator, *, epsilon: float = 0.0, noises: int = 1
) -> np.ndarray:
    """Counts `[draws, *counts.shape]` as they might have come out.

    With noise a count may be negative or hold noise alone. The spread is then taken from the positive counts, scaled down
    to the total of all (else noise would pass for patients), and added to the counts as they are.
    """
    shape = (draws, *counts.shape)
    if epsilon <= 0:
        return rng.poisson(np.maximum(counts, 0.0), shape).astype(np.float64)
    positive = np.maximum(counts, 0.0)
    rate = positive * (max(counts.sum(), 0.0) / positive.sum() if positive.any() else 0.0)
    p = -np.expm1(-epsilon)
    drawn = counts + rng.poisson(rate, shape) - rate
    for _ in range(noises):
        drawn += rng.geometric(p, shape) - rng.geometric(p, shape)
    return drawn
