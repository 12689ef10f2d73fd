"""The evaluation table against scikit-survival, lifelines and exact pair counts."""

from __future__ import annotations

import itertools
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from lifelines import KaplanMeierFitter
from oncofed.common.evaluation.bootstrap import interval
from oncofed.common.evaluation.calibration import calibration, equal_groups, halves
from oncofed.common.evaluation.censoring import survival_at_edges
from oncofed.common.evaluation.concordance import by_score, concordance, concordance_bounds, uno_concordance
from oncofed.common.evaluation.edges import risk_bins, time_bins
from oncofed.common.evaluation.scores import auc, brier, integrated_brier, null_survival, predicted_survival
from oncofed.common.evaluation.table import RiskTimeTable, events_and_leaving, in_rows, risk_time_table
from oncofed.common.metrics import bootstrap_concordance, concordance_index
from oncofed.common.survival import PUBLIC_EDGES, RISK_EDGES, survival_curve
from sksurv.metrics import brier_score, concordance_index_ipcw, cumulative_dynamic_auc, integrated_brier_score
from sksurv.util import Surv

sys.path.insert(0, str(Path(__file__).parents[1]))
from survival_cohorts import COHORTS, HORIZONS, Cohort, cohort

RISK_COUNTS = arrays(
    float, (2, len(RISK_EDGES) + 1), elements=st.integers(-3, 2000).map(lambda n: max(n - 1900, n // 1000))
)
EVENT_COUNTS = arrays(float, (2, len(PUBLIC_EDGES)), elements=st.integers(-3, 50))


def predictions(c: Cohort, table: RiskTimeTable) -> np.ndarray:
    return predicted_survival(table.mean_risk, c.log_baseline[None], c.grid, table.time_edges)[0]


@settings(max_examples=60, deadline=None)
@given(RISK_COUNTS, st.sampled_from([2, 8, 32]))
def test_risk_bins_increase_around_the_median_and_hold_their_mean(counts: np.ndarray, bins: int) -> None:
    edges, means = risk_bins(counts, bins)
    assert (np.diff(edges) > 0).all()
    assert (means[:, :-1] < edges + 1e-9).all()
    assert (means[:, 1:] > edges - 1e-9).all()
    for row, edge in zip(counts, edges, strict=True):
        filled = np.maximum(row if row.max() > 0 else np.maximum(counts, 0).sum(0), 0)
        if filled.any():
            below = np.interp(edge[bins // 2 - 1], RISK_EDGES, np.cumsum(filled)[:-1] / filled.sum())
            outside = abs(edge[bins // 2 - 1]) > 5
            assert outside or below == pytest.approx(0.5, abs=1e-9)


def test_risks_all_in_one_bin_or_of_nobody_still_give_bins() -> None:
    counts = np.zeros((2, len(RISK_EDGES) + 1))
    counts[0, 100] = 17
    edges, means = risk_bins(counts, 4)
    np.testing.assert_allclose(edges[0], [-0.0375, -0.025, -0.0125], atol=1e-12)
    np.testing.assert_allclose(means[0], [-0.04375, -0.03125, -0.01875, -0.00625], atol=1e-12)
    np.testing.assert_allclose(edges[1], edges[0])
    assert (np.diff(risk_bins(counts * 0, 32)[0]) > 0).all()
    with pytest.raises(ValueError, match="even"):
        risk_bins(counts, 5)


@settings(max_examples=60, deadline=None)
@given(EVENT_COUNTS, st.sampled_from([5, 8, 32]), st.sampled_from([(), (12.0,), HORIZONS]))
def test_time_bins_increase_and_hold_the_horizons(counts: np.ndarray, bins: int, horizons: tuple[float, ...]) -> None:
    edges = time_bins(counts, bins, horizons)
    assert len(edges) == bins - 1
    assert (np.diff(edges) > 0).all()
    assert edges[0] > 0
    assert set(horizons) <= set(edges.tolist())


def test_time_bins_refuse_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="ask for 5 bins"):
        time_bins(np.ones(len(PUBLIC_EDGES)), 4, HORIZONS)
    with pytest.raises(ValueError, match="increase"):
        time_bins(np.ones(len(PUBLIC_EDGES)), 8, (24.0, 12.0))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 5))
def test_tables_of_sites_add_up_to_the_pooled_table(seed: int, sites: int) -> None:
    rng = np.random.default_rng(seed)
    n = 120
    patients = rng.normal(size=n), rng.exponential(20, n), rng.integers(0, 2, n), rng.integers(0, 3, n)
    risk_edges, time_edges = np.sort(rng.normal(size=(3, 7)), 1), np.array([6.0, 12.0, 24.0])
    site = rng.integers(0, sites, n)
    parts = [risk_time_table(*(v[site == s] for v in patients), risk_edges, time_edges) for s in range(sites)]
    pooled = risk_time_table(*patients, risk_edges, time_edges)
    assert np.array_equal(sum(parts), pooled)
    assert pooled.shape == (3, 2, 8, 4)
    np.testing.assert_array_equal(pooled.sum((1, 2, 3)), np.bincount(patients[3], minlength=3))


def test_a_patient_on_an_edge_belongs_to_the_bin_before_it() -> None:
    edges = np.array([[0.0, 1.0]])
    counts = risk_time_table([0.0, 1.0, 1.1], [12.0, 12.1, 30.0], [1, 0, 1], [0, 0, 0], edges, np.array([12.0, 24.0]))
    assert np.argwhere(counts[0]).tolist() == [[0, 1, 1], [1, 0, 0], [1, 2, 2]]
    with pytest.raises(ValueError, match="cancer types must be 0 to 0"):
        risk_time_table([0.0], [1.0], [1], [2], edges, np.array([12.0]))
    with pytest.raises(ValueError, match="finite"):
        risk_time_table([np.nan], [1.0], [1], [0], edges, np.array([12.0]))


def test_a_table_adds_selects_and_refuses_other_edges() -> None:
    table = cohort("gbsg2").table(8, 8)
    two = RiskTimeTable(*(np.concatenate([v, v]) if v.ndim > 1 else v for v in vars(table).values()))
    assert ((two + two).patients == 2 * 686).all()
    assert (two + two).of([1]).counts.shape == (1, 2, 8, 8)
    with pytest.raises(ValueError, match="same risk and time edges"):
        table + replace(table, time_edges=table.time_edges + 1)
    with pytest.raises(ValueError, match="increase strictly"):
        replace(table, risk_edges=table.risk_edges[:, ::-1])
    with pytest.raises(ValueError, match="want risk edges"):
        replace(table, time_edges=table.time_edges[:-1])
    with pytest.raises(ValueError, match="13 months is not an edge"):
        table.until(13.0)


# A table holds a patient's risk to a share 1 / R of all: what it cannot know is luck that gets smaller with patients.
@pytest.mark.parametrize(
    ("name", "limit"), [("breast", 0.004), ("gbsg2", 0.001), ("whas500", 0.002), ("flchain", 0.001)]
)
def test_concordance_of_32_by_32_cells(name: str, limit: float) -> None:
    c = cohort(name).some(4000)
    exact = concordance_index(c.risk, c.time, c.event)
    assert concordance(c.table().counts[0]) == pytest.approx(exact, abs=limit)
    wide = np.linspace(-3, 3, 33)[1:-1] * (1.0 if name != "breast" else 0.5), np.linspace(0, c.time.max(), 33)[1:-1]
    assert concordance(c.counts(*wide)) == pytest.approx(exact, abs=0.005)


def test_filling_in_ties_beats_leaving_them_out() -> None:
    def ties_left_out(counts: np.ndarray) -> float:
        later = np.flip(np.cumsum(np.flip(counts.sum(0), 1), 1), 1) - counts.sum(0)
        pairs = (counts[1].sum(0) * later.sum(0)).sum()
        return float((counts[1] * (np.cumsum(later, 0) - later / 2)).sum() / pairs)

    errors = []
    for name, seed in itertools.product(COHORTS, range(4)):
        c = cohort(name, True, seed).some(1000)
        h, exact = c.table(16, 16).counts[0], concordance_index(c.risk, c.time, c.event)
        errors.append((concordance(h) - exact, ties_left_out(h) - exact))
    ours, theirs = np.sqrt((np.array(errors) ** 2).mean(0))
    assert ours < 0.8 * theirs


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(5, 60))
def test_a_table_with_a_bin_for_everybody_is_exact(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    risk, time, event = rng.normal(size=n), rng.exponential(30, n), rng.integers(0, 2, n)
    event[np.argsort(time)[0]], event[np.argsort(time)[-1]] = 1, 0
    edges = np.sort(risk)[:-1], np.sort(time)[:-1]
    h = risk_time_table(risk, time, event, np.zeros(n, dtype=int), edges[0][None], edges[1])[0]
    y, k = Surv.from_arrays(event.astype(bool), time), n // 2
    t = edges[1][k]
    assert concordance(h) == pytest.approx(concordance_index(risk, time, event))
    for bound in concordance_bounds(h):
        assert bound == pytest.approx(concordance_index(risk, time, event))
    assert auc(h, k + 1) == pytest.approx(cumulative_dynamic_auc(y, y, risk, [t], tied_tol=0)[0][0])
    survival = survival_curve_of_risk(np.sort(risk), edges[1])
    expected = brier_score(y, y, survival_curve_of_risk(risk, edges[1][k : k + 1]), [t])[1][0]
    assert brier(h, survival)[k] == pytest.approx(expected)
    fit = KaplanMeierFitter().fit(time, event)
    np.testing.assert_allclose(survival_at_edges(h), fit.survival_function_at_times(edges[1]), atol=1e-12)
    uncut = (event == 1) & (time <= t)
    if uncut.sum() > 1 and fit_censoring(time, event)(t) > 0.05:
        uno = concordance_index_ipcw(y, y, risk, tau=np.nextafter(t, np.inf), tied_tol=0)[0]
        assert uno_concordance(h, k + 1) == pytest.approx(uno)


def survival_curve_of_risk(risk: np.ndarray, times: np.ndarray) -> np.ndarray:
    return np.exp(-np.exp(risk)[:, None] * times[None] / 30)


def fit_censoring(time: np.ndarray, event: np.ndarray) -> KaplanMeierFitter:
    return KaplanMeierFitter().fit(time, 1 - event).predict


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 100_000), st.integers(2, 60), st.integers(2, 12), st.booleans())
def test_certified_bounds_hold_with_and_without_ties(seed: int, n: int, bins: int, ties: bool) -> None:
    rng = np.random.default_rng(seed)
    risk, time, event = rng.normal(size=n), rng.exponential(10, n), rng.integers(0, 2, n)
    if ties:
        risk, time = np.round(risk, 0), np.ceil(time / 4)
    edges = np.sort(rng.uniform(-2, 2, bins - 1)), np.sort(rng.uniform(1, 25, bins - 1))
    h = risk_time_table(risk, time, event, np.zeros(n, dtype=int), edges[0][None], edges[1])[0]
    low, high = concordance_bounds(h)
    exact, ours = concordance_index(risk, time, event), concordance(h)
    assert np.isnan(exact) or low - 1e-12 <= exact <= high + 1e-12
    assert np.isnan(ours) or low - 1e-12 <= ours <= high + 1e-12


@pytest.mark.parametrize("name", COHORTS)
def test_auc_and_uno_against_scikit_survival(name: str) -> None:
    c = cohort(name).some(4000)
    table = c.table()
    h, hs = table.counts[0], np.array(HORIZONS)
    expected = cumulative_dynamic_auc(c.truth, c.truth, c.risk, hs, tied_tol=0)[0]
    ours = np.array([auc(h, table.until(t)) for t in HORIZONS])
    # Within a risk bin a case's rank is off by about 0.29 / R, independently of the other cases'.
    cases = np.array([((c.time <= t) & (c.event == 1)).sum() for t in HORIZONS])
    assert (np.abs(ours - expected) < 0.0005 + 2 * 0.29 / 32 / np.sqrt(cases)).all()
    if name == "flchain":
        np.testing.assert_allclose(ours, expected, atol=0.001)
    uno = concordance_index_ipcw(c.truth, c.truth, c.risk, tau=60.0, tied_tol=0)[0]
    assert uno_concordance(h, table.until(60.0)) == pytest.approx(uno, abs=0.004 if name == "breast" else 0.0025)


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("name", COHORTS)
def test_brier_against_scikit_survival(name: str, held_out: bool) -> None:
    c = cohort(name, held_out)
    table = c.table()
    h, until, hs = table.counts[0], table.until(60.0), np.array(HORIZONS)
    survival = predictions(c, table)
    at_horizons = brier_score(c.truth, c.truth, survival_curve(c.log_baseline, c.grid, c.risk, hs), hs)[1]
    ours = brier(h, survival)
    np.testing.assert_allclose(ours[[table.until(t) - 1 for t in HORIZONS]], at_horizons, atol=0.003)
    # Theirs begins at the first patient who leaves, ours at 0, where everybody lives and the score is 0.
    times = np.linspace(c.time.min(), 60.0, 600)
    area = integrated_brier_score(c.truth, c.truth, survival_curve(c.log_baseline, c.grid, c.risk, times), times) * (
        60.0 - times[0]
    )
    before = np.linspace(0, times[0], 50)
    area += np.trapezoid(((1 - survival_curve(c.log_baseline, c.grid, c.risk, before)) ** 2).mean(0), before)
    assert integrated_brier(h, survival, table.time_edges, until) == pytest.approx(area / 60.0, abs=0.0015)


def test_the_model_beats_the_null_model_and_the_null_model_scores_zero() -> None:
    c = cohort("flchain")
    table = c.table()
    h = table.counts[0]
    null = null_survival(h)
    args = table.time_edges, table.until(60.0)
    scaled = 1 - integrated_brier(h, predictions(c, table), *args) / integrated_brier(h, null, *args)
    assert 0.1 < scaled < 0.4
    km = KaplanMeierFitter().fit(c.time, c.event).survival_function_at_times(table.time_edges)
    np.testing.assert_allclose(null[0], km, atol=0.002)


def test_pooled_over_cancers_is_the_table_of_the_patients_with_their_bins_scores() -> None:
    rng = np.random.default_rng(3)
    n = 500
    risk, time, event, cancer = rng.normal(size=n), rng.exponential(20, n), rng.integers(0, 2, n), rng.integers(0, 3, n)
    risk_edges, time_edges = np.tile([-1.0, 0.0, 1.0], (3, 1)), np.arange(2.0, 60, 2)
    counts = risk_time_table(risk, time, event, cancer, risk_edges, time_edges)
    score = np.round(rng.normal(size=(3, 4)), 1)
    score[2, 3] = score[0, 1]  # a tie between cancer types
    own = score[cancer, np.searchsorted(risk_edges[0], risk)]
    distinct = np.unique(score)
    pooled = risk_time_table(own, time, event, np.zeros(n, dtype=int), distinct[None, :-1], time_edges)[0]
    assert np.array_equal(by_score(counts, score), pooled)
    batch = np.stack([counts, 2 * counts])
    assert np.array_equal(by_score(batch, score)[1], 2 * pooled)
    assert np.array_equal(in_rows(counts, -4).sum(1), counts.sum((0, 2)))
    with pytest.raises(ValueError, match="each of 3 cancer types and 4 risk bins"):
        by_score(counts, score[:2])


def test_statistics_of_many_tables_at_once_are_those_of_each() -> None:
    c = cohort("gbsg2")
    table = c.table(16, 16)
    survival, until = predictions(c, table), table.until(36.0)
    batch = np.random.default_rng(0).poisson(table.counts, (3, 2, *table.counts.shape[1:])).astype(float)
    for statistic in (
        concordance,
        lambda h: uno_concordance(h, until),
        lambda h: auc(h, until),
        lambda h: brier(h, survival),
        lambda h: integrated_brier(h, survival, table.time_edges, until),
        lambda h: brier(h, null_survival(h)),
        lambda h: (
            np.stack(concordance_bounds(h)) if h.ndim == 3 else np.moveaxis(np.stack(concordance_bounds(h)), 0, -1)
        ),
    ):
        together = statistic(batch)
        for i, j in np.ndindex(3, 2):
            np.testing.assert_allclose(together[i, j], statistic(batch[i, j]))


def test_calibration_groups_hold_everybody_and_agree_with_patients() -> None:
    c = cohort("flchain", held_out=True)
    table = c.table()
    until = table.until(60.0)
    result = calibration(table.counts, predictions(c, table)[None, :, until - 1], until)
    assert len(result.patients) == 5
    assert result.patients.sum() == len(c.risk)
    assert (result.patients > 0.7 * len(c.risk) / 5).all()
    survival = survival_curve(c.log_baseline, c.grid, c.risk, np.array([60.0]))[:, 0]
    cuts = np.cumsum(result.patients).astype(int)[:-1]
    for g, rows in enumerate(np.split(np.argsort(survival), cuts)):
        km = KaplanMeierFitter().fit(c.time[rows], c.event[rows])
        assert result.observed[g] == pytest.approx(km.predict(60.0), abs=0.004)
        assert result.predicted[g] == pytest.approx(survival[rows].mean(), abs=0.02)
        assert result.lower[g] < result.observed[g] < result.upper[g]


def test_groups_split_at_the_training_median_and_are_never_empty() -> None:
    c = cohort("whas500")
    table = c.table()
    events, leaving = events_and_leaving(table.counts[0], halves(32))
    high = c.risk > table.risk_edges[0, 15]
    assert leaving.sum(1).tolist() == [(~high).sum(), high.sum()]
    assert events.sum(1).tolist() == [c.event[~high].sum(), c.event[high].sum()]
    assert abs(high.sum() - 250) <= 2
    owner = equal_groups(np.array([100.0, 0, 1, 1]), np.arange(4.0), 5)
    assert sorted(set(owner.tolist())) == list(range(owner.max() + 1))


def test_bootstrap_agrees_with_resampling_patients() -> None:
    c = cohort("gbsg2")
    by_hand = bootstrap_concordance(c.risk, c.time, c.event, 400, np.random.default_rng(0))
    point, low, high = interval(concordance, c.table().counts[0], np.random.default_rng(0), draws=1000)
    assert point == pytest.approx(concordance_index(c.risk, c.time, c.event), abs=0.001)
    width = np.diff(np.quantile(by_hand, [0.025, 0.975]))[0]
    assert high - low == pytest.approx(width, rel=0.15)
    assert low < point < high


def test_bootstrap_of_several_values_and_of_nothing() -> None:
    c = cohort("whas500")
    counts = np.stack([c.table().counts[0], np.zeros((2, 32, 32))])
    point, low, high = interval(concordance, counts, np.random.default_rng(0), draws=50)
    assert low[0] < point[0] < high[0]
    assert np.isnan([point[1], low[1], high[1]]).all()
