"""The report's view of every model at every hospital, and of hospitals that took no part (server/cross_site.py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from oncofed.common.metrics import ratio
from oncofed.server.cross_site import ENOUGH, FEDERATED, KINDS, LOCAL, PERSONALISED, matrix, summed
from oncofed.server.report.heat import LONGEST
from oncofed.server.report.look import STYLE, svg

__all__ = ["every_model", "matrix", "sites_apart"]

WRITTEN = 15
"""A matrix of more sites than this shows colours only."""

GREY = "#d9d9d9"
OWN = "#222222"
"""Frame of the cell of a hospital's own model."""

TITLES = {
    FEDERATED: "",
    LOCAL: "trained at one hospital alone",
    PERSONALISED: "federated, then trained on at one hospital",
}


@STYLE
def every_model(table: Mapping[str, Any]) -> str:
    """Score by model (row) and hospital (column), the federated model on top; grey where there are too few pairs to tell.

    A C-index has colours on both sides of 0.5, which is chance; their range leaves out the most extreme twentieth of cells.
    """
    score = np.array(table["score"], dtype=np.float64)
    shown = np.where(np.array(table["pairs"]) >= ENOUGH, score, np.nan)
    kinds = [m["kind"] for m in table["models"]]
    groups = [[i for i, kind in enumerate(kinds) if kind == wanted] for wanted in KINDS if wanted in kinds]
    sites = [_short(site) for site in table["sites"]]
    row, wide = (0.3 if len(sites) <= WRITTEN else 0.2), (0.52 if len(sites) <= WRITTEN else 0.26)
    figure = Figure(
        figsize=(3.6 + wide * len(sites), 1.6 + row * len(kinds) + 0.35 * len(groups)), layout="constrained"
    )
    axes = list(
        figure.subplots(len(groups), 1, squeeze=False, height_ratios=[len(g) for g in groups], sharex=True)[:, 0]
    )
    colours, norm = _scale(shown, table["measure"] == "c_index")
    for axis, rows in zip(axes, groups, strict=True):
        image = axis.imshow(shown[rows], cmap=colours, norm=norm, aspect="auto")
        axis.set_facecolor(GREY)
        axis.grid(False)
        axis.spines[:].set_visible(False)
        names = [_short(table["models"][i]["site"] or FEDERATED) for i in rows]
        axis.set_yticks(range(len(rows)), names)
        axis.set_title(TITLES[kinds[rows[0]]], loc="left", fontsize=9)
        for i, r in enumerate(rows):
            if table["models"][r]["site"] in table["sites"]:
                j = table["sites"].index(table["models"][r]["site"])
                axis.add_patch(
                    Rectangle((j - 0.5, i - 0.5), 1, 1, fill=False, edgecolor=OWN, linewidth=1.2, clip_on=False)
                )
        if len(sites) <= WRITTEN:
            _write(axis, image, shown[rows])
        axis.tick_params(length=0, labelbottom=axis is axes[-1])
    c_index = table["measure"] == "c_index"
    pairs = np.max(table["pairs"], axis=0)
    axes[-1].set_xticks(range(len(sites)), [f"{s} ({n:.0f})" for s, n in zip(sites, pairs, strict=True)], rotation=90)
    axes[-1].set_xlabel(f"held-out patients of ({'pairs' if c_index else 'patients'})")
    label = "C-index within site and cancer" if c_index else "accuracy"
    lowest = float(np.nanmin(shown, initial=0.45)) - 0.02
    beyond = ("both" if lowest < (norm.vmin or 0.0) else "max") if c_index else "neither"
    shrink = min(1.0, 4 / len(kinds) + 0.4)
    bar = figure.colorbar(image, ax=axes, shrink=shrink, label=label, aspect=25, extend=beyond)
    if c_index:  # of the colours below chance, those that are seen
        bar.ax.set_ylim(max(norm.vmin or 0.0, lowest))
    return svg(figure)


def sites_apart(study: Mapping[str, Any], folds: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of each hospital that was held out whole: its patients, the pairs behind the C-index (None: accuracy) and the score."""
    names = study["splits"].get("held_out_sites", [])
    rows = []
    for fold in folds if names else []:
        if "evaluation" not in fold:
            continue
        s = summed({key: np.array(value) for key, value in fold["evaluation"].items()})
        pairs = s.get("comparable")
        score = float(ratio(*((s["hits"], s["patients"]) if pairs is None else (s["concordant"], pairs))))
        rows.append(
            {
                "site": names[fold["fold"]],
                "patients": int(s["patients"]),
                "pairs": None if pairs is None else int(pairs),
                "score": None if np.isnan(score) else score,
                "loss": s["loss"] / max(s["patients"], 1.0),
            }
        )
    return rows


def _scale(shown: np.ndarray, c_index: bool) -> tuple[str, Normalize]:
    known = shown[np.isfinite(shown)]
    if not c_index:
        low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)
        return "Blues", Normalize(min(low, 0.95), max(high, low + 0.05))
    reach = max(float(np.quantile(np.abs(known - 0.5), 0.95)), 0.05) if known.size else 0.5
    return "RdBu", TwoSlopeNorm(0.5, 0.5 - reach, 0.5 + reach)


def _write(axis: Axes, image: AxesImage, values: np.ndarray) -> None:
    for i, j in np.argwhere(np.isfinite(values)):
        red, green, blue, _ = image.cmap(image.norm(values[i, j]))
        colour = "white" if 0.3 * red + 0.59 * green + 0.11 * blue < 0.5 else "#333333"
        axis.text(j, i, f"{values[i, j]:.2f}".lstrip("0"), ha="center", va="center", fontsize=7, color=colour)


def _short(name: str) -> str:
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…"
