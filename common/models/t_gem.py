"""T-GEM: attention between genes (Zhang et al., Cancers 2022, 14:4763), without the original's defects.

Genes are tokens of one number each. A layer gives each gene a query, a key and a value of its own in every head, mixes the
heads by one number each and adds the normalised result to its input; a linear head reads all genes. Without layers it is a
linear model: multinomial logistic regression, or a proportional hazards model. Shapes: B patients, G genes, H heads, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from oncofed.common.blocks import Blocks
from oncofed.common.models.attention import SelfAttention, scalar_token_attention
from oncofed.common.models.gene_moe import Off, head_owner
from oncofed.common.models.heads import ClassHead, SurvivalHead
from oncofed.common.models.inputs import Inputs
from oncofed.common.models.layers import dropout
from oncofed.common.models.output import ModelOutput
from torch import Tensor, nn

EPSILON = 1e-6
"""Added to the deviation, not to the variance: the branch begins at a deviation of 1e-7 to 1e-1 (t_gem.md, fact 5)."""

ACTIVATIONS = {
    "leaky_relu": lambda x: F.leaky_relu(x, 0.1),
    "relu": F.relu,
    "gelu": F.gelu,
    "none": lambda x: x,
}


@dataclass(frozen=True)
class Seen:
    """What one layer saw and did: its input `x [B, G]`, query, key and value `[B, H, G]`, and what its heads gave `[B, H, G]`."""

    x: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor


class GeneScale(nn.Module):
    """One weight a head and gene: `[B, G]` -> `[B, H, G]`."""

    def __init__(self, heads: int, genes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(heads, genes) * (2.0 / (genes + heads)) ** 0.5)

    def forward(self, x_BG: Tensor) -> Tensor:
        return x_BG[:, None] * self.weight


class HeadMix(nn.Module):
    """A weighted sum over heads: `[B, H, G]` -> `[B, G]`."""

    def __init__(self, heads: int, first: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((heads,), first or 1.0 / heads))

    def forward(self, o_BHG: Tensor) -> Tensor:
        return torch.einsum("bhg,h->bg", o_BHG, self.weight)


class GeneNorm(nn.Module):
    """a * (u - mean u) / (sd u + 1e-6) + b over a patient's genes, as T-GEM's authors write it."""

    def __init__(self, genes: int, first: float) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.full((genes,), first)), nn.Parameter(torch.zeros(genes))

    def forward(self, u_BG: Tensor) -> Tensor:
        centred = u_BG - u_BG.mean(-1, keepdim=True)
        # the deviation by hand: that of equal numbers has an infinite gradient
        sd = (centred.square().sum(-1, keepdim=True) / (u_BG.shape[-1] - 1)).clamp(min=1e-30).sqrt()
        return self.weight * centred / (sd + EPSILON) + self.bias


class AttentionLayer(nn.Module):
    """Query, key, value and mix of one layer; the attention between them has no parameters."""

    def __init__(self, genes: int, heads: int, *, head_mix: float, to_self: SelfAttention) -> None:
        super().__init__()
        self.query, self.key, self.value = (GeneScale(heads, genes) for _ in range(3))
        self.mix = HeadMix(heads, head_mix)
        self.to_self = to_self

    def look(self, x_BG: Tensor) -> Seen:
        """What each head makes of a patient's genes."""
        q, k, v = self.query(x_BG), self.key(x_BG), self.value(x_BG)
        return Seen(x_BG, q, k, v, scalar_token_attention(q, k, v, to_self=self.to_self).to(x_BG.dtype))


class TGEM(nn.Module):
    """Attention layers and a head on all genes: `Inputs` -> `ModelOutput`."""

    def __init__(
        self,
        layers: list[AttentionLayer],
        norms: list[GeneNorm],
        head: SurvivalHead | ClassHead,
        cancers: tuple[str, ...],
        *,
        activation: str,
        dropout: float,
    ) -> None:
        """`norms` has one for each layer, or one that all of them share."""
        super().__init__()
        self.layers, self.norms = nn.ModuleList(layers), nn.ModuleList(norms)
        self.head, self.cancers = head, cancers
        self.activation, self.dropout = activation, dropout
        self.still = False
        """Whether the layers are frozen: then they have no noise in training either."""

    def forward(self, inputs: Inputs, generator: torch.Generator | None = None, off: Off | None = None) -> ModelOutput:
        """Dropout is drawn from `generator`; without one there is none. `off` takes out a head: `("layer-1", 0)`."""
        x_BG, generator = inputs.x_BG, None if self.still else generator
        for n, layer in enumerate(self.attention, start=1):
            o_BHG = layer.look(x_BG).o
            if off is not None and off[0] == f"layer-{n}":
                o_BHG = o_BHG.index_fill(1, torch.tensor([off[1]], device=o_BHG.device), 0.0)
            x_BG = self._add(n - 1, x_BG, o_BHG, generator)
        return self._read(x_BG, inputs)

    def trace(self, inputs: Inputs) -> list[Seen]:
        """What each layer saw and did, without noise."""
        seen, x_BG = [], inputs.x_BG
        for n, layer in enumerate(self.attention):
            seen.append(layer.look(x_BG))
            x_BG = self._add(n, x_BG, seen[-1].o, None)
        return seen

    def score_from(self, n: int, x_BG: Tensor, o_BHG: Tensor, inputs: Inputs) -> Tensor:
        """The score when layer `n` (from 0) has input `x_BG` and its heads give `o_BHG`, whatever they would give by themselves."""
        x_BG = self._add(n, x_BG, o_BHG, None)
        for later, layer in enumerate(self.attention):
            if later > n:
                x_BG = self._add(later, x_BG, layer.look(x_BG).o, None)
        return self._read(x_BG, inputs).score

    @property
    def attention(self) -> tuple[AttentionLayer, ...]:
        """The attention layers, in order."""
        return tuple(self.layers)  # type: ignore[arg-type]

    def _add(self, n: int, x_BG: Tensor, o_BHG: Tensor, generator: torch.Generator | None) -> Tensor:
        mixed_BG = self.attention[n].mix(o_BHG)
        norm = self.norms[n if len(self.norms) > 1 else 0]
        return x_BG + norm(dropout(mixed_BG, self.dropout, generator))

    def _read(self, x_BG: Tensor, inputs: Inputs) -> ModelOutput:
        latent_BG = ACTIVATIONS[self.activation](x_BG)
        score, baseline = self.head.read(latent_BG, inputs.cancer_B, inputs.v_BV)
        return ModelOutput(score=score, latent=latent_BG, log_baseline=baseline)

    def penalty(self, output: ModelOutput, load: dict[str, Tensor]) -> Tensor:
        """Nothing is routed, so nothing is balanced: 0 `[B]`."""
        return output.latent.new_zeros(len(output.latent))

    def mixtures(self) -> dict[str, int]:
        """No mixtures: every patient passes all heads."""
        return {}

    def removable(self) -> dict[str, int]:
        """Heads of each layer, which can be taken out where there are others."""
        return {
            f"layer-{n}": len(layer.mix.weight)
            for n, layer in enumerate(self.attention, 1)
            if len(layer.mix.weight) > 1
        }

    def blocks(self) -> Blocks:
        """A class's row of the head is that class's block, a cancer type's own rows that cancer's; the rest is the trunk."""
        owners: dict[str, str | tuple[str, ...]] = {}
        for name, _ in self.named_parameters():
            of_head = name.startswith("head.")
            owners[name] = head_owner(self.head, name.removeprefix("head."), self.cancers) if of_head else "trunk"
        return Blocks(owners)
