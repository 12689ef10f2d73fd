"""Survival and censoring distributions on the time bins, for many tables at once.

Shapes: counts `[..., 2, R, T]` (event, risk bin, time bin), any leading axes: cancer types, draws of a bootstrap.
"""

from __future__ import annotations

import numpy as np
from oncofed.common.classical.life_table import exposed
from oncofed.common.evaluation.table import events_and_leaving

SMALLEST_G = 0.05
"""Probabilities of being uncensored are cut off here, so that no patient weighs more than 20 (or 400 where squared)."""


def product_limit(events: np.ndarray, leaving: np.ndarray) -> np.ndarray:
    """Actuarial survival `[..., T + 1]` at the start, at each of the T - 1 edges and at the end of the open bin.

    Patients are taken to leave evenly within a bin (Cutler and Ederer 1958). Counts that noise made negative are used as
    they are; only the product is kept within 0 and 1.
    """
    at_risk = exposed(leaving, events, even=True)
    hazard = np.divide(events, at_risk, out=np.zeros(at_risk.shape), where=at_risk > 0)
    survival = np.cumprod(1.0 - np.clip(hazard, -1.0, 1.0), axis=-1)
    return np.clip(np.concatenate([np.ones_like(survival[..., :1]), survival], axis=-1), 0.0, 1.0)


def greenwood(events: np.ndarray, leaving: np.ndarray) -> np.ndarray:
    """Variance `[...]` of the logarithm of survival after as many bins as `events [..., t]` has, of `leaving [..., T]`."""
    until = events.shape[-1]
    at_risk = exposed(leaving, np.concatenate([events, leaving[..., until:]], axis=-1), even=True)[..., :until]
    hazard = np.clip(np.divide(events, at_risk, out=np.zeros(events.shape), where=at_risk > 0), 0.0, 0.99)
    return np.divide(hazard, at_risk * (1.0 - hazard), out=np.zeros(events.shape), where=at_risk > 0).sum(-1)


def survival_at_edges(counts: np.ndarray) -> np.ndarray:
    """Kaplan-Meier (actuarial) `[..., T - 1]` at the time edges, of all risk bins together."""
    return product_limit(*events_and_leaving(counts))[..., 1:-1]


def uncensored(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Probability G of still being uncensored: `[..., T]` in the middle of each bin, `[..., T - 1]` at the edges.

    The middle is the one of a straight line within the bin. Both are cut off at `SMALLEST_G`.
    """
    events, leaving = events_and_leaving(counts)
    G = np.maximum(product_limit(leaving - events, leaving), SMALLEST_G)
    return (G[..., :-1] + G[..., 1:]) / 2, G[..., 1:-1]
