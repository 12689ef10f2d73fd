"""Honest comparison: the federation beside pooled, local and a classical model, on the same folds, with intervals.

Every number comes from predictions of held-out patients; how they are scored is the task's own business
(survival.py, classes.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import pandas as pd
from oncofed.client.data.site import SiteFolder, list_sites
from oncofed.common.privacy.sharing import UNSHARED
from oncofed.common.progress import progress_bar
from oncofed.common.study import Study
from oncofed.deploy.comparison import classes, survival
from oncofed.deploy.comparison.cox import predict_cox
from oncofed.deploy.comparison.logistic import predict_logistic
from oncofed.deploy.comparison.reference import INNER, predict_local, predict_pooled
from oncofed.deploy.comparison.ridge import predict_ridge
from oncofed.deploy.comparison.variants import (
    KEYS,
    MULTIMODAL,
    PARTS,
    UNMODULATED,
    VARIANTS,
    Federations,
    check_variant,
)
from oncofed.deploy.simulate import Engine, note


class Scoring(Protocol):
    """How a task's predictions are scored; tables hold one row a patient and fold."""

    METHODS: tuple[str, ...]

    def summarise(self, table: pd.DataFrame, seed: int) -> dict[str, Any]:
        """The headline with a 95 % bootstrap interval, and what stands beside it."""

    def difference(self, main: pd.DataFrame, other: pd.DataFrame, seed: int) -> dict[str, float]:
        """Paired difference main - other of the headline, on the same resampled patients."""

    def site_table(self, tables: dict[str, pd.DataFrame]) -> list[dict[str, Any]]:
        """By site: patients, and each method's score within the site."""

    def further(self, tables: dict[str, pd.DataFrame], main: str, seed: int) -> dict[str, Any]:
        """What a comparison holds beside scores and their differences; `main` names the federation's own predictions."""


SCORING: dict[str, Scoring] = {"survival": survival, "classification": classes}


def compare(study: Study, sites: Path, methods: tuple[str, ...], engine: Engine = "local") -> dict[str, Any]:
    """Run the federation and every method of `methods`, and return all tables as plain numbers (no patient rows)."""
    check_methods(study, methods)
    note(Path(study.runtime.out), sites, engine, methods)
    scoring, federations = SCORING[study.task.kind], Federations(study, sites, engine)
    run = federations.run()
    main = "federated" if study.aggregation.rule == "evidence" else "fedavg"
    costs, tables = {main: spent(federations, "")}, {main: run.predictions}
    for method in methods:
        if method == main:
            continue
        if method in VARIANTS or method in PARTS:
            tables[method] = federations.table(method)
            costs[method] = spent(federations, *PARTS.get(method, (method,)))
        else:
            begin = time.perf_counter()
            tables[method] = _reference(federations, method)
            costs[method] = {"seconds": time.perf_counter() - begin}
    everybody, tables = tables[main], common_patients(tables)
    branches = {main: balance_of(run.results)}
    if UNMODULATED in tables:
        branches[UNMODULATED] = balance_of(federations.run(UNMODULATED).results)
    return {
        "task": study.task.kind,
        "results": run.results,
        "methods": {n: scoring.summarise(table, study.seed) | {"cost": costs[n]} for n, table in tables.items()},
        "differences": {
            name: difference(tables[main], table, study.seed, scoring) for name, table in tables.items() if name != main
        },
        "main": main,
        "held_out": {"scored": held_out(everybody), "compared": held_out(tables[main])},
        "balance": {name: folds for name, folds in branches.items() if folds},
        "sites": scoring.site_table(tables),
        "cohort": cohort_table(sites, tables[main]),
    } | scoring.further(tables, main, study.seed)


def check_methods(study: Study, methods: tuple[str, ...]) -> None:
    """Raise `ValueError` on a method that is unknown, or not for this study."""
    scoring = SCORING[study.task.kind]
    known = (*scoring.METHODS, *(MULTIMODAL if study.multimodal else ()))
    for method in methods:
        if study.task.kind == "survival":
            check_variant(study, method)
        if method not in known:
            other = method in MULTIMODAL or any(method in s.METHODS for s in SCORING.values())
            why = f"not for {study.task.kind}" if other else "unknown"
            raise ValueError(f"--compare {method}: {why}; choose from {','.join(known)}")
    if "cox" in methods and not study.panel.covariates:
        raise ValueError(
            "--compare cox: a Cox regression on clinical covariates, and the study has none; name some in panel.covariates, such as "
            "'age,sex=female|male'"
        )
    if study.splits.held_out_sites and "local" in methods:
        raise ValueError(
            "--compare local: a site that is held out whole has no training patients of its own; leave it out"
        )


def spent(federations: Federations, *variants: str) -> dict[str, float]:
    """What federations cost together."""
    parts = [cost_of(federations.run(v).results) | {"seconds": federations.seconds[v]} for v in variants]
    return {key: sum(part[key] for part in parts) for key in parts[0]}


def balance_of(results: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """By fold and round: what each modality adds to the log hazard; empty where the model is no sum over modalities."""
    folds = [f for f in results["folds"] if f["fold"] >= 0]
    if not any("branches" in point for f in folds for point in f["curve"]):
        return []
    return [[point.get("branches", {}) for point in f["curve"]] for f in folds]


def held_out(table: pd.DataFrame) -> int:
    """Held-out patients of all folds."""
    return int((table["split"] == "test").sum())


def common_patients(tables: dict[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """Every table cut to the patients that all methods scored, fold by fold: a site may have been left out of one run."""
    shared = None
    for table in tables.values():
        index = pd.MultiIndex.from_frame(table[KEYS])
        shared = index if shared is None else shared.intersection(index)
    return {name: t[pd.MultiIndex.from_frame(t[KEYS]).isin(shared)] for name, t in tables.items()}


def difference(main: pd.DataFrame, other: pd.DataFrame, seed: int, scoring: Scoring = survival) -> dict[str, float]:
    """The task's paired difference; raises where the two methods scored different patients."""
    mine, theirs = (set(map(tuple, t.loc[t["split"] == "test", KEYS].to_numpy().tolist())) for t in (main, other))
    if mine != theirs:
        raise ValueError(
            f"the two methods scored different held-out patients ({len(mine ^ theirs)} differ); they cannot be paired"
        )
    return scoring.difference(main, other, seed)


def _reference(federations: Federations, method: str) -> pd.DataFrame:
    study, folds, pool = open_study(federations.study), federations.folds, federations.pool()
    predict: dict[str, Callable[..., pd.DataFrame]] = {
        "pooled": predict_pooled,
        "local": predict_local,
        "ridge": predict_ridge,
        "ridge-own": partial(predict_ridge, own=True),
        "ridge-powers": partial(predict_ridge, own=True, powers=True),
        "cox": predict_cox,
        "logistic": predict_logistic,
    }
    rounds = sum(study.steps(phase).rounds for phase in study.phases)
    ticks = {"pooled": rounds, "local": len(pool.cohorts), "cox": 1}.get(method, INNER) * len(folds)
    with progress_bar() as progress:
        bar = progress.add_task(method, total=ticks)
        parts = [predict[method](pool, study, fold, lambda: progress.advance(bar)) for fold in folds]
    return pd.concat(parts, ignore_index=True)


def open_study(study: Study) -> Study:
    """The study without its privacy, for who holds all patients in one place; its folds are the same."""
    if not study.privacy.on:
        return study
    clip = {"training__clip_norm": study.privacy.clip}  # rates are chosen for clipped gradients
    return study.changed(privacy__unit="none", splits__deal="independent", evaluation__epsilon=0.0, **UNSHARED, **clip)


def cost_of(results: dict[str, Any]) -> dict[str, float]:
    """What a federation spent, over all its folds."""
    folds = results["folds"]
    return {
        "seconds": sum(f["seconds"] for f in folds),
        "rounds": sum(len(f["curve"]) for f in folds),
        "bytes_to_sites": sum(f["bytes_to_sites"] for f in folds),
        "bytes_from_sites": sum(f["bytes_from_sites"] for f in folds),
        "seconds_in_local_steps": sum(f["seconds_in_local_steps"] for f in folds),
    }


def cohort_table(sites: Path, table: pd.DataFrame) -> dict[str, Any]:
    """Patients by site and cancer type."""
    one = table.drop_duplicates(["site", "patient"])
    counts = pd.crosstab(one["site"], one["cancer_type"])
    names = sorted(SiteFolder.open(f).name for f in list_sites(sites))
    counts = counts.reindex(names, fill_value=0)
    return {"sites": names, "cancers": [str(c) for c in counts.columns], "patients": counts.to_numpy().tolist()}
