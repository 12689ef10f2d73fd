"""Our classification numbers against scikit-learn, from sums over sites."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oncofed.common import class_metrics as cm
from scipy.special import softmax
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    confusion_matrix,
    f1_score,
    matthews_corrcoef,
    precision_score,
    recall_score,
    roc_auc_score,
    top_k_accuracy_score,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:A single label was found"),
    pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true"),
]

CLASSES = 5
SITES = 4

many = settings(max_examples=60, deadline=None)
federation = given(st.integers(1, 80), st.integers(0, 10_000), st.integers(1, CLASSES), st.floats(0.0, 4.0))


def patients(n: int, seed: int, present: int, signal: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels of the first `present` classes, probabilities that know them by `signal`, and a site for each patient."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, present, n)
    probability = softmax(rng.normal(size=(n, CLASSES)) * 2 + signal * np.eye(CLASSES)[label], axis=1)
    return label, probability, rng.integers(0, SITES, n)


def added_up(label: np.ndarray, probability: np.ndarray, site: np.ndarray) -> dict[str, np.ndarray]:
    """What a server has: the sum over sites, empty ones included."""
    parts = [cm.class_sums(label[site == s], probability[site == s], np.zeros((site == s).sum())) for s in range(SITES)]
    return {name: np.sum([p[name] for p in parts], axis=0) for name in parts[0]}


@many
@federation
def test_scores_from_the_confusion_matrix_equal_scikit_learns(n: int, seed: int, present: int, signal: float) -> None:
    label, probability, site = patients(n, seed, present, signal)
    chosen, known = probability.argmax(1), np.unique(label)
    confusion = added_up(label, probability, site)["confusion"]
    np.testing.assert_array_equal(confusion, confusion_matrix(label, chosen, labels=range(CLASSES)))
    assert cm.accuracy(confusion) == pytest.approx(accuracy_score(label, chosen))
    # classes without patients do not count, though some may have been mistaken for them
    per_class = {"labels": known, "average": None}
    assert cm.macro_f1(confusion) == pytest.approx(f1_score(label, chosen, zero_division=0, **per_class).mean())
    np.testing.assert_allclose(cm.class_recall(confusion)[known], recall_score(label, chosen, **per_class))
    theirs = precision_score(label, chosen, zero_division=np.nan, **per_class)
    np.testing.assert_allclose(cm.class_precision(confusion)[known], theirs)
    for measure in (cm.class_recall, cm.class_precision, cm.class_f1):
        assert np.isnan(measure(confusion)[present:]).all()
    assert cm.matthews(confusion) == pytest.approx(matthews_corrcoef(label, chosen), abs=1e-12)


@many
@federation
def test_balanced_accuracy_equals_scikit_learns(n: int, seed: int, present: int, signal: float) -> None:
    label, probability, site = patients(n, seed, present, signal)
    ours = cm.balanced_accuracy(added_up(label, probability, site)["confusion"])
    assert ours == pytest.approx(balanced_accuracy_score(label, probability.argmax(1)))


@many
@federation
def test_auroc_of_each_class_is_within_its_bound(n: int, seed: int, present: int, signal: float) -> None:
    label, probability, site = patients(n, seed, present, signal)
    ranking = added_up(label, probability, site)["ranking"]
    ours, bound = cm.class_auroc(ranking), cm.auroc_error(ranking)
    for c in range(CLASSES):
        if 0 < (label == c).sum() < n:
            assert abs(ours[c] - roc_auc_score(label == c, probability[:, c])) <= bound[c] + 1e-12
        else:
            assert np.isnan(ours[c])
            assert np.isnan(bound[c])


@pytest.mark.parametrize("sureness", [0.3, 1.0, 4.0])
def test_macro_auroc_is_scikit_learns_to_the_third_digit(sureness: float) -> None:
    """From timid to very sure of itself: probabilities near 0 and 1 are told apart as well."""
    label, probability, site = patients(3000, 7, CLASSES, 2.0)
    probability = softmax(sureness * np.log(probability), axis=1)
    ranking = added_up(label, probability, site)["ranking"]
    theirs = roc_auc_score(label, probability, multi_class="ovr", average="macro")
    assert cm.macro_auroc(ranking) == pytest.approx(theirs, abs=5e-4)
    assert np.nanmax(cm.auroc_error(ranking)) < 0.012


@many
@federation
def test_first_three_equal_scikit_learns_top_k(n: int, seed: int, present: int, signal: float) -> None:
    label, probability, site = patients(n, seed, present, signal)
    certainty = added_up(label, probability, site)["certainty"]
    theirs = top_k_accuracy_score(label, probability, k=cm.FIRST, labels=range(CLASSES))
    assert cm.top_three(certainty) == pytest.approx(theirs)
    assert certainty[2].sum() == (probability.argmax(1) == label).sum()


@many
@federation
def test_sums_over_sites_are_the_sums_over_all_patients(n: int, seed: int, present: int, signal: float) -> None:
    label, probability, site = patients(n, seed, present, signal)
    loss = -np.log(probability[np.arange(n), label])
    whole = cm.class_sums(label, probability, loss)
    assert {name: value.shape for name, value in whole.items()} == cm.class_shapes(CLASSES)
    parts = [cm.class_sums(*(a[site == s] for a in (label, probability, loss))) for s in range(SITES)]
    for name, value in whole.items():
        np.testing.assert_allclose(np.sum([p[name] for p in parts], axis=0), value, atol=1e-12)
    np.testing.assert_array_equal(whole["patients"], np.bincount(label, minlength=CLASSES))
    np.testing.assert_allclose(whole["loss"], np.bincount(label, weights=loss, minlength=CLASSES))
    np.testing.assert_array_equal(whole["ranking"][0].sum(1), whole["patients"])
    np.testing.assert_array_equal(whole["ranking"].sum((0, 2)), n)
