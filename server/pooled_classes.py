"""How well classes are told apart over all folds and hospitals, with intervals, from the summed confusion and rankings alone.

Intervals are Poisson bootstraps of the counts (common/evaluation/bootstrap.py): no hospital need do anything. A patient is in one cell
of the confusion, and in one bin of each class's ranking, which are drawn as if they were apart: right for the AUROC of a
class, a little too narrow or wide for their mean. Shapes: F folds, C classes, B bins.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from oncofed.common import class_metrics as cm
from oncofed.common.evaluation.bootstrap import interval
from oncofed.common.metrics import mean_known
from oncofed.common.splits import seed_from

WHOLE: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "macro_f1": cm.macro_f1,
    "balanced_accuracy": cm.balanced_accuracy,
    "accuracy": cm.accuracy,
}
BY_CLASS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "recall": cm.class_recall,
    "precision": cm.class_precision,
    "f1": cm.class_f1,
}
DRAWS = 500


def summarise_classes(folds: Sequence[Mapping[str, Any]], classes: Sequence[str], seed: int) -> dict[str, Any] | None:
    """Scores of `whole` and of each class in `by_class`, each with value, low and high (None for what is unknown); None without sums."""
    held = [f["evaluation"] for f in folds if "confusion" in f.get("evaluation", {})]
    if not held:
        return None
    confusion, ranking = (np.array([e[k] for e in held], dtype=np.float64) for k in ("confusion", "ranking"))

    def told(name: str, measure: Callable[[np.ndarray], np.ndarray], counts: np.ndarray) -> list[np.ndarray]:
        rng = np.random.default_rng(seed_from(seed, "pooled classes", name))
        return list(interval(lambda h: mean_known(measure(h), axis=1), counts, rng, draws=DRAWS, bounds=(0.0, 1.0)))

    whole = {name: told(name, measure, confusion) for name, measure in WHOLE.items()}
    whole["macro_auroc"] = told("macro_auroc", cm.macro_auroc, ranking)
    each = {name: told(name, measure, confusion) for name, measure in BY_CLASS.items()}
    each["auroc"] = told("auroc", cm.class_auroc, ranking)
    return {
        "whole": {name: _plain(limits) for name, limits in whole.items()},
        "by_class": {
            c: {name: _plain([v[i] for v in limits]) for name, limits in each.items()} for i, c in enumerate(classes)
        },
    }


def _plain(limits: Sequence[np.ndarray]) -> dict[str, float | None]:
    return {
        name: float(v) if np.isfinite(v) else None for name, v in zip(("value", "low", "high"), limits, strict=True)
    }
