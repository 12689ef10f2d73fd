"""One scale from sums: it equals scikit-learn's and scipy's on pooled patients, whoever holds them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oncofed.common.blocks import Sum
from oncofed.common.scaling import (
    CLIP,
    MIN_PATIENTS,
    NUMBERS,
    POWERS,
    Scaling,
    groups,
    moments,
    power_moments,
)
from oncofed.server.aggregate import STATISTICS_BITS, Accumulator
from oncofed.server.statistics import POWER_BITS
from scipy.stats import skew, yeojohnson, yeojohnson_llf
from sklearn.preprocessing import StandardScaler


def expression(n: int = 300, seed: int = 0) -> np.ndarray:
    """Genes of many shapes: normal, log-normal, mirrored log-normal, heavy tails, nearly two values."""
    rng = np.random.default_rng(seed)
    columns = (
        rng.normal(7, 2, n),
        rng.lognormal(0, 0.8, n),
        -rng.lognormal(0, 0.8, n),
        rng.standard_t(3, n),
        rng.integers(0, 2, n) + rng.normal(0, 0.05, n),
    )
    return np.stack(columns, axis=1)


def nobody(x: np.ndarray) -> np.ndarray:
    return np.zeros(len(x), dtype=int)


def pooled(x: np.ndarray, group: np.ndarray, count: int, powers: bool = True) -> Scaling:
    scaling = Scaling.from_moments(moments(x, group, count))
    return scaling.with_powers(power_moments(x, group, scaling)) if powers else scaling


def test_without_powers_it_is_scikit_learns_standard_scaler() -> None:
    x = expression()
    theirs = StandardScaler().fit(x)
    ours = pooled(x, nobody(x), 1, powers=False)
    np.testing.assert_allclose(ours.mean[0], theirs.mean_, rtol=1e-12)
    np.testing.assert_allclose(ours.sd[0], theirs.scale_, rtol=1e-9)
    np.testing.assert_allclose(ours.apply(x, nobody(x)), theirs.transform(x), atol=1e-4)


def test_each_group_gets_its_own_scale() -> None:
    x = expression(400)
    cancer = np.arange(400) % 2
    x[cancer == 1] = x[cancer == 1] * 3 + 10
    ours = pooled(x, groups(cancer, True), 2, powers=False).apply(x, cancer)
    for c in (0, 1):
        theirs = StandardScaler().fit_transform(x[cancer == c])
        np.testing.assert_allclose(ours[cancer == c], theirs, atol=1e-4)
    assert (groups(cancer, False) == 0).all()


def clipped(x: np.ndarray, scaling: Scaling) -> np.ndarray:
    return np.clip((x - scaling.mean[0]) / scaling.sd[0], -CLIP, CLIP)


def test_the_chosen_power_is_the_most_likely_by_scipys_likelihood() -> None:
    skews = np.random.default_rng(7).gamma(np.geomspace(0.3, 30, 40), size=(300, 40))
    x = np.hstack([expression(), skews, -skews])
    scaling = pooled(x, nobody(x), 1)
    z = clipped(x, scaling)
    for gene in range(x.shape[1]):
        likelihood = [yeojohnson_llf(power, z[:, gene]) for power in POWERS]
        assert scaling.power[0, gene] == POWERS[int(np.argmax(likelihood))], likelihood
    assert len(set(scaling.power[0])) >= 5  # the genes are of different shapes
    assert scaling.power[0, 1] < 1 < scaling.power[0, 2]  # log-normal, and its mirror image


def test_the_likelihood_itself_is_scipys() -> None:
    """-n/2 log var + (power - 1) log Jacobian, from the sums alone."""
    x = expression(80)
    scaling = pooled(x, nobody(x), 1, powers=False)
    sums, n = power_moments(x, nobody(x), scaling), len(x)
    z = clipped(x, scaling)
    for i, power in enumerate(POWERS):
        mean, squares = sums["power_sum"][0, i] / n, sums["power_squares"][0, i] / n
        ours = -0.5 * n * np.log(squares - mean**2) + (power - 1) * sums["log_jacobian"][0]
        np.testing.assert_allclose(
            ours, [yeojohnson_llf(power, z[:, g]) for g in range(x.shape[1])], rtol=1e-8, atol=1e-9
        )


def test_after_the_power_values_are_scipys_transform_standardised() -> None:
    x = expression()
    scaling = pooled(x, nobody(x), 1)
    out = scaling.apply(x, nobody(x))
    z = clipped(x, scaling)
    for gene in range(x.shape[1]):
        theirs = StandardScaler().fit_transform(yeojohnson(z[:, gene], lmbda=scaling.power[0, gene])[:, None])
        np.testing.assert_allclose(out[:, gene], theirs[:, 0], atol=2e-4)


def test_a_log_normal_gene_is_less_skewed_afterwards() -> None:
    x = np.random.default_rng(1).lognormal(0, 0.8, (2000, 1)) * [[1, -1]]
    plain = pooled(x, nobody(x), 1, powers=False).apply(x, nobody(x))
    better = pooled(x, nobody(x), 1).apply(x, nobody(x))
    assert (np.abs(skew(plain)) > 2.5).all()
    assert (np.abs(skew(better)) < 0.7).all()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 6), st.booleans())
def test_sums_over_any_sites_give_the_pooled_scaling(seed: int, sites: int, by_cancer: bool) -> None:
    rng = np.random.default_rng(seed)
    x = expression(120, seed)
    x[rng.random(x.shape) < 0.1] = np.nan
    cancer = rng.integers(0, 2, 120)
    group, count = groups(cancer, by_cancer), 2 if by_cancer else 1
    site = rng.integers(0, sites, 120)  # a site may hold one patient, or none of a cancer type

    def added(shapes: dict[str, tuple[int, ...]], bits: int, of_site) -> Sum:  # type: ignore[no-untyped-def]
        accumulator = Accumulator(shapes, bits)
        for s in np.unique(site):
            accumulator.add(of_site(x[site == s], group[site == s]))
        return accumulator.total()

    shape, powers = (count, 5), (count, len(POWERS), 5)
    first = added(dict.fromkeys(("n", "sum", "squares"), shape), STATISTICS_BITS, lambda x, g: moments(x, g, count))
    plain = Scaling.from_moments(first)
    shapes = {"n": shape, "log_jacobian": shape, "power_sum": powers, "power_squares": powers}
    federated = plain.with_powers(added(shapes, POWER_BITS, lambda x, g: power_moments(x, g, plain)))
    wanted = pooled(x, group, count)
    np.testing.assert_array_equal(federated.power, wanted.power)
    for name in ("mean", "sd", "centre", "spread"):
        np.testing.assert_allclose(getattr(federated, name), getattr(wanted, name), rtol=1e-5, atol=1e-6)


def test_a_group_with_few_patients_takes_the_scale_of_all() -> None:
    x = expression(200)
    group = (np.arange(200) < MIN_PATIENTS - 1).astype(int)
    x[group == 1] = x[group == 1] * 5 - 3
    ours, everybody = pooled(x, group, 2, powers=False), pooled(x, nobody(x), 1, powers=False)
    np.testing.assert_allclose(ours.mean[1], everybody.mean[0])
    np.testing.assert_allclose(ours.sd[1], everybody.sd[0])
    assert (np.abs(ours.mean[0] - everybody.mean[0]) > 1e-3).all()
    with_powers = pooled(x, group, 2)
    sums = power_moments(x, group, ours)
    all_ = ours.with_powers({k: v.sum(0, keepdims=True) for k, v in sums.items()})
    np.testing.assert_array_equal(with_powers.power[1], all_.power[0])
    np.testing.assert_allclose(with_powers.centre[1], all_.centre[0])


def test_one_patient_more_and_the_group_has_a_scale_of_its_own() -> None:
    x = expression(200)
    group = (np.arange(200) < MIN_PATIENTS).astype(int)
    ours = pooled(x, group, 2, powers=False)
    np.testing.assert_allclose(ours.mean[1], x[:MIN_PATIENTS].mean(0))


def test_a_missing_value_becomes_zero_and_moves_no_other() -> None:
    x = expression()
    holes = x.copy()
    holes[::3, 1] = np.nan
    scaling = pooled(holes, nobody(x), 1)
    out = scaling.apply(holes, nobody(x))
    assert (out[::3, 1] == 0).all()
    present = np.delete(np.arange(len(x)), np.s_[::3])
    alone = pooled(x[present], nobody(present), 1)
    assert scaling.power[0, 1] == alone.power[0, 1]
    np.testing.assert_allclose(out[present, 1], alone.apply(x[present], nobody(present))[:, 1], atol=1e-5)


@pytest.mark.parametrize("powers", [False, True])
def test_genes_without_values_or_without_spread_stay_finite(powers: bool) -> None:
    x = expression()
    x[:, 0], x[:, 1] = np.nan, 4.0
    out = pooled(x, nobody(x), 1, powers).apply(x, nobody(x))
    assert np.isfinite(out).all()
    assert (out[:, 0] == 0).all()
    np.testing.assert_allclose(out[:, 1], 0.0, atol=1e-6)


def test_a_gene_that_never_varied_in_training_is_no_lever_afterwards() -> None:
    """All powers are as likely for a constant; the most extreme one would turn a later -5 into -7776."""
    x = expression()
    x[:, 1] = 4.0 + np.random.default_rng(0).normal(0, 1e-5, len(x))
    scaling = pooled(x, nobody(x), 1)
    later = np.repeat(x.mean(0, keepdims=True), 3, axis=0)
    later[:, 1] = [-1.0, 4.0, 9.0]
    np.testing.assert_allclose(scaling.apply(later, nobody(later))[:, 1], [-5.0, 0.0, 5.0], atol=1e-3)


def test_scaling_survives_a_message() -> None:
    x = expression(60)
    scaling = pooled(x, nobody(x), 1)
    again = Scaling.of(scaling.arrays())
    np.testing.assert_array_equal(again.apply(x, nobody(x)), scaling.apply(x, nobody(x)))


def test_numbers_counts_what_leaves_for_each_gene_and_group() -> None:
    """The door withholds cells with so few patients that their values could be solved for: it must know the count."""
    x = expression(40)
    sums = power_moments(x, nobody(x), pooled(x, nobody(x), 1, powers=False))
    assert sum(v[0].size // x.shape[1] for v in sums.values()) == NUMBERS
