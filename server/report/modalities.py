"""The report's view of several modalities: who holds which, and how they share the risk, round by round."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from oncofed.common.modalities import ALTERATIONS, MODALITIES, PATHOLOGY, RNA
from oncofed.server.report.look import COLOURS, STYLE, svg
from oncofed.server.report.pictures import Curve, draw_lines

Branches = Mapping[str, Mapping[str, float]]
"""What a round's training says of each modality: `patients`, `deviation`, `share` and `factor`."""

PANELS = {
    "share": "share in the variance of the log hazard",
    "factor": "factor on the encoder's learning rate",
}


def held(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each modality of a multimodal study, how many sites trained its encoder, and what it was read from; else none."""
    folds = [f for f in results["folds"] if "site_evidence" in f]
    beside, fusion = results.get("beside", {}), results["study"].get("fusion", {})
    alterations = len(str(beside.get("alterations", "")).splitlines())
    about = {
        RNA: "embeddings of scGPT" if fusion.get("rna_encoder") == "scgpt" else "",
        PATHOLOGY: beside.get("images", ""),
        ALTERATIONS: f"{alterations} columns" if alterations else "",
    }
    rows = []
    for m in seen(results["study"]) if results["study"]["model"]["name"] == "path_gptomic" else ():
        sites = {s for f in folds for s, v in f["site_evidence"].items() if v[f["blocks"].index(m)] > 0}
        # FedAvg asks nobody what they hold, and under masks nobody tells
        by_evidence = results["study"]["aggregation"]["rule"] == "evidence" and any(f["site_evidence"] for f in folds)
        rows.append({"name": m, "sites": len(sites) if by_evidence else None, "about": about[m]})
    return rows


def seen(study: Mapping[str, Any]) -> list[str]:
    """The modalities that the study's model sees."""
    several = study["model"]["name"] == "path_gptomic"
    return [m for m in MODALITIES if m in (study["fusion"]["modalities"] if several else (RNA,))]


def balance_by_method(comparison: Mapping[str, Any]) -> dict[str, list[list[Branches]]]:
    """By method, fold and round what was seen of the modalities; without a comparison the run's own, under an empty name."""
    told: dict[str, list[list[Branches]]] = comparison.get("balance", {})
    folds = [f for f in comparison["results"]["folds"] if f["fold"] >= 0]
    own = [[point.get("branches", {}) for point in f["curve"]] for f in folds]
    main = comparison.get("main", "")
    methods = ({} if main in told else {main: own}) | told
    return {name: runs for name, runs in methods.items() if len(_named(runs)) > 1}


@STYLE
def balance(methods: Mapping[str, list[list[Branches]]]) -> str:
    """By round each modality's share in the variance and the factor on its rate: a row a method, thin lines are folds."""
    figure = Figure(figsize=(9, 0.6 + 2.4 * len(methods)), layout="constrained")
    axes = figure.subplots(len(methods), 2, squeeze=False, sharex=True, sharey="col")
    for row, (method, runs) in zip(axes, methods.items(), strict=True):
        for axis, (key, title) in zip(row, PANELS.items(), strict=True):
            for m in _named(runs):
                draw_lines(axis, _lines(runs, m, key), COLOURS[m], m)
            axis.set_title(f"{method}: {title}" if method else title, loc="left", fontsize=9)
            axis.set_ylim(0, 1.04)
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        if all(value == 1 for m in _named(runs) for line in _lines(runs, m, "factor") for _, value in line):
            row[1].text(0.5, 0.5, "not modulated", ha="center", color="#777777", transform=row[1].transAxes)
    for axis in axes[-1]:
        axis.set_xlabel("round")
    axes[0][0].legend(frameon=False, ncols=len(MODALITIES))
    return svg(figure)


def _named(runs: list[list[Branches]]) -> list[str]:
    """The modalities that any round tells of, in their order."""
    there = {m for run in runs for point in run for m in point}
    return [m for m in MODALITIES if m in there]


def _lines(runs: list[list[Branches]], modality: str, key: str) -> list[Curve]:
    """A line a fold, over the rounds that tell of the modality."""
    lines = [[(i, point[modality][key]) for i, point in enumerate(run, 1) if modality in point] for run in runs]
    return [line for line in lines if line]
