"""Whole sites held out: each in turn takes no part in training and is the test."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oncofed.common import wire
from oncofed.common.blocks import Sum
from oncofed.common.study import Study

Make = Callable[..., Study]
SITES = ["Aachen", "Coimbra"]
KEYS = {
    "name": "held-out",  # predictions of other studies lie beside
    "splits__held_out_sites": SITES,
    "splits__only": [],
    "training__evaluate_every": 0,
}


def test_each_site_is_the_test_once_with_all_its_patients(federation: Any, small_study: Make) -> None:
    study = small_study(**KEYS)
    results = federation.run(study)
    assert results["left_out"] == []
    assert [fold["fold"] for fold in results["folds"]] == [0, 1]
    for fold, site in enumerate(SITES):
        table = federation.predictions(study, fold)
        assert set(table["site"]) == {site}
        assert set(table["split"]) == {"test"}
        evaluation = results["folds"][fold]["evaluation"]
        cancers = table["cancer_type"].value_counts()
        assert evaluation["patients"] == [cancers.get(c, 0) for c in results["cancers"]]
        assert set(results["folds"][fold]["site_evidence"]) == set(results["sites"]) - {site}


def test_a_held_out_site_is_asked_for_its_score_and_nothing_else(federation: Any, small_study: Make) -> None:
    federation.run(small_study(**(KEYS | {"splits__only": [0], "training__evaluate_every": 1})))
    asked = [(kind, site) for kind, _, _, site in federation.asked]
    assert {kind for kind, site in asked if site == "Aachen"} == {wire.HELLO, wire.EVALUATE}
    assert {site for kind, site in asked if kind == wire.EVALUATE} == {"Aachen"}
    assert {site for kind, site in asked if kind == wire.TRAIN} == {"Bergen", "Coimbra", "Dublin"}


def test_other_data_at_the_held_out_site_give_the_same_weights(
    federation: Any, small_study: Make, tmp_path: Path, weights_of: Callable[..., Sum], differing: Any
) -> None:
    keys = KEYS | {"pretraining__rounds": 1}
    first = small_study(**keys, runtime__out=str(tmp_path / "a"))
    before = federation.run(first)
    table = federation.predictions(first, 0)
    other = federation.copy(tmp_path / "sites")
    other.disturb("Aachen", set(table["patient"]))
    second = small_study(**keys, runtime__out=str(tmp_path / "b"))
    after = other.run(second)
    assert differing(weights_of(first, fold=0), weights_of(second, fold=0)) == []
    assert differing(weights_of(first, fold=1), weights_of(second, fold=1)) != []  # where Aachen trains
    assert before["folds"][0]["evaluation"]["loss"] != after["folds"][0]["evaluation"]["loss"]


def test_a_site_that_comes_to_nothing_else_still_learns_the_panel(
    federation: Any, small_study: Make, tmp_path: Path
) -> None:
    """In its own fold a held-out site never hears the statistics question, which brings the genes to the others."""
    fresh = federation.copy(tmp_path / "sites")
    results = fresh.run(small_study(**(KEYS | {"splits__only": [0]})))
    assert results["left_out"] == []
    assert np.sum(results["folds"][0]["evaluation"]["patients"]) == len(fresh.predictions(small_study(**KEYS), 0))


def test_a_refit_trains_on_every_site_again(federation: Any, small_study: Make) -> None:
    results = federation.run(small_study(**(KEYS | {"splits__only": [1], "splits__refit": True})))
    assert [fold["fold"] for fold in results["folds"]] == [1, -1]
    assert set(results["folds"][1]["site_evidence"]) == set(results["sites"])


def test_validation_patients_are_those_of_the_training_sites(federation: Any, small_study: Make) -> None:
    keys = {"splits__validation": 0.25, "training__evaluate_every": 1, "splits__only": [0]}
    results = federation.run(small_study(**(KEYS | keys)))
    assert all("validation_loss" in point for point in results["folds"][0]["curve"])
    rounds = [(round_, site) for kind, _, round_, site in federation.asked if kind == wire.EVALUATE]
    assert {site for round_, site in rounds if round_ == 1} == {"Bergen", "Coimbra", "Dublin"}
    assert [site for round_, site in rounds].count("Aachen") == 2  # the final evaluation, and its table


def test_a_site_that_nobody_knows_is_refused_by_name(federation: Any, small_study: Make) -> None:
    with pytest.raises(ValueError, match=r"held_out_sites = \['Atlantis'\] are not in the federation"):
        federation.run(small_study(**(KEYS | {"splits__held_out_sites": ["Aachen", "Atlantis"]})))
    assert {kind for kind, *_ in federation.asked} == {wire.HELLO}


def test_sites_survive_flowers_flat_run_config_and_count_as_folds() -> None:
    study = Study().changed(splits__held_out_sites=SITES, splits__only=[1])
    assert study.splits.count == 2
    assert Study.from_run_config(study.run_config()) == study
    with pytest.raises(ValueError, match="must lie between 0 and 1"):
        Study().changed(splits__held_out_sites=SITES, splits__only=[2])
