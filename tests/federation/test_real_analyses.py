"""Classical analyses over the ninety real hospitals of nine TCGA cancers, equal to pooled; skipped without ONCOFED_DATA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from lifelines import CoxPHFitter, KaplanMeierFitter
from oncofed.client.data.site import SiteDescription, write_description
from oncofed.common.plan import Plan
from oncofed.deploy.analyse import analyse
from scipy.stats import chi2


@pytest.fixture(scope="module")
def table(real_data: Path) -> pd.DataFrame:
    return pd.read_csv(real_data / "tcga" / "clinical.csv").rename(columns={"time_months": "time"})


@pytest.fixture(scope="module")
def hospitals(table: pd.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each institution with its clinical table alone, however small it is."""
    return deal(table, tmp_path_factory.mktemp("hospitals"))


def deal(table: pd.DataFrame, root: Path) -> Path:
    # numbered: two of the ninety are spellings of one name
    for i, (name, rows) in enumerate(table.groupby("institution")):
        write_description(root / f"site-{i}", SiteDescription(name=str(name), expression_unit="zscore"))
        rows.drop(columns="institution").to_csv(root / f"site-{i}" / "clinical.csv", index=False)
    return root


def run(root: Path, out: Path, **keys: Any) -> dict[str, Any]:
    return analyse(Plan(times="exact", min_sites=1, out=str(out), **keys), root)


def test_cox_with_a_baseline_for_each_cancer(table: pd.DataFrame, hospitals: Path, tmp_path: Path) -> None:
    keys = {"kind": "cox", "covariates": ("age", "sex=female|male"), "strata": ("cancer_type",)}
    result = run(hospitals, tmp_path / "many", **keys)
    one = run(deal(table.assign(institution="All"), tmp_path / "one"), tmp_path / "whole", **keys)
    cox = result["cox"]
    for key in ("coef", "se", "loglik"):
        np.testing.assert_allclose(cox[key], one["cox"][key], rtol=1e-10, err_msg=key)
    known = table[table["age"].notna()]
    # hospitals of which nobody's age is known have nobody in the fit
    assert set(result["sites"]) == set(known["institution"])
    assert {x["site"] for x in result["left_out"]} == set(table["institution"]) - set(known["institution"])
    frame = known[["time", "event", "age", "cancer_type"]].assign(male=(known["sex"] == "male").astype(float))
    pooled = CoxPHFitter(strata=["cancer_type"]).fit(frame, "time", "event", fit_options={"precision": 1e-14})
    np.testing.assert_allclose(cox["coef"], pooled.params_, rtol=1e-9)
    np.testing.assert_allclose(cox["se"], pooled.standard_errors_, rtol=1e-7)
    np.testing.assert_allclose(cox["loglik"], pooled.log_likelihood_, rtol=1e-11)
    assert (cox["patients"], cox["events"]) == (len(known), known["event"].sum())


def test_curves_of_each_cancer(table: pd.DataFrame, hospitals: Path, tmp_path: Path) -> None:
    result = run(hospitals, tmp_path / "out", kind="km", group="cancer_type")
    assert len(result["sites"]) == 90
    assert [c["name"] for c in result["curves"]] == sorted(table["cancer_type"].unique())
    for curve in result["curves"]:
        rows = table[table["cancer_type"] == curve["name"]]
        km = KaplanMeierFitter().fit(rows["time"], rows["event"])
        wanted = km.survival_function_at_times(curve["time"]).to_numpy()
        np.testing.assert_allclose(curve["survival"], wanted, atol=1e-12)
        at_risk = [(rows["time"] >= t).sum() for t in curve["time"]]
        np.testing.assert_array_equal(curve["at_risk"], at_risk)
        assert curve["patients"] == len(rows)


def test_log_rank_of_sex_within_cancers(table: pd.DataFrame, hospitals: Path, tmp_path: Path) -> None:
    result = run(hospitals, tmp_path / "out", kind="logrank", group="sex=female|male", strata=("cancer_type",))
    observed = expected = variance = 0.0
    for _, rows in table.groupby("cancer_type"):
        time, event, male = (rows[c].to_numpy() for c in ("time", "event", "sex"))
        male = male == "male"
        for t in np.unique(time[event == 1]):
            at_risk, dead = time >= t, (time == t) & (event == 1)
            n, d, m = at_risk.sum(), dead.sum(), (at_risk & male).sum()
            observed += (dead & male).sum()
            expected += d * m / n
            variance += d * (m / n) * (1 - m / n) * (n - d) / (n - 1) if n > 1 else 0.0
    test = result["logrank"]
    wanted = (observed - expected) ** 2 / variance
    assert test["chi2"] == pytest.approx(wanted, rel=1e-10)
    assert test["p"] == pytest.approx(chi2.sf(wanted, 1), rel=1e-9)
    assert test["observed"][1] == observed
    assert test["expected"][1] == pytest.approx(expected, rel=1e-12)
