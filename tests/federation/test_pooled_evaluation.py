"""A study's pooled evaluation from its sites' tables: near the exact numbers, with noise, and behind policies."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from lifelines import KaplanMeierFitter
from oncofed.common.metrics import concordance_index, pair_counts, pair_table
from oncofed.common.study import Study
from oncofed.deploy.comparison.compare import check_methods, compare
from oncofed.deploy.simulate import SimulatedRun, simulate
from oncofed.deploy.sites.synth import SynthSettings, write_consortium
from oncofed.server.evaluation import load_tables
from oncofed.server.report.render import render
from oncofed.server.roster import NotEnoughSites

Make = Callable[..., Study]


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("consortium") / "sites"
    settings = SynthSettings(sites=4, patients=1200, genes=60, cancers=2, genes_per_program=8)
    write_consortium(root, settings)
    return root


@pytest.fixture(scope="module")
def run(sites: Path, tmp_path_factory: pytest.TempPathFactory) -> SimulatedRun:
    study = Study().changed(
        model__size="tiny",
        training__rounds=4,
        splits__folds=2,
        runtime__threads=1,
        runtime__out=str(tmp_path_factory.mktemp("out")),
        runtime__wait_sites_s=2.0,
    )
    return simulate(study, sites)


def held_out(run: SimulatedRun) -> pd.DataFrame:
    return run.predictions[run.predictions["split"] == "test"]


def test_the_c_index_of_each_cancer_is_within_the_tables_error_of_the_exact_one(run: SimulatedRun) -> None:
    found, test = run.results["evaluation"], held_out(run)
    for cancer, rows in test.groupby("cancer_type"):
        exact = np.mean(
            [
                concordance_index(*(p[c].to_numpy() for c in ("risk", "time_months", "event")))
                for _, p in rows.groupby("fold")
            ]
        )
        mine = found["by_cancer"][cancer]
        assert mine["c_index"]["value"] == pytest.approx(exact, abs=0.005)
        assert mine["bounds"][0] <= exact <= mine["bounds"][1]
        assert mine["c_index"]["low"] < exact < mine["c_index"]["high"]
        assert (mine["patients"], mine["events"]) == (len(rows), rows["event"].sum())
    mean = np.mean([c["c_index"]["value"] for c in found["by_cancer"].values()])
    assert found["c_index"]["value"] == pytest.approx(mean, abs=1e-12)


def test_pairs_within_a_site_are_exact(run: SimulatedRun) -> None:
    test = held_out(run)
    for row in run.results["evaluation"]["by_site"]:
        mine = test[test["site"] == row["site"]]
        total = np.zeros(2)
        for _, part in mine.groupby(["fold", "cancer_type"]):
            total += pair_counts(*(part[c].to_numpy() for c in ("risk", "time_months", "event")))
        assert row["c_index"]["value"] == pytest.approx(total[0] / total[1], abs=1e-9)
        assert (row["patients"], row["pairs"]) == (len(mine), total[1])


def test_observed_survival_of_calibration_groups_is_kaplan_meiers(run: SimulatedRun) -> None:
    """The mean of a cancer's patients over all groups must be what everybody's Kaplan-Meier says."""
    test = held_out(run)
    for at in run.results["evaluation"]["horizons"]:
        c = at["calibration"]
        assert np.sum(c["patients"]) == len(test)
        km = KaplanMeierFitter().fit(test["time_months"], test["event"])
        everybody = np.average(c["observed"], weights=c["patients"])
        assert everybody == pytest.approx(float(km.predict(at["month"])), abs=0.03)
        assert c["predicted"] == sorted(c["predicted"])
        assert all(low <= o <= high for low, o, high in zip(c["lower"], c["observed"], c["upper"], strict=True))


def test_risk_groups_are_split_at_the_training_median(run: SimulatedRun) -> None:
    groups = run.results["evaluation"]["risk_groups"]
    low, high = groups["curves"]
    assert low["patients"] + high["patients"] == len(held_out(run))
    median = run.predictions[run.predictions["split"] == "train"].groupby(["fold", "cancer_type"])["risk"].median()
    test = held_out(run).join(median.rename("median"), on=["fold", "cancer_type"])
    # the tables' bins know the median to a share of 0.05
    assert high["patients"] == pytest.approx((test["risk"] > test["median"]).sum(), abs=0.03 * len(test))
    assert groups["logrank"]["p"] < 0.05


def test_a_report_can_be_drawn_from_the_tables_alone(run: SimulatedRun) -> None:
    out = Path(run.results["study"]["runtime"]["out"])
    tables = load_tables(out, run.results["folds"])
    assert [len(t.sites) for t in tables] == [4, 4]
    np.testing.assert_allclose(tables[0].counts, sum(s["table"] for s in tables[0].sites.values()))


def test_pair_table_and_pair_counts_agree() -> None:
    rng = np.random.default_rng(0)
    risk, time = rng.integers(0, 5, 80).astype(float), rng.integers(1, 20, 80).astype(float)
    event, cancer = rng.integers(0, 2, (2, 80))
    table = pair_table(risk, time, event, cancer, 2)
    for c in (0, 1):
        rows = cancer == c
        concordant, comparable = pair_counts(risk[rows], time[rows], event[rows])
        assert table[0, c] == 2 * concordant
        assert table[:, c].sum() == 2 * comparable


def test_with_noise_sites_that_keep_small_cells_answer_and_pay(
    sites: Path, small_study: Make, tmp_path: Path, federation_at: Callable[[Path, Study], dict[str, Any]]
) -> None:
    results = federation_at(sites, small_study(evaluation__epsilon=8.0, evaluation__horizons=(24.0,)))
    found = results["evaluation"]
    assert found["epsilon"] == 8.0
    assert len(found["sites"]) == 4
    assert 0.4 < found["within_sites"]["value"] < 0.9
    # nothing else of held-out patients leaves, or the noise would protect nobody
    assert "evaluation" not in results["folds"][0]
    sent = [json.loads(x) for f in (tmp_path / "work").glob("*/release-log.jsonl") for x in f.read_text().splitlines()]
    assert [x["arrays"].keys() for x in sent if x["kind"] == "evaluate"] == [{"table", "pairs"}] * 4
    ledgers = list(sites.glob("*/.oncofed/ledger.jsonl"))
    assert len(ledgers) == 4
    for f in ledgers:
        booked, settled = map(json.loads, f.read_text().splitlines())
        assert {m["kind"] for m in booked["mechanisms"]} == {"pure"}
        assert sum(m["noise"] * m["count"] for m in booked["mechanisms"]) == 8.0
        assert (settled["op"], settled["id"]) == ("settle", booked["id"])


def test_without_noise_hospitals_keep_their_tables_and_still_tell_large_groups(
    sites: Path, small_study: Make, federation_at: Callable[[Path, Study], dict[str, Any]]
) -> None:
    results = federation_at(sites, small_study())
    assert "evaluation" not in results
    reasons = [x["reason"] for x in results["left_out"] if "table of risk" in x["reason"]]
    assert len(reasons) == 4
    assert all("set evaluation.epsilon" in r for r in reasons)
    assert np.sum(results["folds"][0]["evaluation"]["patients"]) > 150


def test_hospitals_that_let_nobody_show_still_get_their_model(
    sites: Path, small_study: Make, tmp_path: Path, federation_at: Callable[[Path, Study], dict[str, Any]]
) -> None:
    """Scores between rounds and at the end are missing, the model, and each hospital's own file, are there."""
    few = tmp_path / "few"
    for folder in sites.iterdir():
        if folder.is_dir():
            shutil.copytree(folder, few / folder.name, ignore=shutil.ignore_patterns(".oncofed"))
            (few / folder.name / "policy.toml").write_text("min_cell = 500\n")
    results = federation_at(few, small_study(splits__validation=0.2))
    fold = results["folds"][0]
    assert "evaluation" not in fold
    assert "validation_loss" not in fold["curve"][0]
    assert (tmp_path / "out" / "model-fold-0.safetensors").exists()
    assert len(list((tmp_path / "work").glob("*/predictions/*/fold-0.csv"))) == 4
    assert render({"results": results})
    with pytest.raises(NotEnoughSites, match=r"training\.patience chooses the round"):
        federation_at(few, small_study(splits__validation=0.2, training__patience=1))


@pytest.fixture
def federation_at(tmp_path: Path) -> Callable[[Path, Study], dict[str, Any]]:
    """Run a study with the sites' own folders in the node config: the policies' defaults hold."""
    from oncofed.client.app import app as client_app
    from oncofed.client.data.site import list_sites
    from oncofed.deploy.engine import InProcessGrid
    from oncofed.server.app import run_study

    def go(root: Path, study: Study) -> dict[str, Any]:
        nodes: list[Any] = [{"site-dir": str(f), "work-dir": str(tmp_path / "work" / f.name)} for f in list_sites(root)]
        return run_study(study, InProcessGrid(client_app, nodes, {}))

    return go


def test_a_cox_model_of_the_covariates_is_a_baseline(sites: Path, small_study: Make) -> None:
    study = small_study(panel__covariates=("age",))
    methods = compare(study, sites, ("cox",))["methods"]
    assert set(methods) == {"federated", "cox"}
    assert methods["cox"]["c_index"]["value"] > 0.5
    with pytest.raises(ValueError, match=r"--compare cox: .* name some in panel\.covariates"):
        check_methods(small_study(), ("cox",))
