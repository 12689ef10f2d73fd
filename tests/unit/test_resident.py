"""What one process keeps between messages must be what the next message asks for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from oncofed.client.resident import Resident
from oncofed.common.modalities import Beside
from oncofed.common.models.build import Sizes, build_empty
from oncofed.common.study import PRETRAIN, TRAIN, Study

SIZES = Sizes(12, ("BRCA", "LUAD"), 3, 1)
BASE = Study().changed(model__size="tiny", pretraining__rounds=1, training__first_layer="adapters")
CPU = torch.device("cpu")


def shapes(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    "keys",
    [
        {"model__width": 8},
        {"model__cancer_head": 0.0},
        {"pretraining__critic": True},
        {"pretraining__rounds": 0, "training__first_layer": "train"},
        {"training__first_layer": "frozen"},
        {"training__adapter_rank": 3},
        {"task__kind": "classification"},
    ],
)
@pytest.mark.parametrize("phase", [PRETRAIN, TRAIN])
def test_the_kept_model_is_always_the_one_that_the_study_builds(keys: dict[str, object], phase: str) -> None:
    resident = Resident()
    resident.model(BASE, SIZES, CPU, phase)
    other = BASE.changed(**keys)
    assert shapes(resident.model(other, SIZES, CPU, phase)) == shapes(build_empty(other, SIZES, CPU, phase=phase))
    turned = TRAIN if phase == PRETRAIN else PRETRAIN
    assert shapes(resident.model(other, SIZES, CPU, turned)) == shapes(build_empty(other, SIZES, CPU, phase=turned))


def test_another_fusion_is_another_model_also_where_all_shapes_are_the_same() -> None:
    s = Study().changed(model__size="tiny", model__name="path_gptomic", fusion__modalities=("rna",))
    resident, sizes = Resident(), Sizes(12, SIZES.cancers, 3, 1, Beside("vector", 4, "x"))
    changes = (
        {"fusion__modalities": ("rna", "pathology")},
        {"fusion__kind": "concat"},
        {"fusion__modality_dropout": 0.5},
    )
    for keys in changes:
        resident.model(s, sizes, CPU, TRAIN)
        other = s.changed(**keys)
        kept, new = resident.model(other, sizes, CPU, TRAIN), build_empty(other, sizes, CPU)
        assert shapes(kept) == shapes(new)
        assert kept.modality_dropout == new.modality_dropout  # type: ignore[union-attr]


def test_a_model_of_the_same_study_is_kept_and_one_of_other_sizes_is_not() -> None:
    resident = Resident()
    first = resident.model(BASE, SIZES, CPU, TRAIN)
    assert resident.model(BASE.changed(training__rounds=3, seed=4), SIZES, CPU, TRAIN) is first
    assert resident.model(BASE, Sizes(13, SIZES.cancers, 3, 1), CPU, TRAIN) is not first


def test_a_cohort_is_opened_again_only_when_its_key_changes() -> None:
    resident, opened = Resident(), []

    def open_() -> object:
        opened.append(1)
        return object()

    a = resident.cohort(Path("site"), "key", open_)
    assert resident.cohort(Path("site"), "key", open_) is a
    assert resident.cohort(Path("site"), "other", open_) is not a
    resident.cohort(Path("another site"), "other", open_)
    assert len(opened) == 3
