"""A site's share of a step whose noise all sites share: its clipped gradients and a part of the noise, and nothing made of them.

The noise of the total is what was promised; a part of it is not. So whatever bends, rounds or thresholds numbers is left to the server, which
has the total alone, and what leaves lies on the noise's own lattice, whole numbers of which add up exactly.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from oncofed.client.batch import Batch
from oncofed.client.privacy.dp_sgd import PatientGradients
from oncofed.client.privacy.train import bounded, check_sent, probe_losses, step_parts
from oncofed.common.blocks import EVIDENCE, Sum
from oncofed.common.models.build import Predictor, set_weights
from oncofed.common.models.path_gptomic import PathGPTOmic
from oncofed.common.noise import SecureNoise
from oncofed.common.study import Study


def shared_gradients(
    model: Predictor,
    weights: Sum,
    batch: Batch,
    study: Study,
    *,
    load: Mapping[str, np.ndarray],
    deviation: float,
    evidence: np.ndarray,
    noise: SecureNoise | None = None,
    probe: bool = True,
) -> Sum:
    """Evidence, and of every trained parameter the sum of clipped gradients in clips, float64 on the lattice, with noise of `deviation`.

    Of blocks without evidence the noise alone: a site that is known to lack a cancer type adds its part all the same. Raises `Refusal` as
    `train_privately`.
    """
    noise = noise or SecureNoise()
    check_sent(model, weights, load)
    set_weights(model, weights)
    model.train()
    batch, clip, blocks = bounded(batch), study.privacy.clip, model.blocks()
    if isinstance(model, PathGPTOmic):
        model.in_step = True
    if probe:
        probe_losses(model, batch, study, load)
    names = {p: name for name, p in model.named_parameters() if p.requires_grad}
    total: Sum = {EVIDENCE: np.asarray(evidence, dtype=np.float64)}
    try:
        with PatientGradients.opened(model, clip) as gradients:
            sums = gradients.clipped_sum(step_parts(model, batch, study, load, noise))
            for parameter, value in zip(gradients.parameters, sums, strict=True):
                name = names[parameter]
                known = torch.as_tensor(blocks.spread(evidence > 0, name, value.ndim), device=value.device)
                told = torch.where(
                    known, value.double() / clip, torch.zeros((), dtype=torch.float64, device=value.device)
                )
                total[name] = noise.covered(told, sensitivity=1.0, deviation=deviation).cpu().numpy()
    finally:
        if isinstance(model, PathGPTOmic):
            model.in_step = False
    return total
