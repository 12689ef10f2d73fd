"""Robust variance of a Cox model in one more question: the sites sum the outer products of score residuals.

Shapes as in `risk_sets`. A patient's score residual is what she adds to the score once its risk sets are taken as random,
U_i = event_i (x_i - mean_i) - sum over cells up to hers of exp(x_i beta) (x_i - mean) dLambda (Lin & Wei 1989), with
Efron's ties as in R's `residuals(coxph, type = "score")`: within her own cell an event counts with weight 1 - l / d.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from oncofed.common.blocks import Sum
from oncofed.common.classical.risk_sets import RiskSets, Ties


def residual_terms(total: Mapping[str, np.ndarray], ties: Ties) -> Sum:
    """What the server tells the sites `[S, T(, P)]`, from the total at the coefficients of the fit.

    `hazard` and `hazard_x`: cumulative hazard, and the integral of the risk sets' mean over it, up to and with each cell;
    `event_hazard` and `event_hazard_x`: the same for who has an event in that cell; `mean_x`: the mean that an event meets.
    """
    sets = RiskSets.of(total, ties)
    (a, b), (aa, ab, bb) = sets.inverse_C, sets.inverse_square_C
    s1_CP, t1_CP = sets.at_risk[1], sets.tied[1]
    shape, width = total["events"].shape, s1_CP.shape[1]

    def spread(value: np.ndarray) -> np.ndarray:
        full = np.zeros((*shape, *value.shape[1:]))
        full[sets.stratum_C, sets.cell_C] = value
        return full

    step, step_x = spread(a), spread(s1_CP * aa[:, None] - t1_CP * ab[:, None])
    own, own_x = spread(a - b), spread(s1_CP * (aa - ab)[:, None] - t1_CP * (ab - bb)[:, None])
    hazard, hazard_x = np.cumsum(step, axis=1), np.cumsum(step_x, axis=1)
    before = np.concatenate([np.zeros((shape[0], 1)), hazard[:, :-1]], axis=1)
    before_x = np.concatenate([np.zeros((shape[0], 1, width)), hazard_x[:, :-1]], axis=1)
    return {
        "hazard": hazard,
        "hazard_x": hazard_x,
        "event_hazard": before + own,
        "event_hazard_x": before_x + own_x,
        "mean_x": spread(sets.mean),
    }


def score_residuals(
    x_NP: np.ndarray,
    cell_N: np.ndarray,
    event_N: np.ndarray,
    stratum_N: np.ndarray,
    beta_P: np.ndarray,
    terms: Mapping[str, np.ndarray],
) -> np.ndarray:
    """Score residuals `[N, P]` of a site's patients: they never leave it."""
    cell_N = np.asarray(cell_N)
    at = np.asarray(stratum_N), np.maximum(cell_N, 0)
    dead_N = np.asarray(event_N) > 0
    hazard_N = np.where(dead_N, terms["event_hazard"][at], terms["hazard"][at])
    hazard_x_NP = np.where(dead_N[:, None], terms["event_hazard_x"][at], terms["hazard_x"][at])
    weight_N = np.exp(x_NP @ beta_P) * (cell_N >= 0)
    expected_NP = weight_N[:, None] * (x_NP * hazard_N[:, None] - hazard_x_NP)
    return np.where(dead_N[:, None], x_NP - terms["mean_x"][at], 0.0) - expected_NP


def residual_sums(
    x_NP: np.ndarray,
    cell_N: np.ndarray,
    event_N: np.ndarray,
    stratum_N: np.ndarray,
    beta_P: np.ndarray,
    terms: Mapping[str, np.ndarray],
) -> Sum:
    """`outer [P, P]`: sum of U_i U_i' over a site's patients, all that `CoxFit.with_robust` needs."""
    residual_NP = score_residuals(x_NP, cell_N, event_N, stratum_N, beta_P, terms)
    return {"outer": residual_NP.T @ residual_NP}
