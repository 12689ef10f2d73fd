"""Kaplan-Meier and Nelson-Aalen of a federation, from counts by group and cell of time that add over sites.

Shapes: N patients, S strata, G groups, T cells of time. A cell is one distinct event time of the federation (`Cells.exact`)
or an interval of an agreed grid (`Cells.grid`); with the first the estimates equal those of the pooled patients. On a grid we
have one assumption, that patients leave a cell evenly: half of those who are censored in it count as at risk (the actuarial
estimate, Cutler and Ederer 1958), and survival is a straight line within it.

Counts may be noisy: they are used as they are, negative ones too, because a cut at zero would bias every later cell.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy.optimize import isotonic_regression
from scipy.special import ndtri

Interval = Literal["log-log", "log", "plain"]
"""How the interval of a survival probability is made symmetric, by the names of R's `conf.type`."""

LEVEL = 0.95
SAME = 1e-9
"""Survival probabilities that differ by less are the same number that was rounded differently."""


@dataclass(frozen=True, eq=False)
class Cells:
    """T cells of time by `starts` and `ends` `[T]`, increasing; of exact event times both are the time itself."""

    starts: np.ndarray
    ends: np.ndarray
    even: bool
    """Patients leave evenly within a cell; False where a cell is one time."""

    @classmethod
    def exact(cls, times: np.ndarray | Sequence[float]) -> Cells:
        """A cell for each of the distinct `times`: the event times of all sites, and any others that one wants to look at."""
        points = _increasing(times, "event times")
        return cls(points, points, even=False)

    @classmethod
    def grid(cls, starts: np.ndarray | Sequence[float]) -> Cells:
        """Intervals `(start, next start]`; the last has no end, so that no patient seems to leave where the grid ends."""
        points = _increasing(starts, "starts of the grid")
        return cls(points, np.append(points[1:], np.inf), even=True)

    def __len__(self) -> int:
        return len(self.starts)


def table_sums(
    cell_N: np.ndarray,
    event_N: np.ndarray,
    group_N: np.ndarray,
    stratum_N: np.ndarray,
    *,
    groups: int,
    strata: int,
    cells: int,
) -> dict[str, np.ndarray]:
    """What a site sends: `patients` `[S, G]`, `events` and `leaving` `[S, G, T]` (with an event or without), float64.

    `cell_N` as by `exact_cells` or `grid_cells` of `risk_sets`, `event_N` 0 or 1, `group_N` and `stratum_N` from 0.
    """
    for name, codes, low, high in (
        ("cell", cell_N, -1, cells),
        ("event", event_N, 0, 2),
        ("group", group_N, 0, groups),
        ("stratum", stratum_N, 0, strata),
    ):
        if len(codes) != len(cell_N):
            raise ValueError(f"{name} of {len(codes)} patients beside cell of {len(cell_N)}: give one value a patient")
        wrong = ~np.isin(codes, np.arange(low, high))
        if wrong.any():
            seen = np.asarray(codes)[wrong][0]
            raise ValueError(f"{name} {seen} of a patient: wanted a whole number from {low} to {high - 1}")
    patients, events, leaving = np.zeros((strata, groups)), *np.zeros((2, strata, groups, cells))
    np.add.at(patients, (stratum_N, group_N), 1.0)
    inside = np.asarray(cell_N) >= 0
    place = tuple(np.asarray(codes)[inside] for codes in (stratum_N, group_N, cell_N))
    np.add.at(leaving, place, 1.0)
    np.add.at(events, place, np.asarray(event_N, dtype=np.float64)[inside])
    return {"patients": patients, "events": events, "leaving": leaving}


def at_risk(leaving: np.ndarray) -> np.ndarray:
    """Patients `[..., T]` under observation when a cell begins: all who leave in it or later."""
    return np.flip(np.cumsum(np.flip(leaving, -1), -1), -1)


def exposed(leaving: np.ndarray, events: np.ndarray, even: bool) -> np.ndarray:
    """Patients `[..., T]` to divide events by: those at risk, less half of those censored in the cell where they leave evenly."""
    return at_risk(leaving) - (0.5 * (leaving - events) if even else 0.0)


@dataclass(frozen=True, eq=False)
class LifeTable:
    """The counts `[T]` of one group over all sites and strata."""

    name: str
    cells: Cells
    patients: float
    events: np.ndarray
    leaving: np.ndarray

    @property
    def at_risk(self) -> np.ndarray:
        return at_risk(self.leaving)

    @property
    def censored(self) -> np.ndarray:
        return self.leaving - self.events

    @property
    def hazard(self) -> np.ndarray:
        """Events over patients exposed `[T]`; 0 where nobody is, and where noise says -1 or less or 1 or more at most that."""
        e = exposed(self.leaving, self.events, self.cells.even)
        return np.clip(np.divide(self.events, e, out=np.zeros_like(e), where=e > 0), -1.0, 1.0)

    @property
    def closed(self) -> int:
        """Cells that have an end: only at an end is survival known."""
        return int(np.isfinite(self.cells.ends).sum())


def life_tables(sums: dict[str, np.ndarray], cells: Cells, names: Sequence[str]) -> list[LifeTable]:
    """A table a group from the sites' total of `table_sums`; strata are added up."""
    wanted = (len(names), len(cells))
    if sums["events"].shape[1:] != wanted or sums["leaving"].shape[1:] != wanted:
        seen = sums["events"].shape[1:], sums["leaving"].shape[1:]
        raise ValueError(f"counts of events and of leaving patients by group and cell are {seen}, wanted {wanted}")
    p, d, c = (sums[key].sum(0) for key in ("patients", "events", "leaving"))
    return [LifeTable(name, cells, float(p[g]), d[g], c[g]) for g, name in enumerate(names)]


@dataclass(frozen=True, eq=False)
class Survival:
    """An estimate at the ends of cells `[T]` with its interval; NaN where an interval is unknown."""

    time: np.ndarray
    value: np.ndarray
    variance: np.ndarray
    """Of the logarithm of survival (Greenwood), or of the cumulative hazard."""
    lower: np.ndarray
    upper: np.ndarray


def kaplan_meier(table: LifeTable, level: float = LEVEL, interval: Interval = "log-log") -> Survival:
    """Product-limit survival with Greenwood's variance (Kalbfleisch and Prentice 2002, eq. 1.13), as R's `survfit` has it.

    No interval is known where survival is 0. Where noise makes survival rise, the nearest curve that does not is taken
    (isotonic regression): it is never further from the truth.
    """
    n = table.closed
    hazard = table.hazard[:n]
    value = np.clip(np.cumprod(1.0 - hazard), 0.0, 1.0)
    if (np.diff(value) > 0).any():
        value = isotonic_regression(value, increasing=False).x
    variance = _growing(_greenwood(table)[:n])
    lower, upper = _interval(value, np.sqrt(variance), level, interval)
    return Survival(table.cells.ends[:n], value, variance, lower, upper)


def nelson_aalen(table: LifeTable, level: float = LEVEL) -> Survival:
    """Cumulative hazard with Aalen's variance, sum of d / Y^2 as in R's `survfit`, and an interval on the log scale."""
    n = table.closed
    e = exposed(table.leaving, table.events, table.cells.even)[:n]
    value = np.maximum(np.cumsum(table.hazard[:n]), 0.0)
    if (np.diff(value) < 0).any():
        value = isotonic_regression(value).x
    variance = _growing(np.divide(table.hazard[:n], e, out=np.zeros(n), where=e > 0))
    spread = -ndtri((1 - level) / 2) * np.sqrt(variance)
    factor = np.exp(np.minimum(np.divide(spread, value, out=np.zeros(n), where=value > 0), 700.0))  # or it overflows
    return Survival(table.cells.ends[:n], value, variance, value / factor, value * factor)


def quantile(time: np.ndarray, survival: np.ndarray, share: float = 0.5, start: float | None = None) -> float | None:
    """When survival falls to `share`; None if it does not. Of a curve with a flat piece there, the middle of the piece.

    `start`: where survival begins to fall along straight lines, for a curve of cells; None for a curve of steps. The interval of
    a median has the times at which the limits of survival fall to one half (Brookmeyer and Crowley 1982).
    """
    below = np.flatnonzero(survival <= share + SAME)  # NaN is not
    if not below.size:
        return None
    k = int(below[0])
    if start is not None:
        before = (start, 1.0) if k == 0 else (float(time[k - 1]), float(survival[k - 1]))
        fall = before[1] - float(survival[k])
        part = 1.0 if fall <= 0 or not np.isfinite(fall) else (before[1] - share) / fall
        return before[0] + min(part, 1.0) * (float(time[k]) - before[0])
    under = np.flatnonzero(survival < share - SAME)
    flat = abs(survival[k] - share) <= SAME and under.size > 0
    return float(time[k] + time[under[0]]) / 2 if flat else float(time[k])


def restricted_mean(table: LifeTable, horizon: float) -> tuple[float, float]:
    """Mean time lived up to `horizon`, the area under Kaplan-Meier, and its standard error (Klein and Moeschberger 2003, 4.5)."""
    curve = kaplan_meier(table)
    area, weights = _areas(table.cells, horizon, table.closed)
    parts = weights * curve.value  # [T]: the area is their sum; all from a cell on move with the hazard of that cell
    later = at_risk(parts)
    variance = float(np.sum(later**2 * np.nan_to_num(_greenwood(table)[: table.closed], posinf=0.0)))
    return area + float(parts.sum()), float(np.sqrt(max(variance, 0.0)))


def last_time(table: LifeTable) -> float | None:
    """The end of the last cell in which anybody is at risk."""
    seen = np.flatnonzero(table.at_risk[: table.closed] > 0)
    return float(table.cells.ends[seen[-1]]) if seen.size else None


def numbers_at_risk(table: LifeTable, times: np.ndarray | Sequence[float]) -> list[float | None]:
    """Patients under observation at `times`: exact at cells' starts, between them the number at the next; None after the last."""
    counts = table.at_risk
    place = np.searchsorted(table.cells.starts, times, side="left")
    return [
        table.patients if t <= 0 else float(counts[k]) if k < len(counts) else None
        for t, k in zip(times, place, strict=True)
    ]


def curve(
    table: LifeTable, level: float = LEVEL, interval: Interval = "log-log", horizon: float | None = None
) -> dict[str, Any]:
    """All of one group as plain numbers for JSON, None for what is unknown; `even` says that lines join the points.

    `horizon` of the restricted mean: by default the last time at which somebody of the group is at risk.
    """
    km, na = kaplan_meier(table, level, interval), nelson_aalen(table, level)
    start = float(table.cells.starts[0]) if table.cells.even and len(table.cells) else None
    median, low, high = (quantile(km.time, s, 0.5, start) for s in (km.value, km.lower, km.upper))
    until = last_time(table) if horizon is None else float(horizon)
    mean, se = (None, None) if until is None or table.patients <= 0 else restricted_mean(table, until)
    return {
        "name": table.name,
        "patients": table.patients,
        "events": float(table.events.sum()),
        "time": km.time.tolist(),
        "survival": km.value.tolist(),
        "lower": _plain(km.lower),
        "upper": _plain(km.upper),
        "cumulative_hazard": na.value.tolist(),
        "na_lower": na.lower.tolist(),
        "na_upper": na.upper.tolist(),
        "at_risk": table.at_risk[: table.closed].tolist(),
        "censored": table.censored[: table.closed].tolist(),
        "median": median,
        "median_lower": low,
        "median_upper": high,
        "rmst": mean,
        "rmst_se": se,
        "horizon": until,
        "even": table.cells.even,
    }


def curves(
    tables: Sequence[LifeTable], level: float = LEVEL, interval: Interval = "log-log", horizon: float | None = None
) -> list[dict[str, Any]]:
    """Curves whose restricted means have one horizon: by default the last time at which every group has somebody at risk."""
    lasts = [last for t in tables if (last := last_time(t)) is not None]
    common = min(lasts, default=None) if horizon is None else horizon
    return [curve(t, level, interval, common) for t in tables]


def _increasing(times: np.ndarray | Sequence[float], what: str) -> np.ndarray:
    points = np.asarray(times, dtype=np.float64)
    if points.ndim != 1 or not points.size or not np.isfinite(points).all() or (np.diff(points) <= 0).any():
        raise ValueError(f"{what} must be finite and increase and be one at least, got {points.tolist()}")
    return points


def _greenwood(table: LifeTable) -> np.ndarray:
    """Each cell's part `[T]` of the variance of log survival, d / (Y (Y - d)); infinite where all leave with an event."""
    e, h = exposed(table.leaving, table.events, table.cells.even), table.hazard
    whole = np.where(h >= 1.0, np.inf, 0.0)
    return np.divide(h, e * (1.0 - h), out=whole, where=(e > 0) & (h < 1.0))


def _growing(parts: np.ndarray) -> np.ndarray:
    """Running sums `[T]` that never fall: noise can make a part of a variance negative, but one knows no more with time."""
    return np.maximum.accumulate(np.maximum(np.cumsum(parts), 0.0))


def _interval(s: np.ndarray, se: np.ndarray, level: float, kind: Interval) -> tuple[np.ndarray, np.ndarray]:
    """Limits `[T]` from survival and the standard error of its logarithm."""
    z = -ndtri((1 - level) / 2)
    inner = (s > 0) & (s < 1) & np.isfinite(se)
    lower = np.where(s >= 1, 1.0, np.nan)
    upper = lower.copy()
    p, width = s[inner], z * se[inner]
    if kind == "log-log":
        logs = np.log(-np.log(p)), width / -np.log(p)
        low, high = (np.exp(-np.exp(np.minimum(logs[0] + sign * logs[1], 700.0))) for sign in (1, -1))
    elif kind == "log":
        low, high = p * np.exp(-width), np.minimum(p * np.exp(np.minimum(width, 700.0)), 1.0)
    elif kind == "plain":
        low, high = np.maximum(p - p * width, 0.0), np.minimum(p + p * width, 1.0)
    else:
        raise ValueError(f"interval {kind!r} of survival: wanted 'log-log', 'log' or 'plain'")
    lower[inner], upper[inner] = low, high
    return lower, upper


def _areas(cells: Cells, horizon: float, closed: int) -> tuple[float, np.ndarray]:
    """The area under survival up to `horizon` as a number plus weights `[T]` of the survival at the cells' ends."""
    ends = cells.ends[:closed]
    if not cells.even:
        after = np.append(ends[1:], max(horizon, ends[-1]))
        return min(horizon, float(ends[0])), np.clip(np.minimum(after, horizon) - ends, 0.0, None)
    starts = cells.starts[:closed]
    length = np.clip(horizon - starts, 0.0, ends - starts)  # what lies before the horizon of each cell
    at_end = length**2 / (ends - starts) / 2
    at_start = length - at_end
    weights = at_end
    weights[:-1] += at_start[1:]
    beyond = max(0.0, horizon - float(ends[-1])) if closed else 0.0
    if closed:
        weights[-1] += beyond  # nothing is known there: survival stays
    return min(horizon, float(cells.starts[0])) + float(at_start[:1].sum()), weights


def _plain(values: np.ndarray) -> list[float | None]:
    return [float(v) if np.isfinite(v) else None for v in values]
