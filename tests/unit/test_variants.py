"""Other federations of the same sites, late fusion of two of them, and ablations of a study of several modalities."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from oncofed.common.study import Study
from oncofed.deploy.comparison import variants
from oncofed.deploy.comparison.ablate import ablations
from oncofed.deploy.comparison.compare import balance_of, check_methods
from oncofed.deploy.comparison.variants import VARIANTS, Federations, check_variant, late_fusion
from oncofed.deploy.simulate import SimulatedRun

FUSION = Study().changed(model__name="path_gptomic", runtime__out="out")


def table(*rows: tuple[str, str, float], fold: int = 0, cancer: str = "BRCA", **more: Any) -> pd.DataFrame:
    """Predictions of patients with their split and risk; a patient's site is the first letter of the name."""
    patient, split, risk = zip(*rows, strict=True)
    about = {"site": [p[0] for p in patient], "patient": patient, "fold": fold, "cancer_type": cancer}
    return pd.DataFrame(about | {"time_months": 12.5, "event": 1, "split": split, "risk": risk} | more)


def risks(fused: pd.DataFrame, fold: int = 0) -> dict[str, float]:
    rows = fused[fused["fold"] == fold]
    return dict(zip(rows["patient"], rows["risk"], strict=True))


RNA = table(("A1", "train", 0.0), ("A2", "train", 2.0), ("B1", "test", 3.0), ("B2", "test", 0.0), risk_rna=9.0)
IMAGES = table(("A1", "train", 10.0), ("A3", "train", 30.0), ("B1", "test", 25.0), ("B3", "test", 15.0))


def test_late_fusion_adds_what_each_patient_has() -> None:
    """RNA: training mean 1, deviation 1. Images: mean 20, deviation 10. B2 has no image, B3 no RNA."""
    fused = late_fusion(RNA, IMAGES)
    expected = {"A1": -1 - 1, "A2": 1, "A3": 1, "B1": 2 + 0.5, "B2": -1, "B3": -0.5}
    assert risks(fused) == pytest.approx(expected)
    assert list(fused.columns) == [c for c in RNA.columns if c != "risk_rna"]
    assert dict(zip(fused["patient"], fused["split"], strict=True))["B3"] == "test"


def test_late_fusion_holds_each_fold_and_cancer_type_against_its_own_patients() -> None:
    other = table(("A8", "train", 100.0), ("A9", "train", 300.0), ("B8", "test", 300.0), cancer="LUAD")
    later = table(("B1", "train", 1.0), ("B2", "train", 5.0), ("A1", "test", 7.0), fold=1)
    fused = late_fusion(pd.concat([RNA, other, later]), IMAGES)
    assert risks(fused)["B8"] == pytest.approx(1.0)
    assert risks(fused)["B1"] == pytest.approx(2.5)
    assert risks(fused, fold=1) == pytest.approx({"B1": -1.0, "B2": 1.0, "A1": 2.0})


def test_late_fusion_does_not_see_the_scale_of_a_model() -> None:
    stretched = RNA.assign(risk=100.0 + 7.0 * RNA["risk"])
    assert risks(late_fusion(stretched, IMAGES)) == pytest.approx(risks(late_fusion(RNA, IMAGES)))


def test_held_out_patients_have_no_part_in_the_scale() -> None:
    other = RNA.assign(risk=np.where(RNA["patient"] == "B2", 1e6, RNA["risk"]))
    fused = risks(late_fusion(other, IMAGES))
    assert fused.pop("B2") > 1e5
    expected = risks(late_fusion(RNA, IMAGES))
    del expected["B2"]
    assert fused == pytest.approx(expected)


def test_a_deviation_of_zero_leaves_risks_as_wide_as_they_are() -> None:
    flat = RNA.assign(risk=[0.1 + 0.2, 0.3, 0.8, 0.3])  # 0.1 + 0.2 is not quite 0.3
    assert risks(late_fusion(flat, IMAGES))["B2"] == pytest.approx(0.0, abs=1e-9)
    assert risks(late_fusion(flat, IMAGES))["B1"] == pytest.approx(0.5 + 0.5)


def test_a_cancer_type_without_training_patients_takes_the_scale_of_all() -> None:
    rare = pd.concat([RNA, table(("B7", "test", 4.0), cancer="STAD")])
    assert risks(late_fusion(rare, IMAGES))["B7"] == pytest.approx(3.0)
    with pytest.raises(ValueError, match="a fold without training patients"):
        late_fusion(RNA[RNA["split"] == "test"], IMAGES)


def test_validation_patients_count_as_training_whichever_model_kept_them_aside() -> None:
    aside = RNA.assign(split=np.where(RNA["patient"] == "A1", "validation", RNA["split"]))
    pd.testing.assert_frame_equal(late_fusion(aside, IMAGES), late_fusion(RNA, IMAGES))


@pytest.mark.parametrize("change", [{"split": "train"}, {"cancer_type": "LUAD"}, {"event": 0}])
def test_models_of_other_folds_are_not_fused(change: dict[str, Any]) -> None:
    odd = IMAGES.copy()
    odd.loc[odd["patient"] == "B1", list(change)] = list(change.values())
    with pytest.raises(ValueError, match="disagree on fold, cancer type or outcome of 1 patients"):
        late_fusion(RNA, odd)


# -- which study has which variant -------------------------------------------------------------------------------------


def test_every_variant_is_a_valid_study_of_its_own() -> None:
    study = FUSION.changed(
        name="n" * 64,
        pretraining__rounds=2,
        training__first_layer="slow",
        analysis__attributions=True,
        splits__refit=True,
        fusion__kind="late",
    )
    federations = Federations(study, Path("sites"))
    made = {name: federations.study_of(name) for name in VARIANTS}
    assert made["fedavg"].aggregation.rule == "fedavg"
    assert made["rna"].modalities == ("rna",)
    assert made["rna"].pretraining.rounds == 2
    assert made["pathology"].modalities == ("pathology",)
    assert made["pathology"].phases == ("train",)
    assert made["concat"].fusion.kind == "concat"
    assert made["unmodulated"].fusion.modulation == "none"
    assert not any(s.splits.refit for s in made.values())
    assert [s.runtime.out for s in made.values()] == [f"out/{name}" for name in VARIANTS]
    assert len({s.name for s in made.values()} | {study.name}) == len(VARIANTS) + 1
    assert all(s.name.endswith(f"-{name}") and len(s.name) == 64 for name, s in made.items())
    assert federations.study_of() == study


def test_one_modality_is_plain_even_where_the_study_concatenates() -> None:
    concatenated = Federations(FUSION.changed(fusion__kind="concat"), Path("sites"))
    assert concatenated.study_of("rna").fusion.kind == concatenated.study_of("pathology").fusion.kind == "additive"


@pytest.mark.parametrize(
    ("keys", "method", "words"),
    [
        ({"model__name": "gene_moe"}, "late", "model.name = 'gene_moe' sees expression alone"),
        ({"model__name": "gene_moe"}, "unmodulated", "set model.name = 'path_gptomic'"),
        ({"fusion__modalities": ("rna",)}, "pathology", r"needs rna and pathology.*\['rna'\]; add pathology"),
        ({"fusion__modalities": ("pathology", "alterations")}, "late", "add rna"),
        ({"fusion__modalities": ("rna", "alterations")}, "concat", "add pathology"),
        ({"fusion__kind": "concat"}, "concat", "fusion.kind is 'concat' already"),
        ({"fusion__modulation": "none"}, "unmodulated", "nothing is modulated with fusion.modulation = 'none'"),
        ({"fusion__kind": "late"}, "unmodulated", "fusion.kind = 'late'"),
        ({"fusion__modalities": ("rna",)}, "unmodulated", "nothing is modulated"),
    ],
)
def test_a_variant_that_a_study_has_not_is_refused(keys: dict[str, Any], method: str, words: str) -> None:
    study = FUSION.changed(**keys)
    with pytest.raises(ValueError, match=words):
        check_variant(study, method)
    with pytest.raises(ValueError, match=f"--compare {method}: "):
        check_methods(study, ("fedavg", method))


def test_variants_that_a_study_has_are_not_refused() -> None:
    check_methods(FUSION, ("fedavg", "pooled", "ridge", "rna", "pathology", "late", "concat", "unmodulated"))
    check_methods(FUSION.changed(fusion__modalities=("rna", "alterations")), ("unmodulated",))
    check_methods(FUSION.changed(fusion__kind="concat"), ("late", "rna"))
    with pytest.raises(ValueError, match="--compare rna: not for classification; choose from pooled,local,logistic"):
        check_methods(Study().changed(task__kind="classification"), ("rna",))
    with pytest.raises(ValueError, match=r"--compare lte: unknown; .*,rna,pathology,late,concat,unmodulated"):
        check_methods(FUSION, ("lte",))


def test_a_federation_is_run_once_whoever_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def simulate(study: Study, sites: Path, engine: str) -> SimulatedRun:
        asked.append(study.name)
        return SimulatedRun({}, IMAGES if study.modalities == ("pathology",) else RNA)

    monkeypatch.setattr(variants, "simulate", simulate)
    federations = Federations(FUSION, Path("sites"))
    pd.testing.assert_frame_equal(federations.table("late"), late_fusion(RNA, IMAGES))
    assert federations.table("rna") is RNA
    assert federations.table("pathology") is IMAGES
    assert federations.table("") is RNA
    assert asked == ["oncofed-rna", "oncofed-pathology", "oncofed"]


def test_balance_holds_each_round_of_each_fold_but_not_the_refit() -> None:
    point = {"rna": {"share": 0.7}, "pathology": {"share": 0.3}}
    results = {
        "folds": [
            {"fold": 0, "curve": [{"branches": point}, {"branches": {}}]},
            {"fold": 1, "curve": [{"branches": point}]},
            {"fold": -1, "curve": [{"branches": point}]},
        ]
    }
    assert balance_of(results) == [[point, {}], [point]]
    assert balance_of({"folds": [{"fold": 0, "curve": [{"train_loss": 1.0}]}]}) == []


# -- ablations ---------------------------------------------------------------------------------------------------------

OF_FUSION = {"no modulation", "federated modulation", "no modality dropout", "concatenation instead of a sum"}
OF_EXPERTS = {"no experts", "no attention experts", "dense perceptron of equal size", "no shared expert"}


def test_ablations_of_several_modalities() -> None:
    found = ablations(FUSION)
    assert found.keys() >= OF_FUSION | OF_EXPERTS
    changed = {name: FUSION.changed(**change) for name, change in found.items()}  # every one is a valid study
    assert changed["no modulation"].fusion.modulation == "none"
    assert changed["federated modulation"].fusion.modulation == "federated"
    assert changed["no modality dropout"].fusion.modality_dropout == 0
    assert changed["concatenation instead of a sum"].fusion.kind == "concat"
    assert not OF_FUSION & ablations(Study()).keys()


@pytest.mark.parametrize(
    ("keys", "gone"),
    [
        ({"fusion__modulation": "none"}, {"no modulation"}),
        ({"fusion__modulation": "federated"}, {"federated modulation"}),
        ({"fusion__modality_dropout": 0.0}, {"no modality dropout"}),
        ({"fusion__kind": "concat"}, {"no modulation", "federated modulation", "concatenation instead of a sum"}),
        ({"fusion__modalities": ("rna",)}, OF_FUSION),
        ({"fusion__modalities": ("pathology", "alterations")}, OF_EXPERTS | {"with pre-training"}),
    ],
)
def test_ablations_that_would_change_nothing_are_left_out(keys: dict[str, Any], gone: set[str]) -> None:
    assert ablations(FUSION).keys() - ablations(FUSION.changed(**keys)).keys() == gone
