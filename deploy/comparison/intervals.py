"""Bootstrap intervals: what a point and its draws over resampled patients say."""

from __future__ import annotations

import numpy as np

DRAWS = 500


def interval(point: float, draws: np.ndarray) -> dict[str, float]:
    """The point with the 95 % interval of its draws."""
    low, high = np.nanpercentile(draws, [2.5, 97.5])
    return {"value": point, "low": float(low), "high": float(high)}
