"""Show an audit: one table on the terminal, the numbers, and a picture."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from oncofed.common.files import write_text
from oncofed.deploy.audit.membership import bound_of
from oncofed.deploy.comparison.present import interval, without_nan
from oncofed.server.report.look import BLUE, RED, STYLE, svg
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from scipy.stats import norm

KINDS = {"plain": ("without noise", RED), "private": ("with noise", BLUE)}
ATTACKS = {"lira": "LiRA", "rmia": "RMIA", "loss": "loss"}
NEVER = "tells nothing"


Row = tuple[str, str, str, str]


def print_audit(result: dict[str, Any], console: Console) -> None:
    """The claim, one table of what was found beside what is allowed, and the gate; 80 columns."""
    claim = result["claim"]
    console.print(
        f"claimed of a {claim['unit']}: epsilon {claim['epsilon']:g} at delta {claim['delta']:g} in the whole study,"
    )
    steps = claim["steps_of_a_fold"]
    console.print(
        f"{claim['epsilon_of_a_fold']:.2f} in the {steps} training steps of a fold; oncofed {claim['package']}"
    )
    console.print(f"attacked: {result['patients']} training patients of {escape(', '.join(result['sites']))}")
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for column in ("without noise", "with noise"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("beside")
    for row in rows(result):
        table.add_row(*row)
    console.print(table)
    for text in result["gate"]["failed"]:
        console.print(f"[red]failed[/] {escape(text)}")
    for text in result["gate"]["alarms"]:
        console.print(f"[yellow]alarm[/] {escape(text)}")
    if result["gate"]["passed"]:
        console.print("[green]passed[/]: no attack shows more than is claimed, which proves no more")


def rows(result: dict[str, Any]) -> Iterator[Row]:
    """What, the number without noise and with, and what stands beside it."""
    if "sensitivity" in result:
        s = result["sensitivity"]
        yield "a patient moves, clips", "", f"{max(s['largest']):.6f}", f"1 allowed {_verdict(s['passed'])}"
        if "single" in s:
            yield (
                "  in single precision",
                "",
                f"{s['single']['largest']:.6f}",
                f"hostile weights {_verdict(s['single']['passed'])}",
            )
    if "canary" in result:
        c = result["canary"]
        loud = _verdict(not (c["quiet_parameters"] or c["loud_parameters"] or c["wrong"]))
        yield "noise of a step, clips", "", f"{c['deviation']['found']:.4f}", f"{c['deviation']['claimed']:.4f} {loud}"
        claimed = f"{c['epsilon']:.2f} claimed"
        yield "canaries: epsilon over", "", f"{c['epsilon_lower']:.2f}", claimed
        verdict = _verdict(c["epsilon_lower_gate"] <= c["epsilon"])
        yield "  the gate, 99.999 %", "", f"{c['epsilon_lower_gate']:.2f}", f"{c['epsilon']:.2f} {verdict}"
        if c["sampled"]:
            share = f"{c['sampled']['found']:.4f}"
            yield "patients of a step", "", share, f"{c['sampled']['rate']:g} claimed"
        one = "[yellow]alarm[/]" if c["alarm"] else "loose"
        yield "  by one run", "", f"{c['epsilon_lower_one_run']:.2f}", one
    if "membership" in result:
        yield from _membership(result["membership"])
    if "inversion" in result:
        yield from _inversion(result["inversion"])


def _membership(m: dict[str, Any]) -> Iterator[Row]:
    for attack, name in ATTACKS.items():
        (auc, auc_private), (tpr, tpr_private) = (
            [interval(m[kind][attack][key]) for kind in KINDS] for key in ("auc", "tpr")
        )
        yield f"members, {name}: AUC", auc, auc_private, "0.5: chance"
        yield "  found at 1 % FPR", tpr, tpr_private, NEVER if attack == "loss" else f"{m['bound']:.3f} allowed"
    if "bound_gaussian" in m:
        yield "  most by this noise", "", f"{m['bound_gaussian']:.3f}", "of all steps"


def _inversion(v: dict[str, Any]) -> Iterator[Row]:
    names = {"one": "site of one", "six": f"site of {v['patients']}", "lone_expert": "lone expert"}
    for key, name in names.items():
        if not v.get(key) or "correlation" not in v[key]["unprotected"]:
            continue
        bare, noisy = v[key]["unprotected"], v[key]["protected"]
        numbers = f"{bare['correlation']:.3f}", f"{noisy['correlation']:.3f}"
        yield f"rebuilt, {name}: r", *numbers, f"{noisy['of_another']:.3f} by chance"
        if key == "six":
            yield "  members by span: AUC", f"{bare['auc']:.3f}", f"{noisy['auc']:.3f}", "0.5: chance"
    if "layer" in v:
        yield "  what is rebuilt", "", v["layer"]["tells"], ""
    if not v["first_layer_travels"]:
        yield "  the first layer", "", "does not travel", ""


def _verdict(passed: bool) -> str:
    return "[green]passed[/]" if passed else "[red]failed[/]"


@STYLE
def write_audit(result: dict[str, Any], out: Path) -> Path:
    """Write `audit.json` and `audit.svg` below `out`; returns the latter."""
    clean = without_nan(result)
    write_text(out / "audit.json", json.dumps(clean, indent=1))
    write_text(out / "audit.svg", svg(draw(clean)))
    return out / "audit.svg"


def draw(result: dict[str, Any]) -> Figure:
    """Membership as ROC curves beside what epsilon allows, and the epsilons that were shown beside the claimed one."""
    panels: list[str] = [p for p in ("membership", "canary", "inversion") if p in result] or ["sensitivity"]
    figure = Figure(figsize=(0.6 + 3.4 * len(panels), 3.2), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, panel in zip(axes, panels, strict=True):
        {"membership": _roc, "canary": _bars, "inversion": _rebuilt, "sensitivity": _moved}[panel](axis, result)
    return figure


def _roc(axis: Axes, result: dict[str, Any]) -> None:
    m = result["membership"]
    for kind, (label, colour) in KINDS.items():
        for attack, line in (("lira", "-"), ("rmia", "--")):
            roc = m[kind][attack]["roc"]
            axis.plot(roc["fpr"], roc["tpr"], line, color=colour, linewidth=1.6, label=f"{label}, {ATTACKS[attack]}")
    fpr = np.geomspace(1e-3, 1, 100)
    axis.plot(
        fpr,
        bound_of(m["epsilon"], m["delta"], fpr),
        color="black",
        linewidth=1,
        label=r"$e^\varepsilon$ FPR + $\delta$",
    )
    if "bound_gaussian" in m:
        mu = norm.ppf(m["bound_gaussian"]) - norm.ppf(m["fpr"])
        axis.plot(fpr, norm.cdf(norm.ppf(fpr) + mu), ":", color="black", linewidth=1, label="most against this noise")
    axis.plot(fpr, fpr, color="grey", linewidth=0.8, label="chance")
    axis.set(
        xscale="log",
        yscale="log",
        xlim=(1e-3, 1),
        ylim=(1e-3, 1.1),
        xlabel="others taken for members",
        ylabel="members found",
    )
    axis.set_title(f"membership, {m['models']} models each", loc="left", fontsize=9)
    axis.legend(frameon=False, fontsize=6, loc="lower right")


def _bars(axis: Axes, result: dict[str, Any]) -> None:
    c = result["canary"]
    names = {"one run": "epsilon_lower_one_run", "Gaussian, 95 %": "epsilon_lower", "the gate": "epsilon_lower_gate"}
    heights = [c[key] if c[key] is not None else 2 * c["epsilon"] for key in names.values()]
    axis.bar(list(names), heights, color=[BLUE if h <= c["epsilon"] else RED for h in heights], width=0.6)
    axis.axhline(c["epsilon"], color="black", linewidth=1)
    axis.annotate("claimed", (2.4, c["epsilon"]), ha="right", va="bottom", fontsize=8)
    axis.set_ylabel(f"epsilon at least, {c['steps']} steps")
    axis.set_ylim(0, 1.15 * max(*heights, c["epsilon"]))
    axis.set_title("canaries", loc="left", fontsize=9)


def _rebuilt(axis: Axes, result: dict[str, Any]) -> None:
    v = result["inversion"]
    names = {"one": "site of one", "six": f"site of {v['patients']}", "lone_expert": "lone expert"}
    known = [key for key in names if v.get(key) and "correlation" in v[key]["unprotected"]]
    at = np.arange(len(known))
    for offset, (kind, label, colour) in zip(
        (-0.2, 0.2), (("unprotected", "without protection", RED), ("protected", "with noise", BLUE)), strict=True
    ):
        axis.bar(at + offset, [v[key][kind]["correlation"] for key in known], 0.36, color=colour, label=label)
        chance = [v[key][kind]["of_another"] for key in known]
        axis.plot(
            at + offset, chance, "_", color="black", markersize=12, label="another patient" if offset > 0 else None
        )
    axis.set_xticks(at, [names[key] for key in known])
    axis.set_ylabel(f"correlation with a patient's {v['layer']['tells']}" if "layer" in v else "")
    axis.set_ylim(0, 1.25)
    axis.legend(frameon=False, fontsize=7, ncols=2)
    axis.set_title("inversion", loc="left", fontsize=9)


def _moved(axis: Axes, result: dict[str, Any]) -> None:
    s = result.get("sensitivity", {"largest": [0.0], "clips": [1.0]})
    axis.bar([f"{clip:.2g}" for clip in s["clips"]], s["largest"], color=BLUE, width=0.5)
    axis.axhline(1.0, color="black", linewidth=1)
    axis.set(xlabel="clip", ylabel="most that a patient moves, clips")
    axis.set_title("sensitivity", loc="left", fontsize=9)
