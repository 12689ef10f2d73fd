"""Honest comparison: the federation beside pooled, local and ridge, on the same folds, with intervals.

Every number comes from predictions of held-out patients. The headline is the mean over cancer types of the C-index within
a cancer; the C-index over all patients mixed stands beside it, labelled.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from lifelines import KaplanMeierFitter
from lifelines.statistics import multivariate_logrank_test
from oncofed.client.data.site import SiteFolder, list_sites
from oncofed.common.metrics import bootstrap_concordance, concordance_index, pair_counts
from oncofed.common.panel import GenePanel
from oncofed.common.splits import seed_from
from oncofed.common.study import Study
from oncofed.deploy.reference import Pool, predict_local, predict_pooled
from oncofed.deploy.ridge import INNER, predict_ridge
from oncofed.deploy.simulate import Engine, SimulatedRun, simulate
from oncofed.server.checkpoint import load_arrays
from oncofed.server.progress import progress_bar

METHODS = ("pooled", "local", "ridge", "ridge-own", "ridge-powers", "fedavg")
"""ridge-own: each cancer's own coefficients beside shared ones; ridge-powers: that, on the federation's scale of genes."""

DRAWS = 500
CURVE_MONTHS = np.arange(0, 121, 3, dtype=np.float64)


def compare(study: Study, sites: Path, methods: tuple[str, ...], engine: Engine = "local") -> dict[str, Any]:
    """Run the federation and every method of `methods`, and return all tables as plain numbers (no patient rows)."""
    unknown = [m for m in methods if m not in METHODS]
    if unknown:
        raise ValueError(f"--compare {','.join(unknown)}: unknown; choose from {','.join(METHODS)}")
    out = Path(study.runtime.out)
    begin = time.perf_counter()
    run = simulate(study, sites, engine)
    main = "federated" if study.aggregation.rule == "evidence" else "fedavg"
    costs = {main: _cost(run, time.perf_counter() - begin)}
    tables = {main: run.predictions}
    for method in methods:
        begin = time.perf_counter()
        if method == main:
            continue
        if method == "fedavg":
            other = study.changed(
                name=f"{study.name}-fedavg",
                aggregation__rule="fedavg",
                runtime__out=str(out / "fedavg"),
                splits__refit=False,
            )
            again = simulate(other, sites, engine)
            tables[method], costs[method] = again.predictions, _cost(again, time.perf_counter() - begin)
        else:
            tables[method] = _reference(study, sites, run, method)
            costs[method] = {"seconds": time.perf_counter() - begin}
    tables = common_patients(tables)
    return {
        "results": run.results,
        "methods": {name: summarise(table, study.seed) | {"cost": costs[name]} for name, table in tables.items()},
        "differences": {
            name: difference(tables[main], table, study.seed) for name, table in tables.items() if name != main
        },
        "main": main,
        "sites": site_table(tables),
        "risk_groups": risk_groups(tables[main]),
        "cohort": cohort_table(sites, tables[main]),
    }


def common_patients(tables: dict[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """Every table cut to the patients that all methods scored, fold by fold: a site may have been left out of one run."""
    keys = ["site", "patient", "fold"]
    shared = None
    for table in tables.values():
        index = pd.MultiIndex.from_frame(table[keys])
        shared = index if shared is None else shared.intersection(index)
    return {name: t[pd.MultiIndex.from_frame(t[keys]).isin(shared)] for name, t in tables.items()}


def _reference(study: Study, sites: Path, run: SimulatedRun, method: str) -> pd.DataFrame:
    results, out = run.results, Path(study.runtime.out)
    folds = [int(f["fold"]) for f in results["folds"] if f["fold"] >= 0]
    _, about = load_arrays(out / f"model-fold-{folds[0]}.safetensors")
    pool = Pool.open(
        sites, study, GenePanel(tuple(about["genes"])), tuple(about["cancers"]), set(run.predictions["site"])
    )
    predict: dict[str, Callable[..., pd.DataFrame]] = {
        "pooled": predict_pooled,
        "local": predict_local,
        "ridge": predict_ridge,
        "ridge-own": partial(predict_ridge, own=True),
        "ridge-powers": partial(predict_ridge, own=True, powers=True),
    }
    rounds = sum(study.steps(phase).rounds for phase in study.phases)
    ticks = {"pooled": rounds, "local": len(pool.cohorts)}.get(method, INNER) * len(folds)
    with progress_bar() as progress:
        bar = progress.add_task(method, total=ticks)
        parts = [predict[method](pool, study, fold, lambda: progress.advance(bar)) for fold in folds]
    return pd.concat(parts, ignore_index=True)


def _cost(run: SimulatedRun, seconds: float) -> dict[str, float]:
    folds = run.results["folds"]
    return {
        "seconds": seconds,
        "rounds": sum(len(f["curve"]) for f in folds),
        "bytes_to_sites": sum(f["bytes_to_sites"] for f in folds),
        "bytes_from_sites": sum(f["bytes_from_sites"] for f in folds),
        "seconds_in_local_steps": sum(f["seconds_in_local_steps"] for f in folds),
    }


# -- tables --------------------------------------------------------------------------------------------------------------


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
                out[str(cancer)] = float(np.nanmean(points)), _nanmean(np.array(draws))
    return out


def summarise(table: pd.DataFrame, seed: int) -> dict[str, Any]:
    """Mean within-cancer C-index with a 95 % bootstrap interval, by cancer, and over all patients mixed (labelled)."""
    by_cancer = draw_concordance(table, seed)
    test = table[table["split"] == "test"]
    mixed = [
        concordance_index(*(p[c].to_numpy() for c in ("risk", "time_months", "event"))) for _, p in test.groupby("fold")
    ]
    return {
        "c_index": _interval(
            float(np.mean([p for p, _ in by_cancer.values()])), _nanmean(np.array([d for _, d in by_cancer.values()]))
        ),
        "by_cancer": {cancer: _interval(point, draws) for cancer, (point, draws) in by_cancer.items()},
        "all_cancers_mixed": float(np.nanmean(mixed)),
    }


def difference(main: pd.DataFrame, other: pd.DataFrame, seed: int) -> dict[str, float]:
    """Paired difference main - other of the mean within-cancer C-index, on the same resampled patients."""
    keys = ["site", "patient", "fold"]
    mine, theirs = (set(map(tuple, t.loc[t["split"] == "test", keys].to_numpy().tolist())) for t in (main, other))
    if mine != theirs:
        raise ValueError(
            f"the two methods scored different held-out patients ({len(mine ^ theirs)} differ); they cannot be paired"
        )
    a, b = draw_concordance(main, seed), draw_concordance(other, seed)
    cancers = sorted(a.keys() & b.keys())
    points = [a[c][0] - b[c][0] for c in cancers]
    return _interval(float(np.mean(points)), _nanmean(np.array([a[c][1] - b[c][1] for c in cancers])))


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


def risk_groups(table: pd.DataFrame) -> dict[str, Any]:
    """Kaplan-Meier of held-out patients by risk group; the threshold is each cancer's median risk in training."""
    median = table[table["split"] == "train"].groupby(["fold", "cancer_type"])["risk"].median().rename("threshold")
    test = table[table["split"] == "test"].join(median, on=["fold", "cancer_type"])
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


def cohort_table(sites: Path, table: pd.DataFrame) -> dict[str, Any]:
    """Patients by site and cancer type."""
    one = table.drop_duplicates(["site", "patient"])
    counts = pd.crosstab(one["site"], one["cancer_type"])
    names = sorted(SiteFolder.open(f).name for f in list_sites(sites))
    counts = counts.reindex(names, fill_value=0)
    return {"sites": names, "cancers": [str(c) for c in counts.columns], "patients": counts.to_numpy().tolist()}


def _interval(point: float, draws: np.ndarray) -> dict[str, float]:
    low, high = np.nanpercentile(draws, [2.5, 97.5])
    return {"value": point, "low": float(low), "high": float(high)}


def _nanmean(draws: np.ndarray) -> np.ndarray:
    """Mean over the first axis of what is known; NaN where nothing is."""
    known = ~np.isnan(draws)
    total = np.where(known, draws, 0.0).sum(0)
    return np.divide(total, known.sum(0), out=np.full(draws.shape[1:], np.nan), where=known.any(0))
