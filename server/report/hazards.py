"""Pictures of a Cox model: hazard ratios, whether they hold over time, and the baseline hazard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from oncofed.server.report.curves import line_style
from oncofed.server.report.look import BLUE, RED, STYLE, label, p_text, svg

WIDEST = 50.0
"""Hazard ratios beyond this factor lie outside the picture: an arrow points to them."""

NICE = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 0.7, 1.0, 1.5, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)
"""Marks of the axis of hazard ratios."""

PANELS = 16
"""Covariates with a panel of residuals: those with the smallest p."""

POINTS = 250
"""More event times than this are drawn as means of neighbours."""

LONGEST = 40
"""Characters of a covariate's name in a picture."""


@STYLE
def forest(cox: Mapping[str, Any]) -> str:
    """Hazard ratios with their intervals on a log axis, the numbers beside; red raises the hazard, blue lowers it."""
    names = cox["names"]
    ratio, low, high = (np.array(cox[key], dtype=np.float64) for key in ("hazard_ratio", "lower", "upper"))
    finite = np.concatenate([ratio, low, high])
    finite = finite[np.isfinite(finite) & (finite > 0)]
    left, right = (
        float(np.clip(v, 1 / WIDEST, WIDEST))
        for v in (min(finite.min(initial=1.0), 0.8), max(finite.max(initial=1.0), 1.25))
    )
    figure = Figure(figsize=(8.2, 0.75 + 0.23 * len(names)), layout="constrained")
    axis = figure.subplots()
    axis.set_xscale("log")
    axis.set_xlim(left / 1.08, right * 1.08)
    for i, p in enumerate(cox["p"]):
        if np.isfinite(ratio[i]):
            colour = RED if ratio[i] > 1 else BLUE
            ends = [v if np.isfinite(v) else beyond for v, beyond in ((low[i], 0.0), (high[i], np.inf))]
            axis.plot(np.clip(ends, left, right), [-i, -i], color=colour, linewidth=1.6)
            for end, limit, mark in ((ends[0], left, "<"), (ends[1], right, ">")):
                if end < left or end > right:
                    axis.plot(limit, -i, mark, color=colour, markersize=4)
            axis.plot(np.clip(ratio[i], left, right), -i, "s", color=colour, markersize=4.5)
        words = f"{number(ratio[i])} [{number(low[i])}, {number(high[i])}]"
        axis.annotate(words, (1.0, -i), (8, 0), ("axes fraction", "data"), "offset points", va="center", fontsize=8)
        axis.annotate(
            p_text(p),
            (1.0, -i),
            (172, 0),
            ("axes fraction", "data"),
            "offset points",
            va="center",
            ha="right",
            fontsize=8,
        )
    for head, x, side in (("hazard ratio [95 % interval]", 8, "left"), ("p", 172, "right")):
        axis.annotate(head, (1.0, 1.0), (x, 4), "axes fraction", "offset points", ha=side, fontsize=8, color="#666666")
    axis.axvline(1.0, color="#777777", linewidth=0.8)
    marks = [m for m in NICE if left / 1.08 <= m <= right * 1.08]
    if len(marks) > 7:
        marks = [m for m in marks if m in (0.02, 0.1, 0.5, 1.0, 2.0, 10.0, 50.0)]
    axis.xaxis.set_major_locator(FixedLocator(marks))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axis.set_yticks([-i for i in range(len(names))], [label(name, LONGEST) for name in names])
    axis.set_ylim(0.6 - len(names), 0.6)
    axis.grid(axis="y", visible=False)
    axis.set_xlabel("hazard ratio")
    return svg(figure)


@STYLE
def residuals(check: Mapping[str, Any], coefficients: Sequence[float | None]) -> str:
    """Scaled Schoenfeld residuals over time with a fitted line, a panel a covariate: a level line means a constant hazard ratio.

    The coefficient is part of the residuals (Grambsch and Therneau 1994), so they show it as it changes over time. Of many covariates those with the smallest p. Time runs as in the test: by events for `km` and `rank`.
    """
    found = check["residuals"]
    time, events = (np.array(found[key], dtype=np.float64) for key in ("time", "events"))
    happened = events > 0
    scaled = np.array(found["scaled"], dtype=np.float64).reshape(len(time), -1)[happened]
    time, events = time[happened], events[happened]
    place = _place(time, events, check["transform"])
    rows = check["rows"]
    chosen = sorted(range(len(rows)), key=lambda j: 2.0 if rows[j]["p"] is None else rows[j]["p"])[:PANELS]
    columns = min(4, len(chosen))
    lines = -(-len(chosen) // columns)
    figure = Figure(figsize=(2.5 * max(columns, 2), 0.5 + 1.9 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    marks = np.unique(np.linspace(0, len(time) - 1, 5).round().astype(int))
    for axis, j in zip(axes, sorted(chosen), strict=False):
        axis.set_title(f"{label(rows[j]['name'], 24)}, {p_text(rows[j]['p'], name=True)}", loc="left", fontsize=8)
        axis.set_xticks(place[marks], [f"{time[m]:.3g}" for m in marks], fontsize=7)
        axis.tick_params(axis="y", labelsize=7)
        known = np.isfinite(scaled[:, j])
        x, y = _thinned(place[known], scaled[known, j], events[known])
        axis.plot(x, y, "o", color="#777777", markersize=2.2, alpha=0.5, markeredgewidth=0)
        axis.axhline(float(coefficients[j] or 0.0), color="#999999", linewidth=0.8, linestyle="--")
        if len(np.unique(place[known])) < 2:
            continue
        line = np.polynomial.Polynomial.fit(place[known], scaled[known, j], 1, w=np.sqrt(events[known]))
        ends = place[[0, -1]]
        axis.plot(ends, line(ends), color=RED if _small(rows[j]["p"]) else BLUE, linewidth=1.8)
        low, high = np.quantile(y, [0.01, 0.99])
        room = 0.08 * (high - low) or 1.0
        axis.set_ylim(low - room, high + room)
    for axis in axes[len(chosen) :]:
        axis.set_visible(False)
    figure.supxlabel("months", fontsize=8.5)
    figure.supylabel("coefficient over time", fontsize=8.5)
    return svg(figure)


@STYLE
def baselines(points: Sequence[Mapping[str, Any]]) -> str:
    """Cumulative baseline hazards, a line a stratum, of points with `stratum`, `time` and `cumulative_hazard`."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for point in points:
        if point["time"] is not None and point["cumulative_hazard"] is not None:
            lines.setdefault(str(point["stratum"]), [(0.0, 0.0)]).append((point["time"], point["cumulative_hazard"]))
    figure = Figure(figsize=(6.5 if len(lines) < 5 else 8.0, 3.0), layout="constrained")
    axis = figure.subplots()
    for i, (name, line) in enumerate(lines.items()):
        axis.step(*zip(*sorted(line), strict=True), where="post", **line_style(i), label=label(name, LONGEST))
    axis.set_xlim(left=0)
    axis.set_ylim(bottom=0)
    axis.set_xlabel("months")
    axis.set_ylabel("baseline cumulative hazard")
    if len(lines) > 1:
        beside = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)} if len(lines) > 4 else {"loc": "best"}
        axis.legend(frameon=False, fontsize=8, **beside)
    return svg(figure)


def number(value: float | None) -> str:
    """A hazard ratio in as many places as it is worth: 0.0042, 1.23, 18, and 3e+05 for what the data cannot tell."""
    if value is None or not np.isfinite(value):
        return "–"
    if value >= 1000 or 0 < value < 0.001:
        return f"{value:.0e}"
    return (
        f"{value:.0f}"
        if value >= 100
        else f"{value:.1f}"
        if value >= 10
        else f"{value:.2f}"
        if value >= 0.1
        else f"{value:.2g}"
    )


def _place(time: np.ndarray, events: np.ndarray, transform: str) -> np.ndarray:
    """Where `[T]` a time lies on the axis."""
    if transform == "identity":
        return time
    if transform == "log":
        return np.log(np.maximum(time, 1e-9))
    return np.cumsum(events) - (events - 1) / 2


def _thinned(place: np.ndarray, value: np.ndarray, events: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places and values, as means of neighbouring event times where there are many."""
    if len(place) <= POINTS:
        return place, value
    owner = np.arange(len(place)) * POINTS // len(place)
    weight = np.bincount(owner, events)
    return np.bincount(owner, events * place) / weight, np.bincount(owner, events * value) / weight


def _small(p: float | None) -> bool:
    return p is not None and p < 0.05
