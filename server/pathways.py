"""Which pathways drive a class: the mean effect of a set's genes, held against random sets of the same size.

The effect of a gene is its class mean in classification, its slope in survival (server/genes.py). Random sets are drawn
from the panel, so a set is said to differ from other genes of this panel, not from nothing; genes of a pathway are
expressed together, random genes are not, which makes these p values too small (Goeman and Bühlmann 2007). They order
sets, they prove none. Shapes: F folds, C classes, G genes of the panel, S sets.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from oncofed.common.files import replacing
from oncofed.common.pathways import pathways_on
from oncofed.common.saved import SavedModel
from oncofed.server.genes import FOLDER, attributed, effects, read_models
from scipy.stats import false_discovery_control

DRAWS = 1000
"""Random orders of the panel; a set of n genes is held against the first n genes of each."""

SHOWN = 30
"""Sets in the results and in the report's picture; the file holds all."""

COLUMNS = ("class", "set", "genes", "mean", "sd", "z", "p", "q")


@dataclass(frozen=True)
class PathwayScores:
    """Sets of one class `[S]`: mean effect, its deviation over folds (NaN with one), z, two-sided p, and q over the sets."""

    mean: np.ndarray
    sd: np.ndarray
    z: np.ndarray
    p: np.ndarray
    q: np.ndarray


def score_sets(effect_FG: np.ndarray, sets: Sequence[np.ndarray], order_DG: np.ndarray) -> PathwayScores:
    """Score sets of one class by the mean over folds of its genes' effects.

    z has the exact mean and variance of n genes drawn without replacement; p counts the random orders whose first n genes
    lie as far from the panel's mean; q is Benjamini and Hochberg's (1995). A set that is the whole panel has z 0 and p 1.
    """
    value = effect_FG.mean(0)
    size = np.array([len(s) for s in sets])
    by_fold_FS = np.stack([effect_FG[:, s].mean(1) for s in sets], axis=1)
    mean, centre = by_fold_FS.mean(0), value.mean()
    variance = value.var(ddof=1) / size * (1 - size / len(value))
    z = np.divide(mean - centre, np.sqrt(variance), out=np.zeros(len(sets)), where=variance > 0)
    random_DS = np.cumsum(value[order_DG], axis=1)[:, size - 1] / size
    # a tolerance, since sums of the same genes in another order differ in their last digits
    slack = 1e-9 * np.abs(value).max(initial=0.0)
    as_far = np.abs(random_DS - centre) >= np.abs(mean - centre) - slack
    p = (1 + as_far.sum(0)) / (1 + len(order_DG))
    sd = by_fold_FS.std(0, ddof=1) if len(effect_FG) > 1 else np.full(len(sets), np.nan)
    return PathwayScores(mean, sd, z, p, false_discovery_control(p, method="bh"))


def random_orders(genes: int, longest: int, *, seed: int, draws: int = DRAWS) -> np.ndarray:
    """The first `longest` genes of random orders of the panel `[draws, longest]`."""
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(genes)[:longest] for _ in range(draws)])


def score_classes(models: list[SavedModel], sets: Mapping[str, np.ndarray]) -> dict[str, PathwayScores]:
    """By cancer type or class, over the folds that saw it; those withheld in all folds are left out."""
    effect_FCG = np.stack([e.effect for e in effects(models)])
    groups = list(sets.values())
    genes = effect_FCG.shape[2]
    order_DG = random_orders(genes, max(len(s) for s in groups), seed=models[0].study.seed)
    found = {}
    for i, cancer in enumerate(models[0].cancers):
        seen = ~np.isnan(effect_FCG[:, i]).any(1)
        if seen.any():
            found[cancer] = score_sets(effect_FCG[seen, i], groups, order_DG)
    return found


def summarise(models: list[SavedModel], sets: Mapping[str, np.ndarray], count: int = SHOWN) -> dict[str, Any]:
    """As plain numbers: the sets that stand out most in any class, by class in the order of `sets`."""
    scores, names = score_classes(models, sets), np.array(list(sets))
    far = np.max([np.abs(s.z) for s in scores.values()], axis=0, initial=0.0) if scores else np.zeros(len(names))
    chosen = np.argsort(-far, kind="stable")[:count]
    return {
        "sets": [{"name": str(names[i]), "genes": len(sets[str(names[i])])} for i in chosen],
        "all_sets": len(names),
        "draws": DRAWS,
        "classes": {
            cancer: {key: _plain(getattr(s, key)[chosen]) for key in ("mean", "sd", "z", "p", "q")}
            for cancer, s in scores.items()
        },
    }


def write_pathways(out: Path, file: Path | None = None) -> tuple[dict[str, Any], Path] | None:
    """Write `genes/pathways.csv`, a row a class and set, for the sets of `file` or of the study; None where there is neither.

    Returns the summary as well.
    """
    models = attributed(read_models(out), out)
    study, panel = models[0].study, models[0].panel
    if file is None and not study.analysis.pathways:
        return None
    chosen = file or Path(study.analysis.pathways)
    sets = pathways_on(panel, chosen)
    target = out / FOLDER / "pathways.csv"
    with replacing(target) as temporary, temporary.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(COLUMNS)
        for cancer, s in score_classes(models, sets).items():
            for i in np.lexsort((-np.abs(s.z), s.p)):
                name = list(sets)[i]
                numbers = (s.mean[i], s.sd[i], s.z[i], s.p[i], s.q[i])
                writer.writerow([cancer, name, len(sets[name]), *(_short(float(v)) for v in numbers)])
    return summarise(models, sets), target


def _plain(values: np.ndarray) -> list[float | None]:
    return [None if np.isnan(v) else float(v) for v in values]


def _short(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.6g}"
