"""The report's page for whoever answers for the patients' privacy: claims by site, what was spent, what an audit measured."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from oncofed.server.report.look import BLUE, RED, STYLE, svg

MOST = 40
"""Sites of the table: of more, those with the largest epsilon."""

AUDIT = "audit.json"
"""What `oncofed audit` measured, beside the results."""

KINDS = {
    "gaussian": "Gaussian noise",
    "sampled_gaussian": "Gaussian noise, patients by chance",
    "pure": "geometric noise on counts",
}

CHECKS = ("sensitivity", "canary", "membership", "inversion")

ATTACKS = {"lira": "LiRA", "rmia": "RMIA", "loss": "loss alone"}

MODELS = {"private": "this study's model", "plain": "the same without noise"}

Audit = Mapping[str, Any]


def read_audit(folder: Path) -> dict[str, Any] | None:
    """The audit in a run's folder; None where there is none. Raises `ValueError` where the file is damaged."""
    file = folder / AUDIT
    if not file.exists():
        return None
    try:
        audit = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file}: no JSON ({error}); run `oncofed audit` again, or remove it") from None
    if not isinstance(audit, dict):
        raise ValueError(f"{file}: not what `oncofed audit` writes; run it again, or remove the file")
    return audit


def sections(results: Mapping[str, Any], audit: Audit | None) -> dict[str, str]:
    """Pictures of the statement and of the audit beside it, by name; nothing where nothing was promised."""
    stated = results.get("privacy")
    if not stated:
        return {}
    out = {"privacy_spent": spent(stated)}
    if drawable(bounds(audit)):
        out["privacy_bounds"] = draw_bounds(bounds(audit))
    if attacks(audit):
        out["privacy_attacks"] = draw_attacks(attacks(audit), stated, _table(checks_of(audit), "membership"))
    return out


def view(results: Mapping[str, Any], audit: Audit | None) -> dict[str, Any] | None:
    """What the template shows beside the statement itself; None where nothing was promised."""
    stated = results.get("privacy")
    if not stated:
        return None
    rows = sorted(stated["sites"].items(), key=lambda item: -item[1]["at_most"])
    return {
        "rows": sorted(rows[:MOST]),
        "more": len(rows) - MOST if len(rows) > MOST else 0,
        "lost": any(row["lost"] for _, row in rows),
        "kinds": KINDS,
        "audit": None if audit is None else audited(results, audit),
    }


# -- the audit ---------------------------------------------------------------------------------------------------------


COMPARED = ("privacy", "task", "model", "training")
"""Tables of a study that make an audit one of another."""


def audited(results: Mapping[str, Any], audit: Audit) -> dict[str, Any]:
    """What the template shows of an audit; what a check lacks is None, or empty, and `of_another` says that it was of another study."""
    stated, claim, checks = results["privacy"], _table(audit, "claim"), checks_of(audit)
    sensitivity, canary, membership, inversion = (_table(checks, k) for k in CHECKS)
    promised = {"unit": stated["unit"], "epsilon": stated["promise"]["epsilon"], "delta": stated["delta"]}
    other = [
        key for key in COMPARED if key in _table(audit, "study") and audit["study"][key] != results["study"].get(key)
    ]
    gate = _table(audit, "gate")
    failed = gate.get("failed") or [k for k in CHECKS if _table(checks, k).get("passed") is False]
    return {
        "claim": claim,
        "of_another": bool(other) or any(claim.get(key, value) != value for key, value in promised.items()),
        "passed": gate.get("passed") is True,
        "failed": list(map(str, failed)),
        "alarms": list(map(str, gate.get("alarms") or ())),
        "sensitivity": {**sensitivity, "largest": _number(sensitivity, "largest")} if sensitivity else {},
        "canary": {**canary, "bounds": bounds(audit)} if canary else {},
        "attacks": attacks(audit),
        "bound": _number(membership, "bound"),
        "bound_of_noise": _number(membership, "bound_gaussian"),
        "cases": cases(inversion),
        "policy": _table(inversion, "policy"),
    }


def checks_of(audit: Audit | None) -> Mapping[str, Any]:
    """The checks of an audit by name."""
    return _table(audit or {}, "checks") or audit or {}


def bounds(audit: Audit | None) -> dict[str, float]:
    """Epsilon of the audited steps as `claimed`, and the least that canaries show: `lower`, `one_run`, `gate`; what is unknown is left out.

    Infinity: something left without noise.
    """
    canary = _table(checks_of(audit), "canary")
    keys = {
        "claimed": ("epsilon", "claimed"),
        "lower": ("epsilon_lower", "eps_lower"),
        "one_run": ("epsilon_lower_one_run", "one_run_lower"),
        "gate": ("epsilon_lower_gate",),
    }
    found = {name: next(filter(_known, (_number(canary, k) for k in places)), None) for name, places in keys.items()}
    return {name: value for name, value in found.items() if value is not None}


def attacks(audit: Audit | None) -> list[dict[str, Any]]:
    """Attacks on membership that were tried: `key` and `model` of what was attacked, `attack`, `auc` and `tpr` with intervals, `roc`."""
    membership = _table(checks_of(audit), "membership")
    out = []
    for key, model in MODELS.items():
        for attack, name in ATTACKS.items():
            found = _table(_table(membership, key), attack)
            if not found:
                continue
            roc = _table(found, "roc")
            curve = list(zip(roc.get("fpr", ()), roc.get("tpr", ()), strict=False))
            scores = {"auc": _span(found, "auc"), "tpr": _span(found, "tpr")}
            out.append({"key": key, "model": model, "attack": name, "roc": curve, **scores})
    return out


def cases(inversion: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What was rebuilt from a small site's update: `what`, and the `correlation` with the truth unprotected and protected.

    `of_another` is that of the same reconstruction with somebody else.
    """
    few = inversion.get("patients", "a few")
    names = {
        "one": "the only patient of a hospital",
        "six": f"the best of {few} patients of a hospital",
        "lone_expert": f"a patient of {few} who alone passed an expert",
    }
    out: list[dict[str, Any]] = []
    for key, what in names.items():
        plain, covered = (_table(_table(inversion, key), k) for k in ("unprotected", "protected"))
        if plain or covered:
            numbers = {"plain": _number(plain, "correlation"), "covered": _number(covered, "correlation")}
            out.append({"what": what, **numbers, "of_another": _number(covered, "of_another")})
    for said in inversion.get("cases") or ():
        if isinstance(said, dict):
            value, protected = _number(said, "correlation"), bool(said.get("protected"))
            numbers = {"plain": None if protected else value, "covered": value if protected else None}
            out.append({"what": str(said.get("what", "")), **numbers, "of_another": None})
    return out


def _table(value: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = value.get(key)
    return found if isinstance(found, dict) else {}


def _number(value: Mapping[str, Any], key: str) -> float | None:
    """A number, the largest of a list of them, or None."""
    found = value.get(key)
    values: list[Any] = found if isinstance(found, list) else [found]
    return max((float(v) for v in values if _is_number(v)), default=None)


def _span(value: Mapping[str, Any], key: str) -> dict[str, float | None]:
    """A number with its interval: `{value, low, high}`, or one beside `interval`."""
    found = _table(value, key)
    if found:
        return {k: _number(found, k) for k in ("value", "low", "high")}
    interval = value.get("interval") if key == "tpr" else None
    low, high = interval if isinstance(interval, list) and len(interval) == 2 else (None, None)
    return {"value": _number(value, key), "low": low, "high": high}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)


def _known(value: float | None) -> bool:
    return value is not None


# -- pictures ----------------------------------------------------------------------------------------------------------


@STYLE
def spent(stated: Mapping[str, Any]) -> str:
    """Epsilon after the rounds of all folds of a site that answers all of them, the promise, and where each site stands."""
    figure = Figure(figsize=(6.5, 2.8), layout="constrained")
    axis = figure.subplots()
    x, y = zip(*[(0, 0.0), *stated["spent"]], strict=True)
    axis.plot(x, y, color=BLUE, linewidth=2, label="a site that answers every round")
    axis.axhline(stated["promise"]["epsilon"], color="#999999", linewidth=1, linestyle="--", label="promised")
    sites = stated["sites"].values()
    axis.plot([s["rounds"] for s in sites], [s["epsilon"] for s in sites], "o", color=RED, markersize=5, label="sites")
    axis.set_xlim(left=0)
    axis.set_ylim(0, 1.08 * max(stated["promise"]["epsilon"], *y))
    axis.set_xlabel("rounds of all folds that a site has answered")
    axis.set_ylabel(f"epsilon at delta = {stated['delta']:g}")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.legend(loc="lower right")
    return svg(figure)


def drawable(told: Mapping[str, float]) -> bool:
    """Whether there is a claim and a finite bound to hold against it."""
    return "claimed" in told and any(math.isfinite(v) for k, v in told.items() if k != "claimed")


@STYLE
def draw_bounds(told: Mapping[str, float]) -> str:
    """What canaries show beside what is claimed of the same steps."""
    figure = Figure(figsize=(3.9, 3.0), layout="constrained")
    axis = figure.subplots()
    names = {
        "claimed": "claimed",
        "lower": "canaries, 95 %",
        "one_run": "one run alone, 95 %",
        "gate": "canaries, gate",
    }
    shown = [(k, v) for k, v in told.items() if math.isfinite(v)]
    claimed = told["claimed"]
    for i, (key, value) in enumerate(shown):
        axis.barh(-i, value, height=0.5, color=_colour(key, value, claimed))
        axis.annotate(f"{value:.3g}", (value, -i), (4, 0), textcoords="offset points", va="center")
    axis.axvline(claimed, color="#999999", linewidth=1, linestyle="--")
    axis.set_yticks([-i for i in range(len(shown))], [names[key] for key, _ in shown])
    axis.set_xlim(0, 1.2 * max([v for _, v in shown] + [1e-9]))
    axis.grid(False)
    axis.set_xlabel("epsilon of the steps that were audited")
    axis.set_title("noise: lower bounds beside the claim", loc="left", fontsize=9)
    return svg(figure)


def _colour(key: str, value: float, claimed: float) -> str:
    """Grey: the claim. Red: what refutes it, which at 95 % chance does once in twenty runs and at the gate next to never."""
    if key == "claimed":
        return "#b5b5b5"
    return BLUE if value <= claimed else RED if key == "gate" else "#d98a29"


FLOOR = 1e-3
"""Least share that is drawn."""


@STYLE
def draw_attacks(tried: list[dict[str, Any]], stated: Mapping[str, Any], said: Mapping[str, Any]) -> str:
    """ROC curves where the audit has them, and each attack's point at the rate of false alarms that the tables name.

    Beside them what the claim allows, and, where `said` (the audit's table) knows it, what the noise does.
    """
    figure = Figure(figsize=(5.6, 3.0), layout="constrained")
    axis = figure.subplots()
    fpr, at = np.geomspace(FLOOR, 1.0, 100), stated["membership"]["fpr"]
    epsilon, delta = _number(said, "epsilon") or stated["epsilon"], _number(said, "delta") or stated["delta"]
    allowed = np.minimum(1.0, np.exp(min(epsilon, 700.0)) * fpr + delta)
    axis.plot(fpr, allowed, color="#777777", linewidth=1, linestyle="--", label="the claim allows")
    bound = _number(said, "bound_gaussian")
    if bound is not None and 0 < bound < 1:
        z = NormalDist()
        mu = z.inv_cdf(bound) - z.inv_cdf(at)
        curve = [z.cdf(z.inv_cdf(f) + mu) if f < 1 else 1.0 for f in fpr.tolist()]
        axis.plot(fpr, curve, color="#777777", linewidth=1, linestyle=":", label="its noise allows")
    axis.plot(fpr, fpr, color="#cccccc", linewidth=1, label="guessing")
    styles = dict(zip(ATTACKS.values(), (("-", "o"), ("--", "s"), (":", "^")), strict=True))
    for i, a in enumerate(tried):
        colour, (line, mark) = BLUE if a["key"] == "private" else RED, styles[a["attack"]]
        name: str | None = f"{a['attack']}, {'private' if a['key'] == 'private' else 'without noise'}"
        if a["roc"]:
            x, y = np.array(a["roc"], dtype=float).T
            axis.plot(x, np.maximum(y, FLOOR), line, color=colour, linewidth=1.2, label=name)
            name = None
        tpr = a["tpr"]
        if tpr["value"] is None:
            continue
        x = at * 1.1 ** (i - (len(tried) - 1) / 2)  # beside each other
        if tpr["low"] is not None and tpr["high"] is not None:
            axis.plot([x, x], np.maximum([tpr["low"], tpr["high"]], FLOOR), color=colour, linewidth=1)
        axis.plot(x, max(tpr["value"], FLOOR), mark, color=colour, markersize=4, label=name)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlim(FLOOR, 1)
    axis.set_ylim(FLOOR * 0.9, 1.15)
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v:g} %"))
    axis.set_xlabel("of those who took no part, wrongly accused")
    axis.set_ylabel("of those who did, recognised")
    axis.set_title(f"membership; points at {100 * at:g} % wrongly accused", loc="left", fontsize=9)
    axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    return svg(figure)
