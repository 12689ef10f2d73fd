"""Calibration at a horizon, and risk groups, both of whole risk bins, which may be in any order.

Shapes: C cancer types, R risk bins, T time bins, G groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from oncofed.common.evaluation.censoring import greenwood, product_limit
from oncofed.common.evaluation.table import events_and_leaving
from oncofed.common.metrics import ratio


@dataclass(frozen=True, eq=False)
class Calibration:
    """Predicted and observed survival `[G]` at a horizon, in groups of rising predicted survival; NaN for what is unknown."""

    predicted: np.ndarray
    observed: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    patients: np.ndarray


def equal_groups(patients: np.ndarray, score: np.ndarray, groups: int = 5) -> np.ndarray:
    """Group 0 to at most `groups` - 1 of each risk bin `[R]`, in order of `score` `[R]`, with about equally many `patients` `[R]`.

    A risk bin belongs where its middle patient does. No group is without a bin, so that there may be fewer groups.
    """
    order = np.argsort(score, kind="stable")
    filled = np.maximum(patients[order], 0.0)
    total = filled.sum()
    middle = (np.cumsum(filled) - filled / 2) / total if total > 0 else (np.arange(len(order)) + 0.5) / len(order)
    owner = np.empty(len(order), dtype=np.intp)
    owner[order] = np.unique(np.minimum((middle * groups).astype(np.intp), groups - 1), return_inverse=True)[1]
    return owner


def halves(bins: int) -> np.ndarray:
    """Group 0 (low) or 1 (high) of each risk bin `[bins]`: the split at the training median, see `edges.risk_bins`."""
    return np.repeat([0, 1], bins // 2)


def calibration(counts: np.ndarray, predicted: np.ndarray, until: int, groups: int = 5) -> Calibration:
    """Mean predicted survival against Kaplan-Meier with its 95 % interval at the end of the first `until` bins.

    `counts` `[C, 2, R, T]`, `predicted` survival `[C, R]` at that horizon; groups of all cancer types are about equally large.
    Observed survival is Kaplan-Meier's of each cancer type within the group, averaged by its patients: types that are
    followed for unlike times must not share one curve. Its interval knows of the patients' chance, not of noise.
    """
    patients = counts.sum((1, 3))
    owner = equal_groups(patients.ravel(), predicted.ravel(), groups).reshape(predicted.shape)
    found = int(owner.max()) + 1
    weight, observed, variance = np.zeros((3, len(counts), found))
    for c, one in enumerate(counts):
        events, leaving = events_and_leaving(one, owner[c], found)
        weight[c], observed[c] = leaving.sum(1), product_limit(events, leaving)[:, until]
        # where all live or all die Greenwood knows no doubt: never less than that of a share of so many (Agresti & Coull 1998)
        some = np.maximum(weight[c], 0.0)
        share = (some * observed[c] + 2.0) / (some + 4.0)
        doubt = share * (1.0 - share) / (some + 4.0)
        variance[c] = np.maximum(observed[c] ** 2 * greenwood(events[:, :until], leaving), doubt)
    n = weight.sum(0)
    mean = ratio((weight * observed).sum(0), n)
    reach = 1.96 * np.sqrt(ratio((weight**2 * variance).sum(0), n**2))
    whole = np.array([(patients * predicted)[owner == g].sum() for g in range(found)])
    return Calibration(ratio(whole, n), mean, np.maximum(mean - reach, 0.0), np.minimum(mean + reach, 1.0), n)
