"""The report's pictures, each a function from numbers to an SVG."""

from __future__ import annotations

import io
import re
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

COLOURS = {"federated": "#0b6e99", "fedavg": "#d98a29", "pooled": "#3f3f46", "local": "#b03a5b", "ridge": "#6b8e23"}

STYLE = matplotlib.rc_context(
    {
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.25,
        "svg.fonttype": "none",
    }
)
"""Our look as a decorator: it holds while a picture is drawn and leaves the user's matplotlib alone."""


@STYLE
def learning_curves(folds: list[dict[str, Any]]) -> str:
    """Training loss and held-out C-index by round: a thin line a fold, a thick one for their mean."""
    figure = Figure(figsize=(9, 3))
    left, right = figure.subplots(1, 2)
    for axis, key in ((left, "train_loss"), (right, "test_c_index")):
        lines = [[(p["round"], p[key]) for p in fold["curve"] if p.get(key) is not None] for fold in folds]
        lines = [line for line in lines if line]
        for line in lines:
            axis.plot(*zip(*line, strict=True), color="#0b6e99", alpha=0.3, linewidth=1)
        by_round: dict[int, list[float]] = {}
        for line in lines:
            for round_, value in line:
                by_round.setdefault(round_, []).append(value)
        full = [(r, float(np.mean(v))) for r, v in sorted(by_round.items()) if len(v) == len(lines)]
        if full:
            axis.plot(
                *zip(*full, strict=True),
                color="#0b6e99",
                linewidth=2,
                marker="o" if len(full) < 15 else None,
                markersize=3,
            )
        axis.set_xlabel("round")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.set_title("training loss (mean per patient)", loc="left", fontsize=9)
    right.set_title(
        "held-out C-index within site and cancer\n(shown only: no choice is made on it)", loc="left", fontsize=9
    )
    return _svg(figure)


@STYLE
def forest(methods: dict[str, dict[str, Any]]) -> str:
    """C-index by cancer type with intervals, a row a cancer, a colour a method."""
    names = list(methods)
    cancers = sorted({c for m in methods.values() for c in m["by_cancer"]})
    rows = ["mean over cancers", *cancers]
    figure = Figure(figsize=(8, 0.5 + 0.16 * (len(names) + 1.5) * len(rows)))
    axis = figure.subplots()
    for i, row in enumerate(rows):
        for j, name in enumerate(names):
            value = methods[name]["c_index"] if i == 0 else methods[name]["by_cancer"].get(row)
            if value is None or value["value"] is None:
                continue
            y = -(i * (len(names) + 1.5) + j)
            colour = COLOURS.get(name, "#555555")
            axis.plot([value["low"], value["high"]], [y, y], color=colour, linewidth=1.5)
            axis.plot(
                value["value"], y, "o", color=colour, markersize=5 if i == 0 else 3.5, label=name if i == 0 else None
            )
    axis.axvline(0.5, color="#999999", linewidth=0.8, linestyle="--")
    axis.set_yticks([-(i * (len(names) + 1.5) + (len(names) - 1) / 2) for i in range(len(rows))], rows)
    axis.set_xlabel("C-index within the cancer type, held-out patients, 95 % bootstrap interval")
    axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    return _svg(figure)


@STYLE
def kaplan_meier(groups: dict[str, Any]) -> str:
    """Survival of the risk groups with bands and numbers at risk."""
    months = groups["months"]
    figure = Figure(figsize=(6.5, 4))
    axis, table = figure.subplots(2, 1, height_ratios=[5, 1], sharex=True)
    colours = {"low risk": "#0b6e99", "high risk": "#b03a5b"}
    marks = [m for m in months if m % 24 == 0]
    for i, (name, curve) in enumerate(groups["curves"].items()):
        axis.step(months, curve["survival"], where="post", color=colours[name], label=f"{name} ({curve['patients']})")
        axis.fill_between(
            months, curve["lower"], curve["upper"], step="post", color=colours[name], alpha=0.15, linewidth=0
        )
        for m in marks:
            table.text(
                m, -i, str(curve["at_risk"][months.index(m)]), ha="center", va="center", color=colours[name], fontsize=8
            )
    axis.set_ylim(0, 1.02)
    axis.set_ylabel("survival")
    p = groups["logrank_p"]
    axis.set_title(
        "" if p is None else f"log-rank p {'< 1e-16' if p < 1e-16 else f'= {p:.2g}'}", loc="left", fontsize=9
    )
    axis.legend(frameon=False, loc="lower left")
    table.set_ylim(-1.6, 0.6)
    table.set_yticks([])
    table.grid(False)
    table.spines["left"].set_visible(False)
    table.set_xticks(marks)
    table.set_xlabel("months since diagnosis; numbers at risk above")
    return _svg(figure)


@STYLE
def routing(tables: dict[str, np.ndarray], cancers: list[str]) -> str:
    """Share of each cancer type's held-out patients that each expert carries, one panel a mixture."""
    experts = [t.shape[1] for t in tables.values()]
    figure = Figure(figsize=(1.6 + 0.55 * sum(experts) + len(tables), 0.9 + 0.32 * len(cancers)))
    axes = figure.subplots(1, len(tables), squeeze=False, width_ratios=experts)
    for axis, (name, table) in zip(axes[0], tables.items(), strict=True):
        share = table / np.maximum(table.sum(1, keepdims=True), 1e-12)
        image = axis.imshow(share, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        for i, j in np.ndindex(*share.shape):
            axis.text(
                j,
                i,
                f"{share[i, j]:.2f}".lstrip("0"),
                ha="center",
                va="center",
                fontsize=7,
                color="white" if share[i, j] > 0.6 else "#333333",
            )
        axis.set_xticks(range(table.shape[1]), [str(e) for e in range(table.shape[1])])
        axis.set_yticks(range(len(cancers)), cancers if axis is axes[0][0] else [""] * len(cancers))
        axis.set_title(
            {"expert": "first-layer experts", "attention": "attention experts"}.get(name, name), loc="left", fontsize=9
        )
        axis.grid(False)
    figure.colorbar(image, ax=axes[0].tolist(), shrink=0.8, label="share of gate mass")
    return _svg(figure, tight=False)


def _svg(figure: Figure, tight: bool = True) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight" if tight else None, metadata={"Date": None})
    text = buffer.getvalue()
    return re.sub(r"^.*?(?=<svg)|<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
