"""The main job on real hospitals; skipped without ONCOFED_DATA."""

from __future__ import annotations

from pathlib import Path

import pytest
from oncofed.client.data.check import check_site
from oncofed.common.study import Study
from oncofed.deploy.comparison.compare import compare
from oncofed.deploy.split import split_pooled

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
