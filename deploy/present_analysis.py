"""Show a classical analysis on the terminal: hazard ratios, or medians and survival by group, and the tests."""

from __future__ import annotations

from typing import Any

from oncofed.server.report.analysis import YEARS, evaluation_rows, survival_at
from oncofed.server.report.hazards import number
from oncofed.server.report.look import p_text
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table


def print_analysis(result: dict[str, Any], out: Console) -> None:
    """The numbers that the question was asked for; the report holds the rest."""
    if result.get("cox"):
        print_cox(result["cox"], out)
    if result.get("curves"):
        print_curves(result["curves"], out)
    if result.get("logrank"):
        print_log_rank(result["logrank"], out)
    for name, value in evaluation_rows(result.get("evaluation") or {}):
        out.print(f"{escape(name)}: {escape(value)}")
    for note in result.get("notes", []):
        out.print(f"[dim]{escape(note)}[/]")
    if result.get("left_out"):
        sites = sorted({x["site"] for x in result["left_out"]})
        out.print(f"[yellow]answers left out of:[/] {escape(', '.join(sites))}")


def print_cox(cox: dict[str, Any], out: Console) -> None:
    """A row a covariate: hazard ratio with interval and p, beside the p of proportional hazards."""
    check = cox.get("proportional_hazards")
    trend = {row["name"]: row["p"] for row in check["rows"]} if check else {}
    table = _table("covariate", "hazard ratio", "95 % interval", "p", *(["p of a trend"] if check else []))
    for i, name in enumerate(cox["names"]):
        interval = f"{number(cox['lower'][i])} to {number(cox['upper'][i])}"
        cells = [number(cox["hazard_ratio"][i]), interval, p_text(cox["p"][i])]
        table.add_row(escape(name), *cells, *([p_text(trend.get(name))] if check else []))
    out.print(table)
    joint = cox.get("tests", {}).get("likelihood_ratio")
    said = f"{cox['patients']:.0f} patients, {cox['events']:.0f} events"
    if joint and joint["chi2"] is not None:
        said += f"; likelihood ratio {joint['chi2']:.2f} on {joint['df']:g}, {p_text(joint['p'], name=True)}"
    if check and check.get("global"):
        said += f"; proportional hazards together {p_text(check['global']['p'], name=True)}"
    out.print(f"[dim]{said}[/]")


def print_curves(curves: list[dict[str, Any]], out: Console) -> None:
    """A row a group: median with interval, and survival after some years; - where nobody was under observation so long."""
    years = [f"{y} y" for y in YEARS]
    table = _table("group", "n", "events", "median", "95 % interval", *years)
    for c in curves:
        median = "-" if c["median"] is None else f"{c['median']:.1f}"
        low, high = ("-" if c[key] is None else f"{c[key]:.1f}" for key in ("median_lower", "median_upper"))
        told = [survival_at(c, y)[0] for y in YEARS]
        shares = ["-" if s is None else f"{100 * s:.1f}%" for s in told]
        counts = [f"{max(0.0, c[key]):.0f}" for key in ("patients", "events")]
        table.add_row(escape(c["name"]), *counts, median, f"{low} to {high}", *shares)
    out.print(table)
    out.print("[dim]median in months; survival after years[/]")


def print_log_rank(test: dict[str, Any], out: Console) -> None:
    """One line."""
    if test["p"] is None:
        out.print("[dim]log-rank: no two groups were at risk together[/]")
        return
    kind = "log-rank" if not test["rho"] else f"log-rank, rho {test['rho']:g}"
    strata = f", {test['strata']} strata" if test["strata"] > 1 else ""
    out.print(
        f"{kind}: chi-squared {test['chi2']:.2f} on {test['df']}, [bold]{p_text(test['p'], name=True)}[/]{strata}"
    )


def _table(first: str, *others: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column(first, min_width=12, overflow="fold")
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table
