"""How well classes are told apart, from sums that merge: who is taken for whom, and histograms of probabilities.

Nothing here needs a patient once the sums are made; sums of sites add up to those of all patients. A class without patients
has NaN and takes no part in a mean over classes. Shapes: N patients, C classes, B bins.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from oncofed.common.metrics import mean_known, ratio
from scipy.special import expit

RANKING_BINS = 240
RANKING_LOGIT = 30.0
"""A class's probability is counted on the logit scale, in bins of 0.06 at even odds that widen outwards to 0.9 at the ends:
a timid model's probabilities lie close together, and one that is too sure of itself gives a class's own patients 1e-9."""

CERTAINTY_BINS = 200
"""The top probability is counted in steps of 0.005, so a threshold of two decimals is met exactly."""

CALIBRATION_BINS = 10
"""Few: with less than some ten patients in each, chance alone makes a calibration error."""

FIRST = 3
"""Classes that are named where no answer is given."""

_END = np.arcsinh(RANKING_LOGIT / 2)
_RANKING_EDGES = expit(2 * np.sinh(np.linspace(-_END, _END, RANKING_BINS + 1)[1:-1]))
_CERTAINTY_EDGES = np.arange(1, CERTAINTY_BINS) / CERTAINTY_BINS


# -- sums of one site ------------------------------------------------------------------------------------------------------


def class_sums(label: np.ndarray, probability: np.ndarray, loss: np.ndarray) -> dict[str, np.ndarray]:
    """One site's classification, from labels and losses `[N]` and probabilities `[N, C]`: all that is below, by name."""
    return confusion_sums(label, probability.argmax(1), loss, probability.shape[1]) | {
        "ranking": ranking_sums(label, probability),
        "certainty": certainty_sums(label, probability),
    }


def class_shapes(classes: int) -> dict[str, tuple[int, ...]]:
    """The shapes of `class_sums`."""
    return {
        "confusion": (classes, classes),
        "patients": (classes,),
        "loss": (classes,),
        "ranking": (2, classes, RANKING_BINS),
        "certainty": (4, CERTAINTY_BINS),
    }


def confusion_sums(label: np.ndarray, chosen: np.ndarray, loss: np.ndarray, classes: int) -> dict[str, np.ndarray]:
    """`confusion [C, C]` (true class in rows), and patients and loss by true class `[C]`."""
    confusion = np.zeros((classes, classes))
    np.add.at(confusion, (label, chosen), 1.0)
    by_class = np.zeros(classes)
    np.add.at(by_class, label, loss)
    return {"confusion": confusion, "patients": confusion.sum(1), "loss": by_class}


def ranking_sums(label: np.ndarray, probability: np.ndarray) -> np.ndarray:
    """Patients by bin of each class's probability `[2, C, B]`: first the class's own patients, then the others."""
    classes = probability.shape[1]
    others = label[:, None] != np.arange(classes)
    cell = (others * classes + np.arange(classes)) * RANKING_BINS + np.digitize(probability, _RANKING_EDGES)
    counts = np.bincount(cell.ravel(), minlength=2 * classes * RANKING_BINS)
    return counts.reshape(2, classes, RANKING_BINS).astype(np.float64)


def certainty_sums(label: np.ndarray, probability: np.ndarray) -> np.ndarray:
    """By bin of the likeliest class's probability `[4, B]`: patients, the sum of that probability, how often that class is
    the true one, and how often the true one is among the first three."""
    top, own = probability.max(1), label[:, None]
    true = np.take_along_axis(probability, own, 1)
    ahead = (probability > true) | ((probability == true) & (np.arange(probability.shape[1]) < own))
    rank, place = ahead.sum(1), np.digitize(top, _CERTAINTY_EDGES)
    rows = (np.ones(len(top)), top, rank == 0, rank < FIRST)
    return np.stack([np.bincount(place, weights=row, minlength=CERTAINTY_BINS) for row in rows])


# -- from the confusion matrix [..., C, C] ---------------------------------------------------------------------------------


def class_recall(confusion: np.ndarray) -> np.ndarray:
    """Share of each class's patients that are recognised `[..., C]`."""
    return ratio(np.diagonal(confusion, axis1=-2, axis2=-1), confusion.sum(-1))


def class_precision(confusion: np.ndarray) -> np.ndarray:
    """Share of those taken for a class that are of it `[..., C]`; NaN also where nobody was taken for it."""
    known = confusion.sum(-1) > 0
    return ratio(np.diagonal(confusion, axis1=-2, axis2=-1), np.where(known, confusion.sum(-2), 0.0))


def class_f1(confusion: np.ndarray) -> np.ndarray:
    """F1 = 2 TP / (2 TP + FP + FN) of each class `[..., C]`."""
    hit, row, column = np.diagonal(confusion, axis1=-2, axis2=-1), confusion.sum(-1), confusion.sum(-2)
    return ratio(2.0 * hit, np.where(row > 0, row + column, 0.0))


def macro_f1(confusion: np.ndarray) -> np.ndarray:
    """Mean F1 over classes with patients `[...]`."""
    return mean_known(class_f1(confusion))


def balanced_accuracy(confusion: np.ndarray) -> np.ndarray:
    """Mean recall over classes with patients `[...]`: each class counts the same, however rare."""
    return mean_known(class_recall(confusion))


def accuracy(confusion: np.ndarray) -> np.ndarray:
    """Share of patients whose class was chosen `[...]`."""
    return ratio(np.trace(confusion, axis1=-2, axis2=-1), confusion.sum((-2, -1)))


def matthews(confusion: np.ndarray) -> np.ndarray:
    """Matthews' correlation of true and chosen class `[...]`, -1 to 1 (Gorodkin 2004, R_K).

    0 is what chance gives, and also what is said where all patients are of one class or all were taken for one.
    """
    n, hits = confusion.sum((-2, -1)), np.trace(confusion, axis1=-2, axis2=-1)
    true, chosen = confusion.sum(-1), confusion.sum(-2)
    spread = np.sqrt((n**2 - (true**2).sum(-1)) * (n**2 - (chosen**2).sum(-1)))
    value = np.divide(hits * n - (true * chosen).sum(-1), spread, out=np.zeros(spread.shape), where=spread > 0)
    return np.where(n > 0, value, np.nan)


# -- from histograms -------------------------------------------------------------------------------------------------------


def class_auroc(ranking: np.ndarray) -> np.ndarray:
    """Area under the ROC curve of each class against all others `[..., C]`, from `ranking [..., 2, C, B]`.

    The share of pairs (a patient of the class, another patient) in which the former has the higher probability; pairs within
    a bin count one half, so the value is off by no more than `auroc_error`.
    """
    own, other = ranking[..., 0, :, :], ranking[..., 1, :, :]
    won = own * (other.cumsum(-1) - other / 2)
    return ratio(won.sum(-1), own.sum(-1) * other.sum(-1))


def auroc_error(ranking: np.ndarray) -> np.ndarray:
    """The most that `class_auroc` can be off `[..., C]`: half of the share of pairs that lie within a bin."""
    own, other = ranking[..., 0, :, :], ranking[..., 1, :, :]
    return ratio((own * other).sum(-1) / 2, own.sum(-1) * other.sum(-1))


def macro_auroc(ranking: np.ndarray) -> np.ndarray:
    """Mean over classes of `class_auroc` `[...]`; a class that all patients have is no class to tell apart and does not count."""
    return mean_known(class_auroc(ranking))


def reliability(certainty: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """By tenth of the likeliest class's probability: patients, their mean probability, and the share who are of that class."""
    patients, probability, hits, _ = certainty.reshape(4, CALIBRATION_BINS, -1).sum(-1)
    return patients, ratio(probability, patients), ratio(hits, patients)


def calibration_error(certainty: np.ndarray) -> float:
    """Expected calibration error: mean over patients of |probability - share right| of their tenth (Guo et al. 2017)."""
    patients, probability, right = reliability(certainty)
    known = patients > 0
    gap = (patients * np.abs(probability - right))[known].sum()
    return float(ratio(gap, patients.sum()))


@dataclass(frozen=True)
class Answers:
    """What is right when patients are answered only where the likeliest class has `threshold` or more, from 0 to below 1 `[B]`.

    `coverage`: share of patients who are answered; `accuracy`: of those, who are of the class; `spared`: of those who are not
    answered, how often the true class is among the first three.
    """

    threshold: np.ndarray
    coverage: np.ndarray
    accuracy: np.ndarray
    spared: np.ndarray

    @classmethod
    def of(cls, certainty: np.ndarray) -> Answers:
        """From `certainty [4, B]`."""
        total = certainty.sum(1, keepdims=True)
        below = np.cumsum(certainty, axis=1) - certainty
        answered = total - below
        return cls(
            np.arange(CERTAINTY_BINS) / CERTAINTY_BINS,
            ratio(answered[0], total[0]),
            ratio(answered[2], answered[0]),
            ratio(below[3], below[0]),
        )

    def at(self, below: float) -> dict[str, float]:
        """All of it where a probability below `below` (to the nearest 0.005) gets no answer."""
        i = min(round(below * CERTAINTY_BINS), CERTAINTY_BINS - 1)
        return {name: float(getattr(self, name)[i]) for name in ("threshold", "coverage", "accuracy", "spared")}


def top_three(certainty: np.ndarray) -> float:
    """How often the true class is among the first three, of all patients."""
    return float(ratio(certainty[3].sum(), certainty[0].sum()))
