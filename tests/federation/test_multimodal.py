"""Studies of several modalities over in-process sites: some lack images, some expression, and all learn what they have."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tomli_w
from flwr.app import RecordDict
from oncofed.client import answers
from oncofed.client.data.read import read_expression
from oncofed.client.data.site import SiteFolder, list_sites
from oncofed.client.release import Answer, Door
from oncofed.client.session import Session
from oncofed.common import wire
from oncofed.common.blocks import EVIDENCE, Sum
from oncofed.common.saved import SavedModel
from oncofed.common.study import Study
from oncofed.deploy.simulate import simulate
from oncofed.server.checkpoint import load_arrays
from toy_scgpt import WIDTH, write_toy_checkpoint
from toy_slides import write_h5

Make = Callable[..., Study]
PATHOLOGY_PARTS = ("branches.pathology.", "head.risks.pathology.")


@pytest.fixture
def sites(consortium: Path, tmp_path: Path) -> Path:
    """The consortium to be changed: Aachen, Bergen and Dublin have images of most patients, Coimbra has none."""
    shutil.copytree(consortium, tmp_path / "sites", ignore=shutil.ignore_patterns(".oncofed"))
    return tmp_path / "sites"


@pytest.fixture
def multimodal(small_study: Make) -> Make:
    return lambda **keys: small_study(**({"model__name": "path_gptomic", "training__learning_rate": 0.01} | keys))


def described(folder: Path, **keys: str) -> None:
    """Add settings to a site's site.toml."""
    own = SiteFolder.open(folder).description.model_dump(exclude_defaults=True)
    (folder / "site.toml").write_text(tomli_w.dumps(own | keys))


def test_sites_learn_what_they_have(sites: Path, multimodal: Make) -> None:
    study = multimodal(training__rounds=3, fusion__modulation="local")
    results = simulate(study, sites).results
    fold = results["folds"][0]
    assert not results["left_out"]
    assert results["beside"]["image_kind"] == "vector"
    assert results["beside"]["image_width"] == 16
    evidence = dict(zip(fold["blocks"], fold["site_evidence"]["Coimbra"], strict=True))
    assert evidence["rna"] > 0
    assert all(v == 0 for k, v in evidence.items() if k == "pathology" or k.endswith("@pathology"))
    point = fold["curve"][-1]["branches"]
    assert 0 < point["pathology"]["patients"] < point["rna"]["patients"]
    assert point["rna"]["share"] + point["pathology"]["share"] == pytest.approx(1.0)
    assert {"without/rna/loss", "without/pathology/loss", "without/expert/loss"} <= fold["evaluation"].keys()
    model = SavedModel.read(Path(study.runtime.out) / "model-fold-0.safetensors")
    assert set(model.scales) == {"rna", "pathology"}
    assert model.beside.image_width == 16


def test_predictions_tell_what_each_modality_adds(sites: Path, multimodal: Make) -> None:
    table = simulate(multimodal(), sites).predictions
    with_images = pd.read_parquet(sites / "aachen" / "pathology.parquet").index
    here = table[table["site"] == "Aachen"].set_index("patient")
    np.testing.assert_allclose(here["risk"], here["risk_rna"] + here["risk_pathology"], rtol=1e-5, atol=1e-6)
    assert (here["risk_pathology"] != 0).equals(pd.Series(here.index.isin(with_images), here.index))
    assert (table.loc[table["site"] == "Coimbra", "risk_pathology"] == 0).all()


def test_a_site_without_images_sends_nothing_for_the_image_encoder(
    sites: Path, multimodal: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What leaves the hospital is 0 in every number of the image encoder and of its evidence, decay or not."""
    sent: dict[str, list[Sum]] = {}
    release = Door.release

    def listen(door: Door, kind: str, stamp: wire.Config, answer: Answer) -> RecordDict:
        if kind == wire.TRAIN and answer.total is not None:
            sent.setdefault(door.site, []).append(answer.total)
        return release(door, kind, stamp, answer)

    monkeypatch.setattr(Door, "release", listen)
    study = multimodal(training__weight_decay=0.5, training__balance=0.1)
    results = simulate(study, sites).results
    own = [n for n in sent["Coimbra"][0] if n.startswith(PATHOLOGY_PARTS)]
    assert len(own) > 4
    assert not any(total[n].any() for total in sent["Coimbra"] for n in own)
    assert all(total[n].any() for total in sent["Aachen"] for n in own)
    rows = [i for i, b in enumerate(results["folds"][0]["blocks"]) if b == "pathology" or b.endswith("@pathology")]
    assert not any(total[EVIDENCE][rows].any() for total in sent["Coimbra"])
    assert sent["Coimbra"][-1]["encoder.latent.weight"].any()


def test_a_hospital_may_have_images_only(sites: Path, multimodal: Make) -> None:
    (sites / "dublin" / "expression.h5ad").unlink()
    results = simulate(multimodal(), sites).results
    fold = results["folds"][0]
    assert not results["left_out"]
    evidence = dict(zip(fold["blocks"], fold["site_evidence"]["Dublin"], strict=True))
    assert evidence["pathology"] > 0
    assert evidence["rna"] == 0
    assert not any(v for k, v in evidence.items() if k.startswith(("expert/", "attention/")))
    alone = simulate(multimodal(fusion__modalities=("pathology",), name="images"), sites)
    assert "Coimbra" in {x["site"] for x in alone.results["left_out"]}
    assert set(alone.predictions["site"]) == {"Aachen", "Bergen", "Dublin"}
    assert "risk_rna" not in alone.predictions


def test_folds_are_the_same_whichever_modalities_a_study_uses(sites: Path, multimodal: Make) -> None:
    tables = {
        m: simulate(multimodal(fusion__modalities=m, name="-".join(m)), sites).predictions.set_index("patient")
        for m in (("rna",), ("pathology",), ("rna", "pathology"))
    }
    for m in (("rna",), ("pathology",)):
        assert tables[m]["split"].equals(tables["rna", "pathology"].loc[tables[m].index, "split"])


def test_a_study_resumes_where_it_was_killed(sites: Path, multimodal: Make) -> None:
    keys = {"training__rounds": 4, "fusion__modulation": "federated", "fusion__modulation_floor": 0.0}
    whole = multimodal(**keys, name="whole")
    simulate(whole, sites)
    file = Path(whole.runtime.out) / "model-fold-0.safetensors"
    a = {k: v.tobytes() for k, v in load_arrays(file)[0].items()}
    checkpoint = Path(whole.runtime.out) / "checkpoints" / "fold-0-train" / "round-0004.safetensors"
    arrays, _ = load_arrays(checkpoint)
    assert arrays["branches"].any()
    again = simulate(whole.changed(runtime__resume=True), sites).results
    assert len(again["folds"][0]["curve"]) == 4
    assert a == {k: v.tobytes() for k, v in load_arrays(file)[0].items()}
    factors = [p["branches"]["rna"]["factor"] for p in again["folds"][0]["curve"]]
    assert factors[0] == 1.0


def test_other_images_are_refused_with_the_sites_named(sites: Path, multimodal: Make) -> None:
    table = pd.read_parquet(sites / "bergen" / "pathology.parquet")
    table.iloc[:, :9].to_parquet(sites / "bergen" / "pathology.parquet")
    with pytest.raises(ValueError, match=r"width 16.*: Aachen, Dublin.*width 9.*: Bergen") as error:
        simulate(multimodal(), sites)
    assert "fusion.modalities" in str(error.value)


def test_alterations_are_a_third_modality(sites: Path, multimodal: Make) -> None:
    rng = np.random.default_rng(0)
    for name, genes in (("aachen", ["TP53", "KRAS", "EGFR"]), ("coimbra", ["KRAS", "TP53", "BRAF"])):
        patients = pd.read_csv(sites / name / "clinical.csv")["patient"][10:]
        table = pd.DataFrame(
            rng.integers(-2, 3, (len(patients), 3)), index=pd.Index(patients, name="patient"), columns=genes
        )
        table.to_csv(sites / name / "alterations.csv")
    study = multimodal(fusion__modalities=("rna", "pathology", "alterations"), training__rounds=3)
    results = simulate(study, sites).results
    assert not results["left_out"]
    assert results["beside"]["alterations"] == "KRAS\nTP53"
    evidence = {
        s: dict(zip(results["folds"][0]["blocks"], v, strict=True))
        for s, v in results["folds"][0]["site_evidence"].items()
    }
    assert {s for s, e in evidence.items() if e["alterations"] > 0} == {"Aachen", "Coimbra"}


# -- tiles ---------------------------------------------------------------------------------------------------------------


def with_slides(sites: Path, encoder: dict[str, str]) -> None:
    """Bags of tiles in place of the tables: more slides for some, none for others."""
    rng = np.random.default_rng(0)
    for name, by in encoder.items():
        folder = sites / name
        (folder / "pathology.parquet").unlink(missing_ok=True)
        for i, patient in enumerate(pd.read_csv(folder / "clinical.csv")["patient"]):
            for slide in range(i % 3):
                tiles = rng.normal(size=(4 + i % 5, 6)).astype(np.float32)
                write_h5(folder / "slides" / f"{patient}-{slide}.h5", tiles, np.zeros((len(tiles), 2), np.int64))
        described(folder, slide_encoder=by)


def test_bags_of_tiles_are_pooled_and_trained_with_the_rest(sites: Path, multimodal: Make) -> None:
    with_slides(sites, {"aachen": "uni", "bergen": "uni", "dublin": "uni"})
    results = simulate(multimodal(fusion__tiles=5), sites).results
    assert not results["left_out"]
    assert results["beside"]["images"] == "bag of uni-v1, width 6"
    fold = results["folds"][0]
    evidence = {s: dict(zip(fold["blocks"], v, strict=True))["pathology"] for s, v in fold["site_evidence"].items()}
    assert evidence["Coimbra"] == 0 < min(evidence[s] for s in ("Aachen", "Bergen", "Dublin"))
    assert fold["curve"][-1]["branches"]["pathology"]["deviation"] > 0


def test_a_patient_of_empty_slides_has_no_images(sites: Path, multimodal: Make) -> None:
    with_slides(sites, {"aachen": "uni", "bergen": "uni", "dublin": "uni"})
    before = simulate(multimodal(training__rounds=1), sites).predictions.set_index("patient")
    some = before.index[(before["site"] == "Aachen") & (before["risk_pathology"] != 0)][:3]
    for patient in some:
        for file in (sites / "aachen" / "slides").glob(f"{patient}-*.h5"):
            write_h5(file, np.zeros((0, 6), np.float32), np.zeros((0, 2), np.int64))
    after = simulate(multimodal(training__rounds=1), sites).predictions.set_index("patient")
    assert (after.loc[some, "risk_pathology"] == 0).all()
    assert (after["risk_pathology"] != 0).sum() == (before["risk_pathology"] != 0).sum() - 3


def test_mixed_encoders_are_refused_with_the_sites_named(sites: Path, multimodal: Make) -> None:
    with_slides(sites, {"aachen": "uni", "bergen": "conch", "dublin": "uni"})
    with pytest.raises(ValueError, match=r"conch-v1, width 6: Bergen; bag of uni-v1, width 6: Aachen, Dublin"):
        simulate(multimodal(), sites)


# -- scGPT ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(sites: Path, tmp_path: Path) -> Path:
    site = SiteFolder.open(sites / "aachen")
    patients = pd.Index(pd.read_csv(sites / "aachen" / "clinical.csv")["patient"])
    write_toy_checkpoint(tmp_path / "scgpt", sorted(read_expression(site, patients).columns))
    for folder in list_sites(sites):
        described(folder, scgpt=str(tmp_path / "scgpt"))
    return tmp_path / "scgpt"


def test_expression_enters_as_embeddings_that_a_site_makes_once(
    sites: Path, multimodal: Make, checkpoint: Path
) -> None:
    units = {SiteFolder.open(f).description.expression_unit for f in list_sites(sites)}
    assert "zscore" not in units
    study = multimodal(fusion__rna_encoder="scgpt", analysis__experts=False)
    results = simulate(study, sites).results
    assert not results["left_out"]
    assert results["beside"]["embedding_width"] == WIDTH
    model = SavedModel.read(Path(study.runtime.out) / "model-fold-0.safetensors")
    assert model.weights["encoder.shared.weight"].shape[1] == WIDTH
    cached = list((sites / "aachen" / ".oncofed" / "cohorts").glob("*/x_NG.npy"))
    assert [np.load(f).shape[1] for f in cached] == [WIDTH]
    np.testing.assert_allclose(np.linalg.norm(np.load(cached[0]), axis=1), 1.0, rtol=1e-5)


def test_another_checkpoint_and_z_scores_are_refused(
    sites: Path, multimodal: Make, checkpoint: Path, tmp_path: Path
) -> None:
    study = multimodal(fusion__rna_encoder="scgpt", analysis__experts=False)
    vocabulary = [f"GENE{i:04d}" for i in range(60)]
    write_toy_checkpoint(tmp_path / "other", vocabulary, seed=9)
    described(sites / "bergen", scgpt=str(tmp_path / "other"))
    with pytest.raises(ValueError, match=r"different models \(.*Bergen.*\); give all of them the same checkpoint"):
        simulate(study, sites)
    described(sites / "bergen", scgpt=str(tmp_path / "nowhere"))
    left_out = simulate(study, sites).results["left_out"]
    assert {x["site"] for x in left_out} == {"Bergen"}
    assert "needs a checkpoint folder" in left_out[0]["reason"]


@pytest.mark.parametrize(
    "keys",
    [
        {"aggregation__rule": "fedavg"},
        {"aggregation__optimizer": "yogi", "aggregation__learning_rate": 0.01, "aggregation__tau": 5.0},
        {"training__optimizer": "adam", "training__learning_rate": 0.001, "task__loss": "cox", "fusion__kind": "late"},
        {"fusion__kind": "concat", "splits__validation": 0.2, "training__patience": 1, "splits__refit": True},
        {"pretraining__rounds": 1, "training__first_layer": "slow", "panel__covariates": ["age"]},
        {"splits__held_out_sites": ["Coimbra"], "splits__only": (), "analysis__attributions": True},
    ],
    ids=["fedavg", "yogi", "cox-late-adam", "concat-patience-refit", "pretrained", "held-out-site"],
)
def test_a_study_of_several_modalities_takes_every_other_choice(
    sites: Path, multimodal: Make, keys: dict[str, object]
) -> None:
    study = multimodal(**keys)
    results = simulate(study, sites).results
    assert not results["left_out"]
    losses = [p["train_loss"] for p in results["folds"][0]["curve"]]
    assert np.isfinite(losses).all()
    assert SavedModel.read(Path(study.runtime.out) / "model-fold-0.safetensors").beside.image_width == 16


# -- what a review found ---------------------------------------------------------------------------------------------------


def test_a_modality_of_too_few_patients_is_not_trained(
    sites: Path, multimodal: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one patient who has images, the change of the image encoder would be hers."""
    table = pd.read_parquet(sites / "bergen" / "pathology.parquet")
    table.iloc[:3].to_parquet(sites / "bergen" / "pathology.parquet")
    sent: list[Sum] = []
    release = Door.release

    def listen(door: Door, kind: str, stamp: wire.Config, answer: Answer) -> RecordDict:
        if door.site == "Bergen" and answer.total is not None and kind in (wire.TRAIN, wire.STATISTICS):
            sent.append(door._withhold(kind, answer) or {})
        return release(door, kind, stamp, answer)

    monkeypatch.setattr(Door, "release", listen)
    assert not simulate(multimodal(), sites).results["left_out"]
    assert not any(total[n].any() for total in sent for n in total if n.startswith((*PATHOLOGY_PARTS, "pathology/")))
    assert not any(total["branches"][1].any() for total in sent if "branches" in total)
    assert any(total["branches"][0].any() for total in sent if "branches" in total)


def test_a_table_with_patients_in_columns_is_refused_before_their_names_leave(sites: Path, multimodal: Make) -> None:
    patients = pd.read_csv(sites / "aachen" / "clinical.csv")["patient"]
    table = pd.DataFrame(1, index=pd.Index(["TP53", "KRAS"], name="gene"), columns=patients)
    table.to_csv(sites / "aachen" / "alterations.csv")
    good = pd.DataFrame(1, index=pd.read_csv(sites / "coimbra" / "clinical.csv")["patient"], columns=["TP53", "KRAS"])
    good.to_csv(sites / "coimbra" / "alterations.csv")
    results = simulate(multimodal(fusion__modalities=("rna", "alterations", "pathology")), sites).results
    assert {x["site"] for x in results["left_out"]} == {"Aachen"}
    assert (
        f"0 patients of the clinical table in rows and {len(patients)} in columns" in results["left_out"][0]["reason"]
    )
    assert results["beside"]["alterations"] == "KRAS\nTP53"


def test_patients_who_come_or_go_within_a_fold_are_refused(sites: Path, multimodal: Make) -> None:
    study = multimodal(training__rounds=3)
    files = pd.read_parquet(sites / "aachen" / "pathology.parquet")
    expression = pd.read_parquet(sites / "aachen" / "expression.parquet")
    train = answers.train

    def leave(session: Session) -> Answer:
        if session.site.name == "Aachen" and session.round == 2:
            gone = expression.index[:2]
            expression.drop(index=gone).to_parquet(sites / "aachen" / "expression.parquet")
            files.drop(index=gone, errors="ignore").to_parquet(sites / "aachen" / "pathology.parquet")
        return train(session)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answers, "train", leave)
        left_out = simulate(study, sites).results["left_out"]
    assert {(x["site"], x["round"]) for x in left_out if x["kind"] == wire.TRAIN} == {("Aachen", 2), ("Aachen", 3)}
    assert all("held-out ones would be trained on" in str(x["reason"]) for x in left_out)


def test_a_checkpoint_that_changes_is_noticed(sites: Path, multimodal: Make, checkpoint: Path) -> None:
    study = multimodal(fusion__rna_encoder="scgpt", analysis__experts=False)
    before = simulate(study, sites).results["beside"]["embedding"]
    write_toy_checkpoint(checkpoint, [f"GENE{i:04d}" for i in range(60)], seed=5)
    assert simulate(study, sites).results["beside"]["embedding"] != before


def test_columns_that_are_numbers_are_read(sites: Path, multimodal: Make) -> None:
    for name in ("aachen", "bergen", "dublin"):
        table = pd.read_parquet(sites / name / "pathology.parquet")
        table.set_axis(range(table.shape[1]), axis=1).to_parquet(sites / name / "pathology.parquet")
        described(sites / name, slide_encoder="titan")
    results = simulate(multimodal(), sites).results
    assert not results["left_out"]
    assert results["beside"]["images"] == "vector of titan, width 16"
