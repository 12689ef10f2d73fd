"""The model of the pre-training phase: Gene-MOE's encoder with a decoder of experts and, when asked, a critic.

Variational autoencoder over expression (Meng et al., arXiv 2311.17401; gene_moe.md, 1.3 and 2.2), with terms that are
sums over patients. Shapes: B patients, G genes, D width, Z latent, E experts.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from oncofed.common.blocks import Blocks
from oncofed.common.models.gene_moe import Encoder, owned
from oncofed.common.models.layers import ExpertLayer, NoisyTopKGate, balance_penalty
from oncofed.common.models.output import ModelOutput
from torch import Tensor, nn

DECODER = "decoder"
LOG_VARIANCE = (-6.0, 4.0)


class GeneAutoencoder(nn.Module):
    """Expression `[B, G]` -> `ModelOutput` whose score is the reconstruction `[B, G]` and whose latent is `[mean, log variance]`."""

    def __init__(self, encoder: Encoder, genes: int, cancers: tuple[str, ...], *, critic: bool) -> None:
        super().__init__()
        s = encoder.settings
        self.encoder, self.cancers = encoder, cancers
        self.log_variance = nn.Linear(s.width, s.latent)
        experts = max(s.experts, 1)
        self.gate = NoisyTopKGate(s.latent, experts, min(s.top_k, experts), noise=s.gate_noise) if s.experts else None
        self.decoder = ExpertLayer(experts, s.latent, s.width)
        self.output = nn.Linear(s.width, genes)
        nn.init.xavier_normal_(self.output.weight)
        nn.init.zeros_(self.output.bias)
        self.critic = Critic(genes, s.width) if critic else None

    def forward(self, x_BG: Tensor, cancer_B: Tensor, generator: torch.Generator | None = None) -> ModelOutput:
        """The latent mean itself is decoded without a generator."""
        encoded = self.encoder(x_BG, cancer_B, generator)
        mean_BZ, hidden_BD = encoded.score, encoded.latent
        log_variance_BZ = self.log_variance(hidden_BD).clamp(*LOG_VARIANCE)
        z_BZ = mean_BZ
        if generator is not None:
            draw = torch.randn(mean_BZ.shape, generator=generator, device=mean_BZ.device, dtype=mean_BZ.dtype)
            z_BZ = mean_BZ + draw * torch.exp(0.5 * log_variance_BZ)
        shares, logits = dict(encoded.shares), dict(encoded.logits)
        gate_BE = z_BZ.new_ones(len(z_BZ), 1)
        if self.gate is not None:
            gate_BE, logits[DECODER] = self.gate.route(z_BZ, cancer_B, generator)
            shares[DECODER] = gate_BE
        u_BD = self.decoder.mix(z_BZ, gate_BE)
        latent = torch.stack([mean_BZ, log_variance_BZ], dim=1)
        return ModelOutput(score=self.output(u_BD), latent=latent, shares=shares, logits=logits)

    def penalty(self, output: ModelOutput, load: dict[str, Tensor]) -> Tensor:
        """Balance loss `[B]` of all three mixtures against the federation's load."""
        return torch.stack([balance_penalty(output.logits[g], load[g]) for g in output.logits]).sum(0)

    def mixtures(self) -> dict[str, int]:
        return self.encoder.mixtures() | ({DECODER: len(self.decoder.weight)} if self.gate is not None else {})

    def blocks(self) -> Blocks:
        """As in the model that it prepares, with the decoder's experts as blocks of their own."""

        def other(name: str, rows: int) -> str | tuple[str, ...]:
            of_expert = name.startswith("decoder.") and self.gate is not None
            return tuple(f"{DECODER}/{e}" for e in range(rows)) if of_expert else "trunk"

        return owned(self, other)


class Critic(nn.Module):
    """Expression `[B, G]` -> verdict `[B]`: high for patients, low for reconstructions (Arjovsky et al. 2017)."""

    def __init__(self, genes: int, width: int) -> None:
        super().__init__()
        sizes = (genes, width, max(width // 2, 1), max(width // 4, 1))
        layers = [part for a, b in pairwise(sizes) for part in (nn.Linear(a, b), nn.Mish())]
        # No bias: only differences of verdicts count, so its gradient is zero.
        self.layers = nn.Sequential(*layers, nn.Linear(sizes[-1], 1, bias=False))

    def forward(self, x_BG: Tensor) -> Tensor:
        return self.layers(x_BG).squeeze(-1)

    def gradient_penalty(self, real_BG: Tensor, fake_BG: Tensor, generator: torch.Generator) -> Tensor:
        """(|grad D(x~)| - 1)^2 `[B]` at points x~ drawn between each pair (Gulrajani et al. 2017, arXiv 1704.00028, eq. 3)."""
        share = torch.rand(len(real_BG), 1, generator=generator, device=real_BG.device)
        between = (share * real_BG + (1 - share) * fake_BG).detach().requires_grad_(True)
        (slope,) = torch.autograd.grad(self(between).sum(), between, create_graph=True)
        return (slope.norm(dim=1) - 1.0).square()


def reconstruction_loss(output: ModelOutput, x_BG: Tensor, kl: float) -> tuple[Tensor, Tensor]:
    """Loss `[B]`: mean squared error over genes + kl * mean KL to N(0, 1) over latent numbers; and the error alone."""
    mean_BZ, log_variance_BZ = output.latent.unbind(1)
    error_B = (output.score - x_BG).square().mean(1)
    kl_B = 0.5 * (mean_BZ.square() + log_variance_BZ.exp() - 1.0 - log_variance_BZ).mean(1)
    return error_B + kl * kl_B, error_B
