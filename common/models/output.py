"""What every model returns to the training loop."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class ModelOutput:
    """Log hazard `risk [B]`, `latent [B, Z]`, and by mixture the gates `shares [B, E]` and clean `logits [B, E]`.

    `shares[group][:, e]` says how much of each patient stands behind block `group/e`: it is where evidence comes from.
    """

    risk: Tensor
    latent: Tensor
    shares: dict[str, Tensor] = field(default_factory=dict)
    logits: dict[str, Tensor] = field(default_factory=dict)
