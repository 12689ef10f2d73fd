"""Balance between modalities: who leads, and how far the leading encoder is slowed (gradient modulation).

Peng et al. 2022 (arXiv 2203.15332, OGM-GE) for classification; Path-GPTOmic (arXiv 2403.11375, eq. 5-8) for survival, whose
eq. 5 lacks an exponential: as printed it slows one of two untrained encoders at random. Shapes: M modalities, B patients.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

BRANCHES = "branches"
"""The name under which a training sum carries `[M, len(COLUMNS)]`, and a request the last round's total."""

COLUMNS = ("patients", "risk", "squares", "pairs", "lead", "factor")
"""Of a round, summed over its steps: patients who have the modality, their log hazards and squares, patients who have all
modalities, what each of those adds to the lead, and the rate's factor times patients."""

REACH = 5.0
"""No patient counts more than exp(5) towards the lead."""


def likelihood_lead(loss_B: Tensor, null_B: Tensor) -> Tensor:
    """Likelihood of each patient under one modality's log hazard, relative to no log hazard at all `[B]`.

    Relative, so that an event's density and a censored patient's probability count alike and units of time do not matter.
    """
    return torch.exp((null_B - loss_B).clamp(-REACH, REACH))


def risk_set_lead(
    risk_B: Tensor, time_B: Tensor, event_B: Tensor, cancer_B: Tensor, *, literal: bool = False
) -> Tensor:
    """Share exp(eta_k) / sum over the risk set of exp(eta_j) of each patient with an event `[B]`, 0 for others.

    Risk sets are of one cancer type; a patient who is alone in hers says nothing about the modality and counts 0.
    `literal` leaves the exponential of the numerator out, as eq. 5 is printed (its b is 0 here: baselines carry the level).
    """
    at_risk_BB = (time_B[None] >= time_B[:, None]) & (cancer_B[None] == cancer_B[:, None])
    odds_B = torch.exp(risk_B.clamp(-4 * REACH, 4 * REACH))
    total_B = at_risk_BB.to(odds_B.dtype) @ odds_B
    share_B = (risk_B if literal else odds_B) / total_B
    counts = (event_B == 1) & (at_risk_BB.sum(1) >= 2)
    return torch.where(counts, share_B, torch.zeros_like(share_B))


def rate_factors(lead_M: np.ndarray, pairs: float, floor: float) -> np.ndarray:
    """clip(1 - tanh(rho - 1), floor, 1) for rho, a modality's lead over the mean of the others'; 1 where nobody has all."""
    if pairs <= 0 or len(lead_M) < 2:
        return np.ones(len(lead_M))
    others = (lead_M.sum() - lead_M) / (len(lead_M) - 1)
    rho = np.divide(lead_M, others, out=np.ones(len(lead_M)), where=np.abs(others) > 1e-12)
    return np.clip(1.0 - np.tanh(rho - 1.0), floor, 1.0)


def contributions(table: np.ndarray, modalities: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """Of a round's summed table: each modality's patients, deviation of its log hazard, its share of the variance, rate factor."""
    n = np.maximum(table[:, COLUMNS.index("patients")], 1.0)
    mean = table[:, COLUMNS.index("risk")] / n
    variance = np.maximum(table[:, COLUMNS.index("squares")] / n - np.square(mean), 0.0)
    total = variance.sum()
    factor = np.where(table[:, 0] > 0, table[:, COLUMNS.index("factor")] / n, 1.0)
    return {
        m: {
            "patients": float(table[i, 0]),
            "deviation": float(np.sqrt(variance[i])),
            "share": float(variance[i] / total) if total > 0 else 0.0,
            "factor": float(factor[i]),
        }
        for i, m in enumerate(modalities)
    }
