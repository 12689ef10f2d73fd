"""The server's part of privacy: noise on a round's total, and what a study's promise means at this number of sites."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from oncofed.common.blocks import EVIDENCE, Sum
from oncofed.common.noise import SecureNoise
from oncofed.common.privacy.releases import promise_of
from oncofed.common.study import Study


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


@dataclass(frozen=True)
class Cost:
    """Noise on the mean change of a round beside what a change may be, both in clips: per number, and over all numbers."""

    per_number: float
    over_all: float
    parameters: int

    @property
    def drowned(self) -> bool:
        """Whether the noise is longer than any mean change can be."""
        return self.over_all > 1.0


def cost_of(study: Study, parameters: int, sites: int, patients: int) -> Cost:
    """What the promise costs: the deviation of the noise on the mean of a round, over `clip`.

    Of patients each site adds its own noise to a step's sum, and the mean is over all `patients`; of hospitals the server adds it once,
    and the mean is over `sites`.
    """
    deviation = promise_of(study).deviation
    p = study.privacy
    per_number = (
        deviation / sites if p.unit == "hospital" else deviation * math.sqrt(sites) / (p.sample_rate * patients)
    )
    return Cost(per_number, per_number * math.sqrt(parameters), parameters)
