"""AUC(t) and Brier score from the evaluation table, weighted by the inverse probability of censoring.

Shapes: counts `[..., 2, R, T]` (event, risk bin, time bin), any leading axes: cancer types, draws of a bootstrap; predicted
survival `[..., R, T - 1]` at the time edges. A patient's prediction is the one of the mean risk of their risk bin.
Censoring is estimated from the table itself: one distribution for all patients of a table `[2, R, T]`.
"""

from __future__ import annotations

import numpy as np
from oncofed.common.evaluation.censoring import survival_at_edges, uncensored
from oncofed.common.evaluation.concordance import concordance_of_ties, concordant_pairs, neighbouring_pairs
from oncofed.common.metrics import ratio
from oncofed.common.survival import TimeGrid, survival_curve


def predicted_survival(
    mean_risk: np.ndarray, log_baseline_CK: np.ndarray, grid: TimeGrid, time_edges: np.ndarray
) -> np.ndarray:
    """Survival `[C, R, T - 1]` at the time edges of a patient of each risk bin, by a baseline hazard of each cancer type."""
    pairs = zip(log_baseline_CK, mean_risk, strict=True)
    return np.stack([survival_curve(baseline, grid, risk, time_edges) for baseline, risk in pairs])


def auc(counts: np.ndarray, until: int) -> np.ndarray:
    """Cumulative/dynamic AUC `[...]` at the end of the first `until` time bins (Uno et al. 2007; Hung and Chiang 2010).

    Cases had the event by then, each weighted by 1 / G at its time; controls live on. Risk bins must be in order of
    risk. Pairs within one bin are filled in as in the C-index. NaN without cases or controls.
    """
    G_middle, _ = uncensored(counts)
    cases = (counts[..., 1, :, :until] / G_middle[..., None, :until]).sum(-1, keepdims=True)
    controls = counts[..., until:].sum((-3, -1))[..., None]
    tied = concordance_of_ties(*neighbouring_pairs(cases, controls))
    return ratio(concordant_pairs(cases, controls, tied[..., None]), (cases.sum(-2) * controls.sum(-2))[..., 0])


def brier(counts: np.ndarray, survival: np.ndarray) -> np.ndarray:
    """Brier score `[..., T - 1]` at each time edge (Graf et al. 1999); NaN without patients."""
    G_middle, G_edge = uncensored(counts)
    cases = np.cumsum(counts[..., 1, :, :] / G_middle[..., None, :], -1)[..., :-1]
    everyone = counts.sum(-3)
    controls = np.flip(np.cumsum(np.flip(everyone, -1), -1), -1)[..., 1:] / G_edge[..., None, :]
    loss = (cases * survival**2 + controls * (1.0 - survival) ** 2).sum(-2)
    return ratio(loss, everyone.sum((-2, -1))[..., None])


def integrated_brier(counts: np.ndarray, survival: np.ndarray, time_edges: np.ndarray, until: int) -> np.ndarray:
    """Mean Brier score `[...]` over time from 0, where it is 0, to the end of the first `until` bins, by trapezoids."""
    scores = brier(counts, survival)[..., :until]
    times = np.concatenate([[0.0], time_edges[:until]])
    scores = np.concatenate([np.zeros_like(scores[..., :1]), scores], axis=-1)
    return ((scores[..., :-1] + scores[..., 1:]) / 2 * np.diff(times)).sum(-1) / times[-1]


def null_survival(counts: np.ndarray) -> np.ndarray:
    """The null model `[..., 1, T - 1]`: everybody's survival is the Kaplan-Meier of their own cancer type.

    With it a Brier score is put on a scale of 0 (no better than that) to 1: `1 - brier(h, s) / brier(h, null_survival(h))`.
    """
    return survival_at_edges(counts)[..., None, :]
