"""How far one patient moves a sum of clipped gradients: never further than the clip, or no noise covers her.

Losses that couple patients fail here without any sign elsewhere: Cox' partial likelihood moved by 46 clips, a mean weighted by
the batch's classes by 20, a balance of experts by the batch's own load by 5 (privacy.md, 1.1).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from oncofed.client.batch import Batch
from oncofed.client.privacy.dp_sgd import PatientGradients
from oncofed.client.privacy.train import LARGEST, bounded, losses_by_patient
from oncofed.common.blocks import Sum
from oncofed.common.models.build import Predictor, set_weights
from oncofed.common.models.path_gptomic import PathGPTOmic
from oncofed.common.study import Study
from oncofed.deploy.audit.setting import Setting
from torch import Tensor

PATIENTS, AMONG = 40, 256
"""Patients who are taken out one by one, and patients of the sums that they are taken out of."""

LIMIT = 1.0 + 1e-6
"""Most that a patient may move a sum, in clips."""

BITING = 0.1
"""A second clip as a share of the median norm, so that it cuts everybody: a clip that cuts nobody is not tested."""

ROUNDING = 1e-6
"""Most that her absence may move of others, in clips: whatever the bound says today, they are coupled."""

SINGLE = 1.0 + 1e-4
"""The same in single precision, where adding up the others rounds too."""

LARGE = np.float32(3.0)
"""Weights that are far from trained ones and leave gradients: the largest often leave none."""

TAKEN, OF = 6, 48
"""Patients who are taken out in single precision, and patients of those sums, for every choice of weights."""

Losses = Callable[[Batch], Tensor]
LossesOf = Callable[[Predictor, Study, Mapping[str, np.ndarray]], Losses]
"""Losses by patient of a batch, from a model, a study and the experts' load."""


def _product_losses(model: Predictor, study: Study, load: Mapping[str, np.ndarray]) -> Losses:
    return losses_by_patient(model, study, load)


def measure_sensitivity(setting: Setting, seed: int, losses: LossesOf = _product_losses) -> dict[str, Any]:
    """The largest change of `PatientGradients.clipped_sum`, in clips, over patients who are taken out; no noise of any kind.

    `others` is what of a change is not the patient's own clipped gradient. In double precision: the sum's own rounding would be as
    large as the slack of the clip. Two clips are tried, the study's and one that cuts everybody. `single` is in the precision of the
    product, also with weights as a hostile coordinator would send them.
    """
    draw = np.random.default_rng(seed)
    rows = np.sort(draw.permutation(len(setting.batch))[:AMONG])
    single = _in_single(setting, draw, losses)
    batch = _doubled(setting.batch.select(torch.from_numpy(rows).to(setting.batch.cancer_B.device)))
    set_weights(setting.model, setting.weights)
    model = copy.deepcopy(setting.model).double()
    model.register_forward_pre_hook(_doubled_tiles)
    if isinstance(model, PathGPTOmic):
        model.in_step = True
    losses_of = losses(model, setting.study, setting.load)
    out = draw.permutation(len(batch))[:PATIENTS]
    clips = [setting.study.privacy.clip]
    with PatientGradients.opened(model, clips[0]) as gradients:
        parts = _everybody(batch, setting.at_once)
        norms = torch.cat([gradients.norms(partial(losses_of, part))[0] for part in parts])
    median = float(norms.median())
    if 0.0 < BITING * median < clips[0]:
        clips.append(BITING * median)
    moved, rest, _ = (
        np.array(m)
        for m in zip(*(_moved(model, batch, losses_of, setting.at_once, c, out) for c in clips), strict=True)
    )
    worst = moved.max(1).tolist()
    return {
        "patients": len(out),
        "among": len(batch),
        "clips": clips,
        "norms": {"median": median, "largest": float(norms.max())},
        "largest": worst,
        "limit": LIMIT,
        "others": float(rest.max()),
        "single": single,
        "passed": single["passed"] and max(worst) <= LIMIT and float(rest.max()) <= ROUNDING,
    }


def _in_single(setting: Setting, draw: np.random.Generator, losses: LossesOf) -> dict[str, Any]:
    """The most that a patient moves a sum, or has in one of her own, in clips, over the weights that are tried."""
    chosen = torch.from_numpy(draw.permutation(len(setting.batch))[:OF])
    batch = bounded(setting.batch.select(chosen.to(setting.batch.cancer_B.device)))
    out, clip, model = draw.permutation(len(batch))[:TAKEN], setting.study.privacy.clip, copy.deepcopy(setting.model)
    if isinstance(model, PathGPTOmic):
        model.in_step = True
    found: dict[str, float] = {}
    for name, weights in hostile(setting.weights, draw).items():
        set_weights(model, weights)
        losses_of = losses(model, setting.study, setting.load)
        moved, _, own = _moved(model, batch, losses_of, setting.at_once, clip, out)
        # a patient whose gradient is not finite counts nothing; a sum that is not finite hides nothing
        found[name] = float(np.nan_to_num(np.maximum(moved, own), nan=np.inf).max())
    worst = max(found, key=lambda name: found[name])
    return {
        "weights": found,
        "worst": worst,
        "largest": found[worst],
        "limit": SINGLE,
        "passed": found[worst] <= SINGLE,
    }


def hostile(weights: Sum, draw: np.random.Generator) -> dict[str, Sum]:
    """The first weights, and such as make rounding large: none, the largest that a site takes, and heads whose parts cancel."""
    signs = {n: np.where(draw.random(v.shape) < 0.5, -1.0, 1.0).astype(v.dtype) for n, v in weights.items()}
    heads = np.array([1.0, -0.5, -0.5])
    cancelling = {}
    for name, value in weights.items():
        if name.endswith("latent.weight"):
            cancelling[name] = np.full_like(value, LARGEST)  # so all latents are the same, and large
        elif name.startswith("head.") and value.ndim and "baseline" not in name:
            cut = value.shape[-1] - value.shape[-1] % 3
            row = np.pad(np.tile(heads, cut // 3), (0, value.shape[-1] - cut))
            cancelling[name] = np.broadcast_to(LARGEST * row, value.shape).astype(value.dtype)
        else:
            cancelling[name] = value
    return {
        "first weights": dict(weights),
        "no weights": {n: np.zeros_like(v) for n, v in weights.items()},
        "large weights": {n: LARGE * v for n, v in signs.items()},
        "largest weights": {n: np.float32(LARGEST) * v for n, v in signs.items()},
        "cancelling heads": cancelling,
    }


def _moved(
    model: Predictor, batch: Batch, losses_of: Losses, at_once: int, clip: float, out: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each patient of `out` the norms of what her absence changes, of that part of it which is not hers, and of a sum of her alone."""
    device = batch.cancer_B.device
    with PatientGradients.opened(model, clip) as gradients:

        def total(rows: np.ndarray) -> Tensor:
            chosen = batch.select(torch.from_numpy(rows).to(device))
            parts = [partial(losses_of, part) for part in _everybody(chosen, at_once)]
            return torch.cat([t.flatten() for t in gradients.clipped_sum(parts)]).double()

        rows = np.arange(len(batch))
        whole, moved, rest, own = total(rows), [], [], []
        for i in out:
            change = whole - total(rows[rows != i])
            moved.append(float(change.norm()) / clip)
            alone = total(rows[i : i + 1])
            own.append(float(alone.norm()) / clip)
            rest.append(float((change - alone).norm()) / clip)
    return np.array(moved), np.array(rest), np.array(own)


def _everybody(batch: Batch, at_once: int) -> list[Batch]:
    rows = torch.arange(len(batch), device=batch.cancer_B.device)
    return [batch.select(piece) for piece in rows.split(at_once)] if len(batch) > at_once else [batch]


def _doubled(batch: Batch) -> Batch:
    """The batch with numbers of double precision; tiles lie on the disk."""
    values: dict[str, Any] = {f.name: getattr(batch, f.name) for f in fields(batch)}
    doubled: dict[str, Any] = {
        k: v.double() for k, v in values.items() if isinstance(v, Tensor) and v.is_floating_point()
    }
    return replace(batch, **doubled)


def _doubled_tiles(_: torch.nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Tiles in the model's precision as they come."""
    inputs, *rest = arguments
    return None if inputs.tiles_TP is None else (replace(inputs, tiles_TP=inputs.tiles_TP.double()), *rest)
