"""T-GEM in a federation, whole: trained, scored, interpreted; small cells stay at the hospitals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oncofed.client.data.site import list_sites
from oncofed.common.ablation import SHARES
from oncofed.common.saved import SavedModel
from oncofed.common.study import Study
from oncofed.deploy.simulate import simulate
from toy_studies import copy_sites

KEYS = {
    "name": "genes",
    "task__kind": "classification",
    "model__name": "t_gem",
    "model__layers": 2,
    "model__heads": 2,
    "training__rounds": 4,
    "training__learning_rate": 0.02,
    "training__weight_decay": 0.01,
    "task__class_prior": "site",
    "splits__only": [0],
    "runtime__threads": 1,
    "analysis__attributions": True,
    "analysis__ablation": True,
    "analysis__attention": True,
    "analysis__network_genes": 12,
    "analysis__network_draws": 2,
    "analysis__patients": 20,
    "analysis__steps": 4,
}


def study(**keys: Any) -> Study:
    return Study().changed(**(KEYS | keys))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, consortium: Path) -> tuple[Path, dict[str, Any]]:
    root = tmp_path_factory.mktemp("t_gem")
    sites = copy_sites(root, consortium)
    return root, simulate(study(runtime__out=str(root / "out")), sites).results


def test_learns_the_classes(finished: tuple[Path, dict[str, Any]]) -> None:
    _, results = finished
    confusion = np.array(results["folds"][0]["evaluation"]["confusion"])
    assert np.trace(confusion) / confusion.sum() > 0.9
    assert not results["left_out"]


def test_what_each_head_is_worth_is_told(finished: tuple[Path, dict[str, Any]]) -> None:
    evaluation = finished[1]["folds"][0]["evaluation"]
    assert np.array(evaluation["without/layer-1/loss"]).shape == (2, 3)
    assert np.array(evaluation["without/layer-2/confusion"]).shape == (2, 3)


def test_saved_model_holds_genes_attention_and_network(finished: tuple[Path, dict[str, Any]]) -> None:
    root, results = finished
    e = SavedModel.read(root / "out" / "model-fold-0.safetensors").explanation
    known = e["attribution/patients"] > 0
    assert known.any()
    assert (np.abs(e["attribution/sum"]).sum(1) > 0).tolist() == known.tolist()
    assert (e["attribution/size"] >= np.abs(e["attribution/sum"]) - 1e-6).all()
    entropy = e["attention/entropy"][known] / e["attention/patients"][known][:, None, None]
    assert ((entropy > 0) & (entropy <= np.log(59) + 1e-6)).all()
    assert e["network/edges"].shape == (3, 2, 12, 12)
    assert e["network/null"].shape == (2, 3, 2, 12, 12)
    assert e["network/null_patients"].shape == (2, 3)
    genes = e["network/genes"]
    assert all(len(set(row)) == 12 for row in genes.tolist())
    covered = e["network/covered"][known] / e["network/total"][known]
    assert ((covered > 0) & (covered < 1)).all()
    assert {"attention", "network", "genes"} <= results.keys()


def test_ablation_counts_held_out_patients(finished: tuple[Path, dict[str, Any]]) -> None:
    fold = finished[1]["folds"][0]
    ablation, confusion = fold["ablation"], np.array(fold["evaluation"]["confusion"])
    assert ablation["shares"] == list(SHARES)
    hits = np.array(ablation["hits"])
    assert hits.shape == (3, 1 + len(SHARES))
    np.testing.assert_allclose(hits[:, 0], np.diag(confusion))
    np.testing.assert_allclose(ablation["patients"], confusion.sum(1))
    assert hits[:, -1].sum() < np.array(ablation["random"])[:, -1].sum() <= hits[:, 0].sum()


def test_classes_of_few_patients_stay_at_the_hospital(tmp_path: Path, consortium: Path) -> None:
    """A site's policy of more patients than it attributes of any class: nothing of its classes leaves, the rest is answered."""
    sites = copy_sites(tmp_path, consortium)
    for folder in list_sites(sites):
        (folder / "policy.toml").write_text("min_patients = 16\nmin_cell = 1\n")
    simulate(study(runtime__out=str(tmp_path / "out"), training__rounds=1), sites)
    e = SavedModel.read(tmp_path / "out" / "model-fold-0.safetensors").explanation
    for name in ("attribution/sum", "attribution/patients", "attention/entropy", "network/edges", "network/patients"):
        counts = e[name].reshape(3, -1)
        held = e["attribution/patients"] > 0
        assert not counts[~held].any(), name
    assert (e["attribution/patients"][e["attribution/patients"] > 0] >= 16).all()
    lines = (list_sites(sites)[0] / ".oncofed" / "release-log.jsonl").read_text().splitlines()
    assert {"query.explain", "evaluate"} <= {json.loads(line)["kind"] for line in lines}


def test_survival_without_layers_is_a_linear_model(tmp_path: Path, consortium: Path) -> None:
    sites = copy_sites(tmp_path, consortium)
    linear = Study().changed(
        name="linear",
        model__name="t_gem",
        model__layers=0,
        training__rounds=6,
        training__learning_rate=0.01,
        splits__only=[0],
        runtime__threads=1,
        runtime__out=str(tmp_path / "out"),
        analysis__attributions=True,
    )
    results = simulate(linear, sites).results
    model = SavedModel.read(tmp_path / "out" / "model-fold-0.safetensors")
    assert set(model.weights) == {"head.shared", "head.own", "head.log_baseline"}
    losses = [point["train_loss"] for point in results["folds"][0]["curve"]]
    assert losses[-1] < losses[0]


def test_same_seed_same_model(tmp_path: Path, consortium: Path) -> None:
    weights = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        sites = copy_sites(tmp_path / name, consortium)
        simulate(study(runtime__out=str(tmp_path / name / "out"), training__rounds=2), sites)
        weights.append(SavedModel.read(tmp_path / name / "out" / "model-fold-0.safetensors"))
    for name, value in weights[0].weights.items():
        assert np.array_equal(value, weights[1].weights[name]), name
    for name, value in weights[0].explanation.items():
        assert np.array_equal(value, weights[1].explanation[name]), name
