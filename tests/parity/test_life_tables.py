"""Federated Kaplan-Meier, Nelson-Aalen and log-rank against lifelines and R's survival, and against themselves when pooled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lifelines import KaplanMeierFitter, NelsonAalenFitter
from lifelines.datasets import load_rossi
from lifelines.statistics import multivariate_logrank_test
from lifelines.utils import median_survival_times, restricted_mean_survival_time
from oncofed.common.classical.life_table import (
    Cells,
    LifeTable,
    curve,
    curves,
    kaplan_meier,
    life_tables,
    nelson_aalen,
    numbers_at_risk,
    quantile,
    restricted_mean,
    table_sums,
)
from oncofed.common.classical.log_rank import log_rank
from oncofed.common.classical.risk_sets import exact_cells, grid_cells
from sksurv.datasets import load_gbsg2

R = json.loads((Path(__file__).parent / "r" / "km.json").read_text())
SETS = ("lung", "veteran", "ovarian")
Patients = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""Time, event, group and stratum of each patient."""


def rossi() -> Patients:
    d = load_rossi()
    return d["week"].to_numpy(float), d["arrest"].to_numpy(), d["fin"].to_numpy(), d["race"].to_numpy()


def gbsg2() -> Patients:
    x, y = load_gbsg2()
    grade, treated = (pd.Categorical(x[name]).codes.astype(int) for name in ("tgrade", "horTh"))
    return y["time"], y["cens"].astype(int), grade, treated


def of_r(name: str) -> Patients:
    return tuple(np.array(R[name]["data"][key]) for key in ("time", "event", "group", "stratum"))  # type: ignore[return-value]


def cell_of(time: np.ndarray, event: np.ndarray, cells: Cells) -> np.ndarray:
    return grid_cells(time, cells.starts) if cells.even else exact_cells(time, event, cells.ends)


def sums_of(data: Patients, cells: Cells) -> dict[str, np.ndarray]:
    time, event, group, stratum = data
    groups, strata = int(group.max()) + 1, int(stratum.max()) + 1
    return table_sums(
        cell_of(time, event, cells), event, group, stratum, groups=groups, strata=strata, cells=len(cells)
    )


def exact(data: Patients) -> Cells:
    return Cells.exact(np.unique(data[0][data[1] == 1]))


def tables_of(data: Patients, cells: Cells | None = None) -> list[LifeTable]:
    cells = exact(data) if cells is None else cells
    total = sums_of(data, cells)
    return life_tables(total, cells, [str(g) for g in range(total["events"].shape[1])])


@pytest.mark.parametrize("data", [rossi(), gbsg2()], ids=["rossi", "gbsg2"])
def test_curves_equal_lifelines(data: Patients) -> None:
    time, event, group, _ = data
    for g, table in enumerate(tables_of(data)):
        rows = group == g
        cells = table.cells.ends
        km = KaplanMeierFitter().fit(time[rows], event[rows])
        mine = kaplan_meier(table)
        at = km.survival_function_.index.searchsorted(cells, side="right") - 1
        np.testing.assert_allclose(mine.value, km.survival_function_.to_numpy()[at, 0], rtol=0, atol=1e-12)
        theirs = km.confidence_interval_.to_numpy()[at]
        inside = (mine.value > 0) & (mine.value < 1)
        assert inside.sum() > 10
        np.testing.assert_allclose(np.c_[mine.lower, mine.upper][inside], theirs[inside], rtol=0, atol=1e-12)
        told = curve(table)
        medians = median_survival_times(km.confidence_interval_).to_numpy()[0]
        expected = [km.median_survival_time_, *medians]
        assert [told[k] for k in ("median", "median_lower", "median_upper")] == [
            None if np.isinf(v) else v for v in expected
        ]
        na = NelsonAalenFitter(nelson_aalen_smoothing=False).fit(time[rows], event[rows])
        np.testing.assert_allclose(
            nelson_aalen(table).value, na.cumulative_hazard_.to_numpy()[at, 0], rtol=0, atol=1e-12
        )
        horizon = 0.8 * time.max()
        assert restricted_mean(table, horizon)[0] == pytest.approx(
            restricted_mean_survival_time(km, horizon), rel=1e-12
        )


def test_interval_of_the_cumulative_hazard_equals_lifelines_without_ties() -> None:
    time, event, *_ = gbsg2()
    time = time + np.arange(len(time)) / (10 * len(time))
    none = np.zeros(len(time), int)
    mine = nelson_aalen(tables_of((time, event, none, none))[0])
    theirs = NelsonAalenFitter().fit(time, event)  # its smoothing says the same where no times are tied
    at = theirs.cumulative_hazard_.index.searchsorted(mine.time)
    np.testing.assert_allclose(
        np.c_[mine.lower, mine.upper], theirs.confidence_interval_.to_numpy()[at], rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("data", [rossi(), gbsg2()], ids=["rossi", "gbsg2"])
def test_log_rank_equals_lifelines(data: Patients) -> None:
    time, event, group, _ = data
    names = [str(g) for g in range(group.max() + 1)]
    cells = exact(data)
    mine = log_rank(sums_of((time, event, group, np.zeros_like(group)), cells), cells, names)
    theirs = multivariate_logrank_test(time, group, event)
    np.testing.assert_allclose([mine.chi2, mine.p], [theirs.test_statistic, theirs.p_value], rtol=1e-11)
    assert mine.df == len(names) - 1


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("interval", ["log-log", "log", "plain"])
def test_curves_equal_r(name: str, interval: Any) -> None:
    theirs = R[name]["intervals"][interval]
    tables = tables_of(of_r(name))
    assert len(theirs) == len(tables)
    for table, r in zip(tables, theirs, strict=True):
        at = np.flatnonzero(np.array(r["n_event"]) > 0)
        own = np.searchsorted(table.cells.ends, np.array(r["time"])[at])
        km, na = kaplan_meier(table, interval=interval), nelson_aalen(table)
        np.testing.assert_array_equal(table.events[own], np.array(r["n_event"])[at])
        np.testing.assert_array_equal(table.at_risk[own], np.array(r["n_risk"])[at])
        assert table.events.sum() == np.sum(r["n_event"])
        for mine, key in (
            (km.value, "surv"),
            (km.lower, "lower"),
            (km.upper, "upper"),
            (na.value, "cumhaz"),
            (np.sqrt(na.variance), "std_chaz"),
        ):
            np.testing.assert_allclose(mine[own], np.array(r[key], dtype=float)[at], rtol=0, atol=1e-10)
        alive = km.value[own] > 0
        np.testing.assert_allclose(
            np.sqrt(km.variance)[own][alive], np.array(r["std_err"], float)[at][alive], atol=1e-10
        )
        told = curve(table, interval=interval, horizon=R[name]["horizon"])
        for key in ("median", "median_lower", "median_upper"):
            assert told[key] == (None if r[key] is None else pytest.approx(r[key], abs=1e-9)), key
        assert (told["rmst"], told["rmst_se"]) == pytest.approx((r["rmst"], r["rmst_se"]), rel=1e-10)


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("kind", ["log_rank", "peto", "stratified", "stratified_peto"])
def test_log_rank_equals_r(name: str, kind: str) -> None:
    time, event, group, stratum = of_r(name)
    data = (time, event, group, stratum if "stratified" in kind else np.zeros_like(stratum))
    theirs = R[name]["survdiff"][kind]
    names = [str(g) for g in range(group.max() + 1)]
    mine = log_rank(sums_of(data, exact(data)), exact(data), names, rho=float("peto" in kind))
    np.testing.assert_allclose(mine.observed, theirs["observed"], rtol=1e-10)
    np.testing.assert_allclose(mine.expected, theirs["expected"], rtol=1e-10)
    np.testing.assert_allclose(mine.variance, theirs["variance"], rtol=1e-9, atol=1e-10)
    assert (mine.chi2, mine.p, mine.df) == pytest.approx((theirs["chi2"], theirs["p"], theirs["df"]), rel=1e-9)
    assert mine.strata == 1 + int(data[3].max())


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(1, 20), st.integers(0, 10_000), st.booleans())
def test_any_split_over_sites_equals_pooled(n: int, sites: int, seed: int, grid: bool) -> None:
    """Bit by bit: counts are whole numbers, and only their total is divided."""
    rng = np.random.default_rng(seed)
    data = (rng.integers(0, 12, n).astype(float), rng.integers(0, 2, n), rng.integers(0, 3, n), rng.integers(0, 2, n))
    cells = Cells.grid([0.0, 3.0, 7.0]) if grid or not data[1].any() else exact(data)
    sizes = {"groups": 3, "strata": 2, "cells": len(cells)}
    cell = cell_of(data[0], data[1], cells)
    pooled = table_sums(cell, *data[1:], **sizes)
    where = rng.integers(0, sites, n)
    split = [table_sums(cell[r], *(c[r] for c in data[1:]), **sizes) for r in (where == k for k in range(sites))]
    total = {key: np.sum([s[key] for s in split], axis=0) for key in pooled}
    names = ["a", "b", "c"]
    assert curves(life_tables(total, cells, names)) == curves(life_tables(pooled, cells, names))
    assert log_rank(total, cells, names).as_dict() == log_rank(pooled, cells, names).as_dict()


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.1, 20.0), st.booleans())
def test_noisy_counts_give_a_survival_curve(seed: int, scale: float, grid: bool) -> None:
    rng = np.random.default_rng(seed)
    data = (rng.exponential(10, 80), rng.integers(0, 2, 80), rng.integers(0, 3, 80), np.zeros(80, int))
    cells = Cells.grid([0.0, 2.0, 5.0, 9.0, 20.0]) if grid else exact(data)
    noisy = {key: value + rng.laplace(0, scale, value.shape) for key, value in sums_of(data, cells).items()}
    tables = life_tables(noisy, cells, ["a", "b", "c"])
    for table in tables:
        for estimate in (kaplan_meier(table), nelson_aalen(table)):
            known = estimate.variance[np.isfinite(estimate.variance)]  # infinite once survival is 0
            assert (np.diff(known, prepend=0.0) >= 0).all()
    for told in curves(tables):
        json.dumps(told, allow_nan=False)
        survival = np.array(told["survival"])
        assert ((survival >= 0) & (survival <= 1)).all()
        assert (np.diff(survival) <= 1e-12).all()
        assert (np.diff(told["cumulative_hazard"]) >= -1e-12).all()
        assert (np.array(told["na_lower"]) <= told["na_upper"]).all()
    json.dumps(log_rank(noisy, cells, ["a", "b", "c"]).as_dict(), allow_nan=False)


def test_noise_is_not_cut_at_zero() -> None:
    """Means over many draws come back to the truth; counts cut at zero would say too many events."""
    rng = np.random.default_rng(0)
    cells = Cells.grid(np.arange(0.0, 60.0, 2.0))
    time, event = rng.exponential(100, 3000), np.ones(3000, int)
    none = np.zeros(3000, int)
    total = sums_of((time, event, none, none), cells)
    truth = kaplan_meier(life_tables(total, cells, ["all"])[0]).value[-1]
    ends = []
    for _ in range(300):
        noise = rng.laplace(0, 60, total["events"].shape)
        noisy = {"patients": total["patients"], "events": total["events"] + noise, "leaving": total["leaving"] + noise}
        ends.append(kaplan_meier(life_tables(noisy, cells, ["all"])[0]).value[-1])
    assert abs(np.mean(ends) - truth) < 4 * np.std(ends) / np.sqrt(len(ends)) + 0.003


@pytest.mark.parametrize(
    ("cells", "most", "without"), [(12, 0.0020, 0.0216), (24, 0.0007, 0.0104), (60, 0.0010, 0.0036)]
)
def test_a_grid_comes_closer_with_half_of_the_censored(cells: int, most: float, without: float) -> None:
    """Equal intervals up to the time that nine patients of ten have left by; in the tail an interval moves survival more."""
    time, event, *_ = gbsg2()
    none = np.zeros(len(time), int)
    edges = np.linspace(0.0, np.quantile(time, 0.9), cells + 1)
    on_grid = tables_of((time, event, none, none), Cells.grid(edges))[0]
    fitter = KaplanMeierFitter().fit(time, event)
    truth = fitter.survival_function_at_times(edges[1:]).to_numpy()
    assert np.abs(kaplan_meier(on_grid).value - truth).max() <= most
    raw = np.cumprod(1 - on_grid.events / on_grid.at_risk)[:-1]
    assert np.abs(raw - truth).max() == pytest.approx(without, abs=5e-5)
    told = curve(on_grid, horizon=1500.0)
    assert told["rmst"] == pytest.approx(restricted_mean_survival_time(fitter, 1500.0), rel=1e-3)
    assert told["median"] == pytest.approx(fitter.median_survival_time_, rel=0.01)
    assert told["rmst_se"] == pytest.approx(
        curve(tables_of((time, event, none, none))[0], horizon=1500.0)["rmst_se"], rel=0.02
    )


def test_a_group_without_events_and_one_without_patients() -> None:
    time, event = np.array([1.0, 2.0, 3.0, 4.0, 5.0]), np.array([1, 1, 0, 0, 0])
    data = (time, event, np.array([0, 0, 0, 1, 1]), np.zeros(5, int))
    cells = Cells.exact([1.0, 2.0])
    total = table_sums(cell_of(time, event, cells), *data[1:], groups=3, strata=1, cells=2)
    some, quiet, nobody = curves(life_tables(total, cells, ["some", "quiet", "nobody"]))
    assert (some["events"], some["survival"]) == (2, pytest.approx([2 / 3, 1 / 3]))
    assert some["median"] == 2
    assert (quiet["survival"], quiet["lower"], quiet["median"], quiet["rmst"]) == ([1, 1], [1, 1], None, 2)
    assert (nobody["patients"], nobody["at_risk"], nobody["rmst"], nobody["survival"]) == (0, [0, 0], None, [1, 1])
    three = log_rank(total, cells, ["some", "quiet", "nobody"])
    two = log_rank({k: v[:, :2] for k, v in total.items()}, cells, ["some", "quiet"])
    assert (three.df, three.chi2, three.p) == pytest.approx((1, two.chi2, two.p))
    one = log_rank({k: v[:, :1] for k, v in total.items()}, cells, ["some"]).as_dict()
    assert (one["chi2"], one["df"], one["p"]) == (None, 0, None)


def test_all_events_at_once() -> None:
    none = np.zeros(6, int)
    data = (np.full(6, 7.0), np.ones(6, int), none, none)
    told = curve(tables_of(data)[0], horizon=10.0)
    assert (told["time"], told["survival"], told["at_risk"]) == ([7.0], [0.0], [6.0])
    assert (told["lower"], told["upper"]) == ([None], [None])
    assert (told["median"], told["rmst"], told["rmst_se"]) == (7.0, 7.0, 0.0)


def test_numbers_at_risk_at_times_that_are_cells() -> None:
    time, event, *_ = gbsg2()
    none = np.zeros(len(time), int)
    wanted = [0.0, 365.0, 1000.0, 1500.0]
    truth = [float((time >= t).sum()) for t in wanted]
    cells = Cells.exact(np.union1d(np.unique(time[event == 1]), wanted[1:]))
    assert numbers_at_risk(tables_of((time, event, none, none), cells)[0], wanted) == truth
    assert numbers_at_risk(tables_of((time, event, none, none), cells)[0], [1e6]) == [None]
    after = [float((time > t).sum()) for t in wanted]  # cells of a grid begin after their start
    assert numbers_at_risk(tables_of((time, event, none, none), Cells.grid(wanted))[0], wanted) == after


def test_median_of_a_flat_piece_and_of_straight_lines() -> None:
    time, survival = np.array([1.0, 3.0, 8.0]), np.array([0.75, 0.5, 0.25])
    assert quantile(time, survival) == 5.5
    assert quantile(time, survival, start=0.0) == 3.0
    assert quantile(time, survival, 0.625, start=0.0) == 2.0
    assert quantile(time, survival, 0.1) is None


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        ("cell", 9, "cell 9"),
        ("event", 2, "event 2"),
        ("group", -1, "group -1"),
        ("stratum", 1, "stratum 1"),
        ("event", 0.5, "event 0.5"),
    ],
)
def test_a_wrong_code_is_named(column: str, value: float, words: str) -> None:
    columns = {
        name: np.zeros(3) if name == "event" else np.zeros(3, int) for name in ("cell", "event", "group", "stratum")
    }
    columns[column][1] = value
    with pytest.raises(ValueError, match=words):
        table_sums(*columns.values(), groups=2, strata=1, cells=4)


def test_times_that_do_not_increase_and_counts_of_another_grid_are_refused() -> None:
    with pytest.raises(ValueError, match="starts of the grid must be finite and increase"):
        Cells.grid([0.0, 2.0, 2.0])
    total = {"patients": np.zeros((1, 1)), "events": np.zeros((1, 1, 3)), "leaving": np.zeros((1, 1, 3))}
    with pytest.raises(ValueError, match="wanted"):
        life_tables(total, Cells.exact([1.0, 2.0]), ["a"])
