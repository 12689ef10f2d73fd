"""The C-index under differential privacy: error of the noisy table, of noisy pair counts, and of intervals."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from oncofed.common.evaluation.bootstrap import interval, redraw
from oncofed.common.evaluation.concordance import concordance
from oncofed.common.evaluation.edges import bins_for, cell_variance, noisy_time_bins
from oncofed.common.metrics import concordance_index, mean_known, pair_counts
from oncofed.common.survival import PUBLIC_EDGES

sys.path.insert(0, str(Path(__file__).parents[1]))
from survival_cohorts import cohort, simulated

REPEATS = 800

COHORTS = {
    "gbsg2": lambda: cohort("gbsg2"),
    "sim 1000": lambda: simulated(1000),
    "sim 5000": lambda: simulated(5000),
    "flchain 1000": lambda: cohort("flchain").some(1000),
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
        ("gbsg2", 16, 5, 0.0476),
        ("gbsg2", 32, 1, 0.0373),
        ("sim 1000", 8, 1, 0.0089),
        ("sim 1000", 16, 1, 0.0175),
        ("sim 1000", 16, 5, 0.0347),
        ("sim 1000", 32, 1, 0.0306),
        ("flchain 1000", 8, 1, 0.0119),
        ("flchain 1000", 16, 1, 0.0189),
        ("flchain 1000", 16, 5, 0.0471),
        ("flchain 1000", 32, 1, 0.0418),
        ("sim 5000", 8, 1, 0.0076),
        ("sim 5000", 16, 1, 0.0038),
        ("sim 5000", 16, 5, 0.0074),
        ("sim 5000", 32, 1, 0.0064),
        ("flchain 5000", 8, 1, 0.0077),
        ("flchain 5000", 16, 1, 0.0045),
        ("flchain 5000", 16, 5, 0.0091),
        ("flchain 5000", 32, 1, 0.0088),
    ],
)
def test_error_of_the_noisy_table_at_epsilon_1(name: str, bins: int, noises: int, rmse: float) -> None:
    c = COHORTS[name]()
    counts, exact = c.noisy_table(bins, bins, noises).counts[0], concordance_index(c.risk, c.time, c.event)
    noisy = counts + two_sided(np.random.default_rng(0), (REPEATS, *counts.shape), 1.0, noises)
    errors = concordance(noisy) - exact
    assert np.isfinite(errors).all()
    assert np.sqrt((errors**2).mean()) <= rmse


@pytest.mark.parametrize("name", ["gbsg2", "flchain 1000", "flchain 5000"])
def test_edges_for_noise_beat_those_without(name: str) -> None:
    c, errors = COHORTS[name](), []
    exact = concordance_index(c.risk, c.time, c.event)
    for table in (c.noisy_table(16, 16, horizons=(12.0, 36.0, 60.0)), c.table(16, 16, (12.0, 36.0, 60.0))):
        noisy = table.counts[0] + two_sided(np.random.default_rng(0), (REPEATS, 2, 16, 16), 1.0)
        errors.append(np.sqrt(((concordance(noisy) - exact) ** 2).mean()))
    assert errors[0] < 0.95 * errors[1]


@settings(max_examples=80, deadline=None)
@given(
    arrays(float, (2, len(PUBLIC_EDGES)), elements=st.integers(-3, 50)),
    arrays(float, (2, len(PUBLIC_EDGES)), elements=st.integers(-20, 5000)),
    st.sampled_from([5, 8, 32]),
    st.sampled_from([(), (12.0,), (12.0, 24.0, 36.0, 60.0)]),
    st.sampled_from([0.0, 3.0, 700.0, 1e6]),
    st.sampled_from([0.05, 1.0, 20.0]),
)
def test_time_bins_for_noise_increase_and_hold_the_horizons(
    events: np.ndarray, exposure: np.ndarray, bins: int, horizons: tuple[float, ...], patients: float, epsilon: float
) -> None:
    edges = noisy_time_bins(events, exposure, bins, horizons, patients=patients, risk_bins=8, epsilon=epsilon)
    assert len(edges) == bins - 1
    assert (np.diff(edges) > 0).all()
    assert edges[0] > 0
    assert set(horizons) <= set(edges.tolist())


def test_with_little_noise_time_bins_hold_equally_many_patients_and_with_much_they_move_to_the_end() -> None:
    c = cohort("gbsg2")
    args = {"patients": float(len(c.risk)), "risk_bins": 8}
    even = noisy_time_bins(c.event_counts, c.exposure, 8, (), epsilon=50.0, **args)
    np.testing.assert_allclose(even, np.quantile(c.time, np.arange(1, 8) / 8), rtol=0.05)
    noisy = noisy_time_bins(c.event_counts, c.exposure, 8, (), epsilon=0.05, **args)
    assert (noisy[:4] > 1.2 * even[:4]).all()
    with pytest.raises(ValueError, match="exposure must be counted on"):
        noisy_time_bins(c.event_counts, c.exposure[:, 1:], 8, (), epsilon=1.0, **args)


def test_the_number_of_bins_is_the_better_one() -> None:
    assert [bins_for(n, 1.0) for n in (50, 4999, 5000, 1e6)] == [8, 8, 16, 16]
    assert [bins_for(5000, e, k) for e, k in ((0.0, 1), (0.5, 1), (2.0, 1), (1.0, 5))] == [32, 8, 16, 8]
    for name, better in (("gbsg2", 8), ("flchain 1000", 8), ("sim 5000", 16)):
        c, rng = COHORTS[name](), np.random.default_rng(0)
        exact, rmse = concordance_index(c.risk, c.time, c.event), {}
        for bins in (8, 16, 32):
            h = c.noisy_table(bins, bins).counts[0]
            rmse[bins] = ((concordance(h + two_sided(rng, (300, *h.shape), 1.0)) - exact) ** 2).mean()
        assert bins_for(len(c.risk), 1.0) == better == min(rmse, key=rmse.__getitem__)


def test_cell_variance_is_that_of_the_noise() -> None:
    rng = np.random.default_rng(0)
    for epsilon, noises in ((1.0, 1), (0.5, 3)):
        assert two_sided(rng, (200_000,), 1 / epsilon, noises).var() == pytest.approx(
            cell_variance(epsilon, noises), rel=0.03
        )
    assert cell_variance(0.0) == 0.0


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


@pytest.mark.parametrize("patients", [60, 200, 500])
@pytest.mark.parametrize(("epsilon", "noises"), [(0.0, 1), (1.0, 1), (1.0, 5)])
def test_intervals_hold_the_population_value_about_as_often_as_they_say(
    epsilon: float, noises: int, patients: int
) -> None:
    big, trained, times = simulated(6000, 99), simulated(1000, 100), 150
    truth, rng, held = concordance_index(big.risk, big.time, big.event), np.random.default_rng(1), 0
    for seed in range(times):
        one = simulated(patients, seed)
        c = replace(trained, risk=one.risk, time=one.time, event=one.event)
        h = (c.noisy_table(8, 8, noises) if epsilon else c.table(32, 32, ())).counts[0]
        h = h + two_sided(rng, h.shape, 1 / epsilon, noises) if epsilon else h
        _, low, high = interval(concordance, h, rng, draws=200, epsilon=epsilon, noises=noises, bounds=(0.0, 1.0))
        held += int(low <= truth <= high)
    assert held >= 0.95 * times - 3 * (0.95 * 0.05 * times) ** 0.5  # three standard errors
    if not (epsilon and patients < 100):  # noise that may hide everything is not told too small
        assert held < times


def test_draws_without_noise_are_centred_at_the_point() -> None:
    """Copies of a patient are ties: of few patients in coarse bins the draws lie lower than the point."""
    rng = np.random.default_rng(0)
    h = np.stack([simulated(40, seed).table(8, 8, ()).counts[0] for seed in range(60)])
    mean = lambda counts: mean_known(concordance(counts))  # noqa: E731
    draws = mean(redraw(h, 400, rng))
    point, low, high = interval(mean, h, rng, draws=400)
    assert np.median(draws) < point - 0.2 * draws.std()
    assert low < point < high
    assert (low + high) / 2 == pytest.approx(point, abs=0.2 * draws.std())
    assert high - low == pytest.approx(np.diff(np.quantile(draws, [0.025, 0.975]))[0], rel=0.2)
    point, low, high = interval(concordance, h[0] * 0 + np.eye(8)[::-1], rng, draws=50, bounds=(0.0, 1.0))
    assert 0 <= low <= point <= high <= 1
