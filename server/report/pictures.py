"""The report's curves and intervals, each a function from numbers to an SVG."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from oncofed.server.report.look import BLUE, COLOURS, MIXTURES, STYLE, svg

SCORES = {"c_index": "C-index within site and cancer", "macro_f1": "macro-F1"}
"""Scores of a round, by their key's ending."""

Curve = list[tuple[int, float]]


@STYLE
def learning_curves(folds: list[dict[str, Any]]) -> str:
    """By round: losses of pre-training and training, and the score of those patients that are scored between rounds.

    Empty where sites tell neither, as under privacy.
    """
    panels = [(title, series) for title, series in _panels(folds) if any(series.values())]
    if not panels:
        return ""
    figure = Figure(figsize=(4.5 * len(panels), 3), layout="constrained")
    for axis, (title, series) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for colour, (label, lines) in zip((BLUE, "#d98a29"), series.items(), strict=False):
            draw_lines(axis, lines, colour, label)
        axis.set_title(title, loc="left", fontsize=9)
        axis.set_xlabel("round")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        if len(series) > 1:
            axis.legend(frameon=False)
    return svg(figure)


def _panels(folds: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, list[Curve]]]]:
    """Title and series of each panel; a series holds a line a fold."""
    before = [fold["pretraining"]["curve"] for fold in folds if "pretraining" in fold]
    after = [fold["curve"] for fold in folds]
    if before:
        yield "pre-training loss (mean per patient)", {"training": _series(before, "train_loss")}
    losses = {"training": _series(after, "train_loss")}
    validated = _series(after, "validation_loss")
    yield "loss (mean per patient)", losses | ({"validation": validated} if validated else {})
    who, note = ("validation", "validation patients") if validated else ("test", "held-out patients, shown only")
    for key, name in SCORES.items():
        lines = _series(after, f"{who}_{key}")
        if any(len(line) > 1 for line in lines):
            yield f"{name}\n({note})", {who: lines}


def _series(curves: list[list[dict[str, Any]]], key: str) -> list[Curve]:
    lines = [[(point["round"], point[key]) for point in curve if point.get(key) is not None] for curve in curves]
    return [line for line in lines if line]


def draw_lines(axis: Axes, lines: list[Curve], colour: str, label: str) -> None:
    """A thin line a fold, and a thick one for their mean over the rounds that all of them have."""
    by_round: dict[int, list[float]] = {}
    for line in lines:
        axis.plot(*zip(*line, strict=True), color=colour, alpha=0.3, linewidth=1)
        for round_, value in line:
            by_round.setdefault(round_, []).append(value)
    full = [(r, float(np.mean(v))) for r, v in sorted(by_round.items()) if len(v) == len(lines)]
    marker = "o" if len(full) < 15 else None
    if full:
        axis.plot(*zip(*full, strict=True), color=colour, linewidth=2, marker=marker, markersize=3, label=label)


@STYLE
def forest(methods: dict[str, dict[str, Any]]) -> str:
    """The headline and the score of each cancer type with intervals: a row a cancer type, a colour a method."""
    classes = all("macro_f1" in m for m in methods.values())
    headline, by = ("macro_f1", "by_class") if classes else ("c_index", "by_cancer")
    names = list(methods)
    cancers = sorted({c for m in methods.values() for c in m[by]})
    rows = ["mean over classes" if classes else "mean over cancers", *cancers]
    figure = Figure(figsize=(8, 0.5 + 0.16 * (len(names) + 1.5) * len(rows)))
    axis = figure.subplots()
    for i, row in enumerate(rows):
        for j, name in enumerate(names):
            value = methods[name][headline] if i == 0 else methods[name][by].get(row)
            if value is None or value["value"] is None:
                continue
            y = -(i * (len(names) + 1.5) + j)
            colour = COLOURS.get(name, "#555555")
            if value["low"] is not None:
                axis.plot([value["low"], value["high"]], [y, y], color=colour, linewidth=1.5)
            label = name if i == 0 else None
            axis.plot(value["value"], y, "o", color=colour, markersize=5 if i == 0 else 3.5, label=label)
    if not classes:
        axis.axvline(0.5, color="#999999", linewidth=0.8, linestyle="--")
    axis.set_yticks([-(i * (len(names) + 1.5) + (len(names) - 1) / 2) for i in range(len(rows))], rows)
    score = "F1 of the class" if classes else "C-index within the cancer type"
    axis.set_xlabel(f"{score}, held-out patients, 95 % bootstrap interval")
    axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    return svg(figure)


@STYLE
def load(shares: dict[str, np.ndarray]) -> str:
    """Share `[R, E]` of each expert in the gate mass of a round: stacked areas, one panel a mixture."""
    figure = Figure(figsize=(4.5 * len(shares), 2.8), layout="constrained")
    for axis, (name, share) in zip(figure.subplots(1, len(shares), squeeze=False)[0], shares.items(), strict=True):
        rounds, experts = share.shape
        colours = matplotlib.colormaps["tab20"](np.arange(experts) % 20)
        axis.stackplot(np.arange(1, rounds + 1), share.T, colors=colours, alpha=0.75, linewidth=0)
        middle = np.cumsum(share[-1]) - share[-1] / 2
        for e in range(experts):
            if share[-1, e] > 0.03:  # a narrower area has no room for its number
                axis.annotate(str(e), (rounds, middle[e]), (4, 0), textcoords="offset points", va="center", fontsize=8)
        axis.set_xlim(1, max(rounds, 2))
        axis.set_ylim(0, 1)
        axis.set_title(MIXTURES.get(name, name), loc="left", fontsize=9)
        axis.set_xlabel("round")
        axis.set_ylabel("share of gate mass")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(False)
    return svg(figure)
