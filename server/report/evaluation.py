"""The report's view of held-out patients in survival, from sums alone (server/pooled_evaluation.py): pictures and a table's rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from oncofed.server.cross_site import ENOUGH
from oncofed.server.report.curves import LONGEST, survival_curves
from oncofed.server.report.look import BLUE, STYLE, label, svg

MOST = 40
"""Hospitals that are drawn: of more, those with most pairs."""

GREY = "#b5b5b5"
"""A hospital with too few pairs to tell."""

BESIDE = 3
"""Horizons side by side."""

Score = Mapping[str, Any]
"""`value`, `low` and `high`, each None where it is unknown."""


def sections(results: Mapping[str, Any]) -> dict[str, str]:
    """Pictures of the pooled evaluation, by name; those that nothing is known for are left out, all of them where noise drowns every cancer type."""
    found = results.get("evaluation")
    if not found or set(found["by_cancer"]) == set(found["c_index"].get("drowned", ())):
        return {}
    out = {"by_cancer": by_cancer(found)}
    if drawn_sites(found["by_site"]):
        out["by_site"] = by_site(found["by_site"])
    if any(h["calibration"]["patients"] for h in found["horizons"]):
        out["calibration"] = calibration(found["horizons"])
    groups = found["risk_groups"]
    if any(c["time"] for c in groups["curves"]):
        out["risk_groups"] = survival_curves(groups["curves"], groups["logrank"]["p"], " since diagnosis")
    return out


# -- tables ------------------------------------------------------------------------------------------------------------


def rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What is known of each cancer type; without a pooled evaluation the plain sums of the folds, and no row without any.

    `loss` is the mean per patient of all folds, from sums that leave for every evaluation. `scaled` is 1 - Brier / Brier of
    the null model: 0 is no better than the Kaplan-Meier of the cancer type. What is unknown is None.
    """
    found, plain = results.get("evaluation"), _plain_sums(results["folds"], results["cancers"])
    if not found:
        return list(plain.values())
    out = []
    for name, row in found["by_cancer"].items():
        brier, null = row["brier"], row["brier_null"]
        scaled = None if brier is None or null is None or null <= 0 else 1.0 - brier / null
        within = found["within_sites"]["by_cancer"].get(name)
        out.append({"cancer": name, "loss": plain.get(name, {}).get("loss"), **row, "within": within, "scaled": scaled})
    return out


def _plain_sums(folds: Sequence[Mapping[str, Any]], cancers: Sequence[str]) -> dict[str, dict[str, Any]]:
    """By cancer type: patients, events, loss per patient, and the C-index of pairs within hospitals, of all folds together."""
    evaluations = [f["evaluation"] for f in folds if "concordant" in f.get("evaluation", {})]
    if not evaluations:
        return {}
    keys = ("patients", "events", "loss", "concordant", "comparable")
    total = dict(zip(keys, (np.sum([e[k] for e in evaluations], axis=0) for k in keys), strict=True))

    def share(part: str, of: str, i: int) -> float | None:
        return float(total[part][i] / total[of][i]) if total[of][i] > 0 else None

    return {
        cancer: {
            "cancer": cancer,
            "patients": float(total["patients"][i]),
            "events": float(total["events"][i]),
            "loss": share("loss", "patients", i),
            "within": share("concordant", "comparable", i),
        }
        for i, cancer in enumerate(cancers)
    }


def drawn_sites(sites: Sequence[Mapping[str, Any]], most: int = MOST) -> list[Mapping[str, Any]]:
    """Hospitals with any pair, at most so many of those with most pairs, the best first."""
    known = [s for s in sites if s["c_index"]["value"] is not None]
    largest = sorted(known, key=lambda s: -s["pairs"])[:most]
    return sorted(largest, key=lambda s: (-s["c_index"]["value"], s["site"]))


def left_out(sites: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
    """Hospitals that the picture lacks: without any pair, and smaller ones than those drawn."""
    none = sum(s["c_index"]["value"] is None for s in sites)
    return none, len(sites) - none - len(drawn_sites(sites))


# -- pictures ----------------------------------------------------------------------------------------------------------


@STYLE
def by_cancer(found: Mapping[str, Any]) -> str:
    """C-index by cancer type, the best first, with its interval and the certain bounds as a grey band; beside it AUC at the horizons."""
    names = sorted(found["by_cancer"], key=lambda n: (-_number(found["by_cancer"][n]["c_index"]["value"]), n))
    mean = ["mean"] if len(names) > 1 else []
    c_index = [found["c_index"]] * len(mean) + [found["by_cancer"][n]["c_index"] for n in names]
    bounds = [found["c_index"].get("bounds")] * len(mean) + [found["by_cancer"][n]["bounds"] for n in names]
    horizons = found["horizons"]
    places = -np.arange(len(c_index), dtype=np.float64)
    figure = Figure(figsize=(9.0, 1.1 + (0.22 + 0.09 * len(horizons)) * len(c_index)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for y, score, bound in zip(places, c_index, bounds, strict=True):
        if bound and None not in bound:
            left.barh(y, bound[1] - bound[0], 0.6, bound[0], color="#e3e3e3", zorder=0)
        _score(left, y, score, BLUE, 6 if mean and y == 0 else 4)
    left.set_yticks(places, [*mean, *(label(n, LONGEST) for n in names)])
    left.set_ylim(places[-1] - 0.6, 0.6)
    left.set_xlabel("C-index within the cancer type")
    step = 0.6 / max(1, len(horizons))
    colours = matplotlib.colormaps["viridis"](np.linspace(0.1, 0.8, len(horizons)))
    for i, (h, colour) in enumerate(zip(horizons, colours, strict=True)):
        scores = [h["auc"]] * len(mean) + [h["auc_by_cancer"][n] for n in names]
        for y, score in zip(places + ((len(horizons) - 1) / 2 - i) * step, scores, strict=True):
            _score(right, y, score, colour, 3.5)
        right.plot([], [], "o-", color=colour, markersize=3.5, label=f"{h['month']:g} months")
    right.set_xlabel("AUC at the horizon")
    if horizons:
        figure.legend(loc="outside upper right", ncols=min(len(horizons), 5), frameon=False, fontsize=8)
    _chance(left, [*c_index, *({"value": b, "low": None, "high": None} for pair in bounds for b in pair or ())])
    _chance(right, [s for h in horizons for s in [h["auc"], *h["auc_by_cancer"].values()]])
    return svg(figure)


@STYLE
def by_site(sites: Sequence[Mapping[str, Any]]) -> str:
    """C-index of pairs within each hospital, the best first; the dotted line is that of the pairs of all hospitals together."""
    shown = drawn_sites(sites)
    figure = Figure(figsize=(8.0, 0.8 + 0.2 * len(shown)), layout="constrained")
    axis = figure.subplots()
    for i, s in enumerate(shown):
        enough = s["pairs"] >= ENOUGH
        _score(axis, -i, s["c_index"], BLUE if enough else GREY, 4)
    names = [f"{label(s['site'], LONGEST)} ({s['pairs']:,.0f})" for s in shown]
    axis.set_yticks(-np.arange(len(shown)), names, fontsize=8)
    for s, text in zip(shown, axis.get_yticklabels(), strict=True):
        text.set_color("#222222" if s["pairs"] >= ENOUGH else "#999999")
    axis.set_ylim(-len(shown) + 0.4, 0.6)
    told = [(s["pairs"], s["c_index"]["value"]) for s in sites if s["c_index"]["value"] is not None]
    pairs, value = np.array(told, dtype=np.float64).T
    axis.axvline(float(np.average(value, weights=pairs)), color=BLUE, linewidth=1, linestyle=":")
    axis.set_xlabel("C-index of pairs within the hospital and a cancer type (pairs in brackets)")
    _chance(axis, [s["c_index"] for s in shown])
    return svg(figure)


@STYLE
def calibration(horizons: Sequence[Mapping[str, Any]]) -> str:
    """Observed survival (Kaplan-Meier with its interval) against predicted in groups of patients, a panel a horizon."""
    wide = min(BESIDE, len(horizons))
    tall = -(-len(horizons) // wide)
    figure = Figure(figsize=(3.1 * wide, 3.2 * tall), layout="constrained")
    axes = figure.subplots(tall, wide, squeeze=False, sharex=True, sharey=True).ravel()
    for axis, h in zip(axes, horizons, strict=False):
        c = {k: np.array(v, dtype=np.float64) for k, v in h["calibration"].items()}
        axis.plot([0, 1], [0, 1], color="#999999", linewidth=0.8, linestyle="--")
        axis.vlines(c["predicted"], c["lower"], c["upper"], color=BLUE, linewidth=1.5)
        axis.plot(c["predicted"], c["observed"], "o-", color=BLUE, markersize=4.5, linewidth=0.6)
        axis.set_title(f"{h['month']:g} months", loc="left", fontsize=9)
        axis.set_xlim(-0.02, 1.02)
        axis.set_ylim(-0.02, 1.02)
        axis.set_aspect("equal")
    for axis in axes[len(horizons) :]:
        axis.set_visible(False)
    figure.supxlabel("predicted survival", fontsize=9)
    figure.supylabel("observed survival", fontsize=9)
    return svg(figure)


def _score(axis: Axes, y: float, score: Score, colour: Any, size: float) -> None:
    if score["value"] is None:
        return
    if score["low"] is not None and score["high"] is not None:
        axis.plot([score["low"], score["high"]], [y, y], color=colour, linewidth=1.5, solid_capstyle="butt")
    axis.plot(score["value"], y, "o", color=colour, markersize=size)


def _chance(axis: Axes, scores: Sequence[Score]) -> None:
    """A line at 0.5, and an axis as wide as the scores but within 0 to 1: noise alone can leave that range."""
    axis.axvline(0.5, color="#999999", linewidth=0.8, linestyle="--", zorder=0)
    known = [float(s[k]) for s in scores for k in ("value", "low", "high") if s[k] is not None]
    low, high = min(known, default=0.5), max(known, default=0.5)
    axis.set_xlim(max(0.0, min(low, 0.45)) - 0.02, min(1.0, max(high, 0.55)) + 0.02)
    axis.grid(False, axis="y")


def _number(value: float | None) -> float:
    return -np.inf if value is None else float(value)
