"""A hospital's picture of its own patients of one cancer type, coloured by percentile of risk.

Survival curves and, of several modalities, which of them drives whose risk. Nobody is named in it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from oncofed.client.new_patients import WORDS
from oncofed.client.predict import Prediction

MONTHS = np.arange(0, 121, 1, dtype=np.float64)
FORMATS = (".svg", ".png")


def choose_cancer(prediction: Prediction, cancer: str, file: Path) -> str:
    """The cancer type to draw: the one named, or the one with the most patients. Raises where nothing can be drawn."""
    counts = prediction.count_by_cancer
    if file.suffix not in FORMATS:
        raise ValueError(f"--picture {file.name}: the name must end in {' or '.join(FORMATS)}")
    if not prediction.survival:
        raise ValueError("--picture shows survival curves, and this model classifies; leave --picture out")
    if cancer and cancer not in counts:
        raise ValueError(f"--cancer {cancer}: no patient of it was scored; choose from {', '.join(counts)}")
    chosen = cancer or max(counts, key=lambda name: counts[name])
    rows = prediction.cohort.cancer == prediction.model.cancers.index(chosen)
    if np.isnan(prediction.percentile[rows]).any():
        raise ValueError(f"--picture: too few patients of {chosen} trained this model to know its baseline")
    return chosen


def draw_curves(prediction: Prediction, cancer: str, file: Path) -> None:
    """Write the picture; the file's ending says the format. A second panel shows what each modality adds, where somebody has two."""
    rows = prediction.cohort.cancer == prediction.model.cancers.index(cancer)
    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        parts = [np.isfinite(v[rows]) for v in prediction.parts.values()]
        several = len(parts) > 1 and bool((parts[0] & parts[1]).any())
        figure = Figure(figsize=(12 if several else 7, 4.2), layout="constrained")
        axes = list(figure.subplots(1, 1 + several, squeeze=False, width_ratios=[3, 2][: 1 + several])[0])
        colours = ScalarMappable(Normalize(0, 100), "viridis_r")
        _curves(axes[0], prediction, cancer, rows, colours)
        if several:
            _parts(axes[1], prediction, rows, colours)
        figure.colorbar(colours, ax=axes, label="percentile of risk among training patients")
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=150, metadata={"Date": None} if file.suffix == ".svg" else None)


def _curves(axis: Axes, prediction: Prediction, cancer: str, rows: np.ndarray, colours: ScalarMappable) -> None:
    """Survival of each patient, faint, and their mean."""
    curves = prediction.curves(prediction.model.cancers.index(cancer), MONTHS)
    faint = float(np.clip(15 / len(curves), 0.12, 0.7))
    for p, curve in zip(prediction.percentile[rows], curves, strict=True):
        axis.plot(MONTHS, curve, color=colours.to_rgba(p), alpha=faint, linewidth=1)
    axis.plot(MONTHS, curves.mean(0), color="#222222", linewidth=2, label="mean of these patients")
    axis.set_ylim(0, 1.02)
    axis.set_xlim(0, MONTHS[-1])
    axis.set_xticks(MONTHS[::24])
    axis.set_xlabel("months since diagnosis")
    axis.set_ylabel("predicted survival")
    last = prediction.model.grid.starts[-1]
    if last < MONTHS[-1]:
        axis.axvspan(last, MONTHS[-1], color="#888888", alpha=0.08, linewidth=0)
        axis.text(last + 1, 1.0, "few events: extrapolated", color="#777777", fontsize=7, va="top")
    axis.set_title(f"{cancer}: {len(curves)} patients", loc="left", fontsize=10)
    axis.legend(loc="lower left", framealpha=0.9, edgecolor="none")


def _parts(axis: Axes, prediction: Prediction, rows: np.ndarray, colours: ScalarMappable) -> None:
    """What the first two modalities add to each patient's log hazard; who has but one of them is a tick at the edge."""
    (a, x_N), (b, y_N) = ((m, v[rows]) for m, v in list(prediction.parts.items())[:2])
    percentile = prediction.percentile[rows]
    has_x, has_y = np.isfinite(x_N), np.isfinite(y_N)
    both = has_x & has_y
    reach = 1.15 * max(float(np.abs(v[known]).max(initial=0.0)) for v, known in ((x_N, has_x), (y_N, has_y))) or 1.0
    for slope in (1, -1):
        axis.axline((0, 0), slope=slope, color="#999999", linewidth=0.8, linestyle=":")
    axis.scatter(x_N[both], y_N[both], c=colours.to_rgba(percentile[both]), s=18, linewidths=0, alpha=0.9)
    said = [f"{both.sum()} patients have both"]
    for only, x, y, marker, end in (
        (has_x & ~has_y, x_N, np.full(len(y_N), -reach), "|", f"{WORDS[b]}: at the bottom"),
        (has_y & ~has_x, np.full(len(x_N), -reach), y_N, "_", f"{WORDS[a]}: at the left"),
    ):
        axis.scatter(x[only], y[only], c=colours.to_rgba(percentile[only]), marker=marker, s=90)
        if only.any():
            said.append(f"{only.sum()} lack {end}")
    axis.set_xlim(-reach, reach)
    axis.set_ylim(-reach, reach)
    axis.set_aspect("equal")
    grey: dict[str, Any] = {"transform": axis.transAxes, "fontsize": 7, "color": "#777777"}
    axis.text(0.995, 0.5, f"driven by {WORDS[a]}", ha="right", va="center", rotation=90, **grey)
    axis.text(0.5, 0.995, f"driven by {WORDS[b]}", ha="center", va="top", **grey)
    axis.set_xlabel(f"part of {WORDS[a]} in the log hazard")
    axis.set_ylabel(f"part of {WORDS[b]}")
    axis.set_title("\n".join(said), loc="left", fontsize=8)
