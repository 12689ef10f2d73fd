"""A hospital's picture of its own patients: survival curves of one cancer type, faint, coloured by percentile of risk."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
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
    """Write the picture; the file's ending says the format."""
    index = prediction.model.cancers.index(cancer)
    percentile = prediction.percentile[prediction.cohort.cancer == index]
    curves = prediction.curves(index, MONTHS)
    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(7, 4.2), layout="constrained")
        axis = figure.subplots()
        colours = ScalarMappable(Normalize(0, 100), "viridis_r")
        faint = float(np.clip(15 / len(curves), 0.12, 0.7))
        for p, curve in zip(percentile, curves, strict=True):
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
        figure.colorbar(colours, ax=axis, label="percentile of risk among training patients")
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=150, metadata={"Date": None} if file.suffix == ".svg" else None)
