"""Survival curves with numbers at risk, and cumulative hazards: from the plain numbers of `common.classical.life_table.curve`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from oncofed.server.report.look import BLUE, RED, STYLE, label, p_text, svg

GROUPS = (BLUE, RED, "#d98a29", "#2e8b6f", "#7a5195", "#5aa9e6", "#6b8e23", "#7f5539", "#d46aa6", "#3f3f46")
"""A colour a group; of more than ten groups some share one, and differ by their dashes."""

BANDS = 4
"""More groups than this are drawn without bands, which would cover each other."""

STEPS = (1, 2, 3, 6, 12, 24, 36, 60, 120)
"""Months between marks of the axis of time."""

LONGEST = 28
"""Characters of a group's name in a picture."""


@STYLE
def survival_curves(curves: Sequence[Mapping[str, Any]], p: float | None = None, since: str = "") -> str:
    """Kaplan-Meier curves with bands, and the patients under observation below; `p` of the log-rank test.

    A curve has `name`, `patients`, `time` in months, `survival`, `lower`, `upper`, `at_risk`, and `even` where lines join its
    points; it is drawn as far as anybody was under observation.
    """
    rows = 0.17 * len(curves) + 0.1
    width = 6.5 if len(curves) <= BANDS else 8.0
    figure = Figure(figsize=(width, 4.1 + rows), layout="constrained")
    axis, table = figure.subplots(2, 1, height_ratios=[3.4, rows], sharex=True)
    _draw(axis, curves, "survival", 1.0, ("lower", "upper"))
    axis.set_ylim(0, 1.02)
    axis.set_ylabel("survival")
    axis.set_title("" if p is None else f"log-rank {p_text(p, name=True)}", loc="left", fontsize=9)
    marks = axis.get_xticks()
    for i, c in enumerate(curves):
        for m in marks:
            count = number_at_risk(c, m)
            if count is not None:
                table.text(m, -i, f"{count:.0f}", ha="center", va="center", color=_colour(i), fontsize=8)
    table.set_ylim(0.5 - len(curves), 0.5)
    table.set_yticks([-i for i in range(len(curves))], [label(c["name"], LONGEST) for c in curves], fontsize=8)
    for i, name in enumerate(table.get_yticklabels()):
        name.set_color(_colour(i))
    table.grid(False)
    table.tick_params(length=0, labelbottom=False, pad=14)
    for side in ("left", "bottom"):
        table.spines[side].set_visible(False)
    axis.tick_params(labelbottom=True)
    axis.set_xlabel(f"months{since}")
    table.set_title("under observation", loc="left", fontsize=8, color="#666666")
    return svg(figure)


@STYLE
def cumulative_hazards(curves: Sequence[Mapping[str, Any]]) -> str:
    """Nelson-Aalen estimates with bands."""
    figure = Figure(figsize=(6.5 if len(curves) <= BANDS else 8.0, 3.4), layout="constrained")
    axis = figure.subplots()
    _draw(axis, curves, "cumulative_hazard", 0.0, ("na_lower", "na_upper"))
    highest = max((v for c in curves for v in seen(c, "cumulative_hazard")[1]), default=1.0)
    axis.set_ylim(0, 1.35 * highest or 1.0)  # the band of a last few patients would flatten all else
    axis.set_ylabel("cumulative hazard")
    axis.set_xlabel("months")
    return svg(figure)


def seen(curve: Mapping[str, Any], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Times and values up to the last cell in which somebody was under observation; NaN for None."""
    known = int(np.max(np.flatnonzero(np.array(curve["at_risk"]) > 0), initial=-1)) + 1
    return np.array(curve["time"][:known], dtype=np.float64), np.array(curve[key][:known], dtype=np.float64)


def number_at_risk(curve: Mapping[str, Any], month: float) -> float | None:
    """Patients under observation at a time, of the next cell that begins; None after the last. Noise may have made it negative."""
    if month <= 0:
        return max(0.0, float(curve["patients"]))
    time = curve["time"]
    k = int(np.searchsorted(time, month, side="right" if curve.get("even") else "left"))
    return max(0.0, float(curve["at_risk"][k])) if k < len(time) else None


def value_at(curve: Mapping[str, Any], key: str, month: float, start: float = 1.0) -> float | None:
    """The curve, or a limit of it, at a time; None where it is unknown or nobody is under observation any more."""
    time, value = seen(curve, key)
    if not time.size or month > time[-1]:
        return None
    if curve.get("even"):
        found = float(np.interp(month, np.append(0.0, time), np.append(start, value)))
    else:
        found = float(np.append(start, value)[np.searchsorted(time, month, side="right")])
    return found if np.isfinite(found) else None


def _draw(axis: Axes, curves: Sequence[Mapping[str, Any]], key: str, start: float, band: tuple[str, str]) -> None:
    last = 0.0
    for i, c in enumerate(curves):
        time, value = _from_start(c, key, start)
        name = f"{label(c['name'], LONGEST)} ({max(0.0, c['patients']):.0f})"
        joined = "default" if c.get("even") else "steps-post"
        axis.plot(time, value, drawstyle=joined, **line_style(i), linewidth=1.5, label=name)
        if len(curves) <= BANDS:
            low, high = (_from_start(c, limit, start)[1] for limit in band)
            axis.fill_between(
                time, low, high, step=None if c.get("even") else "post", color=_colour(i), alpha=0.15, linewidth=0
            )
        last = max(last, float(time[-1]))
    last = last or 1.0
    step = next((s for s in STEPS if last / s <= 9), STEPS[-1] * max(1, int(last / STEPS[-1] / 9)))
    axis.set_xticks(np.arange(0.0, last + 1e-9, step))
    axis.set_xlim(0, 1.03 * last)
    beside = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)} if len(curves) > BANDS else {"loc": "best"}
    axis.legend(frameon=False, fontsize=8, **beside)


def _from_start(curve: Mapping[str, Any], key: str, start: float) -> tuple[np.ndarray, np.ndarray]:
    """The curve from month 0 on."""
    time, value = seen(curve, key)
    first = [0.0] if not time.size or time[0] > 0 else []
    return np.concatenate([first, time]), np.concatenate([[start] * len(first), value])


def line_style(i: int) -> dict[str, Any]:
    """How the line of group `i` looks."""
    return {"color": _colour(i), "linestyle": ("-", "--", ":")[i // len(GROUPS) % 3]}


def _colour(i: int) -> str:
    return GROUPS[i % len(GROUPS)]
