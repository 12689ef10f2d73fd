"""Scoring of classification: macro-F1 and accuracy over cancer types, F1 of each type, and who is taken for whom.

Every score is computed within a fold and averaged over folds. Tables hold one row a patient and fold: site, fold, patient,
cancer_type, split, predicted, p_<cancer type>. Shapes: C cancer types, D draws.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from oncofed.common.metrics import class_f1
from oncofed.common.splits import seed_from
from oncofed.deploy.comparison.intervals import DRAWS, interval, nanmean

METHODS: tuple[str, ...] = ("pooled", "local", "logistic", "fedavg")


@dataclass(frozen=True)
class Scores:
    """A point and its draws, or several of each: `macro_f1` and `accuracy` `[1 + D]`, `f1` `[1 + D, C]`; the point comes first."""

    macro_f1: np.ndarray
    accuracy: np.ndarray
    f1: np.ndarray

    @classmethod
    def of(cls, confusion: np.ndarray) -> Scores:
        """From `[..., C, C]`, true types in rows."""
        f1 = class_f1(confusion)
        hits = np.trace(confusion, axis1=-2, axis2=-1)
        return cls(np.nanmean(f1, axis=-1), hits / confusion.sum((-2, -1)), f1)


def draw_scores(table: pd.DataFrame, seed: int) -> Scores:
    """Scores of held-out patients, averaged over folds, with bootstrap draws over patients.

    Patients are drawn within fold and cancer type by a seed of their own, so two methods meet the same draws.
    """
    cancers = cancer_types(table)
    folds = []
    for fold, part in _test(table).sort_values(["site", "patient"], kind="stable").groupby("fold"):
        confusion = np.zeros((1 + DRAWS, len(cancers), len(cancers)))
        for c, rows in part.groupby("cancer_type"):
            n, rng = len(rows), np.random.default_rng(seed_from(seed, "bootstrap", c, fold))
            weights = rng.multinomial(n, np.full(n, 1 / n), size=DRAWS)
            chosen = np.eye(len(cancers))[[cancers.index(p) for p in rows["predicted"]]]
            confusion[:, cancers.index(str(c))] = np.vstack([np.ones(n), weights]) @ chosen
        folds.append(Scores.of(confusion))
    return Scores(*(nanmean(np.array([getattr(s, name) for s in folds])) for name in ("macro_f1", "accuracy", "f1")))


def summarise(table: pd.DataFrame, seed: int) -> dict[str, Any]:
    """Macro-F1, accuracy and the F1 of each type that was held out, with 95 % bootstrap intervals."""
    s = draw_scores(table, seed)
    f1 = dict(zip(cancer_types(table), s.f1.T, strict=True))
    return {
        "macro_f1": interval(float(s.macro_f1[0]), s.macro_f1[1:]),
        "accuracy": interval(float(s.accuracy[0]), s.accuracy[1:]),
        "by_class": {c: interval(float(v[0]), v[1:]) for c, v in f1.items() if not np.isnan(v[0])},
    }


def difference(main: pd.DataFrame, other: pd.DataFrame, seed: int) -> dict[str, float]:
    """Paired difference main - other of macro-F1, on the same resampled patients."""
    gap = draw_scores(main, seed).macro_f1 - draw_scores(other, seed).macro_f1
    return interval(float(gap[0]), gap[1:])


def site_table(tables: dict[str, pd.DataFrame]) -> list[dict[str, Any]]:
    """By site: held-out patients, cancer types among them, and each method's accuracy."""
    rows: dict[str, dict[str, Any]] = {}
    for method, table in tables.items():
        for site, part in _test(table).groupby("site"):
            row = rows.setdefault(str(site), {"site": str(site), "patients": len(part), "accuracy": {}})
            row["cancers"] = int(part["cancer_type"].nunique())
            row["accuracy"][method] = float((part["predicted"] == part["cancer_type"]).mean())
    return [rows[site] for site in sorted(rows)]


def further(table: pd.DataFrame) -> dict[str, Any]:
    """The confusion matrix over all folds: counts of held-out patients, true types in rows, predicted ones in columns."""
    cancers, test = cancer_types(table), _test(table)
    counts = pd.crosstab(test["cancer_type"], test["predicted"]).reindex(index=cancers, columns=cancers, fill_value=0)
    return {"confusion": {"cancers": cancers, "counts": counts.to_numpy().tolist()}}


def cancer_types(table: pd.DataFrame) -> list[str]:
    """The study's cancer types, as the predictions name them."""
    return [str(c).removeprefix("p_") for c in table.columns if str(c).startswith("p_")]


def _test(table: pd.DataFrame) -> pd.DataFrame:
    return table[table["split"] == "test"]
