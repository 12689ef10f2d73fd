"""What a trained model looks at and how its scores lie, as sums over a site's training patients.

Shapes: N patients, G genes, C cancer types, E experts, K intervals.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from captum.attr import IntegratedGradients
from oncofed.client.batch import Batch
from oncofed.client.data.cohort import Cohort
from oncofed.client.release import Answer
from oncofed.client.score import scored_model
from oncofed.client.session import Session
from oncofed.common.blocks import Sum
from oncofed.common.modalities import MODALITIES, RNA
from oncofed.common.models.build import Predictor
from oncofed.common.models.gene_moe import EXPERT
from oncofed.common.models.inputs import Inputs
from oncofed.common.splits import seed_from
from oncofed.common.survival import RISK_EDGES, TimeGrid
from torch import Tensor

CHUNK = 32
"""Patients whose whole paths are held at once."""


def explain(session: Session) -> Answer:
    """Calibration of survival scores by cancer type, and, when the study asks, attributions of genes.

    Cells of cancer types with few patients are withheld at the door: one patient's attributions would be her expression.
    """
    cohort = session.training_cohort()
    model, cancers = scored_model(session), len(session.cancers)
    total: Sum = {}
    cells: dict[str, np.ndarray] = {}
    count = np.bincount(cohort.cancer, minlength=cancers)
    if session.study.task.kind == "survival":
        batch = session.batch(cohort)
        with torch.no_grad():
            risk = batch.through(model).risk.double().cpu().numpy()
        total |= calibration_sums(risk, cohort, session.lens.grid, cancers)
        cells |= dict.fromkeys(total, count)
    if session.study.analysis.attributions:
        rng = np.random.default_rng(seed_from(session.study.seed, "explain", session.fold, session.site.name))
        known = np.flatnonzero(cohort.has(RNA))
        some = cohort.select(np.sort(rng.permutation(known)[: session.study.analysis.patients]))
        genes = attribution_sums(model, session.batch(some), cancers, session.study.analysis.steps)
        total |= genes
        by_cancer = np.bincount(some.cancer, minlength=cancers)
        cells |= {name: by_cancer for name in genes if not name.startswith("gate/")}
    return Answer({}, total, len(cohort), cells, numbers=4)


def calibration_sums(risk: np.ndarray, cohort: Cohort, grid: TimeGrid, cancers: int) -> Sum:
    """How risks lie and what they leave to the baselines, by cancer type.

    `risk_counts [C, len(RISK_EDGES) + 1]`; `events [C, K]`; `weighted_exposure [C, K]`, months under observation times
    hazard ratio. events / weighted_exposure is the baseline hazard of highest likelihood, whatever the risks came from.
    """
    member = np.eye(cancers)[cohort.cancer].T
    bins = np.eye(len(RISK_EDGES) + 1)[np.searchsorted(RISK_EDGES, risk)]
    at = np.eye(len(grid))[grid.interval(cohort.time)] * cohort.event[:, None]
    return {
        "risk_counts": member @ bins,
        "events": member @ at,
        "weighted_exposure": member @ (np.exp(risk)[:, None] * grid.exposure(cohort.time)),
    }


def attribution_sums(model: Predictor, batch: Batch, cancers: int, steps: int) -> Sum:
    """Integrated gradients (Sundararajan et al. 2017) of the score, and of each expert's gate logit, from the mean patient.

    By cancer type `[C, G]`: `attribution/size`, the sum of |a|; `attribution/product`, of a x; `attribution/squares`, of
    x^2; `attribution/patients [C]`. product / squares is the slope of the attribution on expression, for a linear model
    its coefficient. By expert `gate/product [E, G]` and `gate/squares [G]` in the same way, over all patients.
    """
    member = np.eye(cancers)[batch.cancer_B.cpu().numpy()].T
    x = batch.x_BG.double().cpu().numpy()

    def score(x_BG: Tensor, cancer_B: Tensor, v_BV: Tensor) -> Tensor:
        # beside other modalities genes move RNA's part of a sum alone: the others may be left out
        has = {m: torch.full_like(cancer_B, m == RNA, dtype=torch.bool) for m in MODALITIES}
        value = model(Inputs(x_BG, cancer_B, v_BV, has)).score
        return value if value.ndim == 1 else value.gather(1, cancer_B[:, None]).squeeze(1)

    a = _attribute(score, batch, steps)
    out = {
        "attribution/patients": member.sum(1),
        "attribution/size": member @ np.abs(a),
        "attribution/product": member @ (a * x),
        "attribution/squares": member @ np.square(x),
    }
    assert model.encoder is not None
    gate = model.encoder.gate
    if gate is not None:
        products = []
        for e in range(model.mixtures()[EXPERT]):

            def logit(x_BG: Tensor, cancer_B: Tensor, v_BV: Tensor, e: int = e) -> Tensor:
                return gate(x_BG, cancer_B, None)[1][:, e]

            products.append((_attribute(logit, batch, steps) * x).sum(0))
        out |= {"gate/product": np.array(products), "gate/squares": np.square(x).sum(0)}
    return out


def _attribute(function: Callable[..., Tensor], batch: Batch, steps: int) -> np.ndarray:
    """Attributions `[N, G]`, float64, on the path from 0, the mean patient of the federation."""
    if not len(batch):
        return np.zeros(batch.x_BG.shape)
    method = IntegratedGradients(function)
    parts = []
    for rows in torch.arange(len(batch), device=batch.x_BG.device).split(CHUNK):
        some = batch.select(rows)
        parts.append(
            method.attribute(
                some.x_BG,
                baselines=torch.zeros_like(some.x_BG),
                additional_forward_args=(some.cancer_B, some.v_BV),
                n_steps=steps,
                method="gausslegendre",
            ).detach()
        )
    return torch.cat(parts).double().cpu().numpy()
