"""Do hazard ratios stay the same over time? The score test of Grambsch and Therneau from the total of a Cox fit.

Shapes: P covariates, C cells with events, G groups of such cells for the picture. The test is that of the coefficients of
x * g(t) added to the model, as R's `cox.zph` since survival 3.0 (Therneau & Grambsch 2000, ch. 6): it needs no sum
that the fit's last question did not bring.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from oncofed.common.blocks import Sum
from oncofed.common.classical.cox_fit import ChiSquare, CoxFit, plain
from oncofed.common.classical.risk_sets import RiskSets

Transform = Literal["km", "rank", "log", "identity"]

FLAT = 1e-9
"""Share of its size below which a variance is rounding."""


@dataclass(frozen=True)
class ProportionalHazards:
    """A test for each covariate and one for all, and the picture behind them.

    `scaled_GP`: mean over the events of a group of the scaled Schoenfeld residual plus the coefficient, which is the
    coefficient at that time, roughly; `time_G` and `events_G`: mean time and number of those events. NaN where a covariate
    does not vary in any stratum that has events there.
    """

    transform: Transform
    names: tuple[str, ...]
    rows: tuple[ChiSquare, ...]
    overall: ChiSquare
    time_G: np.ndarray
    events_G: np.ndarray
    scaled_GP: np.ndarray

    def as_dict(self) -> dict[str, Any]:
        """For JSON, without NaN."""
        told = {
            "transform": self.transform,
            "rows": [{"name": n, **row.as_dict()} for n, row in zip(self.names, self.rows, strict=True)],
            "global": self.overall.as_dict(),
            "residuals": {"time": self.time_G, "events": self.events_G, "scaled": self.scaled_GP},
        }
        return {name: plain(value) for name, value in told.items()}


def check_proportional_hazards(
    fit: CoxFit, times_T: np.ndarray, transform: Transform = "km", events_each: int = 1
) -> ProportionalHazards:
    """Test whether the coefficients change with g(time) of `times_T`, the time of each cell.

    `transform` g: `km`, 1 - the Kaplan-Meier estimate of all strata just before; `rank`, how many patients left before
    (events before those who are censored at the same time); `log`; `identity`. For the picture neighbouring times are put
    together until each group has `events_each` events: a residual of a single event is a patient's covariates.
    """
    sets = RiskSets.of(fit.total, fit.ties)
    g_C = _clock(fit.total, np.asarray(times_T, dtype=np.float64), transform)[sets.cell_C]
    g_C = g_C - np.average(g_C, weights=sets.events_C)
    information_PP, mixed_PP, own_PP = (sets.information(weight) for weight in (1.0, g_C, g_C**2))
    # What the coefficients of x * g(t) know beyond the constant ones: the Schur complement of the joint information. The
    # score is cleared in the same way of what a penalty left in that of the constant ones (Neyman's C(alpha) test).
    cleared_PP = mixed_PP.T @ _inverse(information_PP)
    score_P = g_C @ sets.residual - cleared_PP @ sets.residual.sum(0)
    rest_PP = own_PP - cleared_PP @ mixed_PP
    some_P = rest_PP.diagonal() > FLAT * own_PP.diagonal()
    with np.errstate(divide="ignore", invalid="ignore"):
        chi2_P = np.where(some_P, score_P**2 / rest_PP.diagonal(), np.nan)
    told = bool(some_P.all()) and np.linalg.eigvalsh(_unit(rest_PP))[0] > FLAT
    overall = float(score_P @ np.linalg.solve(rest_PP, score_P)) if told else np.nan
    time_G, events_G, scaled_GP = _picture(fit, sets, information_PP, np.asarray(times_T), events_each)
    return ProportionalHazards(
        transform,
        fit.names,
        tuple(ChiSquare(float(value), 1.0) for value in chi2_P),
        ChiSquare(overall, float(len(fit.names))),
        time_G,
        events_G,
        scaled_GP,
    )


def _clock(total: Sum, times_T: np.ndarray, transform: Transform) -> np.ndarray:
    """g of each cell `[T]`, but for a constant."""
    events_T, leaving_T = total["events"].sum(0), total["leaving"].sum(0)
    if len(times_T) != len(events_T):
        raise ValueError(f"the fit has {len(events_T)} cells of time, got {len(times_T)} times; give one for each cell")
    if transform == "identity":
        return times_T
    if transform == "log":
        if (times_T[np.rint(events_T) > 0] <= 0).any():
            raise ValueError("transform log needs times above 0, got an event at 0 or before; choose km or rank")
        return np.log(np.where(times_T > 0, times_T, 1.0))
    if transform == "rank":
        return np.cumsum(leaving_T) - leaving_T + events_T / 2
    if transform == "km":
        at_risk_T = np.cumsum(leaving_T[::-1])[::-1]
        stays_T = 1.0 - np.divide(events_T, at_risk_T, out=np.zeros_like(events_T), where=at_risk_T > 0.5)
        return 1.0 - np.concatenate([[1.0], np.cumprod(stays_T)[:-1]])
    raise ValueError(f"transform must be km, rank, log or identity, got {transform!r}")


def _picture(
    fit: CoxFit, sets: RiskSets, information_PP: np.ndarray, times_T: np.ndarray, events_each: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Time `[G]`, events `[G]` and mean scaled residuals plus coefficients `[G, P]`, on the original scale.

    As R has it: the variance that scales a residual is the mean over those events in whose stratum both covariates vary.
    """
    residual_CP = sets.residual
    scaled_CP = np.full(residual_CP.shape, np.nan)
    strata = np.unique(sets.stratum_C)
    varies_SP = np.stack([_varies(fit.total, s) for s in strata])
    used_SP = varies_SP * np.array([[sets.events_C[sets.stratum_C == s].sum()] for s in strata])
    shared_PP = np.minimum(used_SP[:, :, None], used_SP[:, None, :]).sum(0)
    variance_PP = information_PP / np.where(shared_PP == 0, 1.0, shared_PP)
    for s, varies_P in zip(strata, varies_SP, strict=True):
        rows = np.flatnonzero(sets.stratum_C == s)
        kept = np.ix_(rows, varies_P)
        if varies_P.any():
            scaled_CP[kept] = residual_CP[kept] @ _inverse(variance_PP[np.ix_(varies_P, varies_P)])
    group_C = _groups(sets, len(times_T), events_each)
    size = int(group_C.max()) + 1
    events_G = np.bincount(group_C, sets.events_C, size)
    time_G = np.bincount(group_C, sets.events_C * times_T[sets.cell_C], size) / events_G
    sums_GP, seen_GP = np.zeros((size, len(fit.names))), np.zeros((size, len(fit.names)))
    np.add.at(sums_GP, group_C, np.nan_to_num(scaled_CP))
    np.add.at(seen_GP, group_C, np.isfinite(scaled_CP) * sets.events_C[:, None])
    mean_GP = np.divide(sums_GP, seen_GP, out=np.full(sums_GP.shape, np.nan), where=seen_GP > 0)
    return time_G, events_G, (mean_GP + fit.beta_P) / fit.sd_P


def _unit(matrix_PP: np.ndarray) -> np.ndarray:
    """A covariance as a correlation: small eigenvalues then mean collinear covariates, not small units."""
    size_P = np.sqrt(matrix_PP.diagonal())
    return matrix_PP / np.outer(size_P, size_P)


def _inverse(matrix_PP: np.ndarray) -> np.ndarray:
    """Inverse of an information; a generalised one where only the penalty told covariates apart."""
    size_P = np.sqrt(matrix_PP.diagonal())
    return np.linalg.pinv(_unit(matrix_PP), rcond=FLAT, hermitian=True) / np.outer(size_P, size_P)


def _varies(total: Sum, stratum: int) -> np.ndarray:
    """Whether each covariate varies among a stratum's patients `[P]`, those who left before the first event aside."""
    n, sum_P, upper_Q = (total[f"left/{i}"][stratum].sum(0) for i in range(3))
    first, second = np.triu_indices(len(sum_P))
    squares_P = upper_Q[first == second]
    return n * squares_P - sum_P**2 > FLAT * n * squares_P


def _groups(sets: RiskSets, cells: int, events_each: int) -> np.ndarray:
    """Number of the group `[C]` of each risk set: times one after the other until a group has its events."""
    if events_each < 1:
        raise ValueError(f"events of each group must be 1 or more, got {events_each}")
    events_T = np.bincount(sets.cell_C, sets.events_C, cells)
    group_T, group, filled = np.zeros(cells, dtype=np.int64), 0, 0.0
    for t in np.flatnonzero(events_T):
        if filled >= events_each:
            group, filled = group + 1, 0.0
        group_T[t] = group
        filled += events_T[t]
    if 0 < filled < events_each and group:
        group_T[group_T == group] = group - 1  # what is left over joins the last full group
    return group_T[sets.cell_C]
