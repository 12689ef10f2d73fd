"""Noise on a round's total: the server's own, where a hospital's presence must not show, and what it makes of totals whose noise the sites share.

All that bends or scales a shared one comes after the sum.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from oncofed.common.blocks import EVIDENCE, Sum
from oncofed.common.models.build import Model
from oncofed.common.noise import SecureNoise
from oncofed.common.privacy.releases import promise_of
from oncofed.common.privacy.sharing import HORIZON, STATISTICS_SENSITIVITY
from oncofed.common.rates import modality_by_parameter, rates_of
from oncofed.common.study import TRAIN, Study


def noise_of_the_server(study: Study) -> Callable[[Sum], Sum]:
    """Noise on the sum of the hospitals' clipped changes: all of its numbers, whichever blocks anybody trained."""
    clip, deviation = study.privacy.clip, promise_of(study).deviation
    noise = SecureNoise()

    def cover(total: Sum) -> Sum:
        return {
            name: value
            if name == EVIDENCE
            else noise.covered(torch.from_numpy(np.array(value)), sensitivity=clip, deviation=deviation).numpy()
            for name, value in total.items()
        }

    return cover


Turn = Callable[[Sum, Sum, int], Sum]
"""Makes of a round's total, the weights that it began with, and its number, the training sum that it stands for."""


def change_of_gradients(study: Study, model: Model) -> Turn:
    """The step of SGD that sites with all the noise take themselves: from clipped gradients in clips to evidence times change."""
    parameters, blocks = modality_by_parameter(model), model.blocks()
    in_gradients = study.privacy.clip / study.privacy.sample_rate

    def turn(total: Sum, weights: Sum, round_: int) -> Sum:
        rates, evidence = rates_of(parameters, study, TRAIN, round_), total[EVIDENCE]
        out: Sum = {EVIDENCE: evidence}
        for name in total.keys() - {EVIDENCE}:
            rate, n = rates[name], blocks.spread(evidence, name, total[name].ndim)
            out[name] = -rate.learning_rate * (in_gradients * total[name] + n * rate.decay * weights[name])
        return out

    return turn


def in_months(total: Sum) -> Sum:
    """Events and months of follow-up from a total in sensitivities."""
    return {
        "events": total["events"] * STATISTICS_SENSITIVITY,
        "exposure": total["exposure"] * STATISTICS_SENSITIVITY * HORIZON,
    }
