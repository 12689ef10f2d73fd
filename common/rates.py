"""How fast each parameter learns: the rate and the weight decay of a local step, by name and round."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from oncofed.common.modalities import PATHOLOGY
from oncofed.common.models.build import Model
from oncofed.common.models.gene_moe import FIRST_LAYER
from oncofed.common.models.path_gptomic import PathGPTOmic
from oncofed.common.study import TRAIN, Study

FIRST_LAYER_NAMES = frozenset(f"encoder.{name}" for name in FIRST_LAYER)
SLOW = 0.1
"""The first layer's rate beside the others' with `training.first_layer = "slow"`."""


@dataclass(frozen=True)
class Rate:
    """Of one parameter in one round; `modality` is whose it is, if anybody's."""

    learning_rate: float
    decay: float
    modality: str | None


def learning_rate(study: Study, phase: str, round_: int) -> float:
    """The local rate in round 1, 2, ... of a phase."""
    return study.steps(phase).learning_rate * _factor(study, phase, round_)


def _factor(study: Study, phase: str, round_: int) -> float:
    t = study.steps(phase)
    return 1.0 if t.schedule == "constant" else 0.5 * (1.0 + math.cos(math.pi * (round_ - 1) / t.rounds))


def modality_by_parameter(model: Model) -> dict[str, str | None]:
    """The parameters that local steps move, and whose modality each is; heads are not modulated (path_gptomic.md, 1.3)."""
    return {
        name: model.modality_of(name) if isinstance(model, PathGPTOmic) and not name.startswith("head.") else None
        for name, p in model.named_parameters()
        if p.requires_grad and not name.startswith("critic.")
    }


def rates_of(parameters: Mapping[str, str | None], study: Study, phase: str, round_: int) -> dict[str, Rate]:
    """Weight decay spares the baselines, hazards to be estimated and not shrunk to exp(0), and the few covariates.

    `parameters` as `modality_by_parameter` gives them. A critic has an optimiser of its own (client/objectives.py).
    """
    t, rate = study.steps(phase), learning_rate(study, phase, round_)
    covariate_rate, head_rate = (
        r * _factor(study, phase, round_) for r in (study.training.covariate_rate, study.training.head_rate)
    )
    out = {}
    for name, modality in parameters.items():
        own, decay = rate, t.weight_decay
        if name == "head.log_baseline":
            decay = 0.0
        elif name.startswith("head.covariates."):
            # each cancer's own coefficients rest on few patients a step: they follow more slowly than the shared ones
            own, decay = covariate_rate * (SLOW if name.endswith(".own") else 1.0), 0.0
        elif name.startswith("head.") and study.pretraining.rounds:
            own = head_rate
        elif phase == TRAIN and study.training.first_layer == "slow" and name in FIRST_LAYER_NAMES:
            own = rate * SLOW
        if modality == PATHOLOGY:
            own *= study.fusion.pathology_rate
        out[name] = Rate(own, decay, modality)
    return out
