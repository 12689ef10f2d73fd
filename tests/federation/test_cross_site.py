"""Every model at every site: what each cell equals, what leaves a gap, and that the fold itself knows nothing of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oncofed.client.predict import Scorer
from oncofed.common import wire
from oncofed.common.metrics import survival_sums
from oncofed.common.saved import SavedModel
from oncofed.common.study import Study
from oncofed.common.survival import event_table
from oncofed.deploy.comparison import reference
from oncofed.deploy.comparison.reference import Pool
from oncofed.server.cross_site import matrix, summed

Make = Callable[..., Study]
SITES = ["Aachen", "Bergen", "Coimbra", "Dublin"]
BOTH = {
    "analysis__cross_site": ["local", "personalised"],
    "analysis__personal_rounds": 1,
    "evaluation__tables": False,
}
COSTS = ("seconds", "seconds_in_local_steps", "seconds_saving")


def part(results: dict[str, Any], fold: int = 0) -> dict[str, Any]:
    return results["folds"][fold]["cross_site"]


def cells(crossed: dict[str, Any], kind: str, key: str) -> np.ndarray:
    """Sums of a kind's models `[models, sites]`; NaN where a site did not answer."""
    rows = [i for i, m in enumerate(crossed["models"]) if m["kind"] == kind]
    return np.array([crossed["sums"][key][i] for i in rows], dtype=np.float64)


def test_the_federated_row_is_the_folds_evaluation_site_by_site(federation: Any, small_study: Make) -> None:
    results = federation.run(small_study(**BOTH))
    crossed, evaluation = part(results), results["folds"][0]["evaluation"]
    assert crossed["sites"] == SITES
    assert [(m["kind"], m["site"]) for m in crossed["models"]] == [
        ("federated", None),
        *(("local", s) for s in SITES),
        *(("personalised", s) for s in SITES),
    ]
    assert crossed["gaps"] == []
    for key in ("patients", "loss", "concordant", "comparable"):
        np.testing.assert_allclose(cells(crossed, "federated", key).sum(), np.sum(evaluation[key]), rtol=1e-6)
        assert np.isfinite(cells(crossed, "local", key)).all()
    # all models are held against the same patients
    assert len(np.unique(crossed["sums"]["patients"], axis=0)) == 1
    assert len(np.unique(crossed["sums"]["comparable"], axis=0)) == 1
    assert len(np.unique(crossed["sums"]["loss"], axis=0)) == 9


def test_nothing_of_the_fold_changes(
    federation: Any, small_study: Make, tmp_path: Path, model_of: Any, checkpoint: Any, differing: Any
) -> None:
    keys = {
        "splits__only": [0, 1],
        "pretraining__rounds": 1,
        "aggregation__optimizer": "adam",
        "evaluation__tables": False,
    }
    without = small_study(**keys, runtime__out=str(tmp_path / "a"))
    crossed = without.changed(**BOTH, runtime__out=str(tmp_path / "b"))
    plain = federation.run(without)
    before = federation.predictions(without)
    results = federation.run(crossed)
    assert before.equals(federation.predictions(crossed))
    for k in (0, 1):
        a, b = (dict(r["folds"][k]) for r in (plain, results))
        assert b.pop("cross_site")["models"]
        assert {n: v for n, v in a.items() if n not in COSTS} == {n: v for n, v in b.items() if n not in COSTS}
        assert differing(model_of(without, k), model_of(crossed, k)) == []
        assert differing(checkpoint(without, fold=k), checkpoint(crossed, fold=k)) == []
    assert plain["left_out"] == results["left_out"] == []
    files = [{f.name for f in (tmp_path / x / "checkpoints").iterdir()} for x in ("a", "b")]
    assert files[0] == files[1]


def test_only_the_site_itself_trains_its_models(federation: Any, small_study: Make) -> None:
    federation.run(small_study(**BOTH, training__evaluate_every=1, training__rounds=3))
    asked = [(kind, round_, site) for kind, _, round_, site in federation.asked if kind in (wire.TRAIN, wire.EVALUATE)]
    # three rounds, two scores between them, the fold's evaluation, and the matrix's of the federated model
    own = asked[(3 + 2 + 1 + 1) * 4 :]
    expected = []
    for rounds in (3, 1):
        for site in SITES:
            expected += [(wire.TRAIN, r, site) for r in range(1, rounds + 1)]
            expected += [(wire.EVALUATE, rounds, s) for s in SITES]
    assert own == expected


def test_a_local_model_is_a_federation_of_that_site_with_the_federations_frame(
    federation: Any, small_study: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same first weights, seeds, batches and steps as the reference that a comparison calls local; of the federation it has
    the scale of genes, the time grid and the first baselines, which the reference is given here."""
    study = small_study(**BOTH, training__rounds=3, training__learning_rate=0.05, panel__covariates=["age"])
    results = federation.run(study)
    saved = SavedModel.read(Path(study.runtime.out) / "model-fold-0.safetensors")
    lens, cancers = Scorer.of(saved, "cpu").lens, saved.cancers
    pool = Pool.open(federation.sites, study, saved.panel, cancers, set(SITES))
    train = pool.all.select(pool.split(study, 0) == "train")
    tables = event_table(train.time, train.event, train.cancer, len(cancers))
    monkeypatch.setattr(reference, "frame_of", lambda *_: lens)
    monkeypatch.setattr(reference, "event_table", lambda *_: tables)
    local = reference.predict_local(pool, study, 0, lambda: None)
    for s, site in enumerate(SITES):
        rows = local[(local["site"] == site) & (local["split"] == "test")]
        code = rows["cancer_type"].map({c: i for i, c in enumerate(cancers)}).to_numpy()
        time, event = rows["time_months"].to_numpy(), rows["event"].to_numpy()
        sums = survival_sums(rows["risk"].to_numpy(), time, event, np.zeros(len(rows)), code, len(cancers))
        assert cells(part(results), "local", "comparable")[s, s] == sums["comparable"].sum() > 0
        assert cells(part(results), "local", "concordant")[s, s] == sums["concordant"].sum()


def test_a_personalised_model_begins_with_the_federated_one(federation: Any, small_study: Make) -> None:
    """Rounds that move nothing leave the federated model: all nine rows are one."""
    still = small_study(**BOTH, training__learning_rate=1e-12, training__head_rate=1e-12, training__weight_decay=0.0)
    crossed = part(federation.run(still))
    for key in ("loss", "concordant"):
        federated = cells(crossed, "federated", key)[0]
        np.testing.assert_allclose(cells(crossed, "personalised", key), [federated] * 4, rtol=1e-6)


def test_pretraining_of_a_local_model_is_the_sites_own(federation: Any, small_study: Make) -> None:
    federation.run(small_study(**(BOTH | {"analysis__cross_site": "local"}), pretraining__rounds=2, training__rounds=1))
    asked = [(phase, round_, site) for kind, phase, round_, site in federation.asked if kind == wire.TRAIN]
    steps = [("pretrain", 1), ("pretrain", 2), ("train", 1)]
    assert asked[3 * 4 :] == [(*step, site) for site in SITES for step in steps]


def test_a_site_that_refuses_leaves_a_gap_with_its_reason(federation: Any, small_study: Make, tmp_path: Path) -> None:
    other = federation.copy(tmp_path / "sites")
    (other.sites / "bergen" / "policy.toml").write_text("min_patients = 100\nmin_cell = 1\nown_model = true\n")
    results = other.run(small_study(**BOTH))
    crossed = part(results)
    assert [(crossed["models"][g["model"]]["kind"], g["site"]) for g in crossed["gaps"]] == [
        ("local", None),
        ("personalised", None),
    ]
    assert all("than the 100 that its policy wants" in g["reason"] for g in crossed["gaps"])
    assert [row is None for row in np.array(crossed["sums"]["loss"], dtype=object)[:, 0]].count(True) == 2
    assert all(v is None for v in crossed["sums"]["loss"][2])
    assert np.isfinite(cells(crossed, "local", "loss")[[0, 2, 3]]).all()  # its patients still score the others' models
    table = matrix(results["folds"])
    assert table is not None
    assert table["score"][2] == [None] * 4
    assert table["own_sites"] == 3
    # it gave no training, so the federated model is a stranger's there
    assert table["kinds"]["federated"]["others"] == table["score"][0][1]


def test_a_site_that_fails_when_it_scores_leaves_a_gap_and_nothing_in_the_folds_list(
    federation: Any, small_study: Make
) -> None:
    seen: list[str] = []

    def fault(kind: str, phase: str, round_: int, site: str) -> bool:
        if kind == wire.EVALUATE:
            seen.append(site)
        return (
            kind == wire.EVALUATE and site == "Dublin" and seen.count(site) == 3
        )  # the fold, the federated model, Aachen's

    results = federation.run(small_study(**BOTH, training__evaluate_every=0), fault)
    (gap,) = part(results)["gaps"]
    assert (gap["model"], gap["site"]) == (1, "Dublin")
    assert "injected fault" in gap["reason"]
    assert part(results)["sums"]["loss"][1][3] is None
    assert results["left_out"] == []


def test_whole_sites_held_out_give_a_column_each(federation: Any, small_study: Make) -> None:
    keys = {"splits__held_out_sites": "all", "splits__only": [], "training__evaluate_every": 0, "training__rounds": 1}
    study = small_study(**keys, **(BOTH | {"analysis__cross_site": "local"}))
    results = federation.run(study)
    assert results["study"]["splits"]["held_out_sites"] == SITES
    assert [f["fold"] for f in results["folds"]] == [0, 1, 2, 3]
    table = matrix(results["folds"])
    assert table is not None
    assert json.loads(json.dumps(table, allow_nan=False))["models"] == table["models"]
    unknown = np.array([[v is None for v in row] for row in table["score"]])
    np.testing.assert_array_equal(unknown, np.vstack([np.zeros(4, dtype=bool), np.eye(4, dtype=bool)]))
    federated = [summed({k: np.array(v) for k, v in f["evaluation"].items()}) for f in results["folds"]]
    assert table["score"][0] == pytest.approx([s["concordant"] / s["comparable"] for s in federated])
    assert table["kinds"]["federated"]["own"] is None
    assert table["own_sites"] == 0
    asked = [site for kind, _, _, site in federation.asked if kind == wire.TRAIN]
    assert {site: asked.count(site) for site in SITES} == dict.fromkeys(SITES, 3 + 3)


def test_a_classification_counts_hits(federation: Any, small_study: Make) -> None:
    results = federation.run(small_study(**BOTH, task__kind="classification"))
    crossed, evaluation = part(results), results["folds"][0]["evaluation"]
    assert set(crossed["sums"]) == {"hits", "patients", "loss"}
    assert cells(crossed, "federated", "hits").sum() == np.trace(evaluation["confusion"])
    table = matrix(results["folds"])
    assert table is not None
    assert table["kinds"]["federated"]["all"] == pytest.approx(
        np.trace(evaluation["confusion"]) / np.sum(evaluation["patients"])
    )


def test_validation_chooses_a_sites_own_round_by_its_own_patients(federation: Any, small_study: Make) -> None:
    keys = {"splits__validation": 0.25, "training__patience": 1, "training__rounds": 3}
    crossed = part(federation.run(small_study(**keys, **BOTH)))
    assert crossed["gaps"] == []
    alone = [i for i, (kind, *_) in enumerate(federation.asked) if kind == wire.TRAIN][-1]
    assert federation.asked[alone + 1][0] == wire.EVALUATE
    assert federation.asked[alone][3] == federation.asked[alone + 1][3] == "Dublin"


def test_keys_are_checked() -> None:
    study = Study().changed(analysis__cross_site="local,personalised", splits__held_out_sites="all")
    assert Study.from_run_config(study.run_config()) == study
    with pytest.raises(ValueError, match="'local' or 'personalised'"):
        Study().changed(analysis__cross_site=["mine"])
    with pytest.raises(ValueError, match=r"analysis\.personal_rounds = 9 exceeds training\.rounds = 5"):
        study.changed(analysis__personal_rounds=9, training__rounds=5)
    with pytest.raises(ValueError, match="'all' stands alone"):
        study.changed(splits__held_out_sites=["all", "Aachen"])
