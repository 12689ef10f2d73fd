"""Patients kept aside to choose the round: who they are, what they do not touch, and which weights they choose."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oncofed.client.data.cohort import Cohort
from oncofed.client.folds import split_names
from oncofed.common import wire
from oncofed.common.blocks import Sum
from oncofed.common.splits import ALL_PATIENTS, deal_folds
from oncofed.common.study import TRAIN, Study
from oncofed.server.roster import NotEnoughSites

Make = Callable[..., Study]
OVERSHOOTS = {  # validation patients are fitted worse and worse after a few rounds
    "training__learning_rate": 0.15,
    "training__weight_decay": 0.0,
    "training__evaluate_every": 1,
    "training__rounds": 25,
    "splits__validation": 0.25,
    "analysis__experts": False,
}


def cohort(n: int = 400) -> Cohort:
    rng = np.random.default_rng(0)
    names = np.array([f"P{i}" for i in range(n)])
    cancer, event = rng.integers(0, 3, n), rng.integers(0, 2, n)
    fold = deal_folds(names, cancer, event, folds=5, seed=0, site="s")
    return Cohort(np.zeros((n, 2)), np.zeros((n, 0)), np.ones(n), event, cancer, fold, names)


def test_validation_patients_are_neither_trained_on_nor_tested_on() -> None:
    c, study = cohort(), Study().changed(splits__validation=0.2)
    chosen = []
    for fold in range(5):
        split = split_names(c, study, fold, "s")
        assert ((split == "test") == (c.fold == fold)).all()
        share = (split == "validation").sum() / (c.fold != fold).sum()
        assert share == pytest.approx(0.2, abs=0.02)
        for k in range(3):
            for e in (0, 1):
                rows = (c.cancer == k) & (c.event == e) & (c.fold != fold)
                assert (split[rows] == "validation").mean() == pytest.approx(0.2, abs=0.05)
        chosen.append(set(c.patient[split == "validation"]))
    assert len(set().union(*chosen)) > max(map(len, chosen))  # each fold keeps others aside
    everybody = split_names(c, study, ALL_PATIENTS, "s")
    assert set(everybody) == {"train", "validation"}


def test_without_a_share_nobody_is_kept_aside() -> None:
    assert set(split_names(cohort(), Study(), 2, "s")) == {"train", "test"}


@pytest.mark.parametrize("keys", [{"splits__validation": 0.0}, {"training__evaluate_every": 0}])
def test_patience_without_validation_is_refused(keys: dict[str, object]) -> None:
    base = {"training__patience": 2, "splits__validation": 0.15}
    assert Study().changed(**base).training.patience == 2
    with pytest.raises(ValueError, match=r"set splits\.validation \(0\.15, say\) and training\.evaluate_every"):
        Study().changed(**(base | keys))


def test_validation_patients_take_no_part_in_statistics_and_training(
    federation: Any, small_study: Make, tmp_path: Path, weights_of: Callable[..., Sum], differing: Any
) -> None:
    keys = {"splits__validation": 0.25, "training__evaluate_every": 1}
    first = small_study(**keys, runtime__out=str(tmp_path / "a"))
    before = federation.run(first)
    table = federation.predictions(first)
    mine = table[table["site"] == "Aachen"]
    other = federation.copy(tmp_path / "sites")
    other.disturb("Aachen", set(mine.loc[mine["split"] == "validation", "patient"]))
    second = small_study(**keys, runtime__out=str(tmp_path / "b"))
    after = other.run(second)
    assert differing(weights_of(first), weights_of(second)) == []
    assert before["folds"][0]["grid_months"] == after["folds"][0]["grid_months"]
    assert before["folds"][0]["evaluation"] == after["folds"][0]["evaluation"]
    (a, b) = ([p["validation_loss"] for p in r["folds"][0]["curve"]] for r in (before, after))
    assert all(x != y for x, y in zip(a, b, strict=True))


def test_training_stops_early_and_the_best_round_is_the_saved_model(
    federation: Any, small_study: Make, tmp_path: Path, weights_of: Callable[..., Sum], differing: Any
) -> None:
    patient = small_study(**OVERSHOOTS, training__patience=3, runtime__out=str(tmp_path / "a"))
    results = federation.run(patient)
    losses = [point["validation_loss"] for point in results["folds"][0]["curve"]]
    best = int(np.argmin(losses)) + 1
    assert len(losses) == best + 3 < 25
    straight = small_study(**(OVERSHOOTS | {"training__rounds": best}), runtime__out=str(tmp_path / "b"))
    then = federation.run(straight)
    assert differing(weights_of(patient), weights_of(straight)) == []
    assert differing(weights_of(patient), weights_of(patient, TRAIN)) != []  # the last round went on from there
    assert results["folds"][0]["evaluation"] == then["folds"][0]["evaluation"]


def test_patience_survives_a_restart(
    federation: Any, small_study: Make, tmp_path: Path, model_of: Callable[..., Sum], differing: Any
) -> None:
    keys = OVERSHOOTS | {"training__patience": 3}
    straight, broken = (small_study(**keys, runtime__out=str(tmp_path / out)) for out in "ab")
    rounds = len(federation.run(straight)["folds"][0]["curve"])

    def fails(kind: str, phase: str, round_: int, site: str) -> bool:
        return kind == wire.TRAIN and round_ == rounds  # after the best round

    with pytest.raises(NotEnoughSites):
        federation.run(broken, fails)
    federation.run(broken.changed(runtime__resume=True))
    assert federation.rounds_asked(TRAIN) == {rounds}
    assert differing(model_of(straight), model_of(broken)) == []


def test_without_patience_validation_is_only_shown(
    federation: Any, small_study: Make, tmp_path: Path, weights_of: Callable[..., Sum], differing: Any
) -> None:
    keys = OVERSHOOTS | {"training__rounds": 5}
    shown = small_study(**keys, runtime__out=str(tmp_path / "a"))
    hidden = small_study(**(keys | {"training__evaluate_every": 0}), runtime__out=str(tmp_path / "b"))
    assert len(federation.run(shown)["folds"][0]["curve"]) == 5
    federation.run(hidden)
    assert differing(weights_of(shown), weights_of(hidden)) == []
