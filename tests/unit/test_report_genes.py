"""The report's sections of genes, pathways, ablation and attention: with all parts, with some withheld, without any."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oncofed.common.pathways import pathways_on
from oncofed.common.saved import SavedModel
from oncofed.deploy.cli import cli
from oncofed.server.interpret import interpret
from oncofed.server.report.genes import ablation
from oncofed.server.report.render import render
from toy_explanations import CLASSES, HEADS, LAYERS, PANEL, toy_results, write_gmt, write_run
from typer.testing import CliRunner

TITLES = (
    "Which genes drive the score",
    "What is left without these genes",
    "Which pathways drive the score",
    "How focused the attention is",
    "Which gene is read through which",
)


def results_of(root: Path, **settings: Any) -> dict[str, Any]:
    out = write_run(root / "out", **settings)
    model = SavedModel.read(out / "model-fold-0.safetensors")
    told = interpret(out, [0, 1, 2], pathways_on(PANEL, write_gmt(root / "sets.gmt")))
    return toy_results(model.study.model_dump(mode="json"), told)


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return results_of(tmp_path_factory.mktemp("everything"))


def titles(html: str) -> list[str]:
    return [t for t in re.findall(r"<h2>(.*?)</h2>", html) if t in TITLES]


def test_all_sections_are_drawn_from_numbers_alone(everything: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps(everything))  # no model beside it
    answer = CliRunner().invoke(cli, ["study", "report", str(tmp_path)])
    assert answer.exit_code == 0, answer.output
    html = (tmp_path / "report.html").read_text()
    assert titles(html) == list(TITLES)
    assert html.count("<svg") == 5  # and one of the rounds
    assert html == render({"results": everything})
    table = html.split("How focused the attention is")[1].split("</table>")[0]
    assert table.count("<td>") == LAYERS * (HEADS + 1)
    assert "At the maximum, 5.989" in html  # ln 399: a gene does not look at itself
    for name in CLASSES:
        assert f">{name}<" in html.split("Which gene is read through which")[1]
    assert f">{PANEL.genes[0]}<" in html


def test_withheld_classes_are_named_and_left_out(tmp_path: Path) -> None:
    html = render({"results": results_of(tmp_path, withheld=(1, 3))})
    assert titles(html) == list(TITLES)
    assert html.count("too few patients: COADREAD, LUAD") == 3  # genes, attention, network
    assert "COADREAD: " not in html


def test_all_withheld_leaves_no_section(tmp_path: Path) -> None:
    html = render({"results": results_of(tmp_path, withheld=tuple(range(len(CLASSES))))})
    assert titles(html) == ["What is left without these genes"]


def test_without_any_nothing_is_said(everything: dict[str, Any]) -> None:
    bare = {k: v for k, v in everything.items() if k not in ("genes", "pathways", "attention", "network")}
    bare["folds"] = [{k: v for k, v in f.items() if k != "ablation"} for f in bare["folds"]]
    assert titles(render({"results": bare})) == []


def test_each_part_stands_alone(tmp_path: Path, everything: dict[str, Any]) -> None:
    for n, (part, shown) in enumerate((("attribution", TITLES[0]), ("attention", TITLES[3]), ("network", TITLES[4]))):
        out = write_run(tmp_path / str(n), parts=(part,))
        told = interpret(out, [0, 1, 2], {})
        results = toy_results(everything["study"], told, ablation=False)
        assert titles(render({"results": results})) == [shown]


def test_slopes_of_earlier_results_keep_their_table(everything: dict[str, Any]) -> None:
    old = copy.deepcopy(everything)
    del old["genes"]["measure"]
    for c in old["genes"]["cancers"].values():
        for g in c["genes"]:
            g["slope"] = g.pop("mean")
    html = render({"results": old})
    assert "<th>slope</th>" in html
    assert html.count("<svg") == 4


def test_a_fold_whose_model_nobody_explained_is_left_out(tmp_path: Path) -> None:
    out = write_run(tmp_path / "out")
    write_run(tmp_path / "bare", folds=1, parts=("nothing",))
    (tmp_path / "bare" / "model-fold-0.safetensors").replace(out / "model-fold-1.safetensors")
    told = interpret(out, [0, 1, 2], {})
    assert {c["folds"] for c in told["genes"]["cancers"].values()} == {2}
    assert {c["models"] for c in told["network"]["classes"].values()} == {2}


def test_recall_curves_are_hits_over_patients(everything: dict[str, Any]) -> None:
    """In the picture heights are one linear function of recall over all folds' patients."""
    folds = [f["ablation"] for f in everything["folds"]]
    picture = ablation(folds)
    thick = re.findall(r'<path d="([^"]*)"[^>]*style="fill: none; [^"]*stroke-width: 2.2', picture)
    heights = [np.array([float(y) for _, y in re.findall(r"[ML] (\S+) (\S+)", d)]) for d in thick]
    drawn = np.concatenate([h for h in heights if len(h) == 7])
    patients = np.sum([f["patients"] for f in folds], axis=0)[:, None]
    wanted = [(np.sum([f[key] for f in folds], axis=0) / patients).mean(0) for key in ("hits", "random")]
    slope, level = np.polyfit(np.concatenate(wanted), drawn, 1)
    assert slope < 0
    np.testing.assert_allclose(slope * np.concatenate(wanted) + level, drawn, atol=0.01)
