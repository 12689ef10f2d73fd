"""Show a comparison: tables on the terminal, `comparison.json`, and the HTML report."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from oncofed.server.checkpoint import write_text
from oncofed.server.report.render import render
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table


def write_comparison(comparison: dict[str, Any], out: Path) -> Path:
    """Write `comparison.json` and `report.html` below `out`; returns the report's path."""
    clean = without_nan(comparison)
    write_text(out / "comparison.json", json.dumps(clean, indent=1))
    report = out / "report.html"
    write_text(report, render(clean))
    return report


def without_nan(value: Any) -> Any:
    """A copy with NaN and infinity as None: JSON has no such numbers."""
    if isinstance(value, dict):
        return {k: without_nan(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_tables(comparison: dict[str, Any], console: Console) -> None:
    """Methods, cancers and sites, in 80 columns; the intervals by cancer stand in the report."""
    main, methods = comparison["main"], comparison["methods"]
    table = _table("Held-out C-index within a cancer type, mean over cancers (95 % bootstrap)")
    for column in ("method", "C-index", f"{main} minus it", "mixed*", "MB", "s"):
        table.add_column(column, justify="left" if column == "method" else "right", no_wrap=True)
    for name, m in methods.items():
        cost = m["cost"]
        moved = f"{(cost['bytes_to_sites'] + cost['bytes_from_sites']) / 1e6:.0f}" if "rounds" in cost else ""
        gap = interval(comparison["differences"][name], sign="+") if name in comparison["differences"] else ""
        label = f"[bold]{name}[/]" if name == main else name
        mixed = number(m["all_cancers_mixed"])
        table.add_row(label, interval(m["c_index"]), gap, mixed, moved, f"{cost['seconds']:.0f}")
    console.print(table)
    console.print("[dim]* over pairs of patients of any cancers: no measure of quality[/]\n")
    table = _table("C-index by cancer type", "cancer", *methods)
    for cancer in methods[main]["by_cancer"]:
        table.add_row(cancer, *(number(m["by_cancer"].get(cancer, {}).get("value")) for m in methods.values()))
    console.print(table)
    table = _table("C-index within each site", "site", "n", "events", "pairs", *methods)
    for row in comparison["sites"]:
        c = row["c_index"]
        values = (number(c.get(m)) for m in methods)
        table.add_row(row["site"][:17], str(row["patients"]), str(row["events"]), str(row["pairs"]), *values)
    console.print(table)
    left_out = comparison["results"]["left_out"]
    if left_out:
        first = f"{left_out[0]['site']}: {left_out[0]['reason']}"
        console.print(f"[yellow]{len(left_out)} answers were left out; the first:[/] {escape(first)}")


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, justify="left" if column in ("cancer", "site") else "right", no_wrap=True)
    return table


def number(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.3f}"


def interval(value: dict[str, float], sign: str = "") -> str:
    """`0.652 (.631-.668)`, or with a sign `+.013 (-.002, +.027)`: short enough for a terminal."""
    point, low, high = (f"{value[key]:{sign}.3f}" for key in ("value", "low", "high"))
    if sign:
        return f"{point} ({low}, {high})".replace("0.", ".")
    return f"{point} ({low}-{high})".replace("(0.", "(.").replace("-0.", "-.")
