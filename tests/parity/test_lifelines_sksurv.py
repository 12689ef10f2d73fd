"""Our numbers against lifelines and scikit-survival."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lifelines import CoxPHFitter, PiecewiseExponentialFitter
from oncofed.client.data.cohort import Cohort
from oncofed.common.metrics import bootstrap_concordance, concordance_index, pair_counts, survival_sums
from oncofed.common.survival import TimeGrid, piecewise_exponential_loss
from oncofed.deploy.comparison.ridge import COVARIATE_PENALTY, Inputs, ridge_path
from sksurv.metrics import concordance_index_censored


@settings(max_examples=60, deadline=None)
@given(st.integers(3, 40), st.integers(0, 10_000))
def test_concordance_equals_scikit_survival(n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    time, event, risk = rng.integers(1, 12, n).astype(float), rng.integers(0, 2, n), rng.integers(0, 6, n).astype(float)
    _, comparable = pair_counts(risk, time, event)
    if comparable == 0:
        assert np.isnan(concordance_index(risk, time, event))
        return
    c, conc, disc, tied, _ = concordance_index_censored(event.astype(bool), time, risk, tied_tol=0)
    assert comparable == conc + disc + tied
    assert concordance_index(risk, time, event) == pytest.approx(c)


def test_pair_counts_by_cancer_add_up_over_sites() -> None:
    rng = np.random.default_rng(0)
    n = 90
    risk, time, event, cancer = (
        rng.normal(size=n),
        rng.exponential(size=n),
        rng.integers(0, 2, n),
        rng.integers(0, 3, n),
    )
    sums = survival_sums(risk, time, event, np.ones(n), cancer, 4)
    assert sums["patients"].sum() == sums["loss"].sum() == n
    assert sums["patients"][3] == 0
    for c in range(3):
        rows = cancer == c
        assert (sums["concordant"][c], sums["comparable"][c]) == pair_counts(risk[rows], time[rows], event[rows])


def test_bootstrap_equals_resampling_by_hand() -> None:
    rng = np.random.default_rng(1)
    risk, time, event = rng.normal(size=30), rng.exponential(size=30), rng.integers(0, 2, 30)
    draws = bootstrap_concordance(risk, time, event, 20, np.random.default_rng(5))
    counts = np.random.default_rng(5).multinomial(30, np.full(30, 1 / 30), size=20)
    for draw, w in zip(draws, counts, strict=True):
        rows = np.repeat(np.arange(30), w)
        assert draw == pytest.approx(concordance_index(risk[rows], time[rows], event[rows]))


def test_piecewise_exponential_baseline_equals_lifelines() -> None:
    rng = np.random.default_rng(2)
    time, event = rng.exponential(20, 400) + 0.01, rng.integers(0, 2, 400)
    grid = TimeGrid((0.0, 5.0, 15.0, 40.0))
    a = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [a], max_iter=300, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )
    parts = [torch.tensor(grid.exposure(time)), torch.tensor(grid.interval(time)), torch.tensor(event.astype(float))]

    def objective() -> torch.Tensor:
        optimizer.zero_grad()
        loss = piecewise_exponential_loss(torch.zeros(400, dtype=torch.float64), a.expand(400, -1), *parts).mean()
        loss.backward()
        return loss

    optimizer.step(objective)
    theirs = PiecewiseExponentialFitter(breakpoints=list(grid.starts[1:])).fit(time, event)
    np.testing.assert_allclose(np.exp(-a.detach().numpy()[0]), theirs.params_.to_numpy(), rtol=1e-3)


def test_piecewise_exponential_approaches_cox_on_a_fine_grid() -> None:
    rng = np.random.default_rng(3)
    x = rng.normal(size=(800, 3))
    death = rng.exponential(30 * np.exp(-(x @ [0.8, -0.5, 0.3])))
    stop = rng.uniform(1, 60, 800)
    time, event = np.minimum(death, stop), (death <= stop).astype(float)
    grid = TimeGrid((0.0, *np.quantile(time[event == 1], np.arange(1, 40) / 40)))
    beta = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    a = torch.full((1, len(grid)), -3.0, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([beta, a], max_iter=500, tolerance_grad=1e-10, line_search_fn="strong_wolfe")
    parts = [torch.tensor(grid.exposure(time)), torch.tensor(grid.interval(time)), torch.tensor(event)]

    def objective() -> torch.Tensor:
        optimizer.zero_grad()
        loss = piecewise_exponential_loss(torch.tensor(x) @ beta, a.expand(800, -1), *parts).mean()
        loss.backward()
        return loss

    optimizer.step(objective)
    frame = pd.DataFrame(x, columns=list("abc")).assign(time=time, event=event)
    cox = CoxPHFitter().fit(frame, "time", "event").params_.to_numpy()
    np.testing.assert_allclose(beta.detach().numpy(), cox, atol=0.005)


def test_ridge_equals_lifelines_stratified_ridge_cox() -> None:
    rng = np.random.default_rng(4)
    n, g = 240, 5
    x = rng.normal(size=(n, g))
    x = (x - x.mean(0)) / x.std(0, ddof=1)  # lifelines penalises on the scale of standardised covariates
    cancer = rng.integers(0, 3, n)
    time = rng.exponential(np.exp(-x[:, 0] + 0.5 * x[:, 1]) * (1 + cancer))
    event = rng.integers(0, 2, n)
    data = ridge_inputs(x, np.empty((n, 0)), time, event, cancer)
    frame = pd.DataFrame(x).assign(time=time, event=event, cancer=cancer)
    frame.columns = frame.columns.astype(str)
    for penalty, predict in zip((0.05, 0.5), ridge_path(data, 3, (0.05, 0.5)), strict=True):
        # lifelines divides the likelihood by n, ours is the mean over events: the penalties relate by events / n
        theirs = CoxPHFitter(penalizer=penalty * event.sum() / n).fit(frame, "time", "event", strata=["cancer"])
        # the risk of a patient who has one gene alone, at 1, is that gene's coefficient
        beta = predict(ridge_inputs(np.eye(g), np.empty((g, 0)), *(a[:g] for a in (time, event, cancer))))
        np.testing.assert_allclose(beta, theirs.params_.to_numpy(), atol=2e-4)


def ridge_inputs(
    x: np.ndarray, v: np.ndarray, time: np.ndarray, event: np.ndarray, cancer: np.ndarray, own: bool = False
) -> Inputs:
    n = len(x)
    cohort = Cohort(x.astype(np.float32), v, time, event, cancer, np.zeros(n, int), np.arange(n).astype(str))
    return Inputs(x, v, cohort, own)


def test_ridge_shrinks_covariates_by_a_penalty_of_their_own() -> None:
    rng = np.random.default_rng(5)
    n = 300
    x, v = rng.normal(size=(n, 3)), rng.normal(size=(n, 1))
    x, v = ((a - a.mean(0)) / a.std(0, ddof=1) for a in (x, v))
    cancer, event = rng.integers(0, 2, n), rng.integers(0, 2, n)
    time = rng.exponential(np.exp(-0.8 * v[:, 0] - 0.5 * x[:, 0]))
    predict = next(ridge_path(ridge_inputs(x, v, time, event, cancer), 2, (5.0,)))
    ours = predict(ridge_inputs(np.eye(4)[:, :3], np.eye(4)[:, 3:], *(a[:4] for a in (time, event, cancer))))
    frame = pd.DataFrame(np.hstack([x, v]), columns=list("abcd")).assign(time=time, event=event, cancer=cancer)
    strength = np.array([5.0, 5.0, 5.0, COVARIATE_PENALTY]) * event.sum() / n
    theirs = CoxPHFitter(penalizer=strength).fit(frame, "time", "event", strata=["cancer"])
    np.testing.assert_allclose(ours, theirs.params_.to_numpy(), atol=2e-4)


def test_own_coefficients_equal_a_ridge_on_genes_written_once_for_all_and_once_by_cancer() -> None:
    rng = np.random.default_rng(6)
    n, g = 200, 3
    x, cancer, event = rng.normal(size=(n, g)), rng.integers(0, 2, n), rng.integers(0, 2, n)
    time = rng.exponential(np.exp(-x[:, 0] * (2 * cancer - 1)))  # the gene that matters, with opposite signs
    v = np.empty((n, 0))
    own = next(ridge_path(ridge_inputs(x, v, time, event, cancer, own=True), 2, (0.1,)))
    wide = np.hstack([x, x * (cancer == 0)[:, None], x * (cancer == 1)[:, None]])
    copies = next(ridge_path(ridge_inputs(wide, v, time, event, cancer), 2, (0.1,)))
    risk = own(ridge_inputs(x, v, time, event, cancer, own=True))
    np.testing.assert_allclose(risk, copies(ridge_inputs(wide, v, time, event, cancer)), atol=1e-4)
    assert np.corrcoef(risk[cancer == 0], x[cancer == 0, 0])[0, 1] < -0.5
    assert np.corrcoef(risk[cancer == 1], x[cancer == 1, 0])[0, 1] > 0.5
