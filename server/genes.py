"""Which genes drive a study's model: read from its saved models, ranked over folds, written for enrichment tools.

Survival ranks by slopes of the log hazard, classification by class means of the attribution of the class's
log-probability, where the models hold them: models of earlier versions have slopes only.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from oncofed.common.files import write_text
from oncofed.common.saved import SavedModel, model_file
from oncofed.common.splits import ALL_PATIENTS
from oncofed.server.analysis import TOP, GeneEffects, GeneRanking, cancer_effects, expert_slopes, rank_genes

FOLDER = "genes"
SHOWN = 10
"""Genes of a cancer type in a table for people."""


def read_models(out: Path) -> list[SavedModel]:
    """The models of a finished run's folds, in order; of the refit where there is no other."""
    try:
        folds = [int(fold["fold"]) for fold in json.loads((out / "results.json").read_text())["folds"]]
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{out}: no results.json of a finished run in it; name the study's runtime.out") from None
    return models_of(out, folds)


def models_of(out: Path, folds: list[int]) -> list[SavedModel]:
    """The models of `folds` below `out`; the refit's only where there is no other."""
    chosen = [fold for fold in folds if fold != ALL_PATIENTS] or folds
    return [SavedModel.read(out / model_file(fold)) for fold in sorted(chosen)]


def attributed(models: list[SavedModel], out: Path) -> list[SavedModel]:
    """The same models; raises with the remedy where one is without attributions."""
    if not models or any("attribution/patients" not in m.explanation for m in models):
        raise ValueError(
            f"{out}: the study did not ask which genes drive the model; set analysis.attributions = true and run it "
            "again with runtime.resume = true: rounds that are done stay done"
        )
    return models


def has_class_means(models: list[SavedModel]) -> bool:
    """Whether classes are ranked by the mean signed attribution of their log-probability."""
    classes = all(m.study.task.kind == "classification" for m in models)
    return classes and all("attribution/sum" in m.explanation for m in models)


def effects(models: list[SavedModel]) -> list[GeneEffects]:
    """Of each model the class means, or the slopes, of genes."""
    means = has_class_means(models)
    return [cancer_effects(m.explanation, means=means) for m in models]


def rankings(models: list[SavedModel]) -> dict[str, GeneRanking | None]:
    """By cancer type, over the models' folds; None where the cancer type was withheld in all of them."""
    each, means = effects(models), has_class_means(models)
    return {
        cancer: rank_genes(
            np.array([e.effect[i] for e in each]), np.array([e.importance[i] for e in each]), means=means
        )
        for i, cancer in enumerate(models[0].cancers)
    }


def summarise(models: list[SavedModel], count: int = SHOWN) -> dict[str, Any]:
    """The first genes of each cancer type and how far folds agree, as plain numbers; `measure` is `slope` or `mean`."""
    ranked, genes = rankings(models), models[0].panel.genes
    measure = "mean" if has_class_means(models) else "slope"
    cancers = {}
    for cancer, r in ranked.items():
        if r is not None:
            rows = [
                {
                    "gene": genes[g],
                    measure: float(r.effect[g]),
                    "sd": None if np.isnan(r.sd[g]) else float(r.sd[g]),
                    "agreement": float(r.agreement[g]),
                    "importance": float(r.importance[g]),
                }
                for g in r.top(count)
            ]
            stability = {"folds": r.folds, "spearman": r.spearman, "top_overlap": r.overlap}
            cancers[cancer] = stability | {"genes": rows}
    return {
        "measure": measure,
        "cancers": cancers,
        "withheld": [cancer for cancer, r in ranked.items() if r is None],
        "top": min(TOP, len(genes)),
        "overlap_by_chance": min(TOP, len(genes)) / len(genes),
    }


def write_rankings(out: Path) -> tuple[dict[str, Any], list[Path]]:
    """Write `genes/<CANCER>.rnk` and `genes/expert-<e>-fold-<k>.rnk` (GSEA's pre-ranked format) and `genes/stability.json`.

    Returns the summary of `stability.json` and the files.
    """
    models = attributed(read_models(out), out)
    genes, files, stems = models[0].panel.genes, [], file_stems(models[0].cancers)
    for cancer, r in rankings(models).items():
        if r is not None:
            files.append(_write_rnk(out / FOLDER / f"{stems[cancer]}.rnk", genes, r.score))
    for m in models:
        slopes = expert_slopes(m.explanation)
        name = "all" if m.fold == ALL_PATIENTS else str(m.fold)
        for e, slope in enumerate(slopes if slopes is not None else ()):
            files.append(_write_rnk(out / FOLDER / f"expert-{e}-fold-{name}.rnk", genes, slope))
    summary = summarise(models)
    file = out / FOLDER / "stability.json"
    write_text(file, json.dumps(summary, indent=1))
    return summary, [*files, file]


def file_stems(cancers: tuple[str, ...]) -> dict[str, str]:
    """Each cancer type or class as part of a path: sites have chosen the names, and `ER+` and `ER-` must not share one."""
    stems: dict[str, str] = {}
    for cancer in cancers:
        plain = stem = re.sub(r"[^A-Za-z0-9_-]+", "-", cancer)
        n = 1
        while stem.lower() in {s.lower() for s in stems.values()}:  # some file systems do not tell case
            n += 1
            stem = f"{plain}-{n}"
        stems[cancer] = stem
    return stems


def _write_rnk(path: Path, genes: tuple[str, ...], score: np.ndarray) -> Path:
    """Gene and score by tab, the highest score first."""
    order = np.argsort(-score, kind="stable")
    write_text(path, "".join(f"{genes[g]}\t{score[g]:.8g}\n" for g in order))
    return path
