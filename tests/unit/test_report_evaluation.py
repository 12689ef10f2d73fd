"""The report of the pooled evaluation: what is drawn lies where the numbers are, and pages of all kinds of runs."""

from __future__ import annotations

import copy
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oncofed.common.evaluation.edges import risk_bins, time_bins
from oncofed.common.evaluation.scores import predicted_survival
from oncofed.common.metrics import pair_counts
from oncofed.common.study import Study
from oncofed.server.evaluation import FoldTable
from oncofed.server.pooled_evaluation import summarise
from oncofed.server.report.evaluation import by_cancer, by_site, calibration, drawn_sites, left_out, rows, sections
from oncofed.server.report.look import BLUE
from oncofed.server.report.render import render

sys.path.insert(0, str(Path(__file__).parents[1]))
from survival_cohorts import simulated
from toy_studies import copy_sites, train

TITLE = "<h2>What the coordinator sees from sums alone</h2>"
MIXED = "All cancer types mixed, by predicted survival at"


def fold(seed: int, cancers: int, hospitals: int, patients: int, study: Study) -> FoldTable:
    """Simulated patients, spread over hospitals at random, with noise where the study wants it."""
    rng, wanted = np.random.default_rng(seed), study.evaluation
    cohorts = [simulated(patients, 10 * seed + c) for c in range(cancers)]
    edges, means = risk_bins(np.concatenate([c.risk_counts for c in cohorts]), wanted.risk_bins)
    times = time_bins(np.concatenate([c.event_counts for c in cohorts]), wanted.time_bins, wanted.horizons)
    owner = rng.integers(0, hospitals, patients)
    sites = {}
    for h in range(hospitals):
        m = owner == h
        mine = [replace(c, risk=c.risk[m], time=c.time[m], event=c.event[m]) for c in cohorts]
        right, all_ = np.array([pair_counts(c.risk, c.time, c.event) for c in mine]).T
        table = np.stack([c.counts(e, times) for c, e in zip(mine, edges, strict=True)])
        if wanted.epsilon:
            p = -np.expm1(-wanted.epsilon / 2)
            table += rng.geometric(p, table.shape) - rng.geometric(p, table.shape)
        sites[f"hospital {h:02d}"] = {"table": table, "pairs": np.stack([2 * right, 2 * (all_ - right)])}
    total = {key: sum(s[key] for s in sites.values()) for key in ("table", "pairs")}
    grid, baseline = cohorts[0].grid, np.array([c.log_baseline for c in cohorts])
    survival, null = (predicted_survival(m, baseline, grid, times) for m in (means, 0 * means[:, :1]))
    return FoldTable(total["table"], total["pairs"], times, means, survival, null, sites)


def results(
    folds: int = 2, cancers: int = 3, hospitals: int = 4, patients: int = 120, bins: int = 16, **dotted: object
) -> dict[str, Any]:
    """As of a finished run, of real numbers."""
    study = Study().changed(evaluation__risk_bins=bins, evaluation__time_bins=bins, **dotted)
    names = tuple(f"C{c}" for c in range(cancers))
    found = summarise(study, names, [fold(f, cancers, hospitals, patients, study) for f in range(folds)])
    return {
        "study": study.model_dump(mode="json"),
        "cancers": list(names),
        "sites": found["sites"],
        "folds": [],
        "left_out": [],
        "panel": {"genes": 60, "hash": "0"},
        "beside": {},
        "started": "",
        "package": "",
        "evaluation": found,
    }


@pytest.fixture(scope="module")
def made() -> dict[str, Any]:
    return results()


def dots(svg: str, colour: str = BLUE) -> np.ndarray:
    """Places `[N, 2]` of the markers of one colour, in order of drawing; those of the axes' ticks are black."""
    found = re.findall(rf'<use xlink:href="[^"]*" x="([^"]*)" y="([^"]*)" style="fill: {colour}', svg)
    return np.array(found, dtype=float).reshape(-1, 2)


def on_a_line(place: np.ndarray, value: np.ndarray) -> None:
    """One linear function takes values to places."""
    assert len(place) == len(value) > 2
    np.testing.assert_allclose(np.polynomial.Polynomial.fit(value, place, 1)(value), place, atol=0.01)


def text_of(html: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", html))


def without_numbers(value: Any, key: str = "") -> Any:
    """The same evaluation where nothing that may be unknown is known."""
    if isinstance(value, dict):
        return {k: without_numbers(v, k) for k, v in value.items()}
    if isinstance(value, list):
        return [without_numbers(v, key) for v in value]
    keep = isinstance(value, str) or key in ("epsilon", "folds", "month", "patients", "events", "pairs", "time", "df")
    return value if keep or key in ("at_risk", "even") else None


def test_scores_by_cancer_type_are_drawn_where_they_are_the_best_first(made: dict[str, Any]) -> None:
    found = made["evaluation"]
    best = sorted(found["by_cancer"], key=lambda n: -found["by_cancer"][n]["c_index"]["value"])
    svg = by_cancer(found)
    assert re.findall(r">(mean|C\d)<", svg) == ["mean", *best]
    on_a_line(
        dots(svg)[:, 0],
        np.array([found["c_index"]["value"], *(found["by_cancer"][n]["c_index"]["value"] for n in best)]),
    )
    assert [f"{m} months" in svg for m in (12, 36, 60, 24)] == [True, True, True, False]
    assert by_cancer(found) == svg


def test_calibration_is_drawn_where_it_is_and_what_is_unknown_is_not(made: dict[str, Any]) -> None:
    horizons = copy.deepcopy(made["evaluation"]["horizons"][:1])
    c = horizons[0]["calibration"]
    place = dots(calibration(horizons))
    on_a_line(place[:, 0], np.array(c["predicted"]))
    on_a_line(place[:, 1], np.array(c["observed"]))
    c["observed"][1] = c["lower"][1] = c["upper"][1] = None
    assert len(dots(calibration(horizons))) == len(place) - 1
    five = calibration(made["evaluation"]["horizons"] + [horizons[0] | {"month": m} for m in (72.0, 84.5)])
    assert re.findall(r">([\d.]+) months<", five) == ["12", "36", "60", "72", "84.5"]


def hospital(name: str, pairs: float, value: float | None) -> dict[str, Any]:
    limits = dict.fromkeys(("low", "high"), value)
    return {"site": name, "patients": 10.0, "events": 5.0, "pairs": pairs, "c_index": {"value": value, **limits}}


def test_hospitals_are_sorted_and_of_many_the_largest_are_drawn() -> None:
    few = [hospital("a", 9, 0.9), hospital("b", 10, 0.6), hospital("c", 1200, 0.7), hospital("d", 0, None)]
    assert [s["site"] for s in drawn_sites(few)] == ["a", "c", "b"]
    assert left_out(few) == (1, 0)
    svg = by_site(few)
    assert re.findall(r">(\w \([\d,]+\))<", svg) == ["a (9)", "c (1,200)", "b (10)"]
    on_a_line(np.concatenate([dots(svg, "#b5b5b5"), dots(svg)])[:, 0], np.array([0.9, 0.7, 0.6]))
    assert len(dots(svg)) == 2
    many = [hospital(f"h{i}", i, 0.5 + (i % 7) / 20) for i in range(1, 61)] + [hospital("none", -3, None)]
    shown = drawn_sites(many)
    assert {s["site"] for s in shown} == {f"h{i}" for i in range(21, 61)}
    assert [s["c_index"]["value"] for s in shown] == sorted((s["c_index"]["value"] for s in shown), reverse=True)
    assert left_out(many) == (1, 20)
    height = [float(re.findall(r'height="([\d.]+)pt"', by_site(s))[0]) for s in (few, many, many * 3)]
    assert height[0] < height[1] / 4
    assert height[1] == height[2]


def test_rows_put_the_brier_score_on_a_scale_and_merge_the_plain_sums(made: dict[str, Any]) -> None:
    plain = {"patients": [4, 0, 6], "events": [2, 0, 1], "loss": [6.0, 0.0, 3.0], "concordant": [3, 0, 1]}
    folds = [{"evaluation": plain | {"comparable": [4, 0, 1]}}] * 2 + [{}]
    told = rows(made | {"folds": folds})
    for name, row in zip(made["cancers"], told, strict=True):
        of = made["evaluation"]["by_cancer"][name]
        assert row["scaled"] == 1 - of["brier"] / of["brier_null"]
        assert row["within"] == made["evaluation"]["within_sites"]["by_cancer"][name]
        assert (row["cancer"], row["patients"], row["c_index"]) == (name, of["patients"], of["c_index"])
    assert [row["loss"] for row in told] == [1.5, None, 0.5]
    without = {k: v for k, v in made.items() if k != "evaluation"}
    assert rows(without | {"folds": folds})[:2] == [
        {"cancer": "C0", "patients": 8.0, "events": 4.0, "loss": 1.5, "within": 0.75},
        {"cancer": "C1", "patients": 0.0, "events": 0.0, "loss": None, "within": None},
    ]
    assert rows(without) == []
    assert sections(without) == {}


def test_the_page_of_a_run_says_what_the_evaluation_says(made: dict[str, Any]) -> None:
    html, found = render({"results": made}), made["evaluation"]
    text = text_of(html)
    c = found["c_index"]
    assert f"held-out patients of all 4 hospitals together: {c['value']:.3f} [{c['low']:.3f}, {c['high']:.3f}]" in text
    assert f"certainly between {c['bounds'][0]:.3f} and {c['bounds'][1]:.3f}" in text
    assert f"of one hospital alone: {found['within_sites']['value']:.3f}" in text
    assert f"{MIXED} 60 months: {found['mixed']['value']:.3f}" in text
    assert "averaged over 2 folds" in text
    assert "no noise on the counts" in text
    for part in ("By hospital", "Calibration", "Risk groups"):
        assert html.count(f"<h2>{part}</h2>") == 1
    of = found["by_cancer"]["C1"]
    cells = [f"{of['patients']:.0f}", f"{of['events']:.0f}", f"{of['c_index']['value']:.3f}"]
    assert f"<td>C1</td><td>{cells[0]}</td><td>{cells[1]}</td><td>{cells[2]}" in html
    assert "<th>loss</th>" not in html  # nothing is known of it here


def test_one_cancer_type_one_fold_one_hospital() -> None:
    html = render({"results": results(1, 1, 1, 60, evaluation__horizons=[12.0])})
    assert "C-index of C0, held-out patients of hospital 00: " in text_of(html)
    assert MIXED not in html
    assert "averaged over" not in html
    assert ">mean<" not in html


def test_noise_is_told_and_negative_counts_are_drawn() -> None:
    made = results(1, 2, 5, 150, 16, evaluation__epsilon=0.5)
    text = text_of(render({"results": made}))
    assert "epsilon = 0.5 a fold" in text
    assert "certainly between" not in text
    assert "no noise" not in text
    made["evaluation"]["by_cancer"]["C0"] |= {"patients": -4.0, "events": -7.2, "brier_null": -0.1}
    made["evaluation"]["by_cancer"]["C0"]["c_index"] = {"value": -3.5, "low": None, "high": None}
    html = render({"results": made})
    assert "<td>C0</td><td>-4</td><td>-7</td><td>-3.500</td>" in html
    assert rows(made)[0]["scaled"] is None


def test_a_page_of_which_nothing_is_known_is_drawn(made: dict[str, Any]) -> None:
    nothing = made | {"evaluation": without_numbers(made["evaluation"])}
    html = render({"results": nothing})
    assert TITLE in html
    assert "None" not in text_of(html.partition(TITLE)[2].partition("<h2>Answers")[0])
    assert "<h2>By hospital</h2>" not in html
    dashes = html.partition("<td>C0</td>")[2].partition("</tr>")[0]
    assert dashes.count("<td>–</td>") == 6


def test_risk_groups_are_drawn_once_and_from_sums_where_there_are_any(made: dict[str, Any]) -> None:
    curve = {"time": [1.0], "survival": [0.9], "lower": [0.8], "upper": [1.0], "at_risk": [9.0], "patients": 9}
    groups = {"months": [1.0], "curves": {"high": curve, "low": curve}, "logrank_p": 0.5}
    both = render({"results": made, "risk_groups": groups})
    assert both.count("<h2>Risk groups</h2>") == 1
    assert "log-rank p = 0.50" not in both
    predicted = {k: v for k, v in made.items() if k != "evaluation"}
    alone = render({"results": predicted, "risk_groups": groups})
    assert alone.count("<h2>Risk groups</h2>") == 1
    assert "log-rank p = 0.50" in alone
    assert TITLE not in alone


def test_a_study_that_was_run(tmp_path: Path, consortium: Path) -> None:
    """With its table, and without: the plain sums of the folds are told then."""
    copy_sites(tmp_path, consortium)
    done = train(tmp_path, training__evaluate_every=0, evaluation__horizons=[12.0, 24.0]).results
    assert "<h2>Calibration</h2>" in render({"results": done})
    known = [row["loss"] for row in rows(done)]
    del done["evaluation"]
    html = render({"results": done})
    assert TITLE in html
    assert "<h2>Calibration</h2>" not in html
    for name, loss in zip(done["cancers"], known, strict=True):
        assert re.search(rf"<td>{name}</td><td>\d+</td><td>\d+</td><td>\S+</td><td>{loss:.3f}</td>", html)


def test_a_fold_in_which_all_died_is_not_certain() -> None:
    """All patients of the lowest group of one fold die before the horizon: survival 0 has no interval."""
    study = Study().changed(evaluation__risk_bins=8, evaluation__time_bins=8, evaluation__horizons=[12.0])
    one, two = fold(0, 1, 1, 100, study), fold(1, 1, 1, 100, study)
    counts = one.counts.copy()
    counts[0, :, -4:] = 0
    counts[0, 1, -4:, 0] = 15
    dead = summarise(study, ("C0",), [replace(one, counts=counts), two])["horizons"][0]
    c = dead["calibration"]
    assert 0 < c["lower"][0] < c["observed"][0] < c["upper"][0] < 0.5
    alone = summarise(study, ("C0",), [two])["horizons"][0]["calibration"]
    assert c["upper"][0] - c["lower"][0] > 0.4 * (alone["upper"][0] - alone["lower"][0])
    points = dots(calibration([dead]))
    on_a_line(points[:, 1], np.array(c["observed"]))


def test_where_noise_drowns_everything_no_picture_pretends_otherwise() -> None:
    drowned = results(patients=8, bins=8, evaluation__epsilon=0.05)
    assert set(drowned["evaluation"]["c_index"]["drowned"]) == set(drowned["evaluation"]["by_cancer"])
    assert sections(drowned) == {}
    page = render({"results": drowned})
    assert "nothing is known of these models' quality" in page
    assert MIXED not in page
    assert "by_cancer" in sections(results(patients=400, bins=8, evaluation__epsilon=8.0))
