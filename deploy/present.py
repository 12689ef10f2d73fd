"""Show a comparison: tables on the terminal, `comparison.json`, and the HTML report."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from oncofed.server.checkpoint import write_text
from oncofed.server.report.render import render
from rich.console import Console
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
    """Methods, cancers and sites."""
    main, methods = comparison["main"], comparison["methods"]
    table = Table(
        title="Held-out C-index within a cancer type, mean over cancers (95 % bootstrap)", title_justify="left"
    )
    for column in ("method", "C-index", f"{main} minus it", "all cancers mixed", "rounds", "MB moved", "seconds"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for name, m in methods.items():
        cost = m["cost"]
        moved = f"{(cost['bytes_to_sites'] + cost['bytes_from_sites']) / 1e6:,.0f}" if "rounds" in cost else ""
        gap = interval(comparison["differences"][name], sign="+") if name in comparison["differences"] else ""
        rounds = f"{cost['rounds']:.0f}" if "rounds" in cost else ""
        label = f"[bold]{name}[/]" if name == main else name
        table.add_row(
            label, interval(m["c_index"]), gap, number(m["all_cancers_mixed"]), rounds, moved, f"{cost['seconds']:.0f}"
        )
    console.print(table)
    cancers = list(methods[main]["by_cancer"])
    table = Table("cancer", *methods, title="C-index by cancer type", title_justify="left")
    for cancer in cancers:
        table.add_row(
            cancer, *(interval(m["by_cancer"][cancer]) if cancer in m["by_cancer"] else "-" for m in methods.values())
        )
    console.print(table)
    table = Table(
        "site", "patients", "events", "pairs", *methods, title="C-index within each site", title_justify="left"
    )
    for row in comparison["sites"]:
        c = row["c_index"]
        table.add_row(
            row["site"],
            str(row["patients"]),
            str(row["events"]),
            str(row["pairs"]),
            *(number(c.get(m)) for m in methods),
        )
    console.print(table)
    left_out = comparison["results"]["left_out"]
    if left_out:
        console.print(
            f"[yellow]{len(left_out)} answers were left out; the first:[/] {left_out[0]['site']}: {left_out[0]['reason']}"
        )


def number(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.3f}"


def interval(value: dict[str, float], sign: str = "") -> str:
    return f"{value['value']:{sign}.3f} [{value['low']:{sign}.3f}, {value['high']:{sign}.3f}]"
