"""`oncofed data split` and `oncofed data synth`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from oncofed.client.data.check import check_site
from oncofed.client.data.read import read_clinical, read_pathology
from oncofed.client.data.site import SiteFolder, list_sites
from oncofed.deploy.sites.split import recognise_unit, split_pooled
from oncofed.deploy.sites.synth import SynthSettings, write_consortium


def write_pool(folder: Path, z: bool = True) -> None:
    rng = np.random.default_rng(0)
    names = [f"TCGA-{i:03d}" for i in range(100)]
    institution = ["Mayo Clinic"] * 50 + ["Henry Ford"] * 41 + ["Tiny"] * 9
    cancer = np.array(["LUAD", "STAD"])[rng.integers(0, 2, 100)]
    table = pd.DataFrame(
        {"patient": names, "cancer_type": cancer, "institution": institution, "time_months": 5.0, "event": 1}
    )
    folder.mkdir(parents=True)
    table.to_csv(folder / "clinical.csv", index=False)
    for cohort in ("LUAD", "STAD"):
        rows = table["cancer_type"] == cohort
        x = rng.normal(0 if z else 5, 1, (rows.sum(), 5))
        frame = pd.DataFrame(
            x - x.mean(0) if z else x.clip(0),
            index=pd.Index(table.loc[rows, "patient"]),
            columns=[*"ABCD", f"only_{cohort}"],
        )
        (folder / "expression").mkdir(exist_ok=True)
        frame.to_parquet(folder / "expression" / f"{cohort}.parquet")
    (folder / "pathology").mkdir()
    frame.iloc[:, :2].to_parquet(folder / "pathology" / "STAD.parquet")


def test_split_keeps_every_patient_once(tmp_path: Path) -> None:
    write_pool(tmp_path / "pool")
    folders, unit = split_pooled(tmp_path / "pool", tmp_path / "sites")
    assert unit == "zscore"
    assert [f.name for f in folders] == ["henry-ford", "mayo-clinic", "rest"]
    sites = [SiteFolder.open(f) for f in folders]
    assert [s.name for s in sites] == ["Henry Ford", "Mayo Clinic", "Rest"]
    assert sorted(p for s in sites for p in read_clinical(s)["patient"]) == [f"TCGA-{i:03d}" for i in range(100)]
    assert sites[0].description.time_unit == "months"
    assert all(check_site(f).ok for f in folders)
    pathology = [read_pathology(s) for s in sites]
    assert 0 < sum(len(p) for p in pathology if p is not None) < 100


def test_small_institutions_can_be_dropped(tmp_path: Path) -> None:
    write_pool(tmp_path / "pool")
    folders, _ = split_pooled(tmp_path / "pool", tmp_path / "sites", rest="drop")
    assert [f.name for f in folders] == ["henry-ford", "mayo-clinic"]


def test_split_never_writes_over_sites_and_leaves_nothing_half_done(tmp_path: Path) -> None:
    write_pool(tmp_path / "pool")
    split_pooled(tmp_path / "pool", tmp_path / "sites")
    with pytest.raises(ValueError, match="holds sites already"):
        split_pooled(tmp_path / "pool", tmp_path / "sites")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(ValueError, match="is not empty"):
        split_pooled(tmp_path / "pool", tmp_path / "mine")
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"
    with pytest.raises(ValueError, match="no column 'hospital' to split by"):
        split_pooled(tmp_path / "pool", tmp_path / "other", by="hospital")
    assert not (tmp_path / "other").exists()
    assert not list(tmp_path.glob("*.partial"))


def test_unit_is_recognised_only_without_doubt(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    assert recognise_unit(pd.DataFrame(rng.poisson(90, (20, 5)))) == "counts"
    with pytest.raises(ValueError, match="pass --unit"):
        recognise_unit(pd.DataFrame(rng.normal(5, 1, (20, 5)).clip(0)))
    write_pool(tmp_path / "pool", z=False)
    _, unit = split_pooled(tmp_path / "pool", tmp_path / "sites", unit="log2")
    assert unit == "log2"


def test_synthetic_consortium_is_clean_and_true(tmp_path: Path) -> None:
    out = tmp_path / "sites"
    settings = SynthSettings(sites=4, patients=600, genes=60, cancers=2, genes_per_program=10, seed=3)
    folders = write_consortium(out, settings)
    assert list_sites(out) == sorted(folders)
    reports = [check_site(f) for f in folders]
    assert all(r.ok for r in reports), [r.findings for r in reports if not r.ok]
    kinds = {next(f.glob("expression.*")).suffix for f in folders}
    assert kinds == {".parquet", ".tsv", ".csv", ".h5ad"}
    assert sum((f / "pathology.parquet").exists() for f in folders) == 3
    sizes = [len(read_clinical(SiteFolder.open(f))) for f in folders]
    assert max(sizes) > 2 * min(sizes)
    truth = json.loads((out / "truth.json").read_text())
    assert set(truth["own_programs"]) == {"BRCA", "LUAD"}
    assert not set(truth["shared_program"]) & set(truth["own_programs"]["BRCA"])
    with pytest.raises(ValueError, match="holds sites already"):
        write_consortium(out, settings)
    again = write_consortium(tmp_path / "again", settings)
    assert all(
        (a / "clinical.csv").read_text() == (b / "clinical.csv").read_text()
        for a, b in zip(folders, again, strict=True)
    )


def test_too_few_genes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="ask for more genes"):
        write_consortium(tmp_path / "x", SynthSettings(genes=20))
    assert not (tmp_path / "x").exists()
