"""A study of RNA and pathology beside its own variants, and without pathology: the whole way, from sites to numbers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from oncofed.client.batch import Batch
from oncofed.client.data.site import SiteFolder, list_sites
from oncofed.client.predict import Scorer
from oncofed.client.scale import lens_of
from oncofed.common.saved import SavedModel
from oncofed.common.study import Study
from oncofed.deploy.cli import cli
from oncofed.deploy.comparison.compare import common_patients, compare
from oncofed.deploy.comparison.present import print_tables, write_comparison
from oncofed.deploy.comparison.reference import Pool
from oncofed.deploy.comparison.rescore import predict_again, without
from oncofed.deploy.comparison.robustness import choose_patients, robustness
from oncofed.deploy.comparison.sites_without import choose_hospitals, copy_without
from oncofed.deploy.comparison.survival import summarise
from oncofed.deploy.comparison.variants import Federations, late_fusion
from oncofed.deploy.simulate import read_predictions
from rich.console import Console
from typer.testing import CliRunner

Make = Callable[..., Study]
CPU = torch.device("cpu")
KEYS = {
    "model__name": "path_gptomic",
    "model__size": "tiny",
    "training__rounds": 2,
    "training__learning_rate": 0.01,
    "training__evaluate_every": 0,
    "splits__folds": 2,
    "splits__only": [],
    "runtime__threads": 1,
}


@pytest.fixture(scope="module")
def sites(consortium: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Aachen, Bergen and Dublin have images of most patients, Coimbra has none; five of Aachen's have images only."""
    out = tmp_path_factory.mktemp("fusion") / "sites"
    shutil.copytree(consortium, out, ignore=shutil.ignore_patterns(".oncofed"))
    expression, images = (pd.read_parquet(out / "aachen" / f"{t}.parquet") for t in ("expression", "pathology"))
    expression.drop(index=images.index[:5]).to_parquet(out / "aachen" / "expression.parquet")
    return out


def images_of(sites: Path) -> set[tuple[str, str]]:
    """Site and name of every patient with images."""
    files = sites.glob("*/pathology.parquet")
    return {(SiteFolder.open(f.parent).name, str(p)) for f in files for p in pd.read_parquet(f).index}


def who(table: pd.DataFrame) -> pd.MultiIndex:
    return pd.MultiIndex.from_frame(table[["site", "patient"]])


# -- comparison --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_fusion_study_is_compared_with_its_variants(sites: Path, small_study: Make, tmp_path: Path) -> None:
    study = small_study(**KEYS, name="c", splits__refit=True)
    result = compare(study, sites, ("ridge", "late", "rna", "pathology", "concat", "unmodulated"))
    assert list(result["methods"]) == ["federated", "ridge", "late", "rna", "pathology", "concat", "unmodulated"]
    tables = {m: read_predictions(list_sites(sites), f"c-{m}") for m in ("rna", "pathology", "concat", "unmodulated")}
    tables |= {"federated": read_predictions(list_sites(sites), "c")}
    tables["late"] = late_fusion(tables["rna"], tables["pathology"])
    both = set(who(tables["rna"])) & images_of(sites)
    assert result["held_out"] == {"scored": int((tables["federated"]["split"] == "test").sum()), "compared": len(both)}
    assert result["held_out"]["compared"] < result["held_out"]["scored"] == len(set(who(tables["federated"])))
    for method, table in common_patients(tables).items():
        expected = summarise(table, study.seed)["c_index"]
        assert result["methods"][method]["c_index"] == pytest.approx(expected), method
    assert len({m["c_index"]["value"] for m in result["methods"].values()}) == 7
    cost = {name: m["cost"] for name, m in result["methods"].items()}
    for key in ("rounds", "bytes_to_sites", "seconds"):
        assert cost["late"][key] == pytest.approx(cost["rna"][key] + cost["pathology"][key])
    assert list(result["balance"]) == ["federated", "unmodulated"]
    factors = {
        method: [point[m]["factor"] for fold in folds for point in fold for m in ("rna", "pathology")]
        for method, folds in result["balance"].items()
    }
    assert [len(f) for f in factors.values()] == [2 * 2 * 2] * 2  # folds, rounds, modalities
    assert set(factors["unmodulated"]) == {1.0}
    assert min(factors["federated"]) < 1.0
    assert (Path(study.runtime.out) / "model.safetensors").exists()
    assert not list(Path(study.runtime.out).glob("*/model.safetensors"))  # variants are not fitted again
    shown = Console(width=80)
    with shown.capture() as capture:
        print_tables(result, shown)
    assert f"{len(both)} held-out patients are compared" in capture.get()
    text = write_comparison(result, tmp_path / "report").read_text() + json.dumps(result)
    assert "AAC-0" not in text  # no patient


def test_late_fusion_alone_is_compared_on_all_patients(sites: Path, small_study: Make) -> None:
    study = small_study(**(KEYS | {"splits__only": [0], "training__rounds": 1}), name="l")
    result = compare(study, sites, ("late",))
    assert result["held_out"]["compared"] == result["held_out"]["scored"]
    assert list(result["methods"]) == ["federated", "late"]
    assert list(result["balance"]) == ["federated"]


@pytest.mark.slow
def test_where_whole_sites_are_held_out_training_patients_are_scored_for_late_fusion(
    sites: Path, small_study: Make, tmp_path: Path
) -> None:
    """Sites that only train write no predictions there, and a risk is held against those of training patients."""
    study = small_study(**(KEYS | {"splits__held_out_sites": ["Bergen", "Dublin"], "training__rounds": 1}), name="h")
    federations = Federations(study, sites)
    table = federations.with_training("rna")
    assert table[table["split"] == "test"].groupby("fold")["site"].unique().map(list).to_dict() == {
        0: ["Bergen"],
        1: ["Dublin"],
    }
    train = table[table["split"] == "train"]
    assert set(train.loc[train["fold"] == 0, "site"]) == {"Aachen", "Coimbra", "Dublin"}
    assert len(table) == 2 * len(set(who(table)))
    result = compare(study, sites, ("late",))
    assert result["held_out"]["compared"] == result["held_out"]["scored"]
    part = robustness(study, sites, (0.0, 1.0), train_hospitals=0.0)["trained"]
    assert len(part) == 1
    assert part[0]["patients"] == len(images_of(sites) & set(who(table[table["split"] == "test"])))


# -- robustness --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def robust(sites: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The command's folder and what it wrote."""
    out = tmp_path_factory.mktemp("robust") / "out"
    keys = [f"{k.replace('__', '.')}={v}" for k, v in (KEYS | {"name": "r"}).items() if k != "splits__only"]
    arguments = [part for key in keys for part in ("-s", key)]
    done = CliRunner().invoke(cli, ["robustness", str(sites), "--out", str(out), "--shares", "1,0,0.5", *arguments])
    assert done.exit_code == 0, done.exception
    assert "trained without that of 1 of 3 hospitals" in done.output
    assert (out / "robustness.svg").exists()
    return out, json.loads((out / "robustness.json").read_text())


def scored(folder: Path, sites: Path, *lost: str) -> pd.DataFrame:
    """Held-out predictions of the models in a folder, for all patients of `sites`."""
    parts = []
    for fold in (0, 1):
        model, pool = opened(folder, sites, fold)
        parts.append(predict_again(model, pool, lost=lost))
    return pd.concat(parts, ignore_index=True)


def opened(folder: Path, sites: Path, fold: int = 0) -> tuple[SavedModel, Pool]:
    model = SavedModel.read(folder / f"model-fold-{fold}.safetensors")
    members = {"Aachen", "Bergen", "Coimbra", "Dublin"}
    return model, Pool.open(sites, model.study, model.panel, model.cancers, members, model.beside)


def batch_of(model: SavedModel, pool: Pool, site: str) -> Batch:
    """A site's held-out patients as the model sees them."""
    lens = lens_of(model.study, model.beside, model.scales, model.covariates, model.grid)
    cohort = pool.cohorts[site]
    return Batch.of(cohort.select(cohort.fold == model.fold), lens, CPU)


def by_patient(table: pd.DataFrame) -> pd.Series:
    return table[table["split"] == "test"].set_index(["site", "patient", "fold"])["risk"].sort_index()


def with_both(sites: Path, table: pd.DataFrame) -> pd.DataFrame:
    """Rows of patients who have images and RNA."""
    rna = {(s, p) for s, p in who(read_predictions(list_sites(sites), "r-rna"))}
    return table[who(table).isin(images_of(sites) & rna)]


def test_training_patients_are_scored_as_the_sites_do(sites: Path, robust: tuple[Path, dict[str, Any]]) -> None:
    out, _ = robust
    for variant in ("rna", "pathology"):
        model, pool = opened(out / variant, sites, 1)
        again = predict_again(model, pool, held_out=False)
        own = read_predictions(list_sites(sites), f"r-{variant}")
        own = own[(own["fold"] == 1) & (own["split"] == "train")]
        expected = own.set_index(["site", "patient"])["risk"].sort_index()
        assert set(again["split"]) == {"train"}
        found = again.set_index(["site", "patient"])["risk"].sort_index()
        assert found.index.equals(expected.index)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_nothing_lost_gives_the_sites_own_predictions(sites: Path, robust: tuple[Path, dict[str, Any]]) -> None:
    out, result = robust
    own = read_predictions(list_sites(sites), "r")
    again = by_patient(scored(out, sites))
    expected = by_patient(own).reindex(again.index)
    assert len(again) == len(by_patient(own))
    np.testing.assert_allclose(again, expected, rtol=1e-5, atol=1e-6)
    point = result["trained"][0]["points"][0]
    assert (point["share"], point["removed"]) == (0.0, 0)
    both = with_both(sites, own)
    assert result["trained"][0]["patients"] == len(both) / 2 == len(set(who(both)))
    assert point["methods"]["fusion"]["c_index"] == pytest.approx(summarise(both, 0)["c_index"])


def test_all_lost_is_the_model_with_pathology_off(sites: Path, robust: tuple[Path, dict[str, Any]]) -> None:
    out, result = robust
    for fold in (0, 1):
        model, pool = opened(out, sites, fold)
        table, network = predict_again(model, pool, lost=("pathology",)), Scorer.of(model, "cpu").network
        for site in pool.cohorts:
            batch = batch_of(model, pool, site)
            with torch.no_grad():
                off, on = (batch.through(network, off=o).score.double().numpy() for o in (("pathology", 0), None))
            assert table.loc[table["site"] == site, "risk"].to_numpy().tolist() == off.tolist()
            assert (site == "Coimbra") == (off.tolist() == on.tolist())
    point = result["trained"][0]["points"][2]
    assert point["removed"] == result["trained"][0]["patients"]
    expected = summarise(with_both(sites, scored(out, sites, "pathology")), 0)
    assert point["methods"]["fusion"]["c_index"] == pytest.approx(expected["c_index"])


def test_late_fusion_of_patients_without_pathology_is_rna_alone(
    sites: Path, robust: tuple[Path, dict[str, Any]]
) -> None:
    """At a share of 1 all are without, and a standardised risk ranks as the risk itself."""
    _, result = robust
    points = result["trained"][0]["points"]
    rna, images = (read_predictions(list_sites(sites), f"r-{m}") for m in ("rna", "pathology"))
    for point, table in ((points[2], rna), (points[0], late_fusion(rna, images))):
        expected = summarise(with_both(sites, table), 0)
        for cancer, value in expected["by_cancer"].items():
            assert point["methods"]["late"]["by_cancer"][cancer] == pytest.approx(value)
    for point in points:
        fusion, late = (point["methods"][m]["c_index"]["value"] for m in ("fusion", "late"))
        assert point["difference"]["value"] == pytest.approx(fusion - late)


def test_losing_some_is_losing_all_for_those(sites: Path, robust: tuple[Path, dict[str, Any]]) -> None:
    """Whole and bare risks are put together by patient, which is what a batch with that mask gives."""
    out, result = robust
    model, pool = opened(out, sites)
    batch = batch_of(model, pool, "Bergen")
    lost = np.arange(len(batch)) % 2 == 0
    with torch.no_grad():
        some = without(batch, "pathology", lost).through(Scorer.of(model, "cpu").network).score.double().numpy()
    whole, bare = (predict_again(model, pool, lost=m) for m in ((), ("pathology",)))
    rows = (whole["site"] == "Bergen").to_numpy()
    expected = np.where(lost, bare.loc[rows, "risk"], whole.loc[rows, "risk"])
    np.testing.assert_allclose(some, expected, rtol=1e-5, atol=1e-6)
    both, bare_all = (with_both(sites, scored(out, sites, *m)).reset_index(drop=True) for m in ((), ("pathology",)))
    removed = choose_patients(both, 0.5, 0)
    mixed = both.assign(risk=np.where(removed, bare_all["risk"], both["risk"]))
    point = result["trained"][0]["points"][1]
    assert point["removed"] == removed.sum()
    assert point["methods"]["fusion"]["c_index"] == pytest.approx(summarise(mixed, 0)["c_index"])


def test_a_copy_of_other_folds_is_refused_before_it_trains(
    sites: Path, small_study: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five of Aachen's patients have images only: a copy that forgets them deals the others other folds."""

    def forget(sites: Path, target: Path, hospitals: list[str]) -> None:
        copy_without(sites, target, hospitals)
        (target / "aachen" / "alterations.parquet").unlink()

    study = small_study(**(KEYS | {"splits__only": [0], "training__rounds": 1}), name="f")
    study = next(s for seed in range(99) if choose_hospitals(sites, 0.5, s := study.changed(seed=seed)) == ["Aachen"])
    monkeypatch.setattr("oncofed.deploy.comparison.robustness.copy_without", forget)
    with pytest.raises(ValueError, match=r"other folds than with it \(Aachen: [0-9]+\)"):
        robustness(study, sites, (0.0, 1.0))
    assert not (Path(study.runtime.out) / "without").exists()


def test_hospitals_without_pathology_in_training_have_it_at_the_test(
    sites: Path, robust: tuple[Path, dict[str, Any]]
) -> None:
    out, result = robust
    part = result["trained"][1]
    (hospital,) = part["hospitals_without"]
    assert hospital in {"Aachen", "Bergen", "Dublin"}
    assert not (sites / hospital.lower() / "alterations.parquet").exists()
    assert (sites / hospital.lower()).joinpath("pathology.parquet").exists()
    trained = json.loads((out / "without" / "results.json").read_text())
    for fold in trained["folds"]:
        images = fold["blocks"].index("pathology")
        evidence = {site: v[images] for site, v in fold["site_evidence"].items()}
        assert {site for site, n in evidence.items() if n} == {"Aachen", "Bergen", "Dublin"} - {hospital}
    assert part["patients"] == result["trained"][0]["patients"]
    blind = read_predictions(list_sites(out / "sites-without"), "r-without")
    seeing = scored(out / "without", sites)
    theirs = by_patient(seeing[seeing["site"] == hospital]), by_patient(blind[blind["site"] == hospital])
    shared = theirs[0].index.intersection(theirs[1].index)  # the same folds
    assert len(shared) == len(theirs[1])
    assert not np.allclose(theirs[0].loc[shared], theirs[1])
    expected = summarise(with_both(sites, seeing), 0)
    assert part["points"][0]["methods"]["fusion"]["c_index"] == pytest.approx(expected["c_index"])
    tables = []
    for m in ("rna", "pathology"):  # training patients as they trained, held-out ones with all that they have
        own = read_predictions(list_sites(out / "sites-without"), f"r-without-{m}")
        tables.append(pd.concat([own[own["split"] != "test"], scored(out / "without" / m, sites)]))
    expected = summarise(with_both(sites, late_fusion(*tables)), 0)
    assert part["points"][0]["methods"]["late"]["c_index"] == pytest.approx(expected["c_index"])
