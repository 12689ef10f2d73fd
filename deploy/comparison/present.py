"""Show a comparison: tables on the terminal, `comparison.json`, and the HTML report."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2
from oncofed.common.files import write_text
from oncofed.server.report import transport
from oncofed.server.report.classes import nouns
from oncofed.server.report.privacy import read_audit
from oncofed.server.report.render import render
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

log = logging.getLogger("oncofed.deploy")

WIDTH = 80
"""Columns of a terminal."""

MISTAKES = 12
"""Of many classes the pairs that are shown."""

LEFT = ("method", "cancer", "site", "cancer type", "class", "true cancer type", "true class", "taken for")
"""Columns of words."""


def write_comparison(comparison: dict[str, Any], out: Path) -> Path:
    """Write `comparison.json` and `report.html` below `out`; returns the report's path, or the numbers' where it cannot be drawn."""
    clean = without_nan(comparison)
    numbers, report = out / "comparison.json", out / "report.html"
    write_text(numbers, json.dumps(clean, indent=1))
    try:
        write_text(report, render(clean, read_audit(out)))
    except (
        LookupError,
        TypeError,
        ValueError,
        jinja2.TemplateError,
    ) as error:  # hours of training are not lost to a picture
        log.error("the report cannot be drawn (%s: %s); the numbers are in %s", type(error).__name__, error, numbers)
        return numbers
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
    show = _classification if comparison["task"] == "classification" else _survival
    for table in show(comparison):
        console.print(table)
    held_out = comparison["held_out"]
    if held_out["compared"] < held_out["scored"]:
        console.print(
            f"{held_out['compared']} held-out patients are compared, whom all methods scored, of the "
            f"{held_out['scored']} that '{comparison['main']}' scored"
        )
    else:
        console.print(f"{held_out['compared']} held-out patients are compared")
    left_out = comparison["results"]["left_out"]
    if left_out:
        first = f"{left_out[0]['site']}: {left_out[0]['reason']}"
        console.print(f"[yellow]{len(left_out)} answers were left out; the first:[/] {escape(first)}")
    folds = comparison["results"]["folds"]
    saved, robust = transport.shares(folds), transport.robust(folds)
    if saved:
        console.print(
            f"rounds of training took {100 * saved['both']:.1f} % of the bytes of float32 models in full "
            f"({100 * saved['up']:.1f} % from sites, {100 * saved['down']:.1f} % to them)"
        )
    if robust and robust["rows"]:
        worst = robust["rows"][0]
        console.print(
            f"[yellow]changes of {len({x['site'] for x in robust['rows']})} sites were cut or left out, the most often {escape(worst['site'])} in "
            f"block '{worst['block']}' ({worst['rounds']} rounds)[/]"
        )


def _survival(comparison: dict[str, Any]) -> Iterator[Table | str]:
    main, methods = comparison["main"], comparison["methods"]
    title = "Held-out C-index within a cancer type, mean over cancers (95 % bootstrap)"
    beside = {name: number(m["all_cancers_mixed"]) for name, m in methods.items()}
    yield _methods(comparison, title, ("C-index", "c_index"), ("mixed*", beside))
    yield "[dim]* over pairs of patients of any cancers: no measure of quality[/]\n"
    table = _table("C-index by cancer type", "cancer", *methods)
    for cancer in methods[main]["by_cancer"]:
        table.add_row(cancer, *(number(m["by_cancer"].get(cancer, {}).get("value")) for m in methods.values()))
    yield table
    table = _table("C-index within each site", "site", "n", "events", "pairs", *methods)
    for row in comparison["sites"]:
        values = (number(row["c_index"].get(m)) for m in methods)
        table.add_row(row["site"][:17], str(row["patients"]), str(row["events"]), str(row["pairs"]), *values)
    yield table


def _classification(comparison: dict[str, Any]) -> Iterator[Table | str]:
    main, methods = comparison["main"], comparison["methods"]
    one, several = nouns(comparison["results"]["study"])
    title = f"Held-out patients, mean over folds; macro: mean over {several} (95 % bootstrap)"
    table = _table(title, "method", "macro-F1", "balanced accuracy", "MCC", "AUROC*", "ECE*")
    for name, m in methods.items():
        points = (number(v) for v in (m["mcc"]["value"], m["macro_auroc"], m["ece"]))
        table.add_row(_label(name, main), interval(m["macro_f1"]), interval(m["balanced_accuracy"]), *points)
    yield table
    yield f"[dim]* each {one} against all others, mean; expected calibration error[/]\n"
    table = _table(
        f"{main} minus each, on the same resampled patients", "method", "macro-F1", "balanced accuracy", "MB", "s"
    )
    for name, m in methods.items():
        gaps = (comparison[k].get(name) for k in ("differences", "balanced_accuracy_differences"))
        table.add_row(
            _label(name, main), *("" if g is None else interval(g, sign="+") for g in gaps), *_cost(m["cost"])
        )
    yield table
    table = _table(f"F1 and recall by {one}", one, *methods)
    for name in methods[main]["by_class"]:
        pairs = ([m[k].get(name, {}).get("value") for k in ("by_class", "recall")] for m in methods.values())
        table.add_row(escape(name[:26]), *(" ".join(map(_short, pair)) for pair in pairs))
    yield table
    yield _confusion(comparison["confusion"], main, one)
    table = _table("Accuracy within each site", "site", "n", several.split()[-1], *methods)
    for row in comparison["sites"]:
        values = (number(row["accuracy"].get(m)) for m in methods)
        table.add_row(row["site"][:17], str(row["patients"]), str(row["cancers"]), *values)
    yield table


def _confusion(confusion: dict[str, Any], main: str, one: str) -> Table:
    """Who is taken for whom; where a terminal has no room for the whole table, the most frequent mistakes."""
    names, counts = confusion["cancers"], confusion["counts"]
    width = max(map(len, names)) + sum(1 + max(len(n), 3) for n in names)
    if width <= WIDTH:
        table = _table(f"Held-out patients: true {one} in rows, {main}'s in columns", one, *map(escape, names))
        for name, row in zip(names, counts, strict=True):
            table.add_row(escape(name), *(str(n) if n else "." for n in row))
        return table
    wrong = [(n, i, j) for i, row in enumerate(counts) for j, n in enumerate(row) if n and i != j]
    table = _table(
        f"The most frequent mistakes of {main}; all of them in the report", f"true {one}", "taken for", "n", "of"
    )
    for n, i, j in sorted(wrong, key=lambda cell: (-cell[0], cell[1:]))[:MISTAKES]:
        table.add_row(escape(names[i][:26]), escape(names[j][:26]), str(n), str(sum(counts[i])))
    return table


def _methods(
    comparison: dict[str, Any], title: str, headline: tuple[str, str], beside: tuple[str, dict[str, str]]
) -> Table:
    """A row a method: the headline (its name and key), the paired difference, a number beside it, and what it cost."""
    main = comparison["main"]
    table = _table(title, "method", headline[0], f"{main} minus it", beside[0], "MB", "s")
    for name, m in comparison["methods"].items():
        gap = interval(comparison["differences"][name], sign="+") if name in comparison["differences"] else ""
        table.add_row(_label(name, main), interval(m[headline[1]]), gap, beside[1][name], *_cost(m["cost"]))
    return table


def _label(name: str, main: str) -> str:
    return f"[bold]{name}[/]" if name == main else name


def _cost(cost: dict[str, float]) -> tuple[str, str]:
    """Megabytes moved, of a federation, and seconds."""
    moved = f"{(cost['bytes_to_sites'] + cost['bytes_from_sites']) / 1e6:.0f}" if "rounds" in cost else ""
    return moved, f"{cost['seconds']:.0f}"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, justify="left" if column in LEFT else "right", no_wrap=True)
    return table


def _short(value: float | None) -> str:
    """`.912`, `1.00`: four letters."""
    if value is None or not math.isfinite(value):
        return "   -"
    return f"{value:.2f}" if value >= 0.9995 else f"{value:.3f}"[1:]


def number(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.3f}"


def interval(value: dict[str, float], sign: str = "") -> str:
    """`0.652 (.631-.668)`, or with a sign `+.013 (-.002, +.027)`: short enough for a terminal."""
    point, low, high = (f"{value[key]:{sign}.3f}" for key in ("value", "low", "high"))
    if sign:
        return f"{point} ({low}, {high})".replace("0.", ".")
    return f"{point} ({low}-{high})".replace("(0.", "(.").replace("-0.", "-.")
