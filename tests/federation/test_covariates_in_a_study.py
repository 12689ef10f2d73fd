"""Clinical covariates through a whole study: they learn what age does, and only where the study names them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from oncofed.client.data.site import list_sites
from oncofed.common.blocks import Sum
from oncofed.common.study import Study

Make = Callable[..., Study]
LOG_HAZARD_OF_A_DEVIATION = 1.0
"""What one standard deviation of age adds to the log hazard of the planted outcomes."""
KEYS = {
    "panel__covariates": ["age", "sex=female|male"],
    "training__rounds": 20,
    "training__evaluate_every": 0,
    "training__learning_rate": 1e-5,  # genes stay out of it
    "model__experts": 0,
    "model__attention_experts": 0,
    "analysis__experts": False,
}


@pytest.fixture(scope="module")
def ageing(consortium: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The consortium with outcomes that only age decides; one site has no column of sex, another writes it in its own way."""
    sites = tmp_path_factory.mktemp("ageing") / "sites"
    shutil.copytree(consortium, sites, ignore=shutil.ignore_patterns(".oncofed"))
    for i, folder in enumerate(list_sites(sites)):
        rng = np.random.default_rng(i)
        table = pd.read_csv(folder / "clinical.csv")
        z = (table["age"] - 62) / 11
        death = rng.exponential(20 * np.exp(-LOG_HAZARD_OF_A_DEVIATION * z))
        stop = rng.uniform(6, 60, len(table))
        table["time"], table["event"] = np.minimum(death, stop).clip(0.1), (death <= stop).astype(int)
        if i == 1:
            table = table.drop(columns="sex")
        if i == 2:
            table["sex"] = table["sex"].str.upper()
        table.to_csv(folder / "clinical.csv", index=False)
    return sites


def test_a_planted_effect_of_age_is_learned_by_all_hospitals_together(
    ageing: Path, small_study: Make, federation: Any, model_of: Callable[..., Sum]
) -> None:
    federation.sites = ageing
    study = small_study(**KEYS)
    results = federation.run(study)
    assert results["left_out"] == []
    arrays = model_of(study)
    age, sex = arrays["weights/head.covariates.shared"][:, 0]
    own = arrays["weights/head.covariates.own"][:, 0, 0]
    assert np.mean(age + own) == pytest.approx(LOG_HAZARD_OF_A_DEVIATION, abs=0.3)
    assert abs(sex) < 0.2
    np.testing.assert_allclose(arrays["covariate_sd"][0], 11, atol=1.5)
    clinical = pd.concat([pd.read_csv(folder / "clinical.csv") for folder in list_sites(ageing)])
    scored = federation.predictions(study).merge(clinical, on=["patient", "cancer_type"])
    assert len(scored) == len(clinical)
    for _, rows in scored[scored["split"] == "test"].groupby("cancer_type"):
        assert np.corrcoef(rows["risk"], rows["age"])[0, 1] > 0.9


def test_a_study_that_names_no_covariates_ignores_the_columns(
    federation: Any, ageing: Path, small_study: Make, tmp_path: Path, weights_of: Callable[..., Sum], differing: Any
) -> None:
    federation.sites = ageing
    bare = federation.copy(tmp_path / "sites")
    for folder in list_sites(bare.sites):
        table = pd.read_csv(folder / "clinical.csv")
        table.drop(columns=["age", "sex"], errors="ignore").to_csv(folder / "clinical.csv", index=False)
    studies = [small_study(runtime__out=str(tmp_path / out)) for out in "ab"]
    federation.run(studies[0])
    bare.run(studies[1])
    assert differing(*map(weights_of, studies)) == []
    assert not any("head.covariates" in name for name in weights_of(studies[0]))
    assert weights_of(studies[0])["covariate_mean"].shape == (0,)


def test_what_a_site_does_not_know_is_the_mean_there_and_the_study_goes_on(
    federation: Any, ageing: Path, small_study: Make, caplog: pytest.LogCaptureFixture
) -> None:
    federation.sites = ageing
    results = federation.run(small_study(panel__covariates=["sex=female|male", "smoker=no|yes"]))
    assert results["left_out"] == []
    assert "Bergen: no clinical column 'sex'" in caplog.text
    assert "no clinical column 'smoker'" in caplog.text
    assert "none of" not in caplog.text  # FEMALE is female
    assert np.isfinite(results["folds"][0]["curve"][-1]["train_loss"])


def test_covariates_of_the_held_out_move_nothing_that_is_learned(
    federation: Any, ageing: Path, small_study: Make, tmp_path: Path, weights_of: Callable[..., Sum], differing: Any
) -> None:
    federation.sites = ageing
    first, second = (small_study(**(KEYS | {"training__rounds": 2}), runtime__out=str(tmp_path / out)) for out in "ab")
    federation.run(first)
    table = federation.predictions(first)
    tested = set(table.loc[table["split"] == "test", "patient"])
    other = federation.copy(tmp_path / "sites")
    for folder in list_sites(other.sites):
        clinical = pd.read_csv(folder / "clinical.csv")
        clinical.loc[clinical["patient"].isin(tested), "age"] = 17.0
        clinical.to_csv(folder / "clinical.csv", index=False)
    other.run(second)
    assert differing(weights_of(first), weights_of(second)) == []
    merged = table.merge(other.predictions(second), on=["site", "patient"])
    changed = merged.loc[merged["risk_x"] != merged["risk_y"], "patient"]
    assert set(changed) == tested
