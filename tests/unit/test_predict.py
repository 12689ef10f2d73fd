"""A saved model at a hospital: the same risks as in the study, new patients, and what the terminal may say."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from oncofed.client.predict import predict
from oncofed.common.errors import Refusal
from oncofed.common.survival import RISK_EDGES, TimeGrid, median_survival, risk_percentile, survival_curve
from oncofed.deploy.cli import cli
from oncofed.server.checkpoint import load_arrays, save_arrays
from toy_studies import copy_sites, model_of, train
from typer.testing import CliRunner

MakeSite = Callable[..., Path]


@pytest.fixture(scope="module")
def survival(tmp_path_factory: pytest.TempPathFactory, consortium: Path) -> Path:
    root = tmp_path_factory.mktemp("survival")
    copy_sites(root, consortium)
    train(root)
    return root


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory, consortium: Path) -> Path:
    root = tmp_path_factory.mktemp("classes")
    copy_sites(root, consortium)
    train(root, task__kind="classification")
    return root


@pytest.fixture
def new_site(survival: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of Aachen whose clinical table went through `change`."""

    def make(change: Callable[[pd.DataFrame], pd.DataFrame]) -> Path:
        folder = tmp_path / "new"
        shutil.copytree(survival / "sites" / "aachen", folder, ignore=shutil.ignore_patterns(".oncofed"))
        change(pd.read_csv(folder / "clinical.csv")).to_csv(folder / "clinical.csv", index=False)
        return folder

    return make


@pytest.mark.parametrize("site", ["aachen", "bergen", "coimbra", "dublin"])  # four units and formats
def test_risks_are_those_of_the_study(survival: Path, site: str, tmp_path: Path) -> None:
    folder = survival / "sites" / site
    predict(model_of(survival), folder).write(tmp_path / "risks.csv")
    ours = pd.read_csv(tmp_path / "risks.csv")
    theirs = pd.read_csv(folder / ".oncofed" / "predictions" / "mine" / "fold-0.csv")
    assert ours["patient"].tolist() == theirs["patient"].tolist()
    assert ours["cancer_type"].tolist() == theirs["cancer_type"].tolist()
    np.testing.assert_allclose(ours["risk"], theirs["risk"], rtol=1e-5, atol=1e-6)


def test_percentiles_and_survival_follow_the_risk(survival: Path, tmp_path: Path) -> None:
    predict(model_of(survival), survival / "sites" / "aachen").write(tmp_path / "risks.csv")
    for _, rows in pd.read_csv(tmp_path / "risks.csv").groupby("cancer_type"):
        rows = rows.sort_values("risk")
        assert rows["percentile"].dropna().is_monotonic_increasing
        assert rows["survival_12_months"].dropna().is_monotonic_decreasing
        assert (rows["survival_12_months"].dropna() >= rows["survival_60_months"].dropna()).all()
        assert rows["percentile"].dropna().between(0, 100).all()
        reached = rows.dropna(subset="median_survival_months")
        assert reached["median_survival_months"].is_monotonic_decreasing


def test_percentile_of_the_counted_patients_themselves() -> None:
    risk = np.random.default_rng(0).normal(0, 2.5, 4000)
    counts = np.bincount(np.searchsorted(RISK_EDGES, risk), minlength=len(RISK_EDGES) + 1)
    ours = risk_percentile(counts, risk)
    rank = (np.argsort(np.argsort(risk)) + 0.5) / len(risk) * 100
    inside = np.abs(risk) <= 5
    assert np.abs(ours - rank)[inside].max() < 1.0
    many = np.linspace(-8, 8, 1000)
    assert (np.diff(risk_percentile(counts, many)) >= 0).all()
    assert np.isnan(risk_percentile(np.zeros(len(RISK_EDGES) + 1), risk)).all()


def test_median_is_where_the_curve_crosses_one_half() -> None:
    grid, baseline = TimeGrid((0.0, 6.0, 24.0)), np.log([0.01, 0.03, 0.05])
    risk = np.array([-4.0, 0.3, 0.5, 3.0])
    median = median_survival(baseline, grid, risk)
    assert np.isinf(median[0])  # half of them live beyond the last event times: not known
    for r, m in zip(risk[1:], median[1:], strict=True):
        assert survival_curve(baseline, grid, np.array([r]), np.array([m]))[0, 0] == pytest.approx(0.5)


def test_new_patients_need_no_outcome(survival: Path, new_site: MakeSite) -> None:
    known = predict(model_of(survival), survival / "sites" / "aachen")
    folder = new_site(lambda t: t.drop(columns=["time", "event"]))
    new = predict(model_of(survival), folder)
    np.testing.assert_array_equal(new.score, known.score)
    assert not (folder / ".oncofed").exists()


def test_patients_with_a_time_of_zero_are_scored_as_well(survival: Path, new_site: MakeSite) -> None:
    known = predict(model_of(survival), survival / "sites" / "aachen")
    assert len(predict(model_of(survival), new_site(lambda t: t.assign(time=0))).cohort) == len(known.cohort)


def test_unknown_cancer_types_are_refused_and_counted(survival: Path, new_site: MakeSite) -> None:
    def change(t: pd.DataFrame) -> pd.DataFrame:
        t.loc[:2, "cancer_type"], t.loc[3, "cancer_type"] = "MESO", None
        return t

    with pytest.raises(Refusal, match=r"4 patients .*\(\(empty\): 1, MESO: 3\); it knows BRCA, COADREAD, LUAD") as stop:
        predict(model_of(survival), new_site(change))
    assert "AAC-" not in str(stop.value)


def test_another_unit_family_is_refused(survival: Path, new_site: MakeSite) -> None:
    folder = new_site(lambda t: t)
    text = (folder / "site.toml").read_text()
    (folder / "site.toml").write_text(text.replace('"log2"', '"zscore"'))
    with pytest.raises(Refusal, match="trained on log-expression; deliver expression of that family"):
        predict(model_of(survival), folder)


def test_missing_genes_are_counted_and_none_at_all_is_refused(survival: Path, new_site: MakeSite) -> None:
    folder = new_site(lambda t: t)
    file = folder / "expression.parquet"
    table = pd.read_parquet(file)
    table.drop(columns=table.columns[:7]).to_parquet(file)
    assert "7 of the model's 60 genes are missing" in "".join(predict(model_of(survival), folder).notes)
    table.rename(columns=lambda g: f"ENSG{g}").to_parquet(file)
    with pytest.raises(Refusal, match="none of the model's 60 genes"):
        predict(model_of(survival), folder)


def test_a_withheld_cancer_stays_empty(survival: Path, tmp_path: Path) -> None:
    arrays, about = load_arrays(model_of(survival))
    arrays["explanation/risk_counts"][0] = 0.0
    save_arrays(tmp_path / "model.safetensors", arrays, about)
    prediction = predict(tmp_path / "model.safetensors", survival / "sites" / "aachen")
    prediction.write(tmp_path / "risks.csv")
    table = pd.read_csv(tmp_path / "risks.csv")
    mine = table["cancer_type"] == about["cancers"][0]
    assert 0 < mine.sum() < len(table)
    assert table.loc[mine, ["percentile", "survival_12_months", "median_survival_months"]].isna().all().all()
    assert table.loc[mine, "risk"].notna().all()
    assert table.loc[~mine, ["percentile", "survival_12_months"]].notna().all().all()
    assert f"{mine.sum()} patients are of cancer types of which too few trained" in "".join(prediction.notes)


def test_classes(classes: Path, new_site: MakeSite, tmp_path: Path) -> None:
    folder = classes / "sites" / "aachen"
    predict(model_of(classes), folder).write(tmp_path / "classes.csv")
    ours = pd.read_csv(tmp_path / "classes.csv")
    theirs = pd.read_csv(folder / ".oncofed" / "predictions" / "mine" / "fold-0.csv")
    assert list(ours) == [
        "patient",
        "answer",
        "predicted",
        "probability",
        "second",
        "second_probability",
        "third",
        "third_probability",
    ]
    assert ours["predicted"].tolist() == theirs["predicted"].tolist()
    np.testing.assert_allclose(ours["probability"], theirs.filter(like="p_").max(axis=1), rtol=1e-5)
    assert (ours["probability"] >= ours["second_probability"]).all()
    np.testing.assert_allclose(ours.filter(like="probability").sum(axis=1), 1.0)
    unsure = ours["probability"] < 0.5
    assert 0 < unsure.sum() < len(ours)
    assert (ours["answer"] == ours["predicted"].where(~unsure, "uncertain")).all()
    prediction = predict(model_of(classes), folder)
    assert prediction.count_by_cancer == ours["answer"].value_counts().to_dict()
    assert f"{unsure.sum()} of {len(ours)} patients are uncertain" in "".join(prediction.notes)
    always = replace(
        prediction, model=replace(prediction.model, study=prediction.model.study.changed(task__abstain_below=0.0))
    )
    assert always.answer.tolist() == ours["predicted"].tolist()
    unlabelled = predict(model_of(classes), new_site(lambda t: t.assign(cancer_type="unknown primary")))
    assert len(unlabelled.cohort) == len(ours)  # the class is what is asked for


@pytest.mark.parametrize("ending", [".svg", ".png"])
def test_terminal_counts_and_names_nobody(survival: Path, tmp_path: Path, ending: str) -> None:
    out, picture = tmp_path / "risks.csv", tmp_path / f"curves{ending}"
    arguments = [
        "site",
        "predict",
        str(model_of(survival)),
        str(survival / "sites" / "aachen"),
        "--out",
        str(out),
        "--picture",
        str(picture),
    ]
    answer = CliRunner().invoke(cli, arguments)
    assert answer.exit_code == 0, answer.output
    assert "AAC-" not in answer.output
    assert f"{len(pd.read_csv(out))} patients" in answer.output
    assert "AAC-" in out.read_text()
    assert picture.stat().st_size > 5000
    assert b"AAC-" not in picture.read_bytes()


def test_mistakes_say_what_to_do(survival: Path, classes: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"name the model\.safetensors"):
        predict(survival / "sites" / "aachen" / "clinical.csv", survival / "sites" / "aachen")
    with pytest.raises(ValueError, match=r"name the model\.safetensors"):
        predict(tmp_path / "none.safetensors", survival / "sites" / "aachen")

    def call(root: Path, *more: str) -> None:
        answer = CliRunner().invoke(
            cli,
            [
                "site",
                "predict",
                str(model_of(root)),
                str(root / "sites" / "aachen"),
                "--out",
                str(tmp_path / "r"),
                *more,
            ],
        )
        assert answer.exception is not None
        raise answer.exception

    with pytest.raises(ValueError, match=r"must end in \.svg or \.png"):
        call(survival, "--picture", str(tmp_path / "curves.gif"))
    with pytest.raises(ValueError, match="--cancer MESO: no patient of it"):
        call(survival, "--picture", str(tmp_path / "curves.svg"), "--cancer", "MESO")
    with pytest.raises(ValueError, match="this model classifies"):
        call(classes, "--picture", str(tmp_path / "curves.svg"))
    assert not (tmp_path / "r").exists()
