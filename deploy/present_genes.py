"""Show which genes, pathways and hubs of a network drive a model: tables on the terminal."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

MOST_ROWS = 5
"""Pathways or hubs of a class in a table."""


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
        means = summary["measure"] == "mean"
        signs = "+ speaks for the class, - against it" if means else "+ more of it, higher score; - lower"
        console.print(
            f"[dim]{signs}; folds that agree on the sign. r: Spearman of {'class means' if means else 'slopes'} between folds; "
            f"top: {summary['top']} first genes in common ({summary['overlap_by_chance']:.2f} by chance)[/]"
        )
    _print_withheld(summary, console)


def print_pathways(summary: dict[str, Any], console: Console) -> None:
    """Of each cancer type the sets that stand out most, with z and q."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 2, 0, 0))
    for name in ("", "pathway", "genes", "z", "q"):
        table.add_column(name, justify="right" if name in ("genes", "z", "q") else "left")
    for cancer, c in summary["classes"].items():
        for n, i in enumerate(sorted(range(len(c["z"])), key=lambda i: -abs(c["z"][i]))[:MOST_ROWS]):
            s = summary["sets"][i]
            label = escape(cancer) if n == 0 else ""
            table.add_row(label, escape(s["name"]), str(s["genes"]), f"{c['z'][i]:+.1f}", f"{c['q'][i]:.3f}")
    console.print(table)
    console.print(
        "[dim]z: against random sets of as many genes of the panel; q: over all sets (Benjamini and Hochberg). Genes of a "
        "pathway move together, random ones do not: q is too sure of itself[/]"
    )


def print_networks(summary: dict[str, Any], console: Console) -> None:
    """Of each class the first hubs with degree, p and stability, and how far models agree beside permuted labels."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 2, 0, 0))
    for name in ("", "hub", "degree", "in", "out", "p", "stability", "agreement"):
        table.add_column(name, justify="left" if name in ("", "hub", "agreement") else "right")
    for name, c in summary["classes"].items():
        agreed = f"{_number(c['agreement']['jaccard'])} ({_number(c['agreement']['by_chance'])})"
        for n, h in enumerate(c["hubs"][:MOST_ROWS]):
            degrees = (f"{h[kind]:.1f}" for kind in ("degree", "in_degree", "out_degree"))
            p = "-" if h["p"] is None else f"{h['p']:.3f}"
            first = n == 0
            label, said = (escape(name), agreed) if first else ("", "")
            table.add_row(label, escape(h["gene"]), *degrees, p, f"{h['stability']:.2f}", said)
    console.print(table)
    if summary["classes"]:
        console.print(
            "[dim]degree: edges over layers, mean over models; p: against the largest hub of each network of permuted labels; "
            f"stability: models that have the gene among their first {summary['top']} hubs; agreement: share of these that two "
            "models have in common (in brackets of permuted labels)[/]"
        )
        least = max((c["null_networks"] for c in summary["classes"].values()), default=0)
        console.print(f"[dim]{least} permuted networks a class: p is never below {1 / (1 + least):.3f}[/]")
    _print_withheld(summary, console)


def _print_withheld(summary: dict[str, Any], console: Console) -> None:
    if summary["withheld"]:
        console.print(f"[yellow]withheld at the sites, too few patients:[/] {escape(', '.join(summary['withheld']))}")


def _cell(cancer: dict[str, Any], i: int) -> str:
    if i >= len(cancer["genes"]):
        return ""
    gene = cancer["genes"][i]
    folds = cancer["folds"]
    effect = gene["mean"] if "mean" in gene else gene["slope"]
    return f"{'+' if effect > 0 else '-'} {escape(gene['gene'])} {round(gene['agreement'] * folds)}/{folds}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
