"""Show what taking pathology away does: a table on the terminal, a picture, and the numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from oncofed.common.files import write_text
from oncofed.deploy.comparison.present import interval, without_nan
from oncofed.deploy.comparison.robustness import FUSION
from oncofed.deploy.comparison.variants import LATE
from oncofed.server.report.look import COLOURS, STYLE, svg
from rich import box
from rich.console import Console
from rich.table import Table

LINES = {FUSION: ("fusion", COLOURS["federated"], "o"), LATE: ("late fusion", COLOURS["late"], "s")}
"""Label, colour and marker of a method."""


def title(part: dict[str, Any], hospitals: int) -> str:
    """What was trained on; `hospitals` have pathology."""
    without = len(part["hospitals_without"])
    return f"trained without that of {without} of {hospitals} hospitals" if without else "trained with all pathology"


def print_robustness(result: dict[str, Any], console: Console) -> None:
    """A table for each training, in 80 columns."""
    console.print("Held-out C-index within a cancer type, mean over cancers (95 % bootstrap),")
    console.print("of patients with RNA and pathology, some of whom lose pathology")
    for part in result["trained"]:
        console.print()
        table = Table(
            title=f"{title(part, result['hospitals'])}; {part['patients']} patients",
            title_justify="left",
            box=box.SIMPLE_HEAD,
            show_edge=False,
            padding=(0, 1, 0, 0),
        )
        for column in ("lose pathology", FUSION, "late fusion", "fusion minus late"):
            table.add_column(column, justify="right", no_wrap=True)
        for point in part["points"]:
            scores = [interval(point["methods"][m]["c_index"]) for m in LINES]
            table.add_row(f"{point['share']:.0%}", *scores, interval(point["difference"], sign="+"))
        console.print(table)


@STYLE
def write_robustness(result: dict[str, Any], out: Path) -> Path:
    """Write `robustness.json`, `robustness.svg` and `robustness.png` below `out`; returns the last."""
    clean = without_nan(result)
    write_text(out / "robustness.json", json.dumps(clean, indent=1))
    figure, file = draw(clean), out / "robustness.png"
    write_text(file.with_suffix(".svg"), svg(figure))
    figure.savefig(file, dpi=200, bbox_inches="tight")
    return file


def draw(result: dict[str, Any]) -> Figure:
    """C-index against the share of patients who lose pathology, with intervals as bands: a panel for each training."""
    parts = result["trained"]
    figure = Figure(figsize=(0.6 + 3.6 * len(parts), 3.2), layout="constrained")
    axes = figure.subplots(1, len(parts), sharey=True, squeeze=False)[0]
    for axis, part in zip(axes, parts, strict=True):
        for method in LINES:
            _line(axis, part["points"], method)
        axis.set_title(title(part, result["hospitals"]), loc="left", fontsize=9)
        axis.set_xlabel("test patients who lose pathology, %")
        axis.set_xticks([100 * share for share in result["shares"]])
    axes[0].set_ylabel("C-index within the cancer type")
    axes[0].legend(frameon=False)
    return figure


def _line(axis: Axes, points: list[dict[str, Any]], method: str) -> None:
    label, colour, marker = LINES[method]
    known = [(100 * p["share"], p["methods"][method]["c_index"]) for p in points]
    known = [(x, c) for x, c in known if None not in c.values()]
    x = [share for share, _ in known]
    low, value, high = ([c[key] for _, c in known] for key in ("low", "value", "high"))
    axis.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
    axis.plot(x, value, color=colour, marker=marker, markersize=4, linewidth=1.8, label=label)
