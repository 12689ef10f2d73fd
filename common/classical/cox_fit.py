"""A fitted Cox model: coefficients, their uncertainty, tests, baseline hazards and predicted survival.

Shapes: P covariates, S strata, T cells of time, N patients. All that is named here is on the scale on which clinicians
speak, x = mean + sd * (x as the sites send it); `beta_P` and `variance_PP` alone are on the scale of the fit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from oncofed.common.blocks import Sum
from oncofed.common.classical.risk_sets import RiskSets, Ties
from scipy.special import chdtrc, ndtr, ndtri

LEVEL = 0.95
"""Of all intervals."""


@dataclass(frozen=True)
class ChiSquare:
    """A test statistic and its degrees of freedom, not always whole under a penalty."""

    chi2: float
    df: float

    @property
    def p(self) -> float:
        """Upper tail of the chi-square distribution."""
        return float(chdtrc(self.df, self.chi2))

    def as_dict(self) -> dict[str, float]:
        """For JSON."""
        return {"chi2": self.chi2, "df": self.df, "p": self.p}


@dataclass(frozen=True)
class CoxFit:
    """The maximum of the (penalised) log partial likelihood, and the sites' total at it.

    `variance_PP` is the inverse of the (penalised) information, `df` the degrees of freedom of all coefficients (their number
    without a penalty; Gray 1992). `robust_PP` is the sandwich where `with_robust` was called, and then z, p and the
    intervals are of it, as in R. `precision`: distance from the exact maximum in standard errors, as the last gradient tells.
    """

    names: tuple[str, ...]
    beta_P: np.ndarray
    variance_PP: np.ndarray
    df: float
    loglik: float
    loglik_null: float
    score: ChiSquare | None
    ties: Ties
    penalty_P: np.ndarray
    iterations: int
    precision: float
    total: Sum
    mean_P: np.ndarray
    sd_P: np.ndarray
    robust_PP: np.ndarray | None = None

    def on_scale(self, mean_P: np.ndarray, sd_P: np.ndarray) -> CoxFit:
        """The same fit told on the original scale, where the sites sent (x - mean) / sd; the penalty stays on theirs."""
        mean_P, sd_P = np.asarray(mean_P, dtype=np.float64), np.asarray(sd_P, dtype=np.float64)
        if mean_P.shape != self.beta_P.shape or sd_P.shape != self.beta_P.shape or (sd_P <= 0).any():
            raise ValueError(
                f"mean and sd must be {len(self.names)} numbers each, one a covariate, and sd above 0; "
                f"got shapes {mean_P.shape} and {sd_P.shape}, smallest sd {sd_P.min() if sd_P.size else None}"
            )
        return replace(self, mean_P=mean_P, sd_P=sd_P)

    def with_robust(self, outer_PP: np.ndarray) -> CoxFit:
        """With the sandwich variance from the total of `score_residuals.residual_sums`."""
        return replace(self, robust_PP=self.variance_PP @ outer_PP @ self.variance_PP)

    # -- coefficients --------------------------------------------------------------------------------------------------

    @property
    def coef(self) -> np.ndarray:
        """Log hazard ratios `[P]` for one unit more."""
        return self.beta_P / self.sd_P

    @property
    def se(self) -> np.ndarray:
        """Standard errors `[P]` from the information."""
        return np.sqrt(np.diag(self.variance_PP)) / self.sd_P

    @property
    def robust_se(self) -> np.ndarray | None:
        """Standard errors `[P]` from the sandwich, where it was asked for."""
        return None if self.robust_PP is None else np.sqrt(np.diag(self.robust_PP)) / self.sd_P

    @property
    def z(self) -> np.ndarray:
        """Coefficients over their standard errors `[P]`, the robust ones where there are any."""
        robust = self.robust_se
        return self.coef / (self.se if robust is None else robust)

    @property
    def p(self) -> np.ndarray:
        """Two-sided p-values `[P]`."""
        return 2.0 * ndtr(-np.abs(self.z))

    @property
    def interval(self) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper ends of the hazard ratios' 95 % intervals, `[P]` each."""
        robust = self.robust_se
        reach = ndtri(0.5 + LEVEL / 2) * (self.se if robust is None else robust)
        return np.exp(self.coef - reach), np.exp(self.coef + reach)

    # -- tests of all coefficients at once -----------------------------------------------------------------------------

    @property
    def likelihood_ratio(self) -> ChiSquare:
        """Twice the gain in log-likelihood over no covariates."""
        return ChiSquare(2.0 * (self.loglik - self.loglik_null), self.df)

    @property
    def wald(self) -> ChiSquare:
        """Of the robust variance where there is one."""
        variance = self.variance_PP if self.robust_PP is None else self.robust_PP
        return ChiSquare(float(self.beta_P @ np.linalg.solve(variance, self.beta_P)), self.df)

    # -- hazards and survival ------------------------------------------------------------------------------------------

    def cumulative_hazard(self, x_P: np.ndarray | None = None) -> np.ndarray:
        """Cumulative baseline hazard `[S, T]` at the end of each cell, at covariates `x_P`, or at their means.

        Breslow's estimator, or with Efron's ties the one that goes with them, as R's `basehaz`.
        """
        sets = RiskSets.of(self.total, self.ties)
        step = np.zeros(self.total["events"].shape)
        step[sets.stratum_C, sets.cell_C] = sets.inverse_C[0]
        relative = 0.0 if x_P is None else (np.asarray(x_P, dtype=np.float64) - self.mean_P) / self.sd_P @ self.beta_P
        return np.cumsum(step, axis=1) * np.exp(relative)

    def survival(self, x_NP: np.ndarray, stratum_N: np.ndarray) -> np.ndarray:
        """Probability `[N, T]` of being without an event after each cell."""
        relative_N = np.exp((np.asarray(x_NP, dtype=np.float64) - self.mean_P) / self.sd_P @ self.beta_P)
        return np.exp(-relative_N[:, None] * self.cumulative_hazard()[np.asarray(stratum_N)])

    # -- for a file ----------------------------------------------------------------------------------------------------

    def as_dict(
        self, times_T: np.ndarray, strata: Sequence[str], proportional_hazards: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Everything for JSON, without NaN; `baseline` is the hazard of a patient at the means of `baseline_at`.

        `times_T`: time of each cell, `strata`: names; `proportional_hazards`: what `ProportionalHazards.as_dict` gives.
        """
        hazard_ST, events_ST = self.cumulative_hazard(), self.total["events"]
        if len(times_T) != events_ST.shape[1] or len(strata) != events_ST.shape[0]:
            raise ValueError(
                f"the fit has {events_ST.shape[0]} strata and {events_ST.shape[1]} cells of time, "
                f"got {len(strata)} names and {len(times_T)} times; give one for each"
            )
        lower, upper = self.interval
        told = {
            "names": list(self.names),
            "coef": self.coef,
            "se": self.se,
            "robust_se": self.robust_se,
            "hazard_ratio": np.exp(self.coef),
            "lower": lower,
            "upper": upper,
            "z": self.z,
            "p": self.p,
            "loglik": self.loglik,
            "loglik_null": self.loglik_null,
            "tests": {
                "likelihood_ratio": self.likelihood_ratio.as_dict(),
                "wald": self.wald.as_dict(),
                "score": None if self.score is None else self.score.as_dict(),
            },
            "ties": self.ties,
            "penalty": self.penalty_P,
            "iterations": self.iterations,
            "patients": round(float(self.total["patients"].sum())),
            "events": round(float(events_ST.sum())),
            "baseline_at": dict(zip(self.names, self.mean_P.tolist(), strict=True)),
            "baseline": [
                {"stratum": strata[s], "time": float(times_T[t]), "cumulative_hazard": hazard_ST[s, t]}
                for s, t in zip(*np.nonzero(np.rint(events_ST)), strict=True)
            ],
            "proportional_hazards": proportional_hazards,
        }
        return {name: plain(value) for name, value in told.items()}


def plain(value: Any) -> Any:
    """For JSON: arrays as lists, and None for whatever is not a finite number."""
    if isinstance(value, Mapping):
        return {name: plain(v) for name, v in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float):  # numpy's float64 is one
        return float(value) if np.isfinite(value) else None
    return value
