"""From results to one HTML file."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import jinja2
import numpy as np
from oncofed.server.report import pictures


def render(comparison: dict[str, Any]) -> str:
    """The report of a comparison (`deploy.compare.compare`) or, with only `results` in it, of a study run for real."""
    results = comparison["results"]
    folds = [f for f in results["folds"] if f["fold"] >= 0]
    sections: dict[str, str] = {}
    if folds:
        sections["curves"] = pictures.learning_curves(folds)
        tables = routing_tables(folds)
        if tables:
            sections["routing"] = pictures.routing(tables, results["cancers"])
    if "methods" in comparison:
        sections["forest"] = pictures.forest(comparison["methods"])
    if comparison.get("risk_groups", {}).get("curves"):
        sections["kaplan_meier"] = pictures.kaplan_meier(comparison["risk_groups"])
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
        (files("oncofed.server.report") / "report.html").read_text()
    )
    return template.render(
        results=results,
        comparison=comparison,
        study=results["study"],
        folds=folds,
        pictures={
            name: jinja2.utils.markupsafe.Markup(svg) for name, svg in sections.items()
        },  # our own SVG, not input
        summed=summed_evaluation(folds, results["cancers"]),
        moved=sum(f["bytes_to_sites"] + f["bytes_from_sites"] for f in results["folds"]),
    )


def routing_tables(folds: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Gate mass `[C, E]` by mixture, of the first fold: experts of different folds are different experts."""
    evaluation = folds[0].get("evaluation", {})
    return {k.removeprefix("routing/"): np.array(v) for k, v in evaluation.items() if k.startswith("routing/")}


def summed_evaluation(folds: list[dict[str, Any]], cancers: list[str]) -> list[dict[str, Any]]:
    """What the coordinator knows from sums alone: by cancer type patients, events, loss, and C over pairs within sites."""
    evaluations = [f["evaluation"] for f in folds if "evaluation" in f]
    total = (
        {
            k: np.sum([e[k] for e in evaluations], axis=0)
            for k in ("patients", "events", "loss", "concordant", "comparable")
        }
        if evaluations
        else {}
    )
    return [
        {
            "cancer": cancer,
            "patients": int(total["patients"][i]),
            "events": int(total["events"][i]),
            "loss": float(total["loss"][i] / max(total["patients"][i], 1)),
            "c_index": float(total["concordant"][i] / total["comparable"][i]) if total["comparable"][i] else None,
        }
        for i, cancer in enumerate(cancers if total else [])
    ]
