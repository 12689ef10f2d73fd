"""What every model returns to the training loop."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class ModelOutput:
    """`score`, the log hazard `[B]` or the class logits `[B, classes]`; `latent [B, Z]`; and the routing by mixture.

    `shares[group][:, e]` says how much of each patient stands behind block `group/e`: it is where evidence comes from.
    `logits[group]` are the gate's clean logits `[B, E]`. Of several modalities, `branches[m]` is the log hazard `[B]` that
    modality m adds, `present[m]` 1 for patients who have it, and `attention [T]` what each tile weighs in its patient.
    `log_baseline [B, K]` is, in survival, that of the patient's cancer type.
    """

    score: Tensor
    latent: Tensor
    shares: dict[str, Tensor] = field(default_factory=dict)
    logits: dict[str, Tensor] = field(default_factory=dict)
    branches: dict[str, Tensor] = field(default_factory=dict)
    present: dict[str, Tensor] = field(default_factory=dict)
    attention: Tensor | None = None
    log_baseline: Tensor | None = None

    @property
    def risk(self) -> Tensor:
        """The score of a survival model: the log hazard `[B]`."""
        return self.score


def stack_outputs(parts: list[ModelOutput]) -> ModelOutput:
    """Outputs of several batches, patient after patient."""

    def join(name: str) -> dict[str, Tensor]:
        return {key: torch.cat([getattr(part, name)[key] for part in parts]) for key in getattr(parts[0], name)}

    attention = [part.attention for part in parts if part.attention is not None]
    baseline = [part.log_baseline for part in parts if part.log_baseline is not None]
    return ModelOutput(
        score=torch.cat([part.score for part in parts]),
        latent=torch.cat([part.latent for part in parts]),
        shares=join("shares"),
        logits=join("logits"),
        branches=join("branches"),
        present=join("present"),
        attention=torch.cat(attention) if attention else None,
        log_baseline=torch.cat(baseline) if baseline else None,
    )
