"""Classes by another clinical column: whose they are, what of them leaves, and what the hospital must have allowed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from oncofed.client.admission import Admission
from oncofed.client.data.read import read_clinical
from oncofed.client.data.site import SiteDescription, SiteFolder, write_description
from oncofed.client.greeting import greet
from oncofed.client.new_patients import _studied
from oncofed.client.objectives import class_log_prior
from oncofed.client.policy import Policy
from oncofed.common.errors import Refusal
from oncofed.common.study import Study
from oncofed.deploy.comparison.compare import compare


def site(folder: Path, **columns: list[object]) -> SiteFolder:
    n = len(next(iter(columns.values())))
    table = {"patient": [f"P{i:02d}" for i in range(n)], "cancer_type": ["BRCA"] * n} | columns
    write_description(folder, SiteDescription(name=folder.name, expression_unit="log2"))
    pd.DataFrame(table).to_csv(folder / "clinical.csv", index=False)
    x = np.random.default_rng(0).normal(6, 1, (n, 4))
    pd.DataFrame(x, index=table["patient"], columns=list("ABCD")).to_csv(
        folder / "expression.csv", index_label="patient"
    )
    return SiteFolder.open(folder)


def by(label: str, **keys: object) -> Study:
    return Study().changed(task__kind="classification", task__label=label, **keys)


def test_a_column_that_the_policy_does_not_name_is_refused(tmp_path: Path) -> None:
    def admit(label: str, policy: Policy, *, simulated: bool = False) -> None:
        Admission("A", policy, tmp_path, simulated).study("query.hello", by(label), "")

    with pytest.raises(Refusal, match=r"add it to labels in policy\.toml"):
        admit("grade", Policy())
    admit("cancer_type", Policy())
    admit("grade", Policy(labels=("cancer_type", "grade")))
    admit("grade", Policy(), simulated=True)


def test_values_of_few_patients_are_not_told_unless_the_study_names_them(tmp_path: Path) -> None:
    s = site(tmp_path / "a", note=["common"] * 12 + ["a secret"] + ["G2"] * 3)
    assert greet(s, tmp_path / "work", by("note"))["cancers"] == ["common"]
    assert greet(s, tmp_path / "work", by("note", task__classes=["G2", "G9"]))["cancers"] == ["G2", "common"]


@pytest.mark.parametrize("label", ["patient", "time", "event"])
def test_names_and_outcomes_are_no_classes(tmp_path: Path, label: str) -> None:
    s = site(tmp_path / "a", time=[1.0] * 12, event=[0] * 12)
    with pytest.raises(Refusal, match="names no class"):
        read_clinical(s, outcome=False, label=label)


def test_spaces_and_empty_cells(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    s = site(tmp_path / "a", grade=["G1 ", " G1", "G2", "", "  "])
    table = read_clinical(s, outcome=False, label="grade")
    assert table["cancer_type"].tolist()[:3] == ["G1", "G1", "G2"]
    assert table["cancer_type"].isna().sum() == 2
    assert "2 patients of the study have no 'grade'" in caplog.text
    with pytest.raises(Refusal, match="lacks columns"):
        read_clinical(s, outcome=False, label="stage")


def test_patients_of_other_cancers_are_left_out(tmp_path: Path) -> None:
    s = site(tmp_path / "a", grade=["G1"] * 5, cancer_type=["BRCA", "BRCA", "LUAD", "", "LUAD"])
    table = read_clinical(s, outcome=False, label="grade", of=("BRCA",))
    assert table["cancer_type"].notna().sum() == 2
    assert read_clinical(s, outcome=False, label="grade")["cancer_type"].notna().sum() == 4


def test_grades_may_be_numbers(tmp_path: Path) -> None:
    """In the file, in the study, and in the predictions that a comparison reads back."""
    rng = np.random.default_rng(1)
    for name in "ab":
        grade = rng.integers(1, 4, 45)
        s = site(tmp_path / "sites" / name, grade=grade.tolist(), patient=[f"{name}{i:02d}" for i in range(45)])
        x = rng.normal(6, 1, (45, 4)) + 4 * np.eye(4)[grade]
        pd.DataFrame(x, index=[f"{name}{i:02d}" for i in range(45)], columns=list("ABCD")).to_csv(
            s.path / "expression.csv", index_label="patient"
        )
    study = by("grade", task__classes=[1, 2, 3], model__name="t_gem", model__layers=0, training__rounds=3)
    assert study.task.classes == ("1", "2", "3")
    study = study.changed(
        training__learning_rate=0.1, runtime__out=str(tmp_path / "out"), splits__folds=2, runtime__threads=1
    )
    comparison = compare(study, tmp_path / "sites", ("logistic", "linear"))
    assert set(comparison["methods"]["federated"]["by_class"]) == {"1", "2", "3"}
    assert comparison["methods"]["federated"]["macro_f1"]["value"] > 0.6


def test_a_class_that_trains_nowhere_is_unlearned_and_not_favoured() -> None:
    for kind in ("federation", "site", "mask"):
        study = by("cancer_type", task__class_prior=kind)
        here, everywhere = torch.tensor([4.0, 6.0, 0.0, 0.0]), torch.tensor([8.0, 8.0, 4.0, 0.0])
        prior = class_log_prior(study, here, everywhere)
        assert prior is not None
        assert float(prior[3]) == 0.0
        assert bool(torch.isinf(prior[2])) is (kind != "federation")
        alone = class_log_prior(study, here, here)  # a site by itself, as in the comparison's `local`
        assert alone is not None
        assert alone[2:].tolist() == [0.0, 0.0]


def test_new_patients_of_other_cancers_get_no_class(tmp_path: Path) -> None:
    s = site(tmp_path / "a", grade=["G1"] * 3, cancer_type=["BRCA", "LUAD", "BRCA"])
    model: Any = SimpleNamespace(study=by("grade", cancers=["BRCA"]))
    clinical = pd.read_csv(s.path / "clinical.csv").set_index("patient")
    kept, notes = _studied(s, model, clinical)
    assert kept.index.tolist() == ["P00", "P02"]
    assert "1 patients are not of BRCA" in notes[0]
    with pytest.raises(Refusal, match="no patient of the clinical table is of them"):
        _studied(s, model, clinical.assign(cancer_type="LUAD"))
