"""Federated Cox regression against R's survival package and lifelines.

What R says lies in r/cox_*.json, made by r/make_cox.R; `python tests/parity/test_cox.py FOLDER` writes the tables that it reads.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lifelines import CoxPHFitter
from lifelines.datasets import load_lung, load_rossi
from oncofed.common.blocks import Sum
from oncofed.common.classical.cox import (
    CollinearCovariates,
    MonotoneLikelihood,
    NoConvergence,
    NoEvents,
    fit_cox,
)
from oncofed.common.classical.cox_fit import CoxFit
from oncofed.common.classical.proportional_hazards import check_proportional_hazards
from oncofed.common.classical.risk_sets import Ties, exact_cells, grid_cells, leaving_shapes, leaving_sums
from oncofed.common.classical.score_residuals import residual_sums, residual_terms, score_residuals
from sksurv.datasets import load_flchain, load_gbsg2, load_veterans_lung_cancer


def _sksurv(loaded: tuple) -> tuple[pd.DataFrame, dict]:
    x, y = loaded
    event, time = y.dtype.names
    return x, {"time": y[time], "event": y[event].astype(float)}


def rossi() -> pd.DataFrame:
    x = load_rossi()
    return pd.DataFrame({"time": x.pop("week"), "event": x.pop("arrest"), "stratum": 0} | dict(x.items()))


def gbsg2() -> pd.DataFrame:
    x, outcome = _sksurv(load_gbsg2())
    numbers = x[["age", "estrec", "pnodes", "progrec", "tsize"]]
    return pd.DataFrame(
        outcome
        | {"stratum": (x["menostat"] == "Post") * 1, "hormone": (x["horTh"] == "yes") * 1}
        | dict(numbers.items())
    )


def flchain() -> pd.DataFrame:
    x, outcome = _sksurv(load_flchain())
    numbers = x[["age", "kappa", "lambda"]]
    return pd.DataFrame(outcome | {"stratum": 0, "male": (x["sex"] == "M") * 1} | dict(numbers.items()))


def veteran() -> pd.DataFrame:
    x, outcome = _sksurv(load_veterans_lung_cancer())
    return pd.DataFrame(
        outcome
        | {
            "stratum": x["Celltype"].astype("category").cat.codes,
            "karnofsky": x["Karnofsky_score"],
            "age": x["Age_in_years"],
            "diagnosed": x["Months_from_Diagnosis"],
            "prior": (x["Prior_therapy"] == "yes") * 1,
            "test": (x["Treatment"] == "test") * 1,
        }
    )


def nested() -> pd.DataFrame:
    """A covariate that varies in one stratum only."""
    x = veteran()[["time", "event", "stratum", "karnofsky", "test"]]
    return x.assign(test_first=x["test"] * (x["stratum"] == 0))


def lung() -> pd.DataFrame:
    x = load_lung()[["time", "status", "age", "sex", "ph.ecog", "ph.karno", "wt.loss"]].dropna()
    x = x.rename(columns=lambda name: name.replace(".", "_"))
    x.insert(1, "event", x.pop("status"))
    x.insert(2, "stratum", 0)
    return x.reset_index(drop=True)


def years() -> pd.DataFrame:
    """Whole years: more than a hundred events tied."""
    x = flchain()
    return x.assign(time=np.ceil(x["time"].clip(lower=1) / 365), stratum=x["male"]).drop(columns="male")


TABLES = {f.__name__: f for f in (rossi, gbsg2, flchain, veteran, nested, lung, years)}

TIES: tuple[Ties, ...] = ("efron", "breslow")


class Patients:
    """Patients of all sites as a federation sees them: standardised together, each site asked for its own rows."""

    def __init__(self, table: pd.DataFrame, times_T: np.ndarray | None = None) -> None:
        covariates = table.drop(columns=["time", "event", "stratum"])
        self.names = list(covariates)
        self.x_NP = covariates.to_numpy(dtype=np.float64)
        self.mean_P, self.sd_P = self.x_NP.mean(0), self.x_NP.std(0)
        time_N, self.event_N = table["time"].to_numpy(float), table["event"].to_numpy(float)
        self.stratum_N = table["stratum"].to_numpy(int)
        self.times_T = np.unique(time_N[self.event_N > 0]) if times_T is None else times_T
        self.cell_N = exact_cells(time_N, self.event_N, self.times_T)
        self.strata = int(self.stratum_N.max()) + 1

    def rows(self, rows: np.ndarray) -> tuple[np.ndarray, ...]:
        """x (standardised), cell, event, stratum of some patients."""
        z_NP = (self.x_NP - self.mean_P) / self.sd_P
        return z_NP[rows], self.cell_N[rows], self.event_N[rows], self.stratum_N[rows]

    def ask(self, ties: Ties, site_N: np.ndarray) -> Callable[[np.ndarray], Sum]:
        parts = [self.rows(np.flatnonzero(site_N == s)) for s in range(int(site_N.max()) + 1)]

        def asked(beta_P: np.ndarray) -> Sum:
            return added([leaving_sums(*p, beta_P, self.strata, len(self.times_T), ties) for p in parts])

        return asked

    def fit(self, ties: Ties, site_N: np.ndarray | None = None, penalty_P: np.ndarray | None = None) -> CoxFit:
        site_N = np.arange(len(self.x_NP)) % 3 if site_N is None else site_N
        fit = fit_cox(self.ask(ties, site_N), self.names, ties=ties, penalty_P=penalty_P)
        terms = residual_terms(fit.total, ties)
        parts = [self.rows(np.flatnonzero(site_N == s)) for s in range(int(site_N.max()) + 1)]
        outer = added([residual_sums(*p, fit.beta_P, terms) for p in parts])["outer"]
        return fit.with_robust(outer).on_scale(self.mean_P, self.sd_P)


def added(sums: Sequence[Sum]) -> Sum:
    return {name: np.sum([s[name] for s in sums], axis=0) for name in sums[0]}


@cache
def patients(name: str) -> Patients:
    return Patients(TABLES[name]())


@cache
def fitted(name: str, ties: Ties) -> CoxFit:
    return patients(name).fit(ties)


@cache
def said_by_r(name: str) -> dict[str, Any]:
    return json.loads((Path(__file__).parent / "r" / f"cox_{name}.json").read_text())


def close(ours: Any, theirs: Any, rtol: float, atol: float = 0.0) -> None:
    np.testing.assert_allclose(np.asarray(ours, float), np.asarray(theirs, float), rtol=rtol, atol=atol)


# -- against R -------------------------------------------------------------------------------------------------------------

each = pytest.mark.parametrize(("name", "ties"), [(name, ties) for name in TABLES for ties in TIES])


@each
def test_coefficients_and_tests_equal_r(name: str, ties: Ties) -> None:
    fit, r = fitted(name, ties), said_by_r(name)[ties]
    assert list(fit.names) == r["names"]
    close(fit.coef, r["coef"], 1e-10)
    close(fit.se, r["se"], 1e-10)
    close([fit.loglik, fit.loglik_null], [r["loglik"], r["loglik_null"]], 1e-12)
    assert fit.score is not None
    close(fit.score.chi2, r["score"], 1e-10)
    close(fit.robust_se, r["robust_se"], 1e-10)
    close(fit.wald.chi2, r["robust_wald"], 1e-10)
    assert fit.iterations <= 8


@each
def test_proportional_hazards_equal_r(name: str, ties: Ties) -> None:
    fit, data, r = fitted(name, ties), patients(name), said_by_r(name)[ties]
    for transform, table in r["zph"].items():
        check = check_proportional_hazards(fit, data.times_T, transform)
        rows = [*check.rows, check.overall]
        close([[row.chi2, row.df, row.p] for row in rows], table, 1e-8)


@pytest.mark.parametrize(("name", "ties"), [(name, ties) for name in TABLES if name != "flchain" for ties in TIES])
def test_residuals_and_baselines_equal_r(name: str, ties: Ties) -> None:
    fit, data, r = fitted(name, ties), patients(name), said_by_r(name)[ties]
    check = check_proportional_hazards(fit, data.times_T)
    close(check.time_G, r["residual_time"], 1e-12)
    close(check.scaled_GP, r["residual_scaled"], 1e-8, 1e-9)
    stratum, cell = np.array(r["baseline_stratum"], int), np.searchsorted(data.times_T, r["baseline_time"])
    at_zero_ST = fit.cumulative_hazard(np.zeros(len(fit.names)))
    close(at_zero_ST[stratum, cell], r["baseline_hazard"], 1e-9)
    # A patient's survival is that of the baseline at her covariates.
    x_1P, s = data.x_NP[:1], data.stratum_N[:1]
    close(fit.survival(x_1P, s)[0], np.exp(-fit.cumulative_hazard(x_1P[0])[s[0]]), 1e-12)


def test_ridge_equals_r() -> None:
    data, r = patients("rossi"), said_by_r("ridge")
    # R penalises coefficients for one unit, and the likelihood of all patients.
    penalty_P = r["theta"] / len(data.x_NP) / data.sd_P**2
    fit = data.fit("efron", penalty_P=penalty_P)
    close(fit.coef, r["coef"], 1e-9)
    close(fit.se, r["se"], 1e-9)
    close(fit.likelihood_ratio.df, r["df"], 1e-9)
    close([fit.loglik, fit.loglik_null], [r["loglik"], r["loglik_null"]], 1e-10)
    close(fit.beta_P @ np.linalg.solve(fit.variance_PP, fit.beta_P), r["wald"], 1e-9)
    assert fit.score is None


# -- against lifelines -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("penalizer", [0.0, 0.1])
@pytest.mark.parametrize("name", ["rossi", "gbsg2", "veteran"])
def test_ridge_equals_lifelines(name: str, penalizer: float) -> None:
    table, data = TABLES[name](), patients(name)
    # lifelines penalises coefficients of x over the deviation with n - 1.
    n = len(data.x_NP)
    fit = data.fit("efron", penalty_P=np.full(len(data.names), penalizer * n / (n - 1)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = CoxPHFitter(penalizer=penalizer).fit(
            table, "time", "event", strata=["stratum"], fit_options={"precision": 1e-16, "r_precision": 0.0}
        )
    assert (np.abs(fit.coef - theirs.params_) < 1e-7 * fit.se).all()  # lifelines stops a little before R's digits
    close(fit.se, theirs.standard_errors_, 1e-7)
    if not penalizer:  # lifelines adds the penalty to it
        close(fit.loglik, theirs.log_likelihood_, 1e-12)


# -- any federation --------------------------------------------------------------------------------------------------------


def drawn(seed: int, n: int, strata: int = 2) -> pd.DataFrame:
    """Patients with many ties, some of whom leave before the first event."""
    rng = np.random.default_rng(seed)
    x_NP = np.column_stack([rng.normal(size=n), rng.integers(0, 2, n), rng.normal(size=n)])
    time_N = np.ceil(rng.exponential(6, n) * np.exp(-0.4 * x_NP[:, 0])).clip(0, 12)
    event_N = (rng.random(n) < 0.6) & (time_N > 1)
    table = {"time": time_N, "event": event_N * 1.0, "stratum": rng.integers(0, strata, n)}
    return pd.DataFrame(table | {name: x_NP[:, i] for i, name in enumerate("abc")})


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(60, 200), st.integers(1, 20), st.sampled_from(TIES), st.booleans())
def test_any_split_equals_pooled(seed: int, n: int, sites: int, ties: Ties, censored_site: bool) -> None:
    data, rng = Patients(drawn(seed, n)), np.random.default_rng(seed + 1)
    site_N = rng.integers(0, sites, n)
    site_N[0] = sites  # a site of one patient
    if censored_site:  # and one without any event
        site_N[(data.event_N == 0) & (rng.random(n) < 0.5)] = sites + 1
    pooled, ours = data.fit(ties, np.zeros(n, int)), data.fit(ties, site_N)
    close(ours.coef, pooled.coef, 1e-10, 1e-12)
    for name in ("se", "robust_se", "loglik", "loglik_null"):
        close(getattr(ours, name), getattr(pooled, name), 1e-10)
    close(ours.cumulative_hazard(), pooled.cumulative_hazard(), 1e-10)
    one, other = (check_proportional_hazards(f, data.times_T) for f in (ours, pooled))
    close([r.chi2 for r in one.rows], [r.chi2 for r in other.rows], 1e-8, 1e-10)
    close(one.scaled_GP, other.scaled_GP, 1e-8, 1e-9)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(TIES))
def test_score_residuals_add_up_to_the_score(seed: int, ties: Ties) -> None:
    data = Patients(drawn(seed, 120))
    rows = data.rows(np.arange(120))
    fit = data.fit(ties)
    residual_NP = score_residuals(*rows, fit.beta_P, residual_terms(fit.total, ties))
    close(residual_NP.sum(0), np.zeros(3), 0, 1e-9)
    assert not residual_NP[data.cell_N < 0].any()


@pytest.mark.parametrize("ties", TIES)
def test_rounded_sums_do_not_loop(ties: Ties) -> None:
    data = patients("gbsg2")
    exact = data.ask(ties, np.zeros(len(data.x_NP), int))
    rng = np.random.default_rng(0)

    def rounded(beta_P: np.ndarray) -> Sum:
        # Fixed point: an error of the size of the last digit of the largest number, another one in every question.
        return {n: v + 1e-12 * np.abs(v).max() * rng.uniform(-1, 1, v.shape) for n, v in exact(beta_P).items()}

    fit = fit_cox(rounded, data.names, ties=ties)
    assert fit.iterations <= 8
    assert fit.precision < 1e-7
    close(fit.beta_P, fitted("gbsg2", ties).beta_P, 1e-6)


def test_a_grid_is_cox_of_rounded_times() -> None:
    table = gbsg2()
    starts_T = np.arange(0, 2700, 180.0)
    data = Patients(table.assign(time=np.ceil(table["time"] / 180) * 180))
    cell_N = grid_cells(table["time"].to_numpy(), starts_T)
    z_NP = (data.x_NP - data.mean_P) / data.sd_P
    fit = fit_cox(
        lambda beta_P: leaving_sums(z_NP, cell_N, data.event_N, data.stratum_N, beta_P, 2, len(starts_T), "efron"),
        data.names,
    )
    close(fit.beta_P, data.fit("efron").beta_P, 1e-10)


def test_shapes_are_those_of_the_sums() -> None:
    data = patients("veteran")
    for ties in TIES:
        sums = data.ask(ties, np.zeros(len(data.x_NP), int))(np.zeros(5))
        shapes = leaving_shapes(5, data.strata, len(data.times_T), ties)
        assert {name: value.shape for name, value in sums.items()} == shapes
        assert all(value.dtype == np.float64 for value in sums.values())


def test_a_penalty_hardly_moves_the_check_of_proportional_hazards() -> None:
    data = patients("veteran")
    free = check_proportional_hazards(fitted("veteran", "efron"), data.times_T, "log")
    held = check_proportional_hazards(data.fit("efron", penalty_P=np.full(5, 0.05)), data.times_T, "log")
    close([r.chi2 for r in held.rows], [r.chi2 for r in free.rows], 0.15)
    close(held.overall.chi2, free.overall.chi2, 0.1)


def test_a_picture_in_groups_has_enough_events_and_the_same_mean() -> None:
    fit, data = fitted("rossi", "efron"), patients("rossi")
    check, fine = (check_proportional_hazards(fit, data.times_T, events_each=k) for k in (10, 1))
    assert check.events_G.min() >= 10
    assert check.events_G.sum() == fine.events_G.sum() == fit.total["events"].sum()
    mean = [np.average(c.scaled_GP, axis=0, weights=c.events_G) for c in (check, fine)]
    close(mean[0], mean[1], 1e-10)
    close(mean[1], fit.coef, 1e-8)


def test_the_dictionary_is_json_without_nan() -> None:
    fit, data = fitted("nested", "efron"), patients("nested")
    check = check_proportional_hazards(fit, data.times_T)
    assert np.isnan(check.scaled_GP).any()
    told = fit.as_dict(data.times_T, ["a", "b", "c", "d"], check.as_dict())
    again = json.loads(json.dumps(told, allow_nan=False))
    assert again == told
    assert {"names", "coef", "hazard_ratio", "tests", "baseline", "proportional_hazards"} <= told.keys()
    assert told["events"] == 128
    assert told["patients"] == 137
    assert None in [v for row in told["proportional_hazards"]["residuals"]["scaled"] for v in row]
    with pytest.raises(ValueError, match="4 strata"):
        fit.as_dict(data.times_T, ["a"])


# -- what goes wrong -------------------------------------------------------------------------------------------------------


def test_collinear_covariates_are_named() -> None:
    table = drawn(1, 150)
    with pytest.raises(CollinearCovariates, match=r"\['a', 'c', 'sum'\].*set a penalty"):
        Patients(table.assign(sum=table["a"] - 2 * table["c"])).fit("efron")
    Patients(table.assign(sum=table["a"] - 2 * table["c"])).fit("efron", penalty_P=np.full(4, 0.1))
    with pytest.raises(CollinearCovariates, match=r"\['by_stratum'\] do not vary"):
        Patients(table.assign(by_stratum=table["stratum"] * 1.0)).fit("efron")


@pytest.mark.parametrize("ties", TIES)
def test_separation_is_named(ties: Ties) -> None:
    table = drawn(2, 150)
    never = (table["event"] == 0) & (np.arange(150) % 2 == 0)
    table = table.assign(immune=never * 1.0)
    with pytest.raises(MonotoneLikelihood, match=r"\['immune'\] grow without end.*set a penalty"):
        Patients(table).fit(ties)
    fit = Patients(table).fit(ties, penalty_P=np.full(4, 0.01))
    assert fit.coef[3] < -1
    # Events in the order of a covariate: the other kind of separation.
    time_N = np.arange(1.0, 41)
    alone = pd.DataFrame({"time": time_N, "event": 1.0, "stratum": 0, "x": -time_N})
    with pytest.raises(MonotoneLikelihood, match="x"):
        Patients(alone).fit(ties)


@pytest.mark.parametrize("seed", [1342, 1413, 1428])
def test_far_outliers_are_not_taken_for_separation(seed: int) -> None:
    rng = np.random.default_rng(seed)
    table = drawn(seed, int(rng.integers(12, 40)), 1)
    table["a"] = np.exp(1.5 * table["a"])
    table.loc[rng.random(len(table)) < 0.6, "event"] = 0.0
    fit = Patients(table).fit("efron")  # steps of half a standard deviation and more, and yet the maximum is finite
    assert np.abs(fit.beta_P).max() < 3
    assert fit.precision < 1e-10


def test_no_events_and_too_few_steps() -> None:
    table = drawn(3, 100)
    with pytest.raises(NoEvents, match="none of 100 patients"):
        Patients(table.assign(event=0.0), times_T=np.array([1.0])).fit("efron")
    data = Patients(table)
    with pytest.raises(NoConvergence, match="after 2 questions"):
        fit_cox(data.ask("efron", np.zeros(100, int)), data.names, max_steps=2)


def test_wrong_input_is_refused() -> None:
    data = Patients(drawn(4, 100))
    ask = data.ask("efron", np.zeros(100, int))
    with pytest.raises(ValueError, match="3 numbers >= 0"):
        fit_cox(ask, data.names, penalty_P=np.array([0.1, -0.1, 0.0]))
    with pytest.raises(ValueError, match="3 covariates, 2 are named"):
        fit_cox(lambda _: ask(np.zeros(3)), ["a", "b"])
    with pytest.raises(ValueError, match="none of the 2 times"):
        exact_cells(np.array([1.0, 2.0, 3.0]), np.array([1, 0, 1]), np.array([1.0, 2.0]))
    with pytest.raises(ValueError, match="distinct and rising"):
        exact_cells(np.array([1.0]), np.array([1]), np.array([2.0, 1.0]))
    x = np.zeros((2, 1))
    for message, cell, event, stratum in (
        ("before the first cell", [-1, 0], [1, 1], [0, 0]),
        ("cells run from -1 to 1", [0, 2], [1, 1], [0, 0]),
        ("strata run from 0 to 0", [0, 1], [1, 1], [0, 1]),
    ):
        with pytest.raises(ValueError, match=message):
            leaving_sums(x, np.array(cell), np.array(event), np.array(stratum), np.zeros(1), 1, 2, "efron")
    with pytest.raises(ValueError, match="missing or infinite"):
        leaving_sums(x * np.nan, np.zeros(2, int), np.ones(2), np.zeros(2, int), np.zeros(1), 1, 2, "efron")
    fit = data.fit("efron")
    with pytest.raises(ValueError, match="sd above 0"):
        fit.on_scale(np.zeros(3), np.array([1.0, 0.0, 1.0]))
    with pytest.raises(ValueError, match="log needs times above 0"):
        check_proportional_hazards(fit, data.times_T - data.times_T[0], "log")
    with pytest.raises(ValueError, match="give one for each cell"):
        check_proportional_hazards(fit, data.times_T[1:])


def test_a_wild_step_is_cut_and_counted() -> None:
    sums = leaving_sums(np.array([[1e3]]), np.zeros(1, int), np.ones(1), np.zeros(1, int), np.ones(1), 1, 1, "efron")
    assert sums["beyond"].tolist() == [1.0]
    assert all(np.isfinite(value).all() for value in sums.values())


if __name__ == "__main__":
    for name, make in TABLES.items():
        make().to_csv(Path(sys.argv[1]) / f"{name}.csv", index=False)
