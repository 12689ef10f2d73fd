"""Scores of a classification from sums: their limits, what is unknown, calibration, and what abstention gives."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oncofed.common import class_metrics as cm
from scipy.special import softmax


def sure(top: list[float], right: list[bool]) -> np.ndarray:
    """`certainty` of patients of two classes who have these top probabilities."""
    probability = np.array([[p, 1 - p] for p in top])
    return cm.certainty_sums(np.where(right, 0, 1), probability)


def test_known_values() -> None:
    confusion = np.array([[8.0, 2.0, 0.0], [1.0, 3.0, 0.0], [0.0, 0.0, 0.0]])  # nobody is of the third class
    np.testing.assert_allclose(cm.class_recall(confusion), [0.8, 0.75, np.nan])
    np.testing.assert_allclose(cm.class_precision(confusion), [8 / 9, 0.6, np.nan])
    assert cm.balanced_accuracy(confusion) == pytest.approx(0.775)
    assert cm.accuracy(confusion) == pytest.approx(11 / 14)
    a, b, c, d = 8.0, 2.0, 1.0, 3.0  # of two classes it is the old coefficient
    two = (a * d - b * c) / np.sqrt((a + b) * (a + c) * (d + b) * (d + c))
    assert cm.matthews(confusion) == pytest.approx(two)


def test_without_patients_there_is_no_score() -> None:
    empty = cm.class_sums(np.zeros(0, dtype=int), np.zeros((0, 4)), np.zeros(0))
    for measure in (cm.macro_f1, cm.balanced_accuracy, cm.accuracy, cm.matthews):
        assert np.isnan(measure(empty["confusion"]))
    assert np.isnan(cm.macro_auroc(empty["ranking"]))
    assert np.isnan(cm.calibration_error(empty["certainty"]))
    assert np.isnan(cm.top_three(empty["certainty"]))
    assert np.isnan(cm.Answers.of(empty["certainty"]).coverage).all()


def test_a_class_that_all_are_taken_for_gives_no_correlation() -> None:
    assert cm.matthews(np.array([[5.0, 0.0], [7.0, 0.0]])) == 0.0
    assert np.isnan(cm.class_precision(np.array([[5.0, 0.0], [7.0, 0.0]]))[1])


def test_many_tables_at_once_are_each_alone() -> None:
    tables = np.random.default_rng(0).integers(0, 9, (6, 4, 4)).astype(float)
    tables[2, 1] = 0.0
    for measure in (cm.macro_f1, cm.balanced_accuracy, cm.accuracy, cm.matthews, cm.class_f1, cm.class_precision):
        np.testing.assert_allclose(measure(tables), [measure(t) for t in tables])


def test_auroc_of_a_coin_and_of_an_oracle() -> None:
    label = np.repeat([0, 1, 2], [50, 20, 1])
    coin = cm.ranking_sums(label, np.full((71, 3), 1 / 3))
    np.testing.assert_allclose(cm.class_auroc(coin), 0.5)
    np.testing.assert_allclose(cm.auroc_error(coin), 0.5)  # all ties: nothing is known
    oracle = cm.ranking_sums(label, np.eye(3)[label])  # probabilities of exactly 0 and 1
    np.testing.assert_allclose(cm.class_auroc(oracle), 1.0)
    np.testing.assert_allclose(cm.auroc_error(oracle), 0.0)
    np.testing.assert_allclose(cm.class_auroc(cm.ranking_sums(label, 1 - np.eye(3)[label])), 0.0)


def test_calibration_error_is_the_gap_of_each_tenth() -> None:
    certainty = sure([0.95] * 10 + [0.62] * 5 + [0.68] * 5, [True] * 9 + [False] + [True] * 2 + [False] * 8)
    patients, probability, right = cm.reliability(certainty)
    np.testing.assert_array_equal(patients[[6, 9]], [10, 10])
    np.testing.assert_allclose(probability[[6, 9]], [0.65, 0.95])
    np.testing.assert_allclose(right[[6, 9]], [0.2, 0.9])
    assert np.isnan(right[0])
    assert cm.calibration_error(certainty) == pytest.approx((10 * 0.05 + 10 * 0.45) / 20)


def test_a_model_that_keeps_its_word_is_calibrated() -> None:
    rng = np.random.default_rng(1)
    probability = softmax(2 * rng.normal(size=(40_000, 6)), axis=1)
    label = (probability.cumsum(1) < rng.random((len(probability), 1))).sum(1)
    assert cm.calibration_error(cm.certainty_sums(label, probability)) < 0.01
    bold = softmax(3 * np.log(probability), axis=1)
    assert cm.calibration_error(cm.certainty_sums(label, bold)) > 0.1


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 50), st.integers(0, 10_000), st.integers(0, 99))
def test_abstention_is_what_counting_patients_says(n: int, seed: int, percent: int) -> None:
    rng = np.random.default_rng(seed)
    below = percent / 100
    probability = softmax(2 * rng.normal(size=(n, 5)), axis=1)
    probability[0] = [0.29, 0.29, 0.21, 0.21, 0.0]  # on an edge that floats miss easily, and a tie
    label = rng.integers(0, 5, n)
    answered = probability.max(1) >= below
    right = probability.argmax(1) == label
    three = (np.argsort(-probability, axis=1, kind="stable")[:, :3] == label[:, None]).any(1)
    got = cm.Answers.of(cm.certainty_sums(label, probability)).at(below)
    assert got["threshold"] == pytest.approx(below)
    assert got["coverage"] == pytest.approx(answered.mean())
    for value, mask, of in ((got["accuracy"], answered, right), (got["spared"], ~answered, three)):
        assert value == pytest.approx(of[mask].mean()) if mask.any() else np.isnan(value)


def test_the_surest_come_first() -> None:
    answers = cm.Answers.of(sure([0.99, 0.9, 0.8, 0.55], [True, True, False, True]))
    assert answers.coverage[0] == 1.0
    assert (np.diff(answers.coverage) <= 0).all()
    assert [answers.at(t)["accuracy"] for t in (0.0, 0.6, 0.85)] == pytest.approx([0.75, 2 / 3, 1.0])
    assert np.isnan(answers.at(0.995)["accuracy"])  # nobody is that sure
