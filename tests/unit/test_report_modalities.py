"""The report of a study of several modalities: who holds what, and how they share the risk round by round."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oncofed.server.analysis import Worth
from oncofed.server.report import heat, modalities
from oncofed.server.report.look import COLOURS
from oncofed.server.report.render import render
from toy_studies import copy_sites, train

TITLE = "<h2>Balance between modalities</h2>"


def results_of(root: Path, consortium: Path, **dotted: object) -> dict[str, Any]:
    copy_sites(root, consortium)
    return train(root, splits__only=[0, 1], training__evaluate_every=0, **dotted).results


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory, consortium: Path) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("report")
    return results_of(root, consortium, model__name="path_gptomic", training__rounds=5)


def branches_of(results: dict[str, Any]) -> list[list[dict[str, Any]]]:
    return [[point["branches"] for point in fold["curve"]] for fold in results["folds"]]


def lines(svg: str, colour: str) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Points of the thin and of the thick lines of a colour, as the picture has them."""
    found: tuple[list[np.ndarray], list[np.ndarray]] = [], []
    for d, style in re.findall(r'<path d="([^"]*)"[^>]*style="fill: none; ([^"]*)"', svg):
        if f"stroke: {colour}" in style and "z" not in d:
            points = np.array(re.findall(r"[ML] (\S+) (\S+)", d), dtype=float)
            found["stroke-width: 2" in style].append(points)
    return found


def test_lines_are_the_rounds_shares_and_factors(both: dict[str, Any]) -> None:
    """In each panel heights in the picture are one linear function of the numbers, for folds and for their mean."""
    runs = branches_of(both)
    svg = modalities.balance({"": runs})
    heights: dict[str, list[np.ndarray]] = {"share": [], "factor": []}
    values: dict[str, list[np.ndarray]] = {"share": [], "factor": []}
    for m in ("rna", "pathology"):
        thin, thick = lines(svg, COLOURS[m])
        thick = [line for line in thick if len(line) == 5]  # a point a round; the legend has fewer
        assert (len(thin), len(thick)) == (4, 2)
        for i, key in enumerate(("share", "factor")):
            told = np.array([[point[m][key] for point in run] for run in runs])
            drawn = [*thin[2 * i : 2 * i + 2], thick[i]]
            heights[key] += [line[:, 1] for line in drawn]
            values[key] += [*told, told.mean(0)]
    for key in values:
        y, v = np.concatenate(heights[key]), np.concatenate(values[key])
        slope, level = np.polyfit(v, y, 1)
        assert slope < 0  # pixels count downwards
        np.testing.assert_allclose(slope * v + level, y, atol=0.01)
    assert np.ptp(np.concatenate(values["factor"])) > 0.01
    assert "not modulated" not in svg


def test_report_of_both_modalities(both: dict[str, Any]) -> None:
    html = render({"results": both})
    assert TITLE in html
    assert "<b>rna</b> at 4 of 4 sites; <b>pathology</b> at 3 of 4 sites (vector of named features, width 16" in html
    assert "60 genes (panel" in html
    assert "What each expert, and each modality, is worth" in html
    assert "share in the variance of the log hazard" in html
    assert {">rna<", ">pathology<"} <= set(re.findall(r">[a-z]+<", html))
    assert render({"results": both}) == html


def test_with_and_without_modulation_stand_side_by_side(both: dict[str, Any]) -> None:
    plain = copy.deepcopy(branches_of(both))
    for run in plain:
        for point in run:
            for branch in point.values():
                branch["factor"] = 1.0
    comparison = {"results": both, "main": "federated", "balance": {"unmodulated": plain}}
    html = render(comparison)  # the main method's own rounds are in its results
    for method in ("federated", "unmodulated"):
        assert html.count(f"{method}: share in the variance of the log hazard") == 1
        assert html.count(f"{method}: factor on the encoder") == 1
    assert html.index("federated: share") < html.index("unmodulated: share")
    assert html.count("not modulated") == 1
    told = modalities.balance_by_method(comparison | {"balance": {"federated": plain, "unmodulated": plain}})
    assert told == {"federated": plain, "unmodulated": plain}


def test_nothing_is_said_of_one_modality(tmp_path: Path, consortium: Path) -> None:
    only = results_of(
        tmp_path / "a",
        consortium,
        model__name="path_gptomic",
        fusion__modalities=("pathology",),
        training__rounds=1,
    )
    html = render({"results": only})
    assert TITLE not in html
    assert "genes (panel" not in html
    assert "<b>pathology</b> at 3 of 3 sites" in html  # the fourth has none and takes no part
    assert "each modality" not in html
    html = render({"results": results_of(tmp_path / "b", consortium, training__rounds=1)})
    assert TITLE not in html
    assert "Modalities" not in html
    assert "each modality" not in html
    assert "60 genes (panel" in html


def test_new_methods_are_explained_and_have_their_own_colours(both: dict[str, Any]) -> None:
    names = ("rna", "pathology", "late", "concat", "unmodulated")
    assert len({COLOURS[name] for name in (*names, "federated", "pooled", "local", "fedavg", "ridge")}) == 10
    score = {"value": 0.6, "low": 0.5, "high": 0.7}
    method = {"c_index": score, "by_cancer": {"BRCA": score}, "all_cancers_mixed": 0.6, "cost": {"seconds": 1.0}}
    comparison = {
        "results": both,
        "main": "federated",
        "methods": dict.fromkeys(("federated", *names), method),
        "differences": dict.fromkeys(names, score),
        "held_out": {"scored": 93, "compared": 61},
    }
    html = render(comparison)
    for name in names:
        assert re.search(rf"{name}: (the|one|without) \w+", html), name
        assert f"fill: {COLOURS[name]}" in html
    assert "61 held-out patients, whom all methods scored, of the 93 that federated scored" in html
    assert "whom all methods" not in render(comparison | {"held_out": {"scored": 61, "compared": 61}})


@pytest.mark.parametrize(("group", "same"), [("pathology", True), ("expert", False)])
def test_a_modalitys_worth_leaves_the_experts_colours_alone(group: str, same: bool) -> None:
    """A whole modality is missed far more than one expert; the range of colours is the experts'."""

    def scale(last: float) -> list[str]:
        loss = np.array([[0.01, -0.02], [0.015, 0.0], [last, 0.02]])
        names = ("expert/0", "expert/1", group if group == "pathology" else f"{group}/2")
        svg = heat.worth(Worth(names, loss, loss), ["BRCA", "LUAD"])
        return re.findall(r">([−\d]\d*\.\d+)<", svg)

    assert (scale(0.018) == scale(3.0)) == same
    assert len(scale(0.018)) > 2
