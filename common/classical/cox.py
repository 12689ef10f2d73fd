"""Cox regression of many hospitals' patients as if they lay in one table (Cox 1972): Newton's method on sums.

Shapes as in `risk_sets`. One question a step; the first, at coefficients of zero, gives the null likelihood, the score test,
and tells which covariates cannot be told apart before anything is fitted. The objective is lifelines':
log-likelihood / patients - sum over p of penalty_p beta_p^2 / 2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from oncofed.common.blocks import Sum, all_finite
from oncofed.common.classical.cox_fit import ChiSquare, CoxFit
from oncofed.common.classical.risk_sets import RiskSets, Ties, unpacked

CLOSE = 1e-11
"""In standard errors: nearer to the maximum than that, a step moves no digit that anybody sees."""

QUADRATIC = 1e-5
"""In standard errors: here Newton's method doubles its digits; where it does not, what is left is rounding of the sums."""

SLACK = 1e-9
"""Share of the log-likelihood by which it may fall from rounding alone."""

FLAT = 1e-9
"""Share of a covariate's own size below which its variation, alone or beside the others, is rounding."""

RUNAWAY = 3
"""Steps in a row, all within `QUIET`, that do not get shorter: coefficients on their way to infinity."""


QUIET = 0.1
"""In standard errors: nearer than that, steps of a maximum that exists have begun to shrink."""

SHORTEST = 0.01
"""Share of a step below which hazards that are still immense are the coefficients' own, not a bold step's."""


class NoEvents(ValueError):
    """Nobody has an event, so there is nothing to fit."""


class CollinearCovariates(ValueError):
    """Some covariates are constant, or a sum of others."""


class MonotoneLikelihood(ValueError):
    """Some coefficients have no finite estimate: a combination of covariates orders the events perfectly."""


class NoConvergence(ValueError):
    """The maximum was not reached within the steps allowed."""


@dataclass(frozen=True)
class _Point:
    """The penalised log-likelihood around coefficients `beta_P`; `value` is minus infinity where the sums do not hold."""

    beta_P: np.ndarray
    total: Sum
    sets: RiskSets
    loglik: float
    value: float
    far: bool

    @classmethod
    def at(cls, beta_P: np.ndarray, total: Sum, ties: Ties, penalty_P: np.ndarray) -> _Point:
        sets = RiskSets.of(total, ties)
        far = bool(np.rint(total["beyond"]).any())
        loglik = sets.log_likelihood(beta_P) if not far and all(all_finite(v) for v in total.values()) else -np.inf
        loglik = loglik if np.isfinite(loglik) else -np.inf
        return cls(beta_P, total, sets, loglik, loglik - 0.5 * float(penalty_P @ beta_P**2), far)

    def newton(self, penalty_P: np.ndarray) -> tuple[np.ndarray, float]:
        """Newton's step `[P]`, and its length in standard errors."""
        gradient_P = self.sets.residual.sum(0) - penalty_P * self.beta_P
        step_P = np.linalg.solve(self.sets.information() + np.diag(penalty_P), gradient_P)
        return step_P, float(np.sqrt(max(gradient_P @ step_P, 0.0)))


def fit_cox(
    ask: Callable[[np.ndarray], Sum],
    names: Sequence[str],
    *,
    ties: Ties = "efron",
    penalty_P: np.ndarray | None = None,
    max_steps: int = 40,
    close: float = CLOSE,
) -> CoxFit:
    """The Cox model of all sites' patients, exactly that of their pooled table.

    `ask(beta_P)` gives the sum over sites of `leaving_sums` at these coefficients, of covariates that are standardised by the
    federation's means and deviations (`CoxFit.on_scale` leads back); `max_steps` counts its calls, and a step shorter than
    `close` standard errors is the last. `penalty_P`: ridge penalty
    of each coefficient on the likelihood of one patient (0: none). Raises `NoEvents`, `CollinearCovariates`,
    `MonotoneLikelihood` and `NoConvergence`, each with its remedy.
    """
    names = tuple(names)
    ridge_P = np.zeros(len(names)) if penalty_P is None else np.asarray(penalty_P, dtype=np.float64)
    if ridge_P.shape != (len(names),) or not np.isfinite(ridge_P).all() or (ridge_P < 0).any():
        raise ValueError(f"penalty must be {len(names)} numbers >= 0, one for each of {list(names)}; got {ridge_P}")
    if ties not in ("efron", "breslow"):
        raise ValueError(f"ties must be efron or breslow, got {ties!r}")
    zero_P = np.zeros(len(names))
    total = ask(zero_P)
    _check(total, names)
    whole_P = ridge_P * float(np.rint(total["patients"]).sum())  # the penalty on the likelihood of all patients
    null = _Point.at(zero_P, total, ties, whole_P)
    _check_information(null.sets, whole_P, names)
    _, score = null.newton(zero_P) if not ridge_P.any() else (zero_P, np.nan)

    here, asked, iterations = null, 1, 0
    before, before_P, runaway = np.inf, zero_P, 0
    while True:
        try:
            step_P, length = here.newton(whole_P)
        except np.linalg.LinAlgError:
            raise _runaway(here.beta_P, before_P, names) from None
        # Near the maximum each step squares the distance; where it no longer shrinks, the sums' own rounding is reached.
        if length <= close or (length <= QUADRATIC and (length > before / 10 or asked >= max_steps)):
            break
        longest = np.abs(step_P).max() >= 0.5 * np.abs(before_P).max()
        runaway = runaway + 1 if longest and iterations and length < QUIET and length > 0.3 * before else 0
        if runaway == RUNAWAY:
            raise _runaway(here.beta_P, step_P, names)
        before, before_P, share = length, step_P, 1.0
        while True:
            if asked >= max_steps:
                raise _unfinished(here, step_P, length, names, asked)
            there = _Point.at(here.beta_P + share * step_P, ask(here.beta_P + share * step_P), ties, whole_P)
            asked += 1
            if there.value >= here.value - SLACK * (1 + abs(here.value)):
                break
            share /= 2
            if there.far and share < SHORTEST:
                raise _runaway(here.beta_P, step_P, names)
        here, iterations = there, iterations + 1

    information_PP = here.sets.information()
    variance_PP = np.linalg.inv(information_PP + np.diag(whole_P))
    df = float(np.trace(variance_PP @ information_PP)) if ridge_P.any() else float(len(names))
    return CoxFit(
        names=names,
        beta_P=here.beta_P,
        variance_PP=(variance_PP + variance_PP.T) / 2,
        df=df,
        loglik=here.loglik,
        loglik_null=null.loglik,
        score=None if ridge_P.any() else ChiSquare(score**2, float(len(names))),
        ties=ties,
        penalty_P=ridge_P,
        iterations=iterations,
        precision=length,
        total=here.total,
        mean_P=np.zeros(len(names)),
        sd_P=np.ones(len(names)),
    )


def _check(total: Sum, names: tuple[str, ...]) -> None:
    """Raise where the first total is not one of these covariates, or holds nothing to fit."""
    if not names:
        raise ValueError(
            "a Cox model needs at least one covariate, got none; name some, or ask for a Kaplan-Meier curve"
        )
    if total["event_x"].shape[-1] != len(names):
        raise ValueError(
            f"the sites sent {total['event_x'].shape[-1]} covariates, {len(names)} are named: {list(names)}"
        )
    broken = [name for name, value in total.items() if not all_finite(value)]
    if broken:
        raise ValueError(f"sums {broken} are not finite; look for missing or immense covariates at the sites")
    if not np.rint(total["events"]).any():
        raise NoEvents(
            f"none of {round(float(total['patients'].sum()))} patients has an event, a Cox model needs some; "
            "follow the patients for longer, join more sites, or choose an endpoint that happens"
        )


def _check_information(sets: RiskSets, penalty_P: np.ndarray, names: tuple[str, ...]) -> None:
    """Raise where covariates do not vary over the risk sets or, without enough penalty, where they are sums of others."""
    information_PP = sets.information()
    (a, b), width = sets.inverse_C, len(names)
    size_P = np.diag(
        unpacked(a @ sets.at_risk[2] - b @ sets.tied[2], width)
    )  # before the square of the mean is taken off
    flat = [name for name, own, z in zip(names, np.diag(information_PP), size_P, strict=True) if own <= FLAT * z]
    if flat:
        raise CollinearCovariates(
            f"covariates {flat} do not vary among the patients at risk within any stratum; leave them out"
        )
    scale_P = np.diag(information_PP) + penalty_P
    unit_PP = (information_PP + np.diag(penalty_P)) / np.sqrt(np.outer(scale_P, scale_P))
    values, vectors = np.linalg.eigh(unit_PP)
    if values[0] < FLAT:
        share_P = np.abs(vectors[:, 0])
        alike = [name for name, s in zip(names, share_P, strict=True) if s > 0.1 * share_P.max()]
        raise CollinearCovariates(
            f"covariates {alike} cannot be told apart: one is a sum of the others among the patients at risk; "
            "leave one of them out, or set a penalty"
        )


def _runaway(beta_P: np.ndarray, step_P: np.ndarray, names: tuple[str, ...]) -> MonotoneLikelihood:
    share_P = np.abs(step_P)
    moving = [name for name, s in zip(names, share_P, strict=True) if s > 0.1 * share_P.max()]
    return MonotoneLikelihood(
        f"coefficients of {moving} grow without end (now {[round(float(beta_P[names.index(n)]), 2) for n in moving]}): "
        "some combination of them orders the events perfectly, or a few values lie immensely far out; leave them out, "
        "join rare categories, take logarithms, or set a penalty"
    )


def _unfinished(here: _Point, step_P: np.ndarray, length: float, names: tuple[str, ...], asked: int) -> NoConvergence:
    worst = names[int(np.abs(step_P).argmax())]
    return NoConvergence(
        f"the Cox model is {length:.2g} standard errors from its maximum after {asked} questions to the sites "
        f"(log-likelihood {here.loglik:.6g}), most of it in {worst}; take the logarithm of covariates with far outliers, "
        "set a penalty, or allow more steps"
    )
