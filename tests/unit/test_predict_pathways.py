"""Pathways and genes of a hospital's own patients: attributions that add up, the file beside the rows, what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from oncofed.client.batch import Batch
from oncofed.client.pathways import attributions, choose_sets, pathway_columns, write_pathways
from oncofed.client.predict import predict
from oncofed.deploy.cli import cli
from scipy.special import log_softmax
from toy_studies import copy_sites, model_of, train
from typer.testing import CliRunner


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory, consortium: Path) -> Path:
    root = tmp_path_factory.mktemp("classes")
    copy_sites(root, consortium)
    train(root, task__kind="classification", analysis__steps=50)
    return root


@pytest.fixture(scope="module")
def survival(tmp_path_factory: pytest.TempPathFactory, consortium: Path) -> Path:
    root = tmp_path_factory.mktemp("survival")
    copy_sites(root, consortium)
    train(root, training__rounds=1)
    return root


def gmt(folder: Path, panel: tuple[str, ...]) -> Path:
    sets = {"WHOLE_PANEL": panel, "SOME": panel[3:9], "ONE": (panel[0], "X", "Y")}
    file = folder / "sets.gmt"
    file.write_text("".join("\t".join((name, "", *genes)) + "\n" for name, genes in sets.items()))
    return file


@pytest.mark.parametrize("kind", ["classes", "survival"])
def test_attributions_add_up_to_what_they_explain(kind: str, request: pytest.FixtureRequest) -> None:
    """Completeness: over genes they sum to the score of the patient less that of the mean patient."""
    root = request.getfixturevalue(kind)
    prediction = predict(model_of(root), root / "sites" / "aachen")
    a = attributions(prediction)
    scorer = prediction.scorer
    batch = Batch.of(prediction.cohort, scorer.lens, scorer.device)
    with torch.no_grad():
        zero = replace(batch, x_BG=torch.zeros_like(batch.x_BG)).through(scorer.network).score.double().cpu().numpy()
    change = prediction.score - zero
    if kind == "classes":
        index = prediction.score.argmax(1)[:, None]
        own, mean = log_softmax(prediction.score, axis=1), log_softmax(zero, axis=1)
        change = np.take_along_axis(own - mean, index, axis=1)[:, 0]
    assert np.abs(change).mean() > 1e-3
    np.testing.assert_allclose(a.sum(1), change, atol=0.05 * np.abs(change).mean() + 1e-5)


def test_columns_are_means_over_sets_and_first_genes(classes: Path, tmp_path: Path) -> None:
    prediction = predict(model_of(classes), classes / "sites" / "bergen")
    panel = prediction.model.panel.genes
    sets = choose_sets(prediction, gmt(tmp_path, panel))
    assert list(sets) == ["WHOLE_PANEL", "SOME"]
    a, columns = attributions(prediction), pathway_columns(prediction, sets)
    np.testing.assert_allclose(columns["SOME"].astype(float), a[:, 3:9].mean(1))
    np.testing.assert_allclose(columns["WHOLE_PANEL"].astype(float), a.mean(1))
    first = np.abs(a).argmax(1)
    assert columns["gene_1"].tolist() == [panel[i] for i in first]
    np.testing.assert_allclose(columns["gene_1_attribution"].astype(float), a[np.arange(len(a)), first])
    sizes = np.abs([columns[f"gene_{n}_attribution"].astype(float) for n in range(1, 6)])
    assert (np.diff(sizes, axis=0) <= 0).all()
    assert columns["predicted"].tolist() == prediction.columns()["predicted"].tolist()


def test_patients_without_expression_have_empty_cells(classes: Path, tmp_path: Path) -> None:
    prediction = predict(model_of(classes), classes / "sites" / "bergen")
    x = prediction.cohort.x_NG.copy()
    x[1] = np.nan
    without = replace(prediction, cohort=replace(prediction.cohort, x_NG=x))
    sets = choose_sets(prediction, gmt(tmp_path, prediction.model.panel.genes))
    file = write_pathways(without, sets, tmp_path / "risks.csv")
    table = pd.read_csv(file)
    assert table.loc[1, ["SOME", "gene_1", "gene_1_attribution"]].isna().all()
    assert table.drop(index=1).notna().all().all()


@pytest.mark.parametrize("kind", ["classes", "survival"])
def test_file_lies_beside_the_rows_and_the_terminal_names_nobody(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    root = request.getfixturevalue(kind)
    folder = root / "sites" / "aachen"
    sets = gmt(tmp_path, predict(model_of(root), folder).model.panel.genes)
    arguments = ["site", "predict", str(model_of(root)), str(folder), "--out", str(tmp_path / "risks.csv")]
    answer = CliRunner().invoke(cli, [*arguments, "--pathways", str(sets)])
    assert answer.exit_code == 0, answer.output
    rows, table = pd.read_csv(tmp_path / "risks.csv"), pd.read_csv(tmp_path / "risks-pathways.csv")
    assert table["patient"].tolist() == rows["patient"].tolist()
    key = "predicted" if kind == "classes" else "cancer_type"
    assert table[key].tolist() == rows[key].tolist()
    assert "2 pathways of" in answer.output.replace("\n", " ")
    assert "AAC-" not in answer.output


def test_sets_of_other_names_are_refused_before_anything_is_written(classes: Path, tmp_path: Path) -> None:
    file = tmp_path / "ids.gmt"
    file.write_text("IDS\t\tENSG1\tENSG2\tENSG3\n")
    out = tmp_path / "risks.csv"
    arguments = ["site", "predict", str(model_of(classes)), str(classes / "sites" / "aachen"), "--out", str(out)]
    answer = CliRunner().invoke(cli, [*arguments, "--pathways", str(file)])
    assert isinstance(answer.exception, ValueError)
    assert "none of its 1 sets has 3 genes in the panel" in str(answer.exception)
    assert not out.exists()


def test_models_without_single_genes_are_refused(classes: Path, tmp_path: Path) -> None:
    prediction = predict(model_of(classes), classes / "sites" / "aachen")
    images = prediction.model.study.changed(
        model__name="path_gptomic", task__kind="survival", fusion__modalities=("pathology",)
    )
    other = replace(prediction, model=replace(prediction.model, study=images))
    with pytest.raises(ValueError, match="this model sees no expression; leave it out"):
        choose_sets(other, gmt(tmp_path, prediction.model.panel.genes))
