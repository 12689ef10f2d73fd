"""The main job on real hospitals; skipped without ONCOFED_DATA."""

from __future__ import annotations

from pathlib import Path

import pytest
from oncofed.client.data.check import check_site
from oncofed.common.study import Study
from oncofed.deploy.comparison.compare import compare
from oncofed.deploy.simulate import simulate
from oncofed.deploy.sites.split import split_pooled

pytestmark = pytest.mark.slow


def test_federation_of_real_hospitals(real_data: Path, tmp_path: Path) -> None:
    """One fold, a narrow model: the path of the published result, with a floor well below what it reaches."""
    folders, unit = split_pooled(real_data / "tcga", tmp_path / "sites", min_patients=40)
    assert unit == "zscore"
    assert len(folders) == 29
    reports = [check_site(f) for f in folders]
    assert all(r.ok for r in reports), [f for r in reports for f in r.findings if f.level == "error"]
    study = Study().changed(
        model__width=64,
        model__latent=32,
        training__learning_rate=0.002,
        splits__only=[0],
        runtime__out=str(tmp_path / "out"),
    )
    result = compare(study, tmp_path / "sites", ("ridge",))
    assert result["results"]["left_out"] == []
    assert len(result["results"]["cancers"]) == 9
    assert result["results"]["panel"]["genes"] >= 1526
    assert result["methods"]["federated"]["c_index"]["value"] > 0.60
    assert result["methods"]["ridge"]["c_index"]["value"] > 0.60
    assert sum(sum(row) for row in result["cohort"]["patients"]) == 3916


def test_two_modalities_of_real_hospitals(real_data: Path, tmp_path: Path) -> None:
    """All nine cancers, of which four have images: counts of cells in the millions, and hospitals without any image."""
    split_pooled(real_data / "tcga", tmp_path / "sites", min_patients=40)
    study = Study().changed(
        model__name="path_gptomic",
        model__width=32,
        model__latent=16,
        model__experts=2,
        model__attention_experts=0,
        training__rounds=3,
        training__evaluate_every=0,
        splits__only=[0],
        runtime__out=str(tmp_path / "out"),
    )
    run = simulate(study, tmp_path / "sites")
    fold = run.results["folds"][0]
    assert run.results["left_out"] == []
    assert run.results["beside"]["image_width"] == 607
    images = fold["blocks"].index("pathology")
    with_images = {site for site, evidence in fold["site_evidence"].items() if evidence[images] > 0}
    assert 15 < len(with_images) < 29
    patients = fold["curve"][-1]["branches"]
    assert patients["rna"]["patients"] > 1.5 * patients["pathology"]["patients"]
    assert {"LUAD", "GBMLGG"} <= set(run.predictions["cancer_type"])
    glioma = run.predictions[run.predictions["cancer_type"] == "GBMLGG"]
    assert (glioma["risk_pathology"] == 0).all()
    assert glioma["risk_rna"].std() > 0
