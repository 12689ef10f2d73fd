"""Genes by class: class means from sums, ranked lists, and what happens with models that hold less."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from oncofed.common.study import Study
from oncofed.deploy.cli import cli
from oncofed.server import analysis, genes
from toy_explanations import CLASSES, DRAWS, OWN, PANEL, own_genes, write_gmt, write_run
from typer.testing import CliRunner


def test_class_means_are_sums_over_patients() -> None:
    a = np.random.default_rng(0).normal(size=(7, 4))
    sums = {
        "attribution/patients": np.array([7.0, 0.0]),
        "attribution/sum": np.array([a.sum(0), np.zeros(4)]),
        "attribution/size": np.array([np.abs(a).sum(0), np.zeros(4)]),
    }
    effects = analysis.cancer_effects(sums, means=True)
    np.testing.assert_allclose(effects.effect[0], a.mean(0))
    np.testing.assert_allclose(effects.importance[0], np.abs(a).mean(0))
    assert np.isnan(effects.effect[1]).all()  # withheld


def test_class_means_rank_by_sign_and_slopes_by_size() -> None:
    effect = np.array([[0.2, -0.9, 0.5], [0.4, -0.7, 0.3]])
    means = analysis.rank_genes(effect, np.abs(effect), means=True)
    slopes = analysis.rank_genes(effect, np.abs(effect))
    assert means is not None
    assert slopes is not None
    assert means.top(3).tolist() == [2, 0, 1]  # what speaks against the class comes last
    assert slopes.top(3).tolist() == [1, 2, 0]
    np.testing.assert_allclose(means.score, effect.mean(0))
    np.testing.assert_allclose(slopes.score, [0.3, -0.8, 0.4])


def test_planted_genes_lead_each_class(tmp_path: Path) -> None:
    models = genes.read_models(write_run(tmp_path / "out"))
    assert genes.has_class_means(models)
    for c, ranking in enumerate(genes.rankings(models).values()):
        assert ranking is not None
        assert set(ranking.top(OWN).tolist()) == set(own_genes(c).tolist())
        assert (ranking.agreement[own_genes(c)] == 1).all()
    told = genes.summarise(models)
    assert told["measure"] == "mean"
    first = told["cancers"]["KIRC"]["genes"][0]
    assert first["gene"] == PANEL.genes[own_genes(2)[0]]
    assert first["mean"] == pytest.approx(0.4, abs=0.06)
    assert first["sd"] > 0


def test_ranked_lists_are_by_class_mean(tmp_path: Path) -> None:
    out = write_run(tmp_path / "out", withheld=(1,))
    answer = CliRunner().invoke(cli, ["study", "genes", str(out), "--pathways", str(write_gmt(tmp_path / "s.gmt"))])
    assert answer.exit_code == 0, answer.output
    assert "speaks for the class" in answer.output
    assert "withheld at the sites, too few patients: COADREAD" in answer.output
    assert "PROGRAM_OF_BRCA" in answer.output
    files = {f.name for f in (out / "genes").iterdir()}
    assert files == {f"{c}.rnk" for c in CLASSES if c != "COADREAD"} | {"stability.json", "pathways.csv"}
    models = genes.read_models(out)
    rows = [line.split("\t") for line in (out / "genes" / "LUAD.rnk").read_text().splitlines()]
    mean = np.mean([m.explanation["attribution/sum"][3] / m.explanation["attribution/patients"][3] for m in models], 0)
    assert [g for g, _ in rows] == [PANEL.genes[g] for g in np.argsort(-mean)]
    np.testing.assert_allclose([float(v) for _, v in rows], np.sort(mean)[::-1], rtol=1e-6)


def test_models_of_earlier_versions_have_slopes(tmp_path: Path) -> None:
    models = genes.read_models(write_run(tmp_path / "out"))
    for m in models:
        del m.explanation["attribution/sum"]
    assert not genes.has_class_means(models)
    told = genes.summarise(models)
    assert told["measure"] == "slope"
    assert "slope" in told["cancers"]["BRCA"]["genes"][0]


def test_survival_keeps_its_slopes(tmp_path: Path) -> None:
    models = genes.read_models(write_run(tmp_path / "out"))
    survival = [type(m)(**{**vars(m), "study": Study()}) for m in models]
    assert not genes.has_class_means(survival)


def test_classes_whose_names_differ_in_signs_have_files_of_their_own() -> None:
    stems = genes.file_stems(("ER+", "ER-", "her2", "HER2", "Luminal A"))
    assert stems["ER+"] == "ER-"
    assert stems["Luminal A"] == "Luminal-A"
    assert len({s.lower() for s in stems.values()}) == 5
    assert all("/" not in s for s in genes.file_stems(("a/b", "a\\b", "..")).values())


def test_networks_by_command(tmp_path: Path) -> None:
    first, second = write_run(tmp_path / "a", seed=1, withheld=(4,)), write_run(tmp_path / "b", seed=2, withheld=(4,))
    answer = CliRunner().invoke(cli, ["study", "network", str(first), str(second)])
    assert answer.exit_code == 0, answer.output
    assert f"{6 * DRAWS} permuted networks a class" in answer.output
    assert "too few patients: PRAD" in answer.output
    names = {f.name for f in (first / "network").iterdir()}
    kept = [c for c in CLASSES if c != "PRAD"]
    assert names == {f"{c}.{e}" for c in kept for e in ("graphml", "tsv")} | {"hubs.csv", "stability.json"}
    stability = json.loads((first / "network" / "stability.json").read_text())
    assert stability["classes"].keys() == set(kept)
    assert stability["classes"]["BRCA"]["models"] == 6
    assert stability["classes"]["BRCA"]["jaccard"] > 3 * stability["classes"]["BRCA"]["by_chance"]


def test_networks_want_a_study_that_asked_for_them(tmp_path: Path) -> None:
    bare = write_run(tmp_path / "out", parts=("attribution",))
    answer = CliRunner().invoke(cli, ["study", "network", str(bare)])
    assert isinstance(answer.exception, ValueError)
    assert "set analysis.network_genes" in str(answer.exception)
