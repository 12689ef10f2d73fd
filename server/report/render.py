"""From results to one HTML file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from oncofed.server import analysis
from oncofed.server.report import (
    classes,
    cross_site,
    curves,
    evaluation,
    genes,
    heat,
    modalities,
    network,
    pictures,
    privacy,
    transport,
)
from oncofed.server.report.pages import page


def render(comparison: dict[str, Any], audit: Mapping[str, Any] | None = None) -> str:
    """The report of a comparison (`deploy.compare.compare`) or, with only `results` in it, of a study run for real.

    `audit` is what `oncofed audit` measured of the study's privacy.
    """
    results = comparison["results"]
    folds = [f for f in results["folds"] if f["fold"] >= 0]
    sections = _experts(folds[0], results["cancers"]) if folds else {}
    measured = classes.measured(folds, results["study"], results["cancers"])
    one, several = classes.nouns(results["study"])
    if folds:
        sections["curves"] = pictures.learning_curves(folds)
    if "methods" in comparison:
        sections["forest"] = pictures.forest(comparison["methods"])
    if comparison.get("risk_groups", {}).get("curves"):
        sections["kaplan_meier"] = _risk_groups(comparison["risk_groups"])
    by_method = modalities.balance_by_method(comparison)
    if by_method:
        sections["modalities"] = modalities.balance(by_method)
    confusion = classes.sums(folds, "confusion")
    if len(confusion):
        sections["confusion"] = heat.confusion(confusion.sum(0), results["cancers"], one)
    if measured:
        below = results["study"]["task"]["abstain_below"]
        sections["certainty"] = classes.certainty(classes.sums(folds, "certainty").sum(0), below)
    crossed, apart = cross_site.matrix(folds), cross_site.sites_apart(results["study"], folds)
    if crossed:
        sections["cross_site"] = cross_site.every_model(crossed)
    sections |= evaluation.sections(results) | genes.sections(results, folds) | network.sections(results)
    sections |= privacy.sections(results, audit)
    return page(
        "report.html",
        sections,
        results=results,
        comparison=comparison,
        study=results["study"],
        classes=results["study"]["task"]["kind"] == "classification",
        folds=folds,
        modalities=modalities.held(results),
        genes=modalities.RNA in modalities.seen(results["study"]),
        drawn=network.MOST,
        evaluated=evaluation.rows(results | {"folds": folds}),
        enough=cross_site.ENOUGH,
        sites_left_out=evaluation.left_out(results.get("evaluation", {}).get("by_site", [])),
        measured=measured,
        privacy=privacy.view(results, audit),
        crossed=crossed,
        apart=apart,
        one=one,
        several=several,
        specialisation=_specialisation(folds, results["study"]["seed"]),
        balance={g: analysis.balance_of_fold(folds[0], g) for g in analysis.mixtures(folds[0])} if folds else {},
        mixture_names=pictures.MIXTURES,
        transport=transport.shares(results["folds"]),
        travelled=transport.travelled(results["folds"]),
        robust=transport.robust(results["folds"]),
        moved=sum(f["bytes_to_sites"] + f["bytes_from_sites"] for f in results["folds"]),
    )


def _risk_groups(groups: dict[str, Any]) -> str:
    named = [{"name": name, "time": groups["months"], **c} for name, c in groups["curves"].items()]
    return curves.survival_curves(named, groups["logrank_p"], " since diagnosis")


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
