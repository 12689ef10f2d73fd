"""Scoring of survival: the C-index within each cancer type, its intervals and paired differences, and risk groups.

The headline is the mean over cancer types of the C-index within a cancer; the C-index over all patients mixed stands beside
it, labelled. Tables hold one row a patient and fold: site, fold, patient, cancer_type, time_months, event, split, risk.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from lifelines import KaplanMeierFitter
from lifelines.statistics import multivariate_logrank_test
from oncofed.common.metrics import bootstrap_concordance, concordance_index, mean_known, pair_counts
from oncofed.common.splits import seed_from
from oncofed.deploy.comparison.intervals import DRAWS, interval

METHODS: tuple[str, ...] = ("pooled", "local", "ridge", "ridge-own", "ridge-powers", "cox", "fedavg", "unprotected")
"""cox: of the clinical covariates alone, summed over sites; ridge-own: each cancer's own coefficients beside shared ones; ridge-powers: that, on the federation's scale of genes."""

CURVE_MONTHS = np.arange(0, 121, 3, dtype=np.float64)


def draw_concordance(table: pd.DataFrame, seed: int) -> dict[str, tuple[float, np.ndarray]]:
    """By cancer type: the C-index within the cancer, averaged over folds, and its bootstrap draws over test patients.

    Patients are drawn within fold and cancer type by a seed of their own, so two methods meet the same draws.
    """
    out: dict[str, tuple[float, np.ndarray]] = {}
    test = table[table["split"] == "test"]
    for cancer, rows in test.groupby("cancer_type"):
        points, draws = [], []
        for fold, part in rows.sort_values(["site", "patient"], kind="stable").groupby("fold"):
            risk, t, e = (part[c].to_numpy() for c in ("risk", "time_months", "event"))
            rng = np.random.default_rng(seed_from(seed, "bootstrap", cancer, fold))
            points.append(concordance_index(risk, t, e))
            draws.append(bootstrap_concordance(risk, t, e, DRAWS, rng))
        if not np.isnan(points).all():
            with np.errstate(invalid="ignore"):
                out[str(cancer)] = float(np.nanmean(points)), mean_known(np.array(draws), axis=0)
    return out


def summarise(table: pd.DataFrame, seed: int) -> dict[str, Any]:
    """Mean within-cancer C-index with a 95 % bootstrap interval, by cancer, and over all patients mixed (labelled)."""
    by_cancer = draw_concordance(table, seed)
    test = table[table["split"] == "test"]
    mixed = [
        concordance_index(*(p[c].to_numpy() for c in ("risk", "time_months", "event"))) for _, p in test.groupby("fold")
    ]
    return {
        "c_index": interval(
            float(np.mean([p for p, _ in by_cancer.values()])),
            mean_known(np.array([d for _, d in by_cancer.values()]), axis=0),
        ),
        "by_cancer": {cancer: interval(point, draws) for cancer, (point, draws) in by_cancer.items()},
        "all_cancers_mixed": float(np.nanmean(mixed)),
    }


def difference(main: pd.DataFrame, other: pd.DataFrame, seed: int) -> dict[str, float]:
    """Paired difference main - other of the mean within-cancer C-index, on the same resampled patients."""
    a, b = draw_concordance(main, seed), draw_concordance(other, seed)
    cancers = sorted(a.keys() & b.keys())
    points = [a[c][0] - b[c][0] for c in cancers]
    return interval(float(np.mean(points)), mean_known(np.array([a[c][1] - b[c][1] for c in cancers]), axis=0))


def site_table(tables: dict[str, pd.DataFrame]) -> list[dict[str, Any]]:
    """By site: patients, events, and each method's C-index over pairs within the site, the cancer and the fold."""
    counts: dict[str, dict[str, np.ndarray]] = {}
    base: dict[str, tuple[int, int]] = {}
    for method, table in tables.items():
        test = table[table["split"] == "test"]
        for site, rows in test.groupby("site"):
            total = np.zeros(2)
            for _, part in rows.groupby(["fold", "cancer_type"]):
                total += pair_counts(*(part[c].to_numpy() for c in ("risk", "time_months", "event")))
            counts.setdefault(str(site), {})[method] = total
            base[str(site)] = len(rows), int(rows["event"].sum())
    return [
        {
            "site": site,
            "patients": base[site][0],
            "events": base[site][1],
            "pairs": int(next(iter(by_method.values()))[1]),
            "c_index": {m: (float(v[0] / v[1]) if v[1] else None) for m, v in by_method.items()},
        }
        for site, by_method in sorted(counts.items())
    ]


def further(tables: dict[str, pd.DataFrame], main: str, seed: int) -> dict[str, Any]:
    """What a comparison of this task holds beside its scores, from the federation's own predictions."""
    return {"risk_groups": risk_groups(tables[main])}


def risk_groups(table: pd.DataFrame) -> dict[str, Any]:
    """Kaplan-Meier of held-out patients by risk group; the threshold is each cancer's median risk in training."""
    median = table[table["split"] == "train"].groupby(["fold", "cancer_type"])["risk"].median().rename("threshold")
    test = table[table["split"] == "test"].join(median, on=["fold", "cancer_type"])
    test = test[test["threshold"].notna()]  # a site that is held out whole has no training patients
    if test.empty:
        return {}
    high = (test["risk"] > test["threshold"]).to_numpy()
    t, e = test["time_months"].to_numpy(), test["event"].to_numpy()
    curves = {}
    for label, rows in (("low risk", ~high), ("high risk", high)):
        if not rows.any():
            continue
        km = KaplanMeierFitter().fit(t[rows], e[rows], timeline=CURVE_MONTHS)
        band = km.confidence_interval_survival_function_
        curves[label] = {
            "patients": int(rows.sum()),
            "survival": km.survival_function_.iloc[:, 0].tolist(),
            "lower": band.iloc[:, 0].tolist(),
            "upper": band.iloc[:, 1].tolist(),
            "at_risk": [int((t[rows] >= m).sum()) for m in CURVE_MONTHS],
        }
    p = float(multivariate_logrank_test(t, high, e).p_value) if 0 < high.sum() < len(high) else None
    return {"months": CURVE_MONTHS.tolist(), "curves": curves, "logrank_p": p}
