"""Which genes drive a trained model's score: integrated gradients of patients, summed by class.

Shapes: N patients, G genes, C cancer types or classes, E experts.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from captum.attr import IntegratedGradients
from oncofed.client.batch import Batch
from oncofed.common.blocks import Sum
from oncofed.common.modalities import MODALITIES, RNA
from oncofed.common.models.build import Predictor
from oncofed.common.models.gene_moe import EXPERT
from oncofed.common.models.inputs import Inputs
from oncofed.common.models.t_gem import TGEM
from torch import Tensor

CHUNK = 32
"""Patients whose whole paths are held at once."""

INTERNAL = 64
"""Points of these paths whose gradients are held at once."""

Score = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Expression `[B, G]`, cancer type or class `[B]` and covariates `[B, V]` -> a number of each patient `[B]`."""


def attribution_sums(model: Predictor, batch: Batch, cancers: int, steps: int) -> Sum:
    """Integrated gradients of the score, and of each expert's gate logit, from the mean patient, by cancer type or class.

    `[C, G]`: `attribution/sum`, of a; `attribution/size`, of |a|; `attribution/product`, of a x; `attribution/squares`, of
    x^2; `attribution/patients [C]`. product / squares is the slope of the attribution on expression, for a linear model its
    coefficient. By expert `gate/product [E, G]` and `gate/squares [G]` in the same way, over all patients.
    """
    member = np.eye(cancers)[batch.cancer_B.cpu().numpy()].T
    x = batch.x_BG.double().cpu().numpy()
    a = attribute(score_of(model), batch, steps)
    out = {
        "attribution/patients": member.sum(1),
        "attribution/sum": member @ a,
        "attribution/size": member @ np.abs(a),
        "attribution/product": member @ (a * x),
        "attribution/squares": member @ np.square(x),
    }
    gate = None if isinstance(model, TGEM) or model.encoder is None else model.encoder.gate
    if gate is not None:
        products = []
        for e in range(model.mixtures()[EXPERT]):

            def logit(x_BG: Tensor, cancer_B: Tensor, v_BV: Tensor, e: int = e) -> Tensor:
                return gate.route(x_BG, cancer_B, None)[1][:, e]

            products.append((attribute(logit, batch, steps) * x).sum(0))
        out |= {"gate/product": np.array(products), "gate/squares": np.square(x).sum(0)}
    return out


def score_of(model: Predictor) -> Score:
    """What is attributed: the log hazard, or the log-probability of the patient's class."""

    def score(x_BG: Tensor, cancer_B: Tensor, v_BV: Tensor) -> Tensor:
        # beside other modalities genes move RNA's part of a sum alone: the others may be left out
        has = {m: torch.full_like(cancer_B, m == RNA, dtype=torch.bool) for m in MODALITIES}
        return of_class(model(Inputs(x_BG, cancer_B, v_BV, has)).score, cancer_B)

    return score


def of_class(score: Tensor, class_B: Tensor) -> Tensor:
    """A log hazard `[B]` as it is; of class logits `[B, C]` the log-probability of one class of each patient."""
    return score if score.ndim == 1 else torch.log_softmax(score, dim=1).gather(1, class_B[:, None]).squeeze(1)


def attribute(function: Score, batch: Batch, steps: int) -> np.ndarray:
    """Integrated gradients (Sundararajan et al. 2017) `[N, G]`, float64, on the path from 0, the federation's mean patient."""
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
                internal_batch_size=INTERNAL,
            ).detach()
        )
    return torch.cat(parts).double().cpu().numpy()
