"""Scoring of classification from predictions: macro-F1 and its like, each class's own scores, and who is taken for whom.

Scores are computed within a fold and averaged over folds; calibration, which few patients cannot show, over all folds'
patients together. Tables hold one row a patient and fold: site, fold, patient, cancer_type, split, predicted, p_<class>; a
class is a cancer type, or what stands in that column instead. Shapes: N patients, C classes, D draws.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pandas as pd
from oncofed.common import class_metrics as cm
from oncofed.common.metrics import mean_known
from oncofed.common.splits import seed_from
from oncofed.deploy.comparison.intervals import DRAWS, interval
from sklearn.metrics import roc_auc_score

METHODS: tuple[str, ...] = ("pooled", "local", "logistic", "linear", "fedavg", "unprotected")

LEAST = 1e-12
"""A true class is given no less than this probability in the log-loss."""


@dataclass(frozen=True)
class Scores:
    """A point and its draws `[1 + D]`, `f1` and `recall` of each class `[1 + D, C]`; the point comes first."""

    macro_f1: np.ndarray
    balanced_accuracy: np.ndarray
    mcc: np.ndarray
    accuracy: np.ndarray
    f1: np.ndarray
    recall: np.ndarray

    @classmethod
    def of(cls, confusion: np.ndarray) -> Scores:
        """From `[1 + D, C, C]`, true classes in rows."""
        f1, recall = cm.class_f1(confusion), cm.class_recall(confusion)
        return cls(
            macro_f1=mean_known(f1),
            balanced_accuracy=mean_known(recall),
            mcc=cm.matthews(confusion),
            accuracy=cm.accuracy(confusion),
            f1=f1,
            recall=recall,
        )


def draw_scores(table: pd.DataFrame, seed: int) -> Scores:
    """Scores of held-out patients, averaged over folds, with bootstrap draws over patients.

    Patients are drawn within fold and class by a seed of their own, so two methods meet the same draws.
    """
    names = class_names(table)
    folds = []
    for fold, part in _test(table).sort_values(["site", "patient"], kind="stable").groupby("fold"):
        confusion = np.zeros((1 + DRAWS, len(names), len(names)))
        for c, rows in part.groupby("cancer_type"):
            n, rng = len(rows), np.random.default_rng(seed_from(seed, "bootstrap", c, fold))
            weights = rng.multinomial(n, np.full(n, 1 / n), size=DRAWS)
            chosen = np.eye(len(names))[[names.index(p) for p in rows["predicted"]]]
            confusion[:, names.index(str(c))] = np.vstack([np.ones(n), weights]) @ chosen
        folds.append(Scores.of(confusion))
    return Scores(**{f.name: mean_known(np.array([getattr(s, f.name) for s in folds]), axis=0) for f in fields(Scores)})


def summarise(table: pd.DataFrame, seed: int) -> dict[str, Any]:
    """Scores and, of each class that was held out, F1 (`by_class`) and recall, with 95 % bootstrap intervals.

    AUROC, whole and by class, calibration error and log-loss are points.
    """
    s, names, auroc = draw_scores(table, seed), class_names(table), class_auroc(table)
    out: dict[str, Any] = {
        k: interval(float(v[0]), v[1:])
        for k, v in (
            ("macro_f1", s.macro_f1),
            ("balanced_accuracy", s.balanced_accuracy),
            ("mcc", s.mcc),
            ("accuracy", s.accuracy),
        )
    }
    out |= {"macro_auroc": float(mean_known(mean_known(auroc), axis=0))} | _by_probability(table)
    out |= {"by_class": {}, "recall": {}, "auroc": {}}
    for i, name in enumerate(names):
        if not np.isnan(s.f1[0, i]):
            out["by_class"][name] = interval(float(s.f1[0, i]), s.f1[1:, i])
            out["recall"][name] = interval(float(s.recall[0, i]), s.recall[1:, i])
            out["auroc"][name] = float(mean_known(auroc[:, i]))
    return out


def class_auroc(table: pd.DataFrame) -> np.ndarray:
    """AUROC of each class against all others `[folds, C]`; NaN where a fold holds out none of its patients, or only those."""
    folds = []
    for _, part in _test(table).groupby("fold"):
        probability = _probability(part)
        own = _labels(part)[:, None] == np.arange(probability.shape[1])
        known = own.any(0) & ~own.all(0)
        folds.append(
            [roc_auc_score(o, p) if k else np.nan for o, p, k in zip(own.T, probability.T, known, strict=True)]
        )
    return np.array(folds)


def _by_probability(table: pd.DataFrame) -> dict[str, float]:
    """Expected calibration error and log-loss of all held-out patients together."""
    label, probability = _labels(_test(table)), _probability(_test(table))
    true = np.take_along_axis(probability, label[:, None], 1)
    ece = cm.calibration_error(cm.certainty_sums(label, probability))
    return {"ece": ece, "log_loss": float(-np.log(np.maximum(true, LEAST)).mean())}


def difference(main: pd.DataFrame, other: pd.DataFrame, seed: int) -> dict[str, float]:
    """Paired difference main - other of macro-F1, on the same resampled patients."""
    gap = draw_scores(main, seed).macro_f1 - draw_scores(other, seed).macro_f1
    return interval(float(gap[0]), gap[1:])


def site_table(tables: dict[str, pd.DataFrame]) -> list[dict[str, Any]]:
    """By site: held-out patients, classes among them, and each method's accuracy."""
    rows: dict[str, dict[str, Any]] = {}
    for method, table in tables.items():
        for site, part in _test(table).groupby("site"):
            row = rows.setdefault(str(site), {"site": str(site), "patients": len(part), "accuracy": {}})
            row["cancers"] = int(part["cancer_type"].nunique())
            row["accuracy"][method] = float((part["predicted"] == part["cancer_type"]).mean())
    return [rows[site] for site in sorted(rows)]


def further(tables: dict[str, pd.DataFrame], main: str, seed: int) -> dict[str, Any]:
    """The confusion matrix over all folds (counts of held-out patients, true classes in rows, predicted ones in columns), and
    the paired differences of balanced accuracy."""
    names, test, mine = class_names(tables[main]), _test(tables[main]), draw_scores(tables[main], seed)
    counts = pd.crosstab(test["cancer_type"], test["predicted"]).reindex(index=names, columns=names, fill_value=0)
    gaps = {
        name: mine.balanced_accuracy - draw_scores(table, seed).balanced_accuracy
        for name, table in tables.items()
        if name != main
    }
    return {
        "confusion": {"cancers": names, "counts": counts.to_numpy().tolist()},
        "balanced_accuracy_differences": {name: interval(float(gap[0]), gap[1:]) for name, gap in gaps.items()},
    }


def class_names(table: pd.DataFrame) -> list[str]:
    """The study's classes, as the predictions name them."""
    return [str(c).removeprefix("p_") for c in table.columns if str(c).startswith("p_")]


def _test(table: pd.DataFrame) -> pd.DataFrame:
    return table[table["split"] == "test"]


def _labels(table: pd.DataFrame) -> np.ndarray:
    """True classes `[N]` by their place."""
    place = {name: i for i, name in enumerate(class_names(table))}
    return table["cancer_type"].astype(str).map(place).to_numpy(dtype=np.int64)


def _probability(table: pd.DataFrame) -> np.ndarray:
    """Probabilities `[N, C]`."""
    return table[[f"p_{name}" for name in class_names(table)]].to_numpy(dtype=np.float64)
