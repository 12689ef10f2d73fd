"""The report's view of genes: what speaks for each class, what is left without it, and which pathways stand out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from oncofed.server.report.look import BLUE, RED, STYLE, svg

LONGEST = 44
"""Characters of a set's name in the picture."""

CERTAIN = 0.05
"""A set with a smaller q has a dot."""


def sections(results: Mapping[str, Any], folds: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The pictures that the results hold numbers for."""
    out = {}
    genes = results.get("genes", {})
    if genes.get("measure") == "mean" and genes["cancers"]:
        out["class_means"] = class_means(genes["cancers"])
    told = [fold["ablation"] for fold in folds if fold.get("ablation")]
    if told and np.sum([t["patients"] for t in told]) > 0:
        out["ablation"] = ablation(told)
    pathways = results.get("pathways", {})
    if pathways.get("sets") and pathways["classes"]:
        out["pathways"] = pathway_map(pathways)
    return out


@STYLE
def class_means(classes: Mapping[str, Mapping[str, Any]]) -> str:
    """The first genes of each class: a panel a class, bars with their deviation over folds, pale where folds differ in sign.

    Each has a scale of its own: attributions of a class that the mean patient nearly belongs to are all small.
    """
    columns = min(4, len(classes))
    rows = -(-len(classes) // columns)
    longest = max(len(c["genes"]) for c in classes.values())
    figure = Figure(figsize=(2.6 * columns, rows * (0.7 + 0.17 * longest)), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, (name, c) in zip(axes, classes.items(), strict=False):
        mean = np.array([g["mean"] for g in c["genes"]])
        sd = np.array([g["sd"] or 0.0 for g in c["genes"]])
        sure = np.array([g["agreement"] == 1 for g in c["genes"]])
        place = np.arange(len(mean))
        bars = axis.barh(place, mean, color=np.where(mean > 0, RED, BLUE), height=0.7)
        for bar, certain in zip(bars, sure, strict=True):
            bar.set_alpha(0.85 if certain else 0.35)
        axis.errorbar(mean, place, xerr=sd, fmt="none", ecolor="#444444", elinewidth=0.8)
        axis.set_yticks(place, [g["gene"] for g in c["genes"]], fontsize=7.5)
        axis.set_ylim(longest - 0.5, -0.5)
        axis.tick_params(axis="x", labelsize=7.5)
        axis.locator_params(axis="x", nbins=4)
        axis.axvline(0, color="#999999", linewidth=0.6)
        axis.grid(axis="y", visible=False)
        between = "" if c["spearman"] is None else f", r {c['spearman']:.2f}"
        axis.set_title(f"{name}{between}", loc="left", fontsize=9)
    for axis in axes[len(classes) :]:
        axis.set_visible(False)
    figure.supxlabel("mean attribution, change of the class's log-probability", fontsize=8.5)
    return svg(figure)


@STYLE
def ablation(folds: Sequence[Mapping[str, Any]]) -> str:
    """Recall without a share of the genes, all folds' patients together: the class's own first genes beside random ones."""
    patients = np.sum([f["patients"] for f in folds], axis=0)
    seen = patients > 0
    shares = np.array([0.0, *folds[0]["shares"]])
    place = np.arange(len(shares))  # evenly, or all but the last shares would lie on one spot
    figure = Figure(figsize=(6.5, 3.4), layout="constrained")
    axis = figure.subplots()
    words = {"hits": "the genes that rank first for the class", "random": "as many random genes"}
    for (key, label), colour in zip(words.items(), (RED, "#777777"), strict=True):
        recall = np.sum([f[key] for f in folds], axis=0)[seen] / patients[seen, None]
        axis.plot(place, recall.T, color=colour, alpha=0.22, linewidth=0.9)
        axis.plot(place, recall.mean(0), color=colour, linewidth=2.2, marker="o", markersize=3.5, label=label)
    axis.set_xticks(place, ["none", *(f"{100 * s:g} %" for s in shares[1:])])
    axis.set_ylim(-0.02, 1.02)
    axis.set_xlabel("share of the panel's genes that is taken out")
    axis.set_ylabel("recall")
    axis.legend(frameon=False, loc="lower left", fontsize=8)
    return svg(figure)


@STYLE
def pathway_map(pathways: Mapping[str, Any]) -> str:
    """z of the sets that stand out most, by class; sets are in the order of the class in which they stand out."""
    classes = list(pathways["classes"])
    z = np.array([pathways["classes"][c]["z"] for c in classes], dtype=np.float64).T
    q = np.array([pathways["classes"][c]["q"] for c in classes], dtype=np.float64).T
    where = np.abs(z).argmax(1)
    order = np.lexsort((-np.abs(z).max(1), where))
    z, q = z[order], q[order]
    names = [f"{_short(pathways['sets'][i]['name'])} ({pathways['sets'][i]['genes']})" for i in order]
    figure = Figure(figsize=(4.4 + 0.34 * len(classes), 1.1 + 0.2 * len(names)), layout="constrained")
    axis = figure.subplots()
    limit = max(float(np.abs(z).max()), 1.0)
    image = axis.imshow(z, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
    rows, columns = np.nonzero(q < CERTAIN)
    axis.plot(columns, rows, "o", color="#ffffff", markeredgecolor="#333333", markeredgewidth=0.5, markersize=3)
    axis.set_xticks(range(len(classes)), classes, rotation=90)
    axis.set_yticks(range(len(names)), names, fontsize=7.5)
    axis.grid(False)
    figure.colorbar(image, ax=axis, shrink=0.7, label="z", aspect=25)
    return svg(figure)


def _short(name: str) -> str:
    plain = name.replace("_", " ")
    return plain if len(plain) <= LONGEST else plain[: LONGEST - 1] + "…"
