"""Noise for counts under differential privacy, from the operating system's randomness: no seed, so nobody can draw it again."""

from __future__ import annotations

import numpy as np


def geometric(counts: np.ndarray, epsilon: float, sensitivity: int) -> np.ndarray:
    """Counts plus two-sided geometric noise (discrete Laplace) of scale sensitivity / epsilon, float64.

    OpenDP's exact sampler (Ghosh et al. 2009; Canonne et al. 2020). A patient who comes or goes changes the whole table
    by at most `sensitivity` in L1, so the table is epsilon-differentially private. Noisy counts may lie below zero and
    stay there: clipping them would bias every statistic. Raises `ValueError` on counts that are not whole.
    """
    import opendp.prelude as dp  # slow to import, and needed for this alone

    if not (epsilon > 0 and sensitivity >= 1):
        raise ValueError(f"epsilon = {epsilon} and sensitivity = {sensitivity} must be above zero")
    whole = np.rint(counts)
    if not np.array_equal(whole, counts):
        raise ValueError("noise of whole numbers is for counts; this table holds fractions")
    dp.enable_features("contrib")
    space = dp.vector_domain(dp.atom_domain(T="i64")), dp.l1_distance(T="i64")
    mechanism = dp.m.make_geometric(*space, scale=sensitivity / epsilon)
    noisy = mechanism(whole.astype(np.int64).ravel().tolist())
    return np.array(noisy, dtype=np.float64).reshape(counts.shape)
