"""The C-index under differential privacy: error of the noisy table, of noisy pair counts, and of intervals."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from oncofed.common.evaluation.bootstrap import interval, redraw
from oncofed.common.evaluation.concordance import concordance
from oncofed.common.metrics import concordance_index, pair_counts

sys.path.insert(0, str(Path(__file__).parents[1]))
from survival_cohorts import cohort, simulated

REPEATS = 500
MARGIN = 1 + 3 / (2 * REPEATS) ** 0.5
"""An RMSE of n normal errors has a relative standard error of 1 / sqrt(2 n): three of those."""

# How much a noisy count weighs depends on the time bins: on those who are still under observation after it. In FLChain most
# patients are, through all of its event times, so that its errors at 16 and 32 bins are larger for their number than others'.

COHORTS = {
    "gbsg2": lambda: cohort("gbsg2"),
    "sim 1000": lambda: simulated(1000),
    "sim 5000": lambda: simulated(5000),
    "flchain 5000": lambda: cohort("flchain").some(5000),
}


def two_sided(rng: np.random.Generator, shape: tuple[int, ...], scale: float, noises: int = 1) -> np.ndarray:
    """The sum of `noises` two-sided geometric noises."""
    p = -np.expm1(-1.0 / scale)
    return (rng.geometric(p, (noises, *shape)) - rng.geometric(p, (noises, *shape))).sum(0).astype(float)


@pytest.mark.parametrize(
    ("name", "bins", "noises", "rmse"),
    [
        ("gbsg2", 8, 1, 0.0115),
        ("gbsg2", 16, 1, 0.0244),
        ("gbsg2", 16, 5, 0.0530),
        ("gbsg2", 32, 1, 0.0480),
        ("sim 1000", 8, 1, 0.0089),
        ("sim 1000", 16, 1, 0.0175),
        ("sim 1000", 16, 5, 0.0347),
        ("sim 1000", 32, 1, 0.0306),
        ("sim 5000", 8, 1, 0.0076),
        ("sim 5000", 16, 1, 0.0038),
        ("sim 5000", 16, 5, 0.0074),
        ("sim 5000", 32, 1, 0.0064),
        ("flchain 5000", 8, 1, 0.0077),
        ("flchain 5000", 16, 1, 0.0062),
        ("flchain 5000", 16, 5, 0.0138),
        ("flchain 5000", 32, 1, 0.0122),
    ],
)
def test_error_of_the_noisy_table_at_epsilon_1(name: str, bins: int, noises: int, rmse: float) -> None:
    c = COHORTS[name]()
    counts, exact = c.table(bins, bins, ()).counts[0], concordance_index(c.risk, c.time, c.event)
    noisy = counts + two_sided(np.random.default_rng(0), (REPEATS, *counts.shape), 1.0, noises)
    errors = concordance(noisy) - exact
    assert np.isfinite(errors).all()
    assert np.sqrt((errors**2).mean()) < rmse * MARGIN


@pytest.mark.parametrize(
    ("name", "own", "shared"),
    [
        ("gbsg2", 0.0127, 0.0064),
        ("sim 1000", 0.0083, 0.0040),
        ("sim 5000", 0.0017, 0.0007),
        ("flchain 5000", 0.0024, 0.0011),
    ],
)
def test_error_of_noisy_pair_counts_of_five_sites_at_epsilon_1(name: str, own: float, shared: float) -> None:
    """Two whole numbers a site, twice the concordant pairs and twice the rest: a patient changes both by less than 2 n."""
    c, rng = COHORTS[name](), np.random.default_rng(0)
    sites = np.array_split(rng.permutation(len(c.risk)), 5)
    pairs = np.array([pair_counts(c.risk[s], c.time[s], c.event[s]) for s in sites]).sum(0)
    right, wrong = 2 * pairs[0], 2 * (pairs[1] - pairs[0])
    for noises, limit in ((5, own), (1, shared)):
        a, b = np.array([[right], [wrong]]) + two_sided(rng, (2, 4000), 2.0 * len(sites[0]), noises)
        errors = a / (a + b) - pairs[0] / pairs[1]
        assert np.sqrt((errors**2).mean()) < limit * 1.06


def test_clipping_noisy_counts_would_pull_c_to_one_half() -> None:
    """Why no noisy count is cut off at zero: the noise of empty cells then looks like patients."""
    c = cohort("gbsg2")
    counts, exact = c.table(16, 16, ()).counts[0], concordance_index(c.risk, c.time, c.event)
    noisy = counts + two_sided(np.random.default_rng(0), (REPEATS, *counts.shape), 1.0)
    assert abs(concordance(noisy).mean() - exact) < 0.01
    assert concordance(np.maximum(noisy, 0)).mean() < exact - 0.02


def test_redrawn_counts_have_the_spread_of_patients_and_noise() -> None:
    counts = np.full((2, 4, 4), 20.0)
    rng = np.random.default_rng(0)
    assert redraw(counts, 4000, rng).var(0).mean() == pytest.approx(20.0, rel=0.05)
    q = np.exp(-1.0)
    noisy = redraw(counts, 4000, rng, epsilon=1.0, noises=3)
    assert noisy.var(0).mean() == pytest.approx(20.0 + 3 * 2 * q / (1 - q) ** 2, rel=0.05)
    assert noisy.mean() == pytest.approx(20.0, abs=0.1)
    empty = redraw(two_sided(rng, (2, 32, 32), 1.0), 200, rng, epsilon=1.0)
    assert empty.var(0).mean() == pytest.approx(2 * q / (1 - q) ** 2, rel=0.2)  # noise is not taken for patients


@pytest.mark.parametrize(("epsilon", "noises"), [(0.0, 1), (1.0, 1), (1.0, 5)])
def test_intervals_hold_the_population_value_about_as_often_as_they_say(epsilon: float, noises: int) -> None:
    big = simulated(6000, 99)
    truth, rng, held = concordance_index(big.risk, big.time, big.event), np.random.default_rng(1), 0
    for seed in range(100):
        h = simulated(500, seed).table(8, 8, ()).counts[0]
        h = h + two_sided(rng, h.shape, 1 / epsilon, noises) if epsilon else h
        _, low, high = interval(concordance, h, rng, draws=200, epsilon=epsilon, noises=noises)
        held += int(low <= truth <= high)
    assert held >= 86  # of 100 at 95 %, three standard errors and the narrowness of a bootstrap below
