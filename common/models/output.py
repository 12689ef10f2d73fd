"""What every model returns to the training loop."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class ModelOutput:
    """`score`, the log hazard `[B]` or the class logits `[B, classes]`; `latent [B, Z]`; and the routing by mixture.

    `shares[group][:, e]` says how much of each patient stands behind block `group/e`: it is where evidence comes from.
    `logits[group]` are the gate's clean logits `[B, E]`.
    """

    score: Tensor
    latent: Tensor
    shares: dict[str, Tensor] = field(default_factory=dict)
    logits: dict[str, Tensor] = field(default_factory=dict)

    @property
    def risk(self) -> Tensor:
        """The score of a survival model: the log hazard `[B]`."""
        return self.score
