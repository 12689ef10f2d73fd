"""Classification of the cancer type, whole: sites without outcomes, predictions, scores, comparison."""

from __future__ import annotations

import json
import re
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from oncofed.client.data.check import check_site
from oncofed.client.data.site import list_sites
from oncofed.common.class_metrics import auroc_error, class_sums, macro_auroc, macro_f1
from oncofed.common.models.build import Sizes, build_model
from oncofed.common.models.gene_moe import GeneMOE
from oncofed.common.models.inputs import Inputs
from oncofed.common.study import Study
from oncofed.deploy.comparison.classes import difference, summarise
from oncofed.deploy.comparison.compare import compare
from oncofed.deploy.comparison.logistic import class_scores, in_span
from oncofed.deploy.comparison.present import print_tables, write_comparison
from oncofed.deploy.simulate import read_predictions
from oncofed.deploy.sites.split import split_pooled
from oncofed.deploy.sites.synth import SynthSettings, write_consortium
from oncofed.server.report import heat
from oncofed.server.report.classes import measured, nouns
from oncofed.server.report.render import render
from oncofed.server.rounds import AUROC_ERROR
from rich.console import Console
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    confusion_matrix,
    f1_score,
    log_loss,
    matthews_corrcoef,
    recall_score,
    roc_auc_score,
)

CANCERS = ["BRCA", "COADREAD", "LUAD"]
METHODS = ("pooled", "local", "logistic", "fedavg")


def classification(**dotted: Any) -> Study:
    base = {
        "name": "classes",
        "task__kind": "classification",
        "model__size": "tiny",
        "training__rounds": 3,
        "training__learning_rate": 0.02,
        "splits__folds": 3,
        "runtime__threads": 1,
        "runtime__device": "cpu",
    }
    return Study().changed(**(base | dotted))


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three synthetic sites whose clinical tables have no outcome columns."""
    out = tmp_path_factory.mktemp("classes") / "sites"
    for folder in write_consortium(out, SynthSettings(sites=3, patients=180, genes=60, cancers=3, genes_per_program=8)):
        clinical = pd.read_csv(folder / "clinical.csv").drop(columns=["time", "event"])
        clinical.to_csv(folder / "clinical.csv", index=False)
    return out


@pytest.fixture(scope="module")
def comparison(sites: Path) -> dict[str, Any]:
    return compare(classification(runtime__out=str(sites.parent / "out")), sites, METHODS)


@pytest.fixture(scope="module")
def predictions(sites: Path, comparison: dict[str, Any]) -> pd.DataFrame:
    """The federation's, as the sites wrote them."""
    return read_predictions(list_sites(sites), "classes")


def test_sites_without_outcomes_are_ready_and_told_so(sites: Path) -> None:
    report = check_site(list_sites(sites)[0])
    assert report.ok
    assert [f.remedy for f in report.findings] == ["enough for classification; a survival study needs both"]
    assert "without outcomes" in report.facts["patients"]


def test_one_outcome_column_alone_is_a_fault(sites: Path, tmp_path: Path) -> None:
    site = list_sites(sites)[0]
    (tmp_path / "site.toml").write_text((site / "site.toml").read_text())
    pd.read_csv(site / "clinical.csv").assign(event=1).to_csv(tmp_path / "clinical.csv", index=False)
    assert "lacks columns ['time']" in check_site(tmp_path).findings[0].problem


def test_predictions_stay_at_the_site_with_a_probability_for_each_type(sites: Path, predictions: pd.DataFrame) -> None:
    file = list_sites(sites)[0] / ".oncofed" / "predictions" / "classes" / "fold-0.csv"
    columns = ["patient", "cancer_type", "split", "predicted", *(f"p_{c}" for c in CANCERS)]
    assert pd.read_csv(file).columns.tolist() == columns
    p = predictions[[f"p_{c}" for c in CANCERS]].to_numpy()
    np.testing.assert_allclose(p.sum(1), 1.0)
    assert (np.array(CANCERS)[p.argmax(1)] == predictions["predicted"]).all()
    test = predictions[predictions["split"] == "test"]
    assert sorted(test["patient"]) == sorted(predictions["patient"].unique())  # each is held out once


def test_scores_are_scikit_learns(comparison: dict[str, Any], predictions: pd.DataFrame) -> None:
    test = predictions[predictions["split"] == "test"]
    folds = [(t["cancer_type"], t["predicted"]) for _, t in test.groupby("fold")]
    scores = comparison["methods"]["federated"]
    mine = scores["macro_f1"]["value"]
    assert mine == pytest.approx(np.mean([f1_score(a, b, average="macro", labels=a.unique()) for a, b in folds]))
    assert scores["accuracy"]["value"] == pytest.approx(np.mean([accuracy_score(a, b) for a, b in folds]))
    for i, cancer in enumerate(CANCERS):
        known = [f1_score(a, b, average=None, labels=CANCERS)[i] for a, b in folds if cancer in set(a)]
        assert scores["by_class"][cancer]["value"] == pytest.approx(np.mean(known))
        known = [recall_score(a, b, average=None, labels=CANCERS)[i] for a, b in folds if cancer in set(a)]
        assert scores["recall"][cancer]["value"] == pytest.approx(np.mean(known))
    balanced = np.mean([balanced_accuracy_score(a, b) for a, b in folds])
    assert scores["balanced_accuracy"]["value"] == pytest.approx(balanced)
    assert scores["mcc"]["value"] == pytest.approx(np.mean([matthews_corrcoef(a, b) for a, b in folds]))
    p = [f"p_{c}" for c in CANCERS]
    curves = [roc_auc_score(t["cancer_type"], t[p], multi_class="ovr", labels=CANCERS) for _, t in test.groupby("fold")]
    assert scores["macro_auroc"] == pytest.approx(np.mean(curves))
    assert scores["log_loss"] == pytest.approx(log_loss(test["cancer_type"], test[p], labels=CANCERS))
    assert comparison["confusion"]["cancers"] == CANCERS
    together = confusion_matrix(test["cancer_type"], test["predicted"], labels=CANCERS)
    assert comparison["confusion"]["counts"] == together.tolist()
    # what the coordinator has from sums alone is what the sites' own files say
    summed = sum(np.array(f["evaluation"]["confusion"]) for f in comparison["results"]["folds"])
    np.testing.assert_array_equal(summed, together)
    last = comparison["results"]["folds"][0]
    assert last["curve"][-1]["test_macro_f1"] == pytest.approx(macro_f1(np.array(last["evaluation"]["confusion"])))
    assert {"test_loss", "test_balanced_accuracy"} <= set(last["curve"][-1])


def test_the_coordinator_measures_from_sums_what_the_files_say(comparison: dict[str, Any]) -> None:
    folds, scores = comparison["results"]["folds"], comparison["methods"]["federated"]
    seen = measured(folds, comparison["results"]["study"], CANCERS)
    assert seen is not None
    for key in ("macro_f1", "balanced_accuracy", "mcc", "accuracy"):
        assert seen["whole"][key] == pytest.approx(scores[key]["value"])
    for key in ("ece", "log_loss"):
        assert seen["whole"][key] == pytest.approx(scores[key], abs=1e-6)
    bound = max(np.nanmax(auroc_error(np.array(f["evaluation"]["ranking"]))) for f in folds)
    assert abs(seen["whole"]["macro_auroc"] - scores["macro_auroc"]) <= bound
    for fold in folds:  # left out of the curve where bins could put it off
        ranking, last = np.array(fold["evaluation"]["ranking"]), fold["curve"][-1]
        assert ("test_macro_auroc" in last) == (np.nanmax(auroc_error(ranking)) <= AUROC_ERROR)
        assert last.get("test_macro_auroc", macro_auroc(ranking)) == pytest.approx(macro_auroc(ranking))


def test_report_says_what_is_measured(comparison: dict[str, Any]) -> None:
    html = render(comparison)
    for words in (
        "How well each cancer type is told apart",
        "balanced accuracy: federated minus it",
        "task.abstain_below",
    ):
        assert words in html
    seen = measured(comparison["results"]["folds"], comparison["results"]["study"], CANCERS)
    assert seen is not None
    assert f"{100 * seen['answers']['coverage']:.1f} % of the held-out patients" in html
    assert html.count("expected calibration error 0.") == 2  # the line and the picture
    assert render(comparison) == html


def test_other_labels_are_called_classes(comparison: dict[str, Any], tmp_path: Path) -> None:
    study = comparison["results"]["study"]
    task = study["task"] | {"label": "oncotree_code"}
    other = comparison | {"results": comparison["results"] | {"study": study | {"task": task}}}
    assert nouns(study) == ("cancer type", "cancer types")
    html = render(other)
    assert "classification of the oncotree code" in html
    assert "How well each class is told apart" in html
    text = StringIO()
    print_tables(other, Console(file=text, width=80))
    for shown in (html.split("<h2>Study</h2>")[0], text.getvalue()):
        assert "cancer type" not in shown


def test_many_classes_show_their_mistakes(comparison: dict[str, Any]) -> None:
    names = [f"CLASS-{i:02d}" for i in range(33)]
    counts = np.diag(np.full(33, 40)).tolist()
    counts[4][7] = 9
    text = StringIO()
    print_tables(comparison | {"confusion": {"cancers": names, "counts": counts}}, Console(file=text, width=80))
    assert max(map(len, text.getvalue().splitlines())) <= 80
    assert "CLASS-04 CLASS-07 9 49" in " ".join(text.getvalue().split())
    assert "CLASS-05" not in text.getvalue()
    svg = heat.confusion(np.array(counts), names)
    assert {"CLASS-04 (49)", "9", "40"} <= set(re.findall(r"<text[^>]*>([^<]*)</text>", svg))


def test_every_method_is_scored_and_paired(comparison: dict[str, Any]) -> None:
    assert comparison["task"] == "classification"
    assert list(comparison["methods"]) == ["federated", *METHODS]
    assert set(comparison["differences"]) == set(METHODS)
    for m in comparison["methods"].values():
        for v in (m["macro_f1"], m["balanced_accuracy"], m["accuracy"], *m["by_class"].values(), *m["recall"].values()):
            assert 0 <= v["low"] <= v["value"] <= v["high"] <= 1
    assert comparison["methods"]["logistic"]["macro_f1"]["value"] > 0.85  # synthetic types are well apart
    gap = comparison["differences"]["logistic"]
    f1 = {name: m["macro_f1"]["value"] for name, m in comparison["methods"].items()}
    assert gap["value"] == pytest.approx(f1["federated"] - f1["logistic"])
    recall = {name: m["balanced_accuracy"]["value"] for name, m in comparison["methods"].items()}
    for name, gap in comparison["balanced_accuracy_differences"].items():
        assert gap["value"] == pytest.approx(recall["federated"] - recall[name])
        assert gap["low"] <= gap["value"] <= gap["high"]
    assert sum(row["patients"] for row in comparison["sites"]) == sum(map(sum, comparison["cohort"]["patients"]))
    assert all(set(row["accuracy"]) == {"federated", *METHODS} for row in comparison["sites"])


def test_tables_and_numbers_are_shown(comparison: dict[str, Any], tmp_path: Path) -> None:
    write_comparison(comparison, tmp_path)
    written = json.loads((tmp_path / "comparison.json").read_text())
    assert written["confusion"] == comparison["confusion"]
    assert "AAC-0" not in (tmp_path / "comparison.json").read_text()  # no patient
    text = StringIO()
    print_tables(comparison, Console(file=text, width=80))
    shown = " ".join(text.getvalue().split())
    for words in (
        "macro-F1",
        "balanced accuracy",
        "logistic",
        "F1 and recall by cancer type",
        "true cancer type in rows",
        "Accuracy within each site",
    ):
        assert words in shown
    assert max(map(len, text.getvalue().splitlines())) <= 80


def test_methods_of_the_other_task_are_refused(sites: Path, tmp_path: Path) -> None:
    study = classification(runtime__out=str(tmp_path / "out"))
    with pytest.raises(ValueError, match="--compare ridge: not for classification; choose from pooled,local,logistic"):
        compare(study, sites, ("ridge",))
    with pytest.raises(ValueError, match="--compare logistic: not for survival"):
        compare(study.changed(task__kind="survival"), sites, ("logistic",))


def test_references_train_on_every_site_but_the_held_out_one(sites: Path, tmp_path: Path) -> None:
    names = ["Aachen", "Bergen"]
    study = classification(splits__held_out_sites=names, runtime__out=str(tmp_path / "out"), name="unseen")
    with pytest.raises(ValueError, match="--compare local: a site that is held out"):
        compare(study, sites, ("local",))
    result = compare(study, sites, ("logistic",))
    assert [row["site"] for row in result["sites"]] == names
    assert set(result["differences"]) == {"logistic"}
    assert result["methods"]["logistic"]["accuracy"]["value"] > 0.6  # trained on the other named site alone it is below


def table(predicted: list[str], truth: list[str]) -> pd.DataFrame:
    names = [f"P{i:03d}" for i in range(len(truth))]
    columns = {"site": "A", "patient": names, "fold": 0, "split": "test", "cancer_type": truth, "predicted": predicted}
    return pd.DataFrame(columns | {f"p_{c}": 0.0 for c in ("A", "B", "C")})


def test_a_method_does_not_differ_from_itself_in_another_order() -> None:
    rng = np.random.default_rng(0)
    mine = table([*"ABC" * 20], rng.choice([*"ABC"], 60).tolist())
    assert difference(mine, mine.sample(frac=1.0, random_state=3), 0) == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_a_type_that_no_patient_of_a_fold_has_costs_only_those_taken_for_it() -> None:
    scores = summarise(table([*"AABC"], [*"AABB"]), 0)  # nobody has C
    assert set(scores["by_class"]) == {"A", "B"}
    assert scores["macro_f1"]["value"] == pytest.approx((1 + 2 / 3) / 2)
    assert scores["accuracy"]["value"] == pytest.approx(0.75)


def test_logistic_regression_in_the_span_of_the_patients_is_the_same_fit() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(50, 300)), rng.integers(0, 3, 50)
    x[:, 0] += 2 * y
    z = in_span(x, x[:40])
    assert z.shape == (50, 40)
    full, short = (class_scores(v[:40], y[:40], v, 3, 0.01) for v in (x, z))
    np.testing.assert_allclose(short, full, atol=2e-3)
    assert in_span(x[:, :20], x[:40, :20]).shape == (50, 20)
    lacking = class_scores(x[:40][y[:40] < 2], y[:40][y[:40] < 2], x[:40], 3, 0.01)
    assert (lacking[:, 2] < -20).all()


def test_nothing_in_the_model_sees_the_cancer_type() -> None:
    study = classification(model__gate_sees_cancer=True)
    model = build_model(study, Sizes(20, ("A", "B", "C"), 1, 2))
    assert isinstance(model, GeneMOE)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_()  # whatever was learned
    model.eval()
    x, v, cancer = torch.randn(30, 20), torch.randn(30, 2), torch.arange(30) % 3
    with torch.no_grad():
        here, there = (model(Inputs(x, c, v)) for c in (cancer, cancer[torch.randperm(30)]))
    assert torch.equal(here.score, there.score)
    assert all(torch.equal(here.shares[g], there.shares[g]) for g in here.shares)
    assert here.score.shape == (30, 3)


@pytest.mark.slow
def test_six_rare_cancers_from_raw_counts(real_data: Path, tmp_path: Path) -> None:
    """Two folds, few rounds: the path of the published result, with a floor well below what it reaches."""
    source = real_data / "rare_cancers"
    if not source.is_dir():
        pytest.skip("ONCOFED_DATA has no rare_cancers")
    folders, unit = split_pooled(source, tmp_path / "sites", min_patients=25)
    assert unit == "counts"
    assert len(folders) == 5
    assert all(check_site(f).ok for f in folders)
    study = classification(
        splits__folds=2, training__rounds=4, training__learning_rate=0.002, runtime__out=str(tmp_path / "out")
    )
    result = compare(study, tmp_path / "sites", ("logistic",))
    assert result["results"]["left_out"] == []
    assert result["results"]["panel"]["genes"] == 56537
    assert result["confusion"]["cancers"] == ["ACC", "CHOL", "DLBC", "KICH", "UCS", "UVM"]
    assert sum(map(sum, result["confusion"]["counts"])) == 252
    assert result["methods"]["federated"]["macro_f1"]["value"] > 0.6
    assert result["methods"]["logistic"]["macro_f1"]["value"] > 0.9


def test_intervals_of_classes_come_from_the_summed_counts_alone() -> None:
    from oncofed.server.pooled_classes import summarise_classes

    rng = np.random.default_rng(0)
    folds = []
    for _ in range(3):
        label = rng.integers(0, 3, 200)
        score = rng.normal(size=(200, 3)) + 1.2 * np.eye(3)[label]
        probability = np.exp(score) / np.exp(score).sum(1, keepdims=True)
        sums = class_sums(label, probability, np.zeros(200))
        folds.append({"evaluation": {k: v.tolist() for k, v in sums.items()}})
    told = summarise_classes(folds, ("a", "b", "c"), seed=0)
    assert told is not None
    confusion = np.array([f["evaluation"]["confusion"] for f in folds])
    assert told["whole"]["macro_f1"]["value"] == pytest.approx(float(macro_f1(confusion).mean()))
    for limits in (*told["whole"].values(), *(v for row in told["by_class"].values() for v in row.values())):
        assert 0 <= limits["low"] < limits["value"] < limits["high"] <= 1
    # as wide as a share of 600 patients is uncertain
    accuracy = told["whole"]["accuracy"]
    expected = 2 * 1.96 * np.sqrt(accuracy["value"] * (1 - accuracy["value"]) / 600)
    assert accuracy["high"] - accuracy["low"] == pytest.approx(expected, rel=0.25)
    assert summarise_classes([{"fold": 0}], ("a",), 0) is None
