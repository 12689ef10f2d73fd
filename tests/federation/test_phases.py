"""Pre-training, then training: one study of two phases, with a restart anywhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from oncofed.common import wire
from oncofed.common.blocks import Sum
from oncofed.common.study import PRETRAIN, TRAIN, Study
from oncofed.server.roster import NotEnoughSites

Make = Callable[..., Study]
KEYS = {
    "pretraining__rounds": 2,
    "training__rounds": 2,
    "training__evaluate_every": 0,
    "analysis__experts": False,
    "aggregation__optimizer": "momentum",  # whose state a restart must bring back
}


@pytest.fixture
def make(small_study: Make, tmp_path: Path) -> Make:
    """A study of both phases, in a folder of its own below `tmp_path`."""
    return lambda out, **keys: small_study(**(KEYS | {"runtime__out": str(tmp_path / out)} | keys))


def failing(phase: str, round_: int) -> Callable[[str, str, int, str], bool]:
    """A network that brings no answers to one round of one phase."""
    return lambda kind, p, r, site: (kind, p, r) == (wire.TRAIN, phase, round_)


def test_training_goes_on_from_the_pretrained_encoder(
    federation: Any, make: Make, weights_of: Callable[..., Sum], differing: Any
) -> None:
    faster = {"pretraining__learning_rate": 0.03, "pretraining__rounds": 4, "aggregation__optimizer": "sgd"}
    study = make("out", training__first_layer="frozen", **faster)
    results = federation.run(study)
    fold = results["folds"][0]
    losses = [point["train_loss"] for point in fold["pretraining"]["curve"]]
    assert len(losses) == 4
    assert losses[-1] < losses[0] - 0.2
    assert [point["round"] for point in fold["curve"]] == [1, 2]
    assert results["left_out"] == []
    before, after = weights_of(study, PRETRAIN), weights_of(study)
    names = {n for n in before if n in after}
    kept = {n for n in names if n not in differing({n: before[n] for n in names}, {n: after[n] for n in names})}
    layers = {f"encoder.{layer}.{part}" for layer in ("experts", "shared") for part in ("weight", "bias")}
    scale = {n for n in after if n.startswith(("scaling/", "covariate_"))}
    assert layers | scale <= kept
    assert not {"encoder.latent.weight", "encoder.attention.query"} & kept
    assert {n for n in before if n.startswith("encoder.")} == {n for n in after if n.startswith("encoder.")}
    assert not any(n.startswith(("decoder.", "output.")) for n in after)


@pytest.mark.parametrize(("phase", "round_"), [(PRETRAIN, 2), (TRAIN, 1), (TRAIN, 2)])
def test_a_study_restarted_in_or_between_phases_equals_an_uninterrupted_one(
    federation: Any, make: Make, model_of: Callable[..., Sum], differing: Any, phase: str, round_: int
) -> None:
    straight, broken = make("a"), make("b")
    federation.run(straight)
    with pytest.raises(NotEnoughSites):
        federation.run(broken, failing(phase, round_))
    federation.run(broken.changed(runtime__resume=True))
    left = {PRETRAIN: {2} if phase == PRETRAIN else set(), TRAIN: {2} if (phase, round_) == (TRAIN, 2) else {1, 2}}
    assert {p: federation.rounds_asked(p) for p in (PRETRAIN, TRAIN)} == left
    assert differing(model_of(straight), model_of(broken)) == []


def test_a_finished_pretraining_serves_another_training(
    federation: Any, make: Make, model_of: Callable[..., Sum], differing: Any
) -> None:
    other = {"training__rounds": 1, "training__learning_rate": 0.01, "training__first_layer": "adapters"}
    broken, straight = make("a"), make("b", **other)
    with pytest.raises(NotEnoughSites):
        federation.run(broken, failing(TRAIN, 1))
    again = make("a", runtime__resume=True, **other)
    federation.run(again)
    assert federation.rounds_asked(PRETRAIN) == set()
    federation.run(straight)
    assert federation.rounds_asked(PRETRAIN) == {1, 2}
    assert differing(model_of(again), model_of(straight)) == []


@pytest.mark.parametrize(
    "keys",
    [
        {"pretraining__kl": 0.5},
        {"model__width": 8},
        {"seed": 1},
        {"panel__powers": False},
        {"aggregation__tau": 3.0},
    ],
)
def test_a_pretraining_of_another_study_is_refused(federation: Any, make: Make, keys: dict[str, object]) -> None:
    with pytest.raises(NotEnoughSites):
        federation.run(make("a", pretraining__rounds=1), failing(TRAIN, 1))
    with pytest.raises(ValueError, match=r"fold-0-pretrain/round-0001\.safetensors was written by another study"):
        federation.run(make("a", pretraining__rounds=1, runtime__resume=True, **keys))


def test_held_out_patients_take_no_part_in_pretraining(
    federation: Any, make: Make, tmp_path: Path, weights_of: Callable[..., Sum], differing: Any
) -> None:
    first = make("a", training__rounds=1)
    federation.run(first)
    table = federation.predictions(first)
    mine = table[table["site"] == "Aachen"]
    outputs = []
    for split in ("test", "train"):
        other = federation.copy(tmp_path / f"sites-{split}")
        other.disturb("Aachen", set(mine.loc[mine["split"] == split, "patient"][:3]))
        second = make(split, training__rounds=1)
        other.run(second)
        outputs.append((second, other.predictions(second)))
    (second, now), (third, _) = outputs
    assert differing(weights_of(first, PRETRAIN), weights_of(second, PRETRAIN)) == []
    assert differing(weights_of(first), weights_of(second)) == []
    assert differing(weights_of(first, PRETRAIN), weights_of(third, PRETRAIN)) != []
    merged = table.merge(now, on=["site", "patient"])
    assert (merged["split_x"] == merged["split_y"]).all()
    assert (merged["risk_x"] != merged["risk_y"]).sum() == 3  # they were scored, and differ


@pytest.mark.parametrize("first_layer", ["slow", "frozen", "adapters"])
def test_an_adversary_and_every_first_layer_run(federation: Any, make: Make, first_layer: str) -> None:
    study = make("out", pretraining__critic=True, training__first_layer=first_layer, panel__covariates=["age"])
    results = federation.run(study)
    assert results["left_out"] == []
    assert "evaluation" in results["folds"][0]


@pytest.mark.parametrize("first_layer", ["slow", "frozen", "adapters"])
def test_a_kept_first_layer_needs_a_pretraining(first_layer: str) -> None:
    with pytest.raises(ValueError, match=r"keeps a first layer that nothing has trained; set pretraining\.rounds"):
        Study().changed(training__first_layer=first_layer)
