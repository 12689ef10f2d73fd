"""Show ablations: a table on the terminal, and the same as Markdown, numbers and a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from oncofed.common.files import write_text
from oncofed.deploy.comparison.present import interval, without_nan
from rich import box
from rich.console import Console
from rich.table import Table

COLUMNS = ("variant", "score", "change", "parameters", "MB moved", "seconds")


def rows(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """A row a variant, the whole first: score, what its absence changes (paired), and what it cost."""
    headline = "macro_f1" if result["task"] == "classification" else "c_index"
    out: list[tuple[str, ...]] = []
    for name, m in result["methods"].items():
        # differences are whole minus variant; a reader of ablations asks what happens when the part goes
        change = {k: -v for k, v in result["differences"][name].items()} if name in result["differences"] else None
        change = change and {"value": change["value"], "low": change["high"], "high": change["low"]}
        cost = m["cost"]
        out.append(
            (
                name,
                interval(m[headline]),
                interval(change, sign="+") if change else "",
                f"{cost['parameters']:,}",
                f"{(cost['bytes_to_sites'] + cost['bytes_from_sites']) / 1e6:.0f}",
                f"{cost['seconds']:.0f}",
            )
        )
    return out


def print_ablations(result: dict[str, Any], console: Console) -> None:
    """The table, in 80 columns; what each variant cost stands in the files."""
    table = Table(title="What each part is worth (held-out, 95 % bootstrap)", title_justify="left", box=box.SIMPLE_HEAD)
    for column in COLUMNS[:3]:
        table.add_column(column, justify="left" if column == "variant" else "right", no_wrap=True)
    for row in rows(result):
        table.add_row(*row[:3])
    console.print(table)


def write_ablations(result: dict[str, Any], out: Path) -> Path:
    """Write `ablations.json`, `ablations.svg` and `ablations.md` below `out`; returns the last."""
    write_text(out / "ablations.json", json.dumps(without_nan(result), indent=1))
    lines = ["| " + " | ".join(line) + " |" for line in (COLUMNS, ("---",) * len(COLUMNS), *rows(result))]
    changes = [f"- {name}: `{json.dumps(change)}`" for name, change in result["changes"].items()]
    file = out / "ablations.md"
    write_text(file, "\n".join([*lines, "", "Keys that a row changes:", "", *changes, ""]))
    _draw(result, out / "ablations.svg")
    return file


def _draw(result: dict[str, Any], file: Path) -> None:
    """The change that each absence makes, with its interval; left of the line the part is worth having."""
    names = list(result["differences"])
    figure = Figure(figsize=(7, 0.8 + 0.35 * len(names)), layout="constrained")
    axis = figure.subplots()
    for y, name in enumerate(names):
        d = result["differences"][name]
        axis.plot([-d["high"], -d["low"]], [-y, -y], color="#0b6e99", linewidth=1.5)
        axis.plot(-d["value"], -y, "o", color="#0b6e99", markersize=5)
    axis.axvline(0.0, color="#999999", linewidth=0.8, linestyle="--")
    axis.set_yticks([-y for y in range(len(names))], names)
    axis.set_xlabel("change of the held-out score, paired, 95 % bootstrap interval")
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(file)
