"""Our classification numbers against scikit-learn, from sums over sites."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oncofed.common.metrics import accuracy, confusion_sums, macro_f1
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score

CLASSES = 4


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 60), st.integers(0, 10_000), st.integers(1, CLASSES))
def test_confusion_accuracy_and_macro_f1_equal_scikit_learns(n: int, seed: int, present: int) -> None:
    rng = np.random.default_rng(seed)
    label, chosen = rng.integers(0, present, n), rng.integers(0, CLASSES, n)
    confusion = confusion_sums(label, chosen, np.zeros(n), CLASSES)["confusion"]
    np.testing.assert_array_equal(confusion, confusion_matrix(label, chosen, labels=range(CLASSES)))
    assert accuracy(confusion) == pytest.approx(accuracy_score(label, chosen))
    # classes without patients do not count, though some may have been mistaken for them
    theirs = f1_score(label, chosen, labels=np.unique(label), average="macro", zero_division=0)
    assert macro_f1(confusion) == pytest.approx(theirs)


def test_sums_over_sites_are_the_sums_over_all_patients() -> None:
    rng = np.random.default_rng(0)
    label, chosen, loss, site = (
        rng.integers(0, 3, 90),
        rng.integers(0, 4, 90),
        rng.exponential(size=90),
        rng.integers(0, 4, 90),
    )
    whole = confusion_sums(label, chosen, loss, CLASSES)
    parts = [confusion_sums(*(a[site == s] for a in (label, chosen, loss)), CLASSES) for s in range(4)]
    for name, value in whole.items():
        np.testing.assert_allclose(sum(p[name] for p in parts), value)
    np.testing.assert_array_equal(whole["patients"], np.bincount(label, minlength=CLASSES))
    np.testing.assert_allclose(whole["loss"], np.bincount(label, weights=loss, minlength=CLASSES))


def test_without_patients_there_is_no_score() -> None:
    empty = np.zeros((CLASSES, CLASSES))
    assert np.isnan(macro_f1(empty))
    assert np.isnan(accuracy(empty))
