"""From results to one HTML file."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import jinja2
import numpy as np
from oncofed.common.metrics import class_f1
from oncofed.server import analysis
from oncofed.server.report import heat, modalities, pictures


def render(comparison: dict[str, Any]) -> str:
    """The report of a comparison (`deploy.compare.compare`) or, with only `results` in it, of a study run for real."""
    results = comparison["results"]
    folds = [f for f in results["folds"] if f["fold"] >= 0]
    sections = _experts(folds[0], results["cancers"]) if folds else {}
    summed = summed_evaluation(folds, results["cancers"])
    if folds:
        sections["curves"] = pictures.learning_curves(folds)
    if "methods" in comparison:
        sections["forest"] = pictures.forest(comparison["methods"])
    if comparison.get("risk_groups", {}).get("curves"):
        sections["kaplan_meier"] = pictures.kaplan_meier(comparison["risk_groups"])
    by_method = modalities.balance_by_method(comparison)
    if by_method:
        sections["modalities"] = modalities.balance(by_method)
    confusion = summed_confusion(folds)
    if confusion is not None:
        sections["confusion"] = heat.confusion(confusion, results["cancers"])
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
        (files("oncofed.server.report") / "report.html").read_text()
    )
    return template.render(
        results=results,
        comparison=comparison,
        study=results["study"],
        classes=results["study"]["task"]["kind"] == "classification",
        folds=folds,
        modalities=modalities.held(results),
        genes=modalities.RNA in modalities.seen(results["study"]),
        pictures={
            name: jinja2.utils.markupsafe.Markup(svg) for name, svg in sections.items()
        },  # our own SVG, not input
        summed=summed,
        specialisation=_specialisation(folds, results["study"]["seed"]),
        balance={g: analysis.balance_of_fold(folds[0], g) for g in analysis.mixtures(folds[0])} if folds else {},
        mixture_names=pictures.MIXTURES,
        moved=sum(f["bytes_to_sites"] + f["bytes_from_sites"] for f in results["folds"]),
    )


def _experts(fold: dict[str, Any], cancers: list[str]) -> dict[str, str]:
    """Pictures of the experts of one fold: experts of different folds are different experts."""
    out: dict[str, str] = {}
    groups = analysis.mixtures(fold)
    evaluation = fold.get("evaluation", {})
    tables = {g: np.array(evaluation[f"routing/{g}"]) for g in groups if f"routing/{g}" in evaluation}
    if tables:
        out["routing"] = heat.shares(tables, cancers)
    worth = analysis.worth(evaluation)
    if worth is not None:
        out["worth"] = heat.worth(worth, cancers)
    if groups:
        out["load"] = pictures.load({g: analysis.load_by_round(fold, g) for g in groups})
        by_site = {g: analysis.load_by_site(fold, g) for g in groups}
        sites = by_site[groups[0]][0]
        if sites:
            out["site_load"] = heat.shares({g: share for g, (_, share) in by_site.items()}, sites)
    return out


def _specialisation(folds: list[dict[str, Any]], seed: int) -> dict[str, dict[str, Any]]:
    groups = analysis.mixtures(folds[0]) if folds else []
    found = {g: analysis.specialisation_by_fold(folds, g, seed=seed) for g in groups}
    return {g: value for g, value in found.items() if value is not None}


def summed_confusion(folds: list[dict[str, Any]]) -> np.ndarray | None:
    """Held-out patients of all folds by true and predicted type `[C, C]`, in a classification."""
    tables = [np.array(f["evaluation"]["confusion"]) for f in folds if "confusion" in f.get("evaluation", {})]
    return np.sum(tables, axis=0) if tables else None


def summed_evaluation(folds: list[dict[str, Any]], cancers: list[str]) -> list[dict[str, Any]]:
    """What the coordinator knows from sums alone, by cancer type: patients, loss, and C over pairs within sites or F1."""
    evaluations = [f["evaluation"] for f in folds if "evaluation" in f]
    if not evaluations:
        return []
    names = [k for k in ("patients", "events", "loss", "concordant", "comparable") if k in evaluations[0]]
    total = {k: np.sum([e[k] for e in evaluations], axis=0) for k in names}
    patients = np.maximum(total["patients"], 1.0)
    columns: dict[str, np.ndarray] = {"loss": np.where(total["patients"] > 0, total["loss"] / patients, np.nan)}
    confusion = summed_confusion(folds)
    if confusion is None:
        pairs = total["comparable"]
        columns["c_index"] = np.divide(total["concordant"], pairs, out=np.full(len(pairs), np.nan), where=pairs > 0)
    else:
        predicted = confusion.sum(0)
        columns["recall"] = np.where(total["patients"] > 0, np.diag(confusion) / patients, np.nan)
        columns["precision"] = np.where(predicted > 0, np.diag(confusion) / np.maximum(predicted, 1.0), np.nan)
        columns["f1"] = class_f1(confusion)
    return [
        {"cancer": cancer}
        | {k: int(total[k][i]) for k in ("patients", "events") if k in total}
        | {k: None if np.isnan(v[i]) else float(v[i]) for k, v in columns.items()}
        for i, cancer in enumerate(cancers)
    ]
