"""How far one patient moves a sum of clipped gradients: never further than the clip, or no noise covers her.

Losses that couple patients fail here without any sign elsewhere: Cox' partial likelihood moved by 46 clips, a mean weighted by
the batch's classes by 20, a balance of experts by the batch's own load by 5 (privacy.md, 1.1).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch
from oncofed.client.batch import Batch
from oncofed.client.privacy.dp_sgd import PatientGradients
from oncofed.client.privacy.train import losses_by_patient
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

Losses = Callable[[Batch], Tensor]
LossesOf = Callable[[Predictor, Study, Mapping[str, np.ndarray]], Losses]
"""Losses by patient of a batch, from a model, a study and the experts' load."""


def _product_losses(model: Predictor, study: Study, load: Mapping[str, np.ndarray]) -> Losses:
    return losses_by_patient(model, study, load)


def measure_sensitivity(setting: Setting, seed: int, losses: LossesOf = _product_losses) -> dict[str, Any]:
    """The largest change of `PatientGradients.clipped_sum`, in clips, over patients who are taken out; no noise of any kind.

    `others` is what of a change is not the patient's own clipped gradient. In double precision: the sum's own rounding would be as large as the slack of the clip. Two clips are tried, the study's
    and one that cuts everybody.
    """
    draw = np.random.default_rng(seed)
    rows = np.sort(draw.permutation(len(setting.batch))[:AMONG])
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
        norms = torch.cat([gradients.norms(lambda part=part: losses_of(part))[0] for part in parts])  # type: ignore[misc]
    median = float(norms.median())
    if 0.0 < BITING * median < clips[0]:
        clips.append(BITING * median)
    moved, rest = (
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
        "passed": max(worst) <= LIMIT and float(rest.max()) <= ROUNDING,
    }


def _moved(
    model: Predictor, batch: Batch, losses_of: Losses, at_once: int, clip: float, out: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """For each patient of `out` the norm of what her absence changes, and of that part of it which is not hers, in clips."""
    device = batch.cancer_B.device
    with PatientGradients.opened(model, clip) as gradients:

        def total(rows: np.ndarray) -> Tensor:
            chosen = batch.select(torch.from_numpy(rows).to(device))
            parts = [_part(part, losses_of) for part in _everybody(chosen, at_once)]
            return torch.cat([t.flatten() for t in gradients.clipped_sum(parts)])

        rows = np.arange(len(batch))
        whole, moved, rest = total(rows), [], []
        for i in out:
            change = whole - total(rows[rows != i])
            moved.append(float(change.norm()) / clip)
            rest.append(float((change - total(rows[i : i + 1])).norm()) / clip)
    return np.array(moved), np.array(rest)


def _part(part: Batch, losses_of: Losses) -> Callable[[Tensor | None], Tensor]:
    return lambda rows: losses_of(part if rows is None else part.select(rows))


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
