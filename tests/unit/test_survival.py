"""Time grid, piecewise-exponential likelihood, baselines."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oncofed.common.survival import (
    PUBLIC_EDGES,
    TimeGrid,
    coarsen,
    cox_loss,
    event_table,
    initial_log_baseline,
    piecewise_exponential_loss,
    survival_curve,
)

GRID = TimeGrid((0.0, 6.0, 18.0, 60.0))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0.01, 500.0), min_size=1, max_size=30))
def test_exposure_adds_up_to_follow_up(times: list[float]) -> None:
    t = np.array(times)
    exposure = GRID.exposure(t)
    np.testing.assert_allclose(exposure.sum(1), t)
    k = GRID.interval(t)
    assert (exposure[np.arange(len(t)), k] > 0).all()
    assert all((exposure[i, k[i] + 1 :] == 0).all() for i in range(len(t)))


def test_event_at_an_edge_belongs_to_the_interval_before() -> None:
    assert GRID.interval(np.array([6.0, 6.01, 18.0, 300.0])).tolist() == [0, 1, 1, 3]


def test_grid_must_start_at_zero_and_increase() -> None:
    for starts in ((1.0, 2.0), (0.0, 2.0, 2.0), ()):
        with pytest.raises(ValueError, match="begin at 0 and increase"):
            TimeGrid(starts)


def test_grid_from_events_balances_events() -> None:
    rng = np.random.default_rng(0)
    time = rng.exponential(30, 4000)
    events, _ = event_table(time, np.ones(4000, int), np.zeros(4000, int), 1)
    grid = TimeGrid.from_events(events.sum(0), 8)
    counts = coarsen(events, grid)[0]
    assert len(grid) == 8
    assert counts.sum() == 4000
    assert counts.max() / counts.min() < 2.0
    assert TimeGrid.from_events(np.zeros(len(PUBLIC_EDGES)), 8).starts == (0.0,)


def test_coarsening_equals_counting_on_the_coarse_grid() -> None:
    rng = np.random.default_rng(1)
    time, event, cancer = rng.exponential(40, 300) + 0.01, rng.integers(0, 2, 300), rng.integers(0, 3, 300)
    events, exposure = event_table(time, event, cancer, 3)
    for c in range(3):
        rows = cancer == c
        np.testing.assert_allclose(coarsen(exposure, GRID)[c], GRID.exposure(time[rows]).sum(0))
        expected = np.bincount(GRID.interval(time[rows]), weights=event[rows], minlength=4)
        np.testing.assert_allclose(coarsen(events, GRID)[c], expected)


def loss_of_one_cancer(risk: np.ndarray, log_baseline: np.ndarray, time: np.ndarray, event: np.ndarray) -> np.ndarray:
    t = [
        torch.tensor(a)
        for a in (
            risk,
            np.tile(log_baseline, (len(risk), 1)),
            GRID.exposure(time),
            GRID.interval(time),
            event.astype(float),
        )
    ]
    return piecewise_exponential_loss(*t).numpy()


def test_likelihood_is_the_density_of_the_survival_curve() -> None:
    """-L_i is log h(t) + log S(t) for an event and log S(t) otherwise, with S from `survival_curve`."""
    log_a, risk = np.log([0.02, 0.05, 0.01, 0.03]), np.array([0.3, -0.4, 1.0])
    time, event = np.array([3.0, 25.0, 100.0]), np.array([1, 0, 1])
    loss = loss_of_one_cancer(risk, log_a, time, event)
    for i in range(3):
        survival = survival_curve(log_a, GRID, risk[i : i + 1], time[i : i + 1])[0, 0]
        log_hazard = log_a[GRID.interval(time[i : i + 1])[0]] + risk[i]
        assert loss[i] == pytest.approx(-np.log(survival) - event[i] * log_hazard, rel=1e-9)


def test_constant_hazard_mle_is_events_over_exposure() -> None:
    rng = np.random.default_rng(2)
    time, event = rng.exponential(25, 500) + 0.01, (rng.random(500) < 0.7).astype(int)
    a = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [a], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )
    tensors = [torch.tensor(GRID.exposure(time)), torch.tensor(GRID.interval(time)), torch.tensor(event.astype(float))]

    def objective() -> torch.Tensor:
        optimizer.zero_grad()
        loss = piecewise_exponential_loss(torch.zeros(500, dtype=torch.float64), a.expand(500, -1), *tensors).mean()
        loss.backward()
        return loss

    optimizer.step(objective)
    d = np.bincount(GRID.interval(time), weights=event, minlength=4)
    np.testing.assert_allclose(a.detach().numpy()[0], np.log(d / GRID.exposure(time).sum(0)), atol=1e-6)


def test_initial_baseline_is_occurrence_over_exposure_and_finite_where_empty() -> None:
    events = np.array([[400.0, 300.0], [0.0, 0.0], [30.0, 0.0]])
    exposure = np.array([[10000.0, 20000.0], [0.0, 0.0], [500.0, 10.0]])
    a = initial_log_baseline(events, exposure)
    assert np.isfinite(a).all()
    np.testing.assert_allclose(a[0], np.log(events[0] / exposure[0]), atol=0.05)
    assert a[2, 0] > a[0, 0]  # the deadlier cancer starts higher


def test_survival_curve_falls_from_one() -> None:
    s = survival_curve(np.log([0.02, 0.05, 0.01, 0.03]), GRID, np.array([0.0, 1.0]), np.array([0.0, 5.0, 50.0]))
    assert (s[:, 0] == 1).all()
    assert (np.diff(s, axis=1) < 0).all()
    assert (s[1, 1:] < s[0, 1:]).all()
    assert s[0, 1] == pytest.approx(np.exp(-0.02 * 5))


def test_cox_is_stratified_by_cancer() -> None:
    """Shifting all risks of one cancer changes nothing: its risk sets hold no other cancer."""
    rng = np.random.default_rng(3)
    risk, time = torch.tensor(rng.normal(size=60)), torch.tensor(rng.exponential(size=60))
    event, cancer = torch.tensor(rng.integers(0, 2, 60)), torch.tensor(rng.integers(0, 3, 60))
    shifted = risk + (cancer == 1) * 5.0
    torch.testing.assert_close(cox_loss(risk, time, event, cancer), cox_loss(shifted, time, event, cancer))
    assert float(cox_loss(risk, time, event * 0, cancer)) == 0.0
