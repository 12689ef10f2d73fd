"""What stands behind each block of a site's private update: what everyone may know of the site, or counts with noise."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from oncofed.client.batch import Batch
from oncofed.client.train import shares_of
from oncofed.common.models.build import Predictor
from oncofed.common.models.gene_moe import cancer_blocks
from oncofed.common.models.path_gptomic import PathGPTOmic
from oncofed.common.noise import SecureNoise
from torch import Tensor

ROUNDED = 10
"""A site's number of patients is told, and divided by, in multiples of this."""


def public_count(patients: int) -> int:
    """A site's patients as everyone may know them: to the nearest ten, and ten at least."""
    return max(ROUNDED, ROUNDED * round(patients / ROUNDED))


@dataclass(frozen=True)
class Held:
    """What everyone may know of a site: its cancer types and modalities, which its greeting tells, and its patients, rounded."""

    cancers: frozenset[int]
    modalities: frozenset[str]
    patients: int = 0
    """Those of the site, whatever part of them a study sees; 0: those of the batch, rounded."""


def public_evidence(model: Predictor, batch: Batch, held: Held) -> np.ndarray:
    """The site's rounded patients behind every block, 0 behind those of cancer types and modalities that it is known to lack."""
    n = float(held.patients or public_count(len(batch)))
    lacking = {m for m in batch.has if m not in held.modalities}
    for c, name in enumerate(model.cancers):
        of_modality = {m: cancer_blocks((name,), m)[0] for m in batch.has}
        if c not in held.cancers:
            lacking |= {*cancer_blocks((name,)), *of_modality.values()}
        lacking |= {block for m, block in of_modality.items() if m not in held.modalities}
    blocks_ = model.blocks()
    return blocks_.vector({name: 0.0 if name in lacking else n for name in blocks_.names})


def noised_evidence(
    model: Predictor, batch: Batch, held: Held, *, deviation: float, least: int, noise: SecureNoise | None = None
) -> np.ndarray:
    """Patients behind each block with noise, 0 where that leaves fewer than `least`; the trunk's and what is lacking as public.

    A patient's shares in a mixture sum to 1, she has one cancer type and each modality at most once: so many groups, so many ones in the
    square of the sensitivity.
    """
    public = public_evidence(model, batch, held)
    with torch.no_grad():
        model.eval()
        output = batch.through(model)
        used = shares_of(model, replace(output, shares={g: _bounded(s) for g, s in output.shares.items()}), batch)
        model.train()
    blocks = model.blocks()
    counted = [name for name in blocks.names if name in used and name != "trunk"]
    groups = len(model.mixtures()) + 1 + 2 * (len(model.modalities) if isinstance(model, PathGPTOmic) else 0)
    total = torch.stack([used[name].double() for name in counted])
    noisy = (noise or SecureNoise()).covered(total, sensitivity=math.sqrt(groups), deviation=deviation)
    told = {name: float(v) if v >= least else 0.0 for name, v in zip(counted, noisy.tolist(), strict=True)}
    at = {name: i for i, name in enumerate(blocks.names)}
    return blocks.vector({n: min(told.get(n, public[at[n]]), public[at[n]]) for n in blocks.names})


def _bounded(share_BE: Tensor) -> Tensor:
    """Shares of each patient that are numbers from 0 and add up to 1 at most, whatever the weights of the message make of them."""
    share_BE = share_BE.nan_to_num(0.0, 0.0, 0.0).clamp(0.0, 1.0)
    return share_BE / share_BE.sum(1, keepdim=True).clamp(min=1.0)
