"""Show which genes drive a model: a table on the terminal."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table


def print_genes(summary: dict[str, Any], console: Console) -> None:
    """Of each cancer type the most important genes with direction and agreement, and how stable the ranking is."""
    columns = list(summary["cancers"])
    per_table = max(1, (console.width - 4) // 18)
    rows = max((len(c["genes"]) for c in summary["cancers"].values()), default=0)
    for begin in range(0, len(columns), per_table):
        some = columns[begin : begin + per_table]
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 2, 0, 0))
        table.add_column("", justify="right", style="dim")
        for cancer in some:
            table.add_column(escape(cancer), no_wrap=True, footer="")
        for i in range(rows):
            table.add_row(str(i + 1), *(_cell(summary["cancers"][c], i) for c in some))
        table.add_section()
        for label, key in (("r", "spearman"), ("top", "top_overlap")):
            table.add_row(label, *(_number(summary["cancers"][c][key]) for c in some))
        console.print(table)
    if columns:
        console.print(
            "[dim]+ more of it, higher score; - lower; folds that agree on the sign. r: Spearman of slopes between folds; "
            f"top: {summary['top']} most important genes in common ({summary['overlap_by_chance']:.2f} by chance)[/]"
        )
    if summary["withheld"]:
        console.print(f"[yellow]withheld at the sites, too few patients:[/] {escape(', '.join(summary['withheld']))}")


def _cell(cancer: dict[str, Any], i: int) -> str:
    if i >= len(cancer["genes"]):
        return ""
    gene = cancer["genes"][i]
    folds = cancer["folds"]
    return f"{'+' if gene['slope'] > 0 else '-'} {escape(gene['gene'])} {round(gene['agreement'] * folds)}/{folds}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
