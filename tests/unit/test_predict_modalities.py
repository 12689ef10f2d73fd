"""A saved model of several modalities at a hospital: whoever has one of them is scored, and the file says on what."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tomli_w
from oncofed.client.data.site import SiteFolder
from oncofed.client.predict import predict
from oncofed.common.errors import Refusal
from oncofed.common.saved import SavedModel
from oncofed.deploy.cli import cli
from toy_scgpt import write_toy_checkpoint
from toy_studies import copy_sites, model_of, train
from typer.testing import CliRunner

GENES = tuple(f"GENE{i:04d}" for i in range(60))


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory, consortium: Path) -> Path:
    """RNA and pathology; Coimbra has no images, at the other sites some patients lack them."""
    root = tmp_path_factory.mktemp("both")
    copy_sites(root, consortium)
    train(root, model__name="path_gptomic")
    return root


@pytest.fixture
def altered(both: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a site, to be changed."""

    def make(site: str) -> Path:
        folder = tmp_path / site
        shutil.copytree(both / "sites" / site, folder, ignore=shutil.ignore_patterns(".oncofed"))
        return folder

    return make


def table_of(root: Path, folder: Path, tmp_path: Path) -> pd.DataFrame:
    predict(model_of(root), folder).write(tmp_path / "risks.csv")
    return pd.read_csv(tmp_path / "risks.csv").set_index("patient")


def study_table(root: Path, site: str) -> pd.DataFrame:
    """What the site itself wrote in the study."""
    return pd.read_csv(root / "sites" / site / ".oncofed" / "predictions" / "mine" / "fold-0.csv").set_index("patient")


def described(folder: Path, **keys: str) -> None:
    own = SiteFolder.open(folder).description.model_dump(exclude_defaults=True)
    (folder / "site.toml").write_text(tomli_w.dumps(own | keys))


@pytest.mark.parametrize("site", ["aachen", "coimbra"])
def test_risks_and_parts_are_those_of_the_study(both: Path, site: str, tmp_path: Path) -> None:
    ours, theirs = table_of(both, both / "sites" / site, tmp_path), study_table(both, site)
    assert ours.index.tolist() == theirs.index.tolist()
    for column in ("risk", "risk_rna"):
        np.testing.assert_allclose(ours[column], theirs[column], rtol=1e-5, atol=1e-6)
    images = both / "sites" / site / "pathology.parquet"
    with_images = ours.index.isin(pd.read_parquet(images).index if images.exists() else [])
    assert with_images.sum() == {"aachen": 24, "coimbra": 0}[site]
    assert (ours["risk_pathology"].notna() == with_images).all()
    np.testing.assert_allclose(
        ours.loc[with_images, "risk_pathology"], theirs.loc[with_images, "risk_pathology"], rtol=1e-5, atol=1e-6
    )
    assert (ours["modalities"] == np.where(with_images, "rna+pathology", "rna")).all()
    stronger = ours["risk_pathology"].abs().fillna(-1) > ours["risk_rna"].abs()
    assert (ours["driver"] == np.where(stronger, "pathology", "rna")).all()
    assert site == "coimbra" or 0 < stronger.sum() < len(ours)


def test_parts_and_covariates_are_the_risk(both: Path, tmp_path: Path) -> None:
    """The covariates' part is computed by hand from the file; it is no modality's."""
    ours = table_of(both, both / "sites" / "aachen", tmp_path)
    model = SavedModel.read(model_of(both))
    clinical = pd.read_csv(both / "sites" / "aachen" / "clinical.csv").set_index("patient").loc[ours.index]
    mean, sd = model.covariates
    v = (np.column_stack([clinical["age"], clinical["sex"] == "male"]) - mean) / sd
    cancer = [model.cancers.index(c) for c in clinical["cancer_type"]]
    shared, own = (model.weights[f"head.covariates.{name}"][..., 0] for name in ("shared", "own"))
    covariates = (v * (shared + own[cancer])).sum(1)
    parts = ours[["risk_rna", "risk_pathology"]].fillna(0.0).sum(axis=1)
    np.testing.assert_allclose(ours["risk"], parts + covariates, rtol=1e-5, atol=1e-6)
    assert np.abs(covariates).max() > 1e-3


def test_what_a_risk_rests_on_is_counted(both: Path) -> None:
    assert (
        "6 patients lack images: predicted from expression alone"
        in predict(model_of(both), both / "sites" / "aachen").notes
    )
    assert predict(model_of(both), both / "sites" / "coimbra").notes == (
        "69 patients lack images: predicted from expression alone",
    )


def test_a_site_without_expression(both: Path, altered: Callable[[str], Path], tmp_path: Path) -> None:
    """Its unit family does not matter then, nor do those who have nothing at all."""
    whole = table_of(both, both / "sites" / "aachen", tmp_path)
    folder = altered("aachen")
    (folder / "expression.parquet").unlink()
    described(folder, expression_unit="zscore")
    ours = table_of(both, folder, tmp_path)
    assert ours.index.tolist() == whole.index[whole["risk_pathology"].notna()].tolist()
    np.testing.assert_allclose(ours["risk_pathology"], whole["risk_pathology"].dropna(), rtol=1e-5, atol=1e-7)
    assert ours["risk_rna"].isna().all()
    assert (ours["modalities"] == "pathology").all()
    assert (ours["driver"] == "pathology").all()
    assert predict(model_of(both), folder).notes == (
        "6 patients of the clinical table have no expression or images: left out",
        "24 patients lack expression: predicted from images alone",
    )
    (folder / "pathology.parquet").unlink()
    with pytest.raises(Refusal, match="no patient of the clinical table has expression or images"):
        predict(model_of(both), folder)


def test_another_unit_family_is_refused_where_there_is_expression(both: Path, altered: Callable[[str], Path]) -> None:
    folder = altered("aachen")
    described(folder, expression_unit="zscore")
    with pytest.raises(Refusal, match="trained on log-expression; deliver expression of that family"):
        predict(model_of(both), folder)


def test_images_of_another_kind_are_refused(both: Path, altered: Callable[[str], Path]) -> None:
    folder = altered("aachen")
    table = pd.read_parquet(folder / "pathology.parquet")
    table.rename(columns={table.columns[0]: "something else"}).to_parquet(folder / "pathology.parquet")
    with pytest.raises(Refusal, match=r"its images are .*, the model reads ") as stop:
        predict(model_of(both), folder)
    own, wanted = re.findall(r"vector of named features, width 16, features [0-9a-f]{8}", str(stop.value))
    assert own != wanted == SavedModel.read(model_of(both)).beside.images
    assert "AAC-" not in str(stop.value)


def test_columns_in_another_order_are_the_same_images(both: Path, altered: Callable[[str], Path]) -> None:
    folder = altered("aachen")
    table = pd.read_parquet(folder / "pathology.parquet")
    table[table.columns[::-1]].to_parquet(folder / "pathology.parquet")
    known = predict(model_of(both), both / "sites" / "aachen")
    np.testing.assert_array_equal(predict(model_of(both), folder).score, known.score)


@pytest.mark.parametrize("ending", [".svg", ".png"])
def test_the_picture_counts_and_names_nobody(both: Path, tmp_path: Path, ending: str) -> None:
    out, picture = tmp_path / "risks.csv", tmp_path / f"picture{ending}"
    call = ["site", "predict", str(model_of(both)), str(both / "sites" / "aachen"), "--out", str(out)]
    answer = CliRunner().invoke(cli, [*call, "--picture", str(picture), "--cancer", "COADREAD"])
    assert answer.exit_code == 0, answer.output
    assert "AAC-" not in answer.output
    assert "6 patients lack images" in answer.output
    drawn = picture.read_bytes()
    assert b"AAC-" not in drawn
    assert "AAC-" in out.read_text()


def words_of(svg: Path) -> list[str]:
    """matplotlib writes each word of an SVG beside its outline."""
    return re.findall(r"<!-- (.*?) -->", svg.read_text())


def test_the_second_panel_needs_somebody_with_both(both: Path, altered: Callable[[str], Path], tmp_path: Path) -> None:
    from oncofed.client.curves import draw_curves

    prediction = predict(model_of(both), both / "sites" / "aachen")
    draw_curves(prediction, "COADREAD", tmp_path / "a.svg")
    table = pd.DataFrame(prediction.columns())
    mine = table[table["cancer_type"] == "COADREAD"]
    n, lacking = (mine["modalities"] == "rna+pathology").sum(), (mine["modalities"] == "rna").sum()
    assert n > 0 < lacking
    words = words_of(tmp_path / "a.svg")
    assert f"{n} patients have both" in words
    assert f"{lacking} lack images: at the bottom" in words
    assert "part of expression in the log hazard" in words
    draw_curves(predict(model_of(both), both / "sites" / "coimbra"), "LUAD", tmp_path / "b.svg")
    assert "predicted survival" in words_of(tmp_path / "b.svg")
    assert not any("patients have both" in word for word in words_of(tmp_path / "b.svg"))


# -- other models ---------------------------------------------------------------------------------------------------------


def test_three_modalities_and_a_site_without_one_of_them(consortium: Path, tmp_path: Path) -> None:
    sites, rng = copy_sites(tmp_path, consortium), np.random.default_rng(0)
    for folder in sorted(sites.glob("*/")):
        patients = pd.read_csv(folder / "clinical.csv")["patient"]
        copies = pd.DataFrame(rng.integers(-2, 3, (len(patients), 4)), index=patients, columns=list("ABCD"))
        copies.to_csv(folder / "alterations.csv")
    keys = {"training__learning_rate": 0.1, "fusion__modalities": ("rna", "pathology", "alterations")}
    train(tmp_path, model__name="path_gptomic", training__rounds=2, **keys)
    whole = table_of(tmp_path, sites / "aachen", tmp_path)
    assert set(whole["modalities"]) == {"rna+pathology+alterations", "rna+alterations"}
    assert whole["risk_alterations"].notna().all()
    assert whole["risk_alterations"].abs().max() > 0
    (sites / "aachen" / "alterations.csv").unlink()
    without = table_of(tmp_path, sites / "aachen", tmp_path)
    assert without["risk_alterations"].isna().all()
    np.testing.assert_array_equal(without["risk_rna"], whole["risk_rna"])
    np.testing.assert_allclose(whole["risk"] - without["risk"], whole["risk_alterations"], rtol=1e-4, atol=1e-6)
    assert predict(model_of(tmp_path), sites / "aachen").notes == (
        "6 patients lack images and alterations: predicted from expression alone",
        "24 patients lack alterations: predicted from expression and images",
    )


def test_features_put_together_have_no_parts(consortium: Path, tmp_path: Path) -> None:
    sites = copy_sites(tmp_path, consortium)
    train(tmp_path, model__name="path_gptomic", fusion__kind="concat", training__rounds=1)
    table = table_of(tmp_path, sites / "aachen", tmp_path)
    assert set(table["modalities"]) == {"rna", "rna+pathology"}
    assert not {"driver", "risk_rna", "risk_pathology"} & set(table)


def test_a_model_of_images_alone(consortium: Path, tmp_path: Path) -> None:
    """It neither reads expression nor asks for its unit; one modality needs no columns of parts."""
    sites = copy_sites(tmp_path, consortium)
    train(tmp_path, model__name="path_gptomic", fusion__modalities=("pathology",), training__rounds=1)
    (sites / "aachen" / "expression.parquet").write_bytes(b"no table")
    prediction = predict(model_of(tmp_path), sites / "aachen")
    assert prediction.notes == ("6 patients of the clinical table have no images: left out",)
    assert not {"driver", "modalities", "risk_pathology"} & set(prediction.columns())
    with pytest.raises(Refusal, match="no patient of the clinical table has images"):
        predict(model_of(tmp_path), sites / "coimbra")


def test_embeddings_must_be_of_the_studys_checkpoint(consortium: Path, tmp_path: Path) -> None:
    sites = copy_sites(tmp_path, consortium)
    write_toy_checkpoint(tmp_path / "scgpt", GENES)
    for folder in sorted(sites.glob("*/")):
        described(folder, scgpt=str(tmp_path / "scgpt"))
    train(tmp_path, model__name="path_gptomic", fusion__rna_encoder="scgpt", training__rounds=1)
    ours, theirs = table_of(tmp_path, sites / "aachen", tmp_path), study_table(tmp_path, "aachen")
    np.testing.assert_allclose(ours["risk_rna"], theirs["risk_rna"], rtol=1e-4, atol=1e-6)
    assert ours["risk_rna"].abs().max() > 0
    write_toy_checkpoint(tmp_path / "other", GENES, seed=1)
    described(sites / "aachen", scgpt=str(tmp_path / "other"))
    with pytest.raises(Refusal, match=r"its scGPT checkpoint is \S+, the model reads embeddings of \S+; let scgpt"):
        predict(model_of(tmp_path), sites / "aachen")
