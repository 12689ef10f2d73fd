"""Risk sets of a stratified Cox model from what patients leave behind, cell of time by cell of time.

Shapes: N patients of a site, S strata, T cells of time, P covariates, Q = P(P+1)/2 pairs of covariates (the upper triangle
of a [P, P] matrix, row by row), C cells in which an event happened, E events. A patient's `cell` is the last one in which
she is at risk, -1 where she leaves before the first; an event happens in its patient's cell, and events of a cell are tied.

A site sends no sums over its risk sets but over those who leave in a cell: a rule of disclosure can then judge each cell by
its patients. The suffix sums that make risk sets of them are linear, so the server takes them of the total.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from oncofed.common.blocks import Sum

Ties = Literal["efron", "breslow"]

FARTHEST = 50.0
"""Log hazards farther than this from the average patient's are cut and counted: no sum overflows, and the server knows."""


# -- cells -----------------------------------------------------------------------------------------------------------------


def exact_cells(time_N: np.ndarray, event_N: np.ndarray, times_T: np.ndarray) -> np.ndarray:
    """Last cell `[N]` at risk where the cells are `times_T`, the distinct event times of all sites in rising order.

    Whoever is censored at an event's time is still at risk for it, as everywhere. Raises where an event is at no such time.
    """
    times_T = np.asarray(times_T, dtype=np.float64)
    if not len(times_T) or (np.diff(times_T) <= 0).any():
        raise ValueError(
            f"times of the cells must be at least one, distinct and rising; got {len(times_T)}; sort them with numpy.unique"
        )
    cell_N = np.searchsorted(times_T, time_N, side="right") - 1
    strangers = int(np.sum((times_T[np.maximum(cell_N, 0)] != time_N) & (np.asarray(event_N) > 0)))
    if strangers:
        raise ValueError(
            f"{strangers} events happened at a time that is none of the {len(times_T)} times of the cells; "
            "collect the event times of all sites anew, or ask for a time grid"
        )
    return cell_N


def grid_cells(time_N: np.ndarray, starts_T: np.ndarray) -> np.ndarray:
    """Last cell `[N]` at risk where the cells are intervals (start_k, start_k+1], the last one open-ended.

    All of an interval's events are tied, and whoever is censored within it counts as at risk for them: the Cox model of
    times rounded up to the ends of the intervals.
    """
    starts_T = np.asarray(starts_T, dtype=np.float64)
    if not len(starts_T) or (np.diff(starts_T) <= 0).any():
        raise ValueError(f"starts of the intervals must be at least one and rise, got {len(starts_T)}; sort them")
    return np.clip(np.searchsorted(starts_T, time_N, side="left") - 1, 0, len(starts_T) - 1)


# -- at a site -------------------------------------------------------------------------------------------------------------


def leaving_shapes(covariates: int, strata: int, cells: int, ties: Ties) -> dict[str, tuple[int, ...]]:
    """The shape of each array of `leaving_sums`."""
    powers = ((), (covariates,), (covariates * (covariates + 1) // 2,))
    kinds = ("left", "tied") if ties == "efron" else ("left",)
    shapes: dict[str, tuple[int, ...]] = {
        f"{kind}/{power}": (strata, cells, *tail) for kind in kinds for power, tail in enumerate(powers)
    }
    return shapes | {
        "leaving": (strata, cells),
        "events": (strata, cells),
        "event_x": (strata, cells, covariates),
        "patients": (strata,),
        "beyond": (strata,),
    }


def leaving_sums(
    x_NP: np.ndarray,
    cell_N: np.ndarray,
    event_N: np.ndarray,
    stratum_N: np.ndarray,
    beta_P: np.ndarray,
    strata: int,
    cells: int,
    ties: Ties,
) -> Sum:
    """Everything that a site says in one step of a Cox fit, float64, by stratum and cell.

    `left/0 [S, T]`, `left/1 [S, T, P]`, `left/2 [S, T, Q]`: sums of exp(x beta) times 1, x and the upper triangle of x x' over
    patients who leave in the cell; `tied/0..2`: the same over its events (Efron's ties only); `leaving` and `events [S, T]`:
    patients; `event_x [S, T, P]`: sum of x over events; `patients [S]`: all of them, also who left before the first cell;
    `beyond [S]`: patients whose x beta was cut at `FARTHEST`. Raises on cells, events or strata that cannot be.
    """
    x_NP = np.asarray(x_NP, dtype=np.float64)
    cell_N, stratum_N = np.asarray(cell_N, dtype=np.int64), np.asarray(stratum_N, dtype=np.int64)
    dead_N = np.asarray(event_N) > 0
    _check(x_NP, cell_N, dead_N, stratum_N, strata, cells)
    eta_N = x_NP @ np.asarray(beta_P, dtype=np.float64)
    stays_N = cell_N >= 0
    key_N, size = stratum_N * cells + cell_N, strata * cells

    def by_cell(rows_N: np.ndarray, weight_N: np.ndarray, powers: int) -> list[np.ndarray]:
        key, weight, x_PN = key_N[rows_N], weight_N[rows_N], np.ascontiguousarray(x_NP[rows_N].T)
        factors: list[list[np.ndarray]] = [[weight], [weight * x for x in x_PN]]
        sums = [np.stack([np.bincount(key, f, size) for f in factor], -1) for factor in factors[:powers]]
        if powers == 3:
            pairs = [
                np.bincount(key, wx * x, size) for p, wx in enumerate(factors[1]) for x in x_PN[p:]
            ]  # one pair at a time: all of them at once would be Q numbers a patient
            sums.append(np.stack(pairs, -1))
        sums[0] = sums[0][:, 0]
        # of nobody numpy counts in integers
        return [value.reshape(strata, cells, *value.shape[1:]).astype(np.float64) for value in sums]

    hazard_N = np.exp(np.clip(eta_N, -FARTHEST, FARTHEST))
    total: Sum = {f"left/{i}": value for i, value in enumerate(by_cell(stays_N, hazard_N, 3))}
    if ties == "efron":
        total |= {f"tied/{i}": value for i, value in enumerate(by_cell(dead_N, hazard_N, 3))}
    ones_N = np.ones(len(x_NP))
    (total["leaving"],) = by_cell(stays_N, ones_N, 1)
    total["events"], total["event_x"] = by_cell(dead_N, ones_N, 2)
    total["patients"] = np.bincount(stratum_N, minlength=strata).astype(np.float64)
    total["beyond"] = np.bincount(stratum_N, np.abs(eta_N) > FARTHEST, strata).astype(np.float64)
    return total


def _check(
    x_NP: np.ndarray, cell_N: np.ndarray, dead_N: np.ndarray, stratum_N: np.ndarray, strata: int, cells: int
) -> None:
    """Raise on what would silently be counted in a wrong place."""
    if not np.isfinite(x_NP).all():
        columns = np.flatnonzero(~np.isfinite(x_NP).all(0)).tolist()
        raise ValueError(
            f"covariates {columns} hold missing or infinite values; fill them in or leave those patients out"
        )
    if len(stratum_N) and not (stratum_N.min() >= 0 and stratum_N.max() < strata):
        raise ValueError(f"strata run from 0 to {strata - 1}, got {stratum_N.min()} to {stratum_N.max()}")
    if len(cell_N) and not (cell_N.min() >= -1 and cell_N.max() < cells):
        raise ValueError(f"cells run from -1 to {cells - 1}, got {cell_N.min()} to {cell_N.max()}")
    if (dead_N & (cell_N < 0)).any():
        raise ValueError(
            f"{int((dead_N & (cell_N < 0)).sum())} events happened before the first cell of time; "
            "begin the cells at the first event of all sites"
        )


# -- at the server ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RiskSets:
    """The C risk sets at which an event happened, and Efron's sums over their events (Efron 1977; Breslow 1974).

    With D_l = at_risk_0 - (l / d) tied_0 for l = 0 .. d-1, `inverse_C[i]` is the sum over l of (l / d)^i / D_l, i = 0, 1, and
    `inverse_square_C[i]` that of (l / d)^i / D_l^2, i = 0, 1, 2. With Breslow's ties only i = 0 is not zero.
    """

    stratum_C: np.ndarray
    cell_C: np.ndarray
    events_C: np.ndarray
    event_x_CP: np.ndarray
    at_risk: tuple[np.ndarray, np.ndarray, np.ndarray]
    tied: tuple[np.ndarray, np.ndarray, np.ndarray]
    log_C: np.ndarray
    inverse_C: tuple[np.ndarray, np.ndarray]
    inverse_square_C: tuple[np.ndarray, np.ndarray, np.ndarray]

    @classmethod
    def of(cls, total: Mapping[str, np.ndarray], ties: Ties) -> RiskSets:
        """From the sum of `leaving_sums` over sites."""
        events = np.rint(total["events"])
        stratum_C, cell_C = np.nonzero(events)
        d_C = events[stratum_C, cell_C]
        left = [_suffix_sums(total[f"left/{i}"])[stratum_C, cell_C] for i in range(3)]
        if ties == "efron":
            tied = [total[f"tied/{i}"][stratum_C, cell_C] for i in range(3)]
            # One row for each event: l = 0 .. d-1 within each cell.
            starts_C = (np.cumsum(d_C) - d_C).astype(np.int64)
            owner_E = np.repeat(np.arange(len(d_C)), d_C.astype(np.int64))
            share_E = (np.arange(len(owner_E)) - starts_C[owner_E]) / d_C[owner_E]
            rest_E = left[0][owner_E] - share_E * tied[0][owner_E]

            def over_events(value_E: np.ndarray) -> np.ndarray:
                return np.add.reduceat(value_E, starts_C) if len(starts_C) else np.zeros(0)

            with np.errstate(invalid="ignore", divide="ignore"):
                log_C = over_events(np.log(rest_E))
                one_E = 1.0 / rest_E
                two_E = one_E * one_E
            inverse = (over_events(one_E), over_events(share_E * one_E))
            square = (over_events(two_E), over_events(share_E * two_E), over_events(share_E**2 * two_E))
        else:
            tied, none = [np.zeros_like(value) for value in left], np.zeros_like(d_C)
            with np.errstate(invalid="ignore", divide="ignore"):
                log_C = d_C * np.log(left[0])
                inverse, square = (d_C / left[0], none), (d_C / left[0] ** 2, none, none)
        return cls(
            stratum_C,
            cell_C,
            d_C,
            total["event_x"][stratum_C, cell_C],
            (left[0], left[1], left[2]),
            (tied[0], tied[1], tied[2]),
            log_C,
            inverse,
            square,
        )

    def log_likelihood(self, beta_P: np.ndarray) -> float:
        """Log partial likelihood at `beta_P`, the coefficients at which the sites made their sums."""
        return float(self.event_x_CP.sum(0) @ beta_P - self.log_C.sum())

    @property
    def residual(self) -> np.ndarray:
        """Schoenfeld residuals, summed over the events of each cell; their sum over cells is the score."""
        return self.event_x_CP - self.events_C[:, None] * self.mean

    @property
    def mean(self) -> np.ndarray:
        """Mean of x over those at risk, weighted by hazard: with Efron's ties the mean of the d means."""
        a, b = self.inverse_C
        return (self.at_risk[1] * a[:, None] - self.tied[1] * b[:, None]) / self.events_C[:, None]

    def information(self, weight_C: np.ndarray | float = 1.0) -> np.ndarray:
        """Sum over cells of `weight` times the variance of x over those at risk `[P, P]`: observed information at weight 1."""
        (a, b), (aa, ab, bb) = self.inverse_C, self.inverse_square_C
        s1_CP, t1_CP = self.at_risk[1], self.tied[1]
        squares_PP = unpacked((weight_C * a) @ self.at_risk[2] - (weight_C * b) @ self.tied[2], s1_CP.shape[1])
        cross_PP = (s1_CP * (weight_C * ab)[:, None]).T @ t1_CP
        return (
            squares_PP
            - (s1_CP * (weight_C * aa)[:, None]).T @ s1_CP
            + cross_PP
            + cross_PP.T
            - (t1_CP * (weight_C * bb)[:, None]).T @ t1_CP
        )


def unpacked(upper_Q: np.ndarray, size: int) -> np.ndarray:
    """The symmetric matrix `[P, P]` of an upper triangle `[Q]`, row by row."""
    full = np.zeros((size, size))
    full[np.triu_indices(size)] = upper_Q
    return full + np.triu(full, 1).T


def _suffix_sums(value: np.ndarray) -> np.ndarray:
    """Sums over a cell and all later ones: those at risk in a cell are those who leave in it or later."""
    return np.cumsum(value[:, ::-1], axis=1)[:, ::-1]
