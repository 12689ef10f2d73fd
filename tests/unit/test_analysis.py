"""What is read from sums about experts and genes, against scikit-learn, against chance, and against planted truth."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oncofed.common.study import Study
from oncofed.deploy.cli import cli
from oncofed.deploy.simulate import simulate
from oncofed.deploy.sites.synth import SynthSettings, write_consortium
from oncofed.server import analysis, genes
from oncofed.server.checkpoint import load_arrays, save_arrays
from oncofed.server.report.render import render
from sklearn.metrics import normalized_mutual_info_score, roc_auc_score
from typer.testing import CliRunner


@pytest.fixture(scope="module")
def attributed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder that holds `sites` and `out`, of a study that learned something and asked for attributions; its results."""
    root = tmp_path_factory.mktemp("attributed")
    settings = SynthSettings(sites=3, patients=480, genes=120, cancers=3, genes_per_program=10, seed=2)
    write_consortium(root / "sites", settings)
    study = Study().changed(
        model__size="tiny",
        training__rounds=10,
        training__learning_rate=0.01,
        training__weight_decay=0.3,
        splits__only=[0, 1],
        analysis__attributions=True,
        analysis__steps=4,
        runtime__threads=1,
        runtime__out=str(root / "out"),
    )
    return root, simulate(study, root / "sites").results


# -- experts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_mutual_information_is_sklearns(seed: int) -> None:
    table = np.random.default_rng(seed).integers(0, 12, (4, 6))
    table[0, :3] = 0
    cancer, expert = (np.repeat(index.ravel(), table.ravel()) for index in np.indices(table.shape))
    ours = analysis.normalised_mutual_information(table)
    assert ours == pytest.approx(normalized_mutual_info_score(cancer, expert), abs=1e-12)


def test_mutual_information_at_its_ends() -> None:
    assert analysis.normalised_mutual_information(np.diag([5, 9, 2])) == pytest.approx(1.0)
    assert analysis.normalised_mutual_information(np.outer([1, 2, 3], [4, 1])) == 0.0
    assert analysis.normalised_mutual_information(np.array([[3, 0], [7, 0]])) == 0.0  # one expert serves all


def test_null_is_calibrated_where_nothing_depends_on_cancer() -> None:
    rng = np.random.default_rng(0)
    shares = np.array([0.5, 0.3, 0.15, 0.05])
    values = []
    for seed in range(200):
        table = np.array([rng.multinomial(n, shares) for n in (60, 30, 20)])
        result = analysis.specialisation(table, seed=seed, draws=500)
        assert result is not None
        values.append(result["p"])
    assert 0.01 <= np.mean(np.array(values) < 0.05) <= 0.10
    assert 0.4 < np.mean(values) < 0.6


def test_an_expert_for_each_cancer_is_beyond_chance() -> None:
    result = analysis.specialisation(np.diag([20, 30, 25]) + 1, seed=0)
    assert result is not None
    assert result["value"] > 5 * result["null_95"] > 5 * result["null_mean"]
    assert result["p"] == pytest.approx(1 / (analysis.DRAWS + 1))


def test_with_one_cancer_there_is_nothing_to_specialise_in() -> None:
    assert analysis.specialisation(np.array([[5, 3], [0, 0]]), seed=0) is None
    assert analysis.specialisation(np.array([[5], [3]]), seed=0) is None


def test_balance_counts_the_dead() -> None:
    even, uneven = analysis.balance(np.full(4, 3.0)), analysis.balance(np.array([99.5, 0.5, 0.0]))
    assert even == {"share": [0.25] * 4, "variation": 0.0, "dead": 0}
    assert uneven["dead"] == 2
    assert uneven["variation"] == pytest.approx(np.std([0.995, 0.005, 0]) * 3)


def test_worth_is_a_change_per_patient_and_per_pair() -> None:
    evaluation = {
        "patients": [10, 0],
        "loss": [20.0, 0.0],
        "concordant": [30.0, 0.0],
        "comparable": [40.0, 0.0],
        "without/expert/loss": [[25.0, 0.0], [19.0, 0.0]],
        "without/expert/concordant": [[20.0, 0.0], [30.0, 0.0]],
        "without/shared/loss": [[30.0, 0.0]],
        "without/shared/concordant": [[20.0, 0.0]],
    }
    w = analysis.worth(evaluation)
    assert w is not None
    assert w.names == ("expert/0", "expert/1", "shared")
    np.testing.assert_allclose(w.loss[:, 0], [0.5, -0.1, 1.0])
    np.testing.assert_allclose(w.score[:, 0], [-0.25, 0.0, -0.25])
    assert np.isnan(w.loss[:, 1]).all()
    assert analysis.worth({"patients": [1]}) is None


def test_load_is_a_share_of_each_round_and_of_each_site() -> None:
    fold = {
        "blocks": ["trunk", "cancer/A", "expert/0", "expert/1"],
        "curve": [{"evidence": {"expert/0": 1.0, "expert/1": 3.0}}, {"evidence": {"expert/0": 0.0, "expert/1": 0.0}}],
        "site_evidence": {"B": [9.0, 9.0, 2.0, 2.0], "A": [9.0, 9.0, 0.0, 5.0]},
    }
    assert analysis.mixtures(fold) == ["expert"]
    np.testing.assert_allclose(analysis.load_by_round(fold, "expert"), [[0.25, 0.75], [0.0, 0.0]])
    sites, share = analysis.load_by_site(fold, "expert")
    assert sites == ["A", "B"]
    np.testing.assert_allclose(share, [[0.0, 1.0], [0.5, 0.5]])


# -- genes ---------------------------------------------------------------------------------------------------------------


def test_slopes_of_a_linear_score_are_its_coefficients() -> None:
    rng = np.random.default_rng(0)
    x, beta = rng.normal(size=(30, 5)), np.array([0.5, -0.2, 0.0, 1.0, 0.1])
    x[:, 4] = 0.0  # a gene that never varies
    sums = {
        "attribution/patients": np.array([30.0, 0.0]),
        "attribution/size": np.array([np.abs(x * beta).sum(0), np.zeros(5)]),
        "attribution/product": np.array([(x * beta * x).sum(0), np.zeros(5)]),
        "attribution/squares": np.array([np.square(x).sum(0), np.zeros(5)]),
    }
    effects = analysis.cancer_effects(sums)
    np.testing.assert_allclose(effects.effect[0], [0.5, -0.2, 0.0, 1.0, 0.0], atol=1e-12)
    np.testing.assert_allclose(effects.importance[0], np.abs(x * beta).mean(0))
    assert np.isnan(effects.effect[1]).all()  # withheld


def test_ranking_over_folds() -> None:
    slope = np.array([[0.5, -0.3, 0.1], [0.7, -0.1, -0.2], [np.nan] * 3])
    importance = np.array([[0.4, 0.2, 0.1], [0.6, 0.2, 0.1], [np.nan] * 3])
    r = analysis.rank_genes(slope, importance)
    assert r is not None
    assert r.folds == 2
    np.testing.assert_allclose(r.score, [0.5, -0.2, -0.1])
    np.testing.assert_allclose(r.agreement, [1.0, 1.0, 0.5])
    np.testing.assert_allclose(r.sd, np.std(slope[:2], axis=0, ddof=1))
    assert r.spearman == pytest.approx(0.5)
    assert r.overlap == 1.0
    one = analysis.rank_genes(slope[:1], importance[:1])
    assert one is not None
    assert (one.spearman, one.overlap) == (None, None)
    assert analysis.rank_genes(slope[2:], importance[2:]) is None


def test_ranking_finds_the_planted_programs(attributed: tuple[Path, dict[str, Any]]) -> None:
    root, _ = attributed
    truth = json.loads((root / "sites" / "truth.json").read_text())
    models = genes.read_models(root / "out")
    panel = models[0].panel.genes
    for cancer, ranking in genes.rankings(models).items():
        assert ranking is not None
        planted = np.isin(panel, truth["shared_program"] + truth["own_programs"][cancer])
        assert roc_auc_score(planted, ranking.importance) > 0.7, cancer


def test_gene_lists_for_enrichment(attributed: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    root, results = attributed
    answer = CliRunner().invoke(cli, ["study", "genes", str(root / "out")])
    assert answer.exit_code == 0
    folder = root / "out" / "genes"
    for cancer in results["cancers"]:
        assert cancer in answer.output
        rows = [line.split("\t") for line in (folder / f"{cancer}.rnk").read_text().splitlines()]
        scores = [float(score) for _, score in rows]
        assert len({gene for gene, _ in rows}) == results["panel"]["genes"] == len(rows)
        assert scores == sorted(scores, reverse=True)
        assert scores[0] > 0 > scores[-1]
    assert len(list(folder.glob("expert-*-fold-*.rnk"))) == 4 * 2
    stability = json.loads((folder / "stability.json").read_text())
    assert stability == results["genes"]
    assert stability["cancers"].keys() == set(results["cancers"])
    assert stability["withheld"] == []


def test_genes_want_a_study_that_asked_for_them(attributed: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no results\.json of a finished run"):
        genes.read_models(tmp_path)
    arrays, about = load_arrays(attributed[0] / "out" / "model-fold-0.safetensors")
    bare = {k: v for k, v in arrays.items() if not k.startswith("explanation/attribution")}
    save_arrays(tmp_path / "model-fold-0.safetensors", bare, about)
    (tmp_path / "results.json").write_text(json.dumps({"folds": [{"fold": 0}]}))
    with pytest.raises(ValueError, match=r"set analysis\.attributions = true"):
        genes.write_rankings(tmp_path)


# -- report --------------------------------------------------------------------------------------------------------------


def test_report_from_results_alone_shows_experts_and_genes(attributed: tuple[Path, dict[str, Any]]) -> None:
    html = render({"results": attributed[1]})
    for title in ("Which expert serves which cancer", "What each expert is worth", "Load of the experts"):
        assert f"<h2>{title}</h2>" in html
    assert "<h2>Which hospital feeds which expert</h2>" in html
    assert "<h2>Which genes drive the score</h2>" in html
    assert "Normalised mutual information" in html
    assert html.count("<svg") == 9
    assert render({"results": attributed[1]}) == html


def test_report_of_a_classification(tmp_path: Path, consortium: Path) -> None:
    study = Study().changed(
        model__size="tiny",
        task__kind="classification",
        training__rounds=2,
        splits__only=[0],
        runtime__threads=1,
        runtime__out=str(tmp_path / "out"),
    )
    html = render({"results": simulate(study, consortium).results})
    assert "<h2>Who is taken for whom</h2>" in html
    assert "<th>recall</th>" in html
    assert "C-index" not in html
    assert "Kaplan" not in html
