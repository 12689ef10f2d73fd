"""Log-rank tests of a federation, plain and stratified, from the counts that Kaplan-Meier needs too.

Shapes: S strata, G groups, T cells of time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from oncofed.common.classical.life_table import Cells, exposed
from scipy.special import chdtrc

NONE = 1e-10
"""A share of the largest variance below which a contrast of groups has none: they were never at risk together."""


@dataclass(frozen=True, eq=False)
class LogRank:
    """Observed and expected events `[G]` (weighted where rho is not 0), their variance `[G, G]`, and the test."""

    groups: tuple[str, ...]
    observed: np.ndarray
    expected: np.ndarray
    variance: np.ndarray
    chi2: float
    df: int
    p: float
    strata: int
    rho: float

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON; without two groups to compare there is neither chi2 nor p."""
        known = self.df > 0
        return {
            "groups": list(self.groups),
            "observed": self.observed.tolist(),
            "expected": self.expected.tolist(),
            "chi2": self.chi2 if known else None,
            "df": self.df,
            "p": self.p if known else None,
            "strata": self.strata,
            "rho": self.rho,
        }


def log_rank(sums: dict[str, np.ndarray], cells: Cells, names: Sequence[str], rho: float = 0.0) -> LogRank:
    """The test of Harrington and Fleming (1982) with weights S(t-)^rho, from the sites' total of `table_sums`, as R's `survdiff`.

    rho 0 is the log-rank test, 1 Peto and Peto's version of Wilcoxon's. Expected events and variances are added over strata, S is
    the stratum's own. A group that is never at risk with another adds no degree of freedom.
    """
    if sums["events"].shape[1] != len(names):
        raise ValueError(f"counts of {sums['events'].shape[1]} groups beside {len(names)} names: give one name a group")
    d_SGT, y_SGT = sums["events"], exposed(sums["leaving"], sums["events"], cells.even)
    d_ST, y_ST = d_SGT.sum(1), y_SGT.sum(1)
    hazard_ST = np.clip(_ratio(d_ST, y_ST), -1.0, 1.0)
    before_ST = np.clip(np.cumprod(1.0 - hazard_ST, axis=1), 0.0, 1.0)
    before_ST = np.concatenate([np.ones((len(before_ST), 1)), before_ST[:, :-1]], axis=1)
    w_ST = before_ST**rho
    share_SGT = _ratio(y_SGT, y_ST[:, None])
    seen_ST = (y_ST > 0).astype(np.float64)  # where nobody is at risk nobody can be expected to have an event
    observed = np.einsum("st,sgt->g", w_ST * seen_ST, d_SGT)
    expected = np.einsum("st,sgt->g", w_ST * d_ST, share_SGT)
    left_ST = np.clip(_ratio(y_ST - d_ST, y_ST - 1.0), 0.0, 1.0)  # drawn without putting back; 0 for a single patient
    v_ST = w_ST**2 * d_ST * left_ST
    variance = np.diag(np.einsum("st,sgt->g", v_ST, share_SGT)) - np.einsum(
        "st,sgt,sht->gh", v_ST, share_SGT, share_SGT
    )
    value, df = _quadratic(observed - expected, variance)
    return LogRank(
        tuple(names),
        observed,
        expected,
        variance,
        value,
        df,
        float(chdtrc(df, value)) if df else 1.0,
        len(d_SGT),
        float(rho),
    )


def _quadratic(z: np.ndarray, variance: np.ndarray) -> tuple[float, int]:
    """z' V^- z and the rank of V, whose rows add up to 0."""
    values, vectors = np.linalg.eigh((variance + variance.T) / 2)
    keep = values > NONE * max(float(np.abs(values).max(initial=0.0)), NONE)
    return float(np.sum((vectors.T @ z)[keep] ** 2 / values[keep])), int(keep.sum())


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = np.broadcast_arrays(a, b)
    return np.divide(a, b, out=np.zeros(a.shape), where=b > 0)
