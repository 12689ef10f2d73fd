"""The page and the terminal's tables of a classical analysis, of real numbers."""

from __future__ import annotations

import copy
import io
import re
from typing import Any

import numpy as np
import pytest
from lifelines import CoxPHFitter
from lifelines.datasets import load_rossi
from oncofed.common.classical.life_table import Cells, curves, life_tables, table_sums
from oncofed.common.classical.log_rank import log_rank
from oncofed.common.classical.risk_sets import exact_cells, grid_cells
from oncofed.deploy.present_analysis import print_analysis
from oncofed.server.report.analysis import evaluation_rows, privacy, render_analysis, survival_at
from oncofed.server.report.curves import number_at_risk, survival_curves, value_at
from oncofed.server.report.hazards import forest, number, residuals
from oncofed.server.report.look import label, p_text
from rich.console import Console

ROSSI = load_rossi()
MONTHS = ROSSI["week"].to_numpy(float)  # as if a week were a month: follow-up ends after four years


def result_of(plan: dict[str, Any]) -> dict[str, Any]:
    return {
        "plan": {"name": "rossi", "epsilon": 0.0, **plan},
        "sites": ["north", "south"],
        "left_out": [],
        "notes": [],
        "package": "0.1.0",
        "seconds": 1.5,
        "bytes_to_sites": 1_000_000,
        "bytes_from_sites": 500_000,
    }


def km_result(grid: float | None = None, groups: int = 2) -> dict[str, Any]:
    event = ROSSI["arrest"].to_numpy()
    group = ROSSI["fin"].to_numpy() if groups == 2 else np.arange(len(event)) % groups
    if grid is None:
        cells = Cells.exact(np.unique(MONTHS[event == 1]))
        cell = exact_cells(MONTHS, event, cells.ends)
    else:
        cells = Cells.grid(np.arange(0.0, 55.0, grid))
        cell = grid_cells(MONTHS, cells.starts)
    none = np.zeros(len(event), int)
    total = table_sums(cell, event, group, none, groups=groups, strata=1, cells=len(cells))
    names = ["no aid", "aid"] if groups == 2 else [f"group {g}" for g in range(groups)]
    plan = {"kind": "km", "times": "exact" if grid is None else "grid", "grid_months": grid or 3.0, "group": "fin"}
    return result_of(plan) | {
        "curves": curves(life_tables(total, cells, names)),
        "logrank": log_rank(total, cells, names).as_dict(),
    }


def cox_result() -> dict[str, Any]:
    fit = CoxPHFitter().fit(ROSSI, "week", "arrest")
    s = fit.summary
    names = list(s.index)
    test = fit.log_likelihood_ratio_test()
    joint = {"chi2": float(test.test_statistic), "df": len(names), "p": float(test.p_value)}
    rng = np.random.default_rng(0)
    scaled = rng.normal(size=(30, len(names))).tolist()
    scaled[3][0] = None
    return result_of({"kind": "cox", "times": "grid", "grid_months": 1.0}) | {
        "cox": {
            "names": names,
            "coef": s["coef"].tolist(),
            "se": s["se(coef)"].tolist(),
            "robust_se": None,
            "hazard_ratio": s["exp(coef)"].tolist(),
            "lower": s["exp(coef) lower 95%"].tolist(),
            "upper": s["exp(coef) upper 95%"].tolist(),
            "z": s["z"].tolist(),
            "p": s["p"].tolist(),
            "loglik": fit.log_likelihood_,
            "loglik_null": fit.log_likelihood_ - joint["chi2"] / 2,
            "tests": {"likelihood_ratio": joint, "wald": joint | {"df": 5.7213}, "score": None},
            "ties": "efron",
            "penalty": [0.25] * len(names),
            "iterations": 5,
            "patients": 432,
            "events": 114,
            "baseline": [
                {"stratum": stratum, "time": float(t), "cumulative_hazard": t / 40}
                for stratum in "ab"
                for t in range(9)
            ],
            "proportional_hazards": {
                "transform": "km",
                "rows": [{"name": n, "chi2": 1.0, "df": 1, "p": 0.001 if n == "age" else 0.4} for n in names],
                "global": joint,
                "residuals": {"time": list(range(1, 31)), "events": [1.0] * 29 + [0.0], "scaled": scaled},
            },
        },
        "curves": [],
        "logrank": None,
        "evaluation": {
            "c_index": {"value": 0.6403, "low": 0.601, "high": 0.682, "bound": 0.004},
            "brier": {"12 months": 0.081},
        },
    }


def many(covariates: int) -> dict[str, Any]:
    """A Cox model of many covariates, among them one without an estimate and one that runs away."""
    cox = cox_result()["cox"]
    ratio = [1.0 + 0.01 * j for j in range(covariates)]
    ratio[1] = 3e6
    big = {
        "names": [f"a covariate whose name is long indeed, number {j}" for j in range(covariates)],
        "coef": [0.1] * covariates,
        "hazard_ratio": ratio,
        "lower": [1e-9 if j == 1 else 0.9 for j in range(covariates)],
        "upper": [1e22 if j == 1 else 1.7 for j in range(covariates)],
        "p": [1e-30] * covariates,
    }
    big["hazard_ratio"][2] = big["lower"][2] = big["upper"][2] = big["p"][2] = None  # type: ignore[call-overload]
    return cox | big | {key: [0.1] * covariates for key in ("se", "z")}


def text_of(html: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", html))


def terminal(result: dict[str, Any], width: int = 120) -> str:
    out = io.StringIO()
    print_analysis(result, Console(file=out, width=width))
    return out.getvalue()


def test_survival_is_drawn_as_it_is_counted() -> None:
    """Every corner of a drawn line lies where its month and its survival are, by one linear function each."""
    told = km_result(3.0)["curves"]
    drawn = re.findall(
        r'<path d="([^"]*)"[^>]*style="fill: none; stroke: (#\w+); stroke-width: 1.5', survival_curves(told)
    )
    lines = {colour: np.array(re.findall(r"[ML] (\S+) (\S+)", d), dtype=float) for d, colour in reversed(drawn)}
    assert list(lines) == ["#b03a5b", "#0b6e99"]
    place = np.concatenate([lines["#0b6e99"], lines["#b03a5b"]])
    value = np.concatenate([np.c_[[0, *c["time"]], [1, *c["survival"]]][: len(lines["#0b6e99"])] for c in told])
    assert len(place) == len(value) > 30
    for axis in (0, 1):
        line = np.polynomial.Polynomial.fit(value[:, axis], place[:, axis], 1)
        np.testing.assert_allclose(line(value[:, axis]), place[:, axis], atol=0.01)


@pytest.mark.parametrize("grid", [None, 3.0])
def test_a_page_of_curves(grid: float | None) -> None:
    result = km_result(grid)
    html = render_analysis(result)
    said = text_of(html)
    assert html.count("<svg") == 2
    assert ("event times of patients left" in said) == (grid is None)
    assert ("intervals of 3 months" in said) == (grid is not None)
    assert ("actuarial" in said) == (grid is not None)
    for curve in result["curves"]:
        for year in (1, 3):
            share, low, high = (100 * (s or 0) for s in survival_at(curve, year))
            assert f"{share:.1f} % [{low:.0f}, {high:.0f}]" in said
        assert survival_at(curve, 5)[0] is None
        assert f"{curve['name']} {curve['patients']:.0f} {curve['events']:.0f} not reached" in said
    assert p_text(result["logrank"]["p"], name=True) in said
    assert render_analysis(copy.deepcopy(result)) == html


def test_a_page_of_a_cox_model() -> None:
    result = cox_result()
    html = render_analysis(result)
    said = text_of(html)
    assert html.count("<svg") == 3
    cox = result["cox"]
    for i, name in enumerate(cox["names"]):
        assert f"{name} {number(cox['hazard_ratio'][i])} [{number(cox['lower'][i])}, {number(cox['upper'][i])}]" in said
    for words in ("5.72", "ridge penalty 0.25", "by stratum", "0.640 [0.601, 0.682]", "Brier score, 12 months 0.081"):
        assert words in said
    assert "log-rank) 1" not in said  # a score test that is None has no row
    assert "Time on a grid: only counts and sums over intervals of 1 month left" in said


def test_a_log_rank_test_alone_and_one_of_nothing() -> None:
    result = km_result() | {"curves": []}
    assert "<svg" not in render_analysis(result)
    result["logrank"] |= {"chi2": None, "df": 0, "p": None}
    assert "nothing to test" in render_analysis(result)
    assert "no two groups" in terminal(result)


def test_names_of_sites_are_text_and_what_was_left_out_is_told() -> None:
    result = km_result()
    result["sites"] = ["<script>alert(1)</script>"]
    result["notes"] = ["north merged its last 3 intervals"]
    result["left_out"] = [{"site": "west", "kind": "km", "round": 2, "reason": "policy: <no> exact times"}]
    result["curves"][0]["name"] = "cost $5 & $6 <b>"
    html = render_analysis(result)
    assert "<script>" not in html
    assert "<b>" not in html.replace("<b>Exact", "").replace("<b>p ", "")
    assert "policy: &lt;no&gt; exact times" in html
    assert "north merged" in html
    assert "cost $5 &amp; $6" in html
    assert "west" in terminal(result)


def test_forty_covariates_and_estimates_that_are_none_or_run_away() -> None:
    cox = many(40)
    svg = forest(cox)
    for name in ("number 0", "number 39", "3e+06 [1e-09, 1e+22]", "– [–, –]", "&lt; 0.0001"):
        assert name in svg, name
    labels = re.findall(r">([^<>]*number \d+)<", svg)
    assert len(set(labels)) == 40, "names that are cut still differ"
    rows = [{"name": name, "chi2": 1.0, "df": 1, "p": 0.9 - 0.01 * j} for j, name in enumerate(cox["names"])]
    found = {"time": [1.0, 2.0, 3.0], "events": [1.0, 2.0, 1.0], "scaled": np.ones((3, 40)).tolist()}
    drawn = residuals({"transform": "log", "rows": rows, "residuals": found}, [None] * 40)
    assert drawn.count("p = ") == 16
    assert "p = 0.51" in drawn
    assert "p = 0.90" not in drawn


def test_ten_groups_have_a_row_each_below_and_no_bands() -> None:
    two, ten = km_result(), km_result(groups=10)
    svg = survival_curves(ten["curves"])
    assert svg.count("group 7") == 2  # legend and row
    assert "FillBetween" not in svg
    assert "FillBetween" in survival_curves(two["curves"])


def test_numbers_at_times() -> None:
    curve = {"patients": 10.0, "time": [2.0, 5.0], "survival": [0.8, 0.4], "at_risk": [9.0, 4.0], "even": False}
    assert [value_at(curve, "survival", t) for t in (1, 2, 4.9, 5, 6)] == [1, 0.8, 0.8, 0.4, None]
    assert [number_at_risk(curve, t) for t in (0, 1, 2, 3, 5, 6)] == [10, 9, 9, 4, 4, None]
    even = curve | {"even": True}
    assert [value_at(even, "survival", t) for t in (1, 2, 3.5, 6)] == pytest.approx([0.9, 0.8, 0.6, None])
    assert [number_at_risk(even, t) for t in (0, 2, 5)] == [10, 4, None]
    over = curve | {"at_risk": [9.0, -0.5], "lower": [None, None]}
    assert value_at(over, "survival", 5) is None, "nobody was under observation"
    assert value_at(over, "lower", 2) is None
    assert number_at_risk(over, 5) == 0


def test_words() -> None:
    assert [p_text(p) for p in (0.0, 0.00042, 0.0314, 0.7, None)] == ["< 0.0001", "0.0004", "0.031", "0.70", "–"]
    assert [number(v) for v in (0.0042, 1.234, 18.04, 312.0, 3e6, 1e-9, float("inf"), None)] == [
        *("0.0042", "1.23", "18.0", "312", "3e+06", "1e-09", "–", "–")
    ]
    assert label("abcdefghij", 7) == "abc…hij"
    assert label("$x$") == r"\$x\$"
    assert "epsilon = 0.5" in privacy({"times": "grid", "grid_months": 6.0, "epsilon": 0.5})
    assert "epsilon" not in privacy({"times": "grid", "grid_months": 6.0, "epsilon": 0.0})
    rows = dict(evaluation_rows({"auc": {"12": {"value": 0.7, "pairs": 40.0}}, "edges": [0.5, 12.0], "none": None}))
    assert rows == {"AUC, 12": "0.700, pairs 40", "edges": "0.500, 12"}


def test_the_terminal() -> None:
    said = terminal(cox_result())
    cox = cox_result()["cox"]
    row = next(line for line in said.splitlines() if line.startswith("age"))
    assert row.split() == ["age", "0.94", "0.90", "to", "0.99", p_text(cox["p"][1]), "0.001"]
    assert "114 events; likelihood ratio 33.27 on 7, p < 0.0001" in said
    said = terminal(km_result(1.0))
    assert re.search(r"\naid +216 +48 +- +- to - +\d+\.\d% +\d+\.\d% +- *\n", said)
    assert "log-rank: chi-squared" in said
