"""Gene-MOE: a sparsely gated encoder of gene expression (Meng et al., arXiv 2311.17401), without the original's defects.

MoE (G -> D) -> mixture of attention experts (D, residual) -> latent mean (Z) -> head. The gates are parameters, experts
merge linearly, and attention stays within a patient. Shapes: B patients, G genes, D width, Z latent, E experts, C cancers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from oncofed.common.blocks import Blocks
from oncofed.common.models.heads import BY_CANCER, ClassHead, SurvivalHead, class_blocks
from oncofed.common.models.inputs import Inputs
from oncofed.common.models.layers import AttentionExperts, ExpertLayer, NoisyTopKGate, balance_penalty, dropout
from oncofed.common.models.output import ModelOutput
from torch import Tensor, nn

EXPERT, ATTENTION, SHARED = "expert", "attention", "shared"

Off = tuple[str, int]
"""An expert to take out of the model: mixture and index; `("shared", 0)` is the expert that all patients pass."""

FIRST_LAYER = ("experts.weight", "experts.bias", "shared.weight", "shared.bias")
"""The encoder's parameters that see genes and hold nearly all of its numbers; the gate is not among them."""


@dataclass(frozen=True)
class EncoderSettings:
    """Sizes and switches of an encoder; `cancers` is 0 where the gate must not see the cancer type."""

    width: int
    latent: int
    experts: int
    top_k: int
    attention_experts: int
    attention_top_k: int
    dropout: float
    input_dropout: float
    gate_noise: bool
    shared_expert: bool
    first_layer_scale: float
    adapter_rank: int
    dispatch: str
    expert_dtype: str
    cancers: int
    gate_prior: float
    expert_scale: float


class Encoder(nn.Module):
    """Expression `[B, G]` -> hidden `[B, D]` and latent mean `[B, Z]`, with the routing.

    `dispatch` is `routed` (only the chosen experts), `dense` (all experts, for per-sample gradients). `expert_dtype`
    bfloat16 runs the expert matrices under autocast; attention and heads stay in float32. Without experts it is a plain
    multilayer perceptron: the shared expert alone.
    """

    def __init__(self, genes: int, s: EncoderSettings) -> None:
        super().__init__()
        self.settings = s
        first = partial(ExpertLayer, inputs=genes, outputs=s.width, scale=s.first_layer_scale, rank=s.adapter_rank)
        gate = partial(NoisyTopKGate, noise=s.gate_noise)
        self.gate = gate(genes, s.experts, s.top_k, cancers=s.cancers, prior=s.gate_prior) if s.experts else None
        self.experts = first(s.experts) if s.experts else None
        self.shared = first(1) if s.shared_expert or not s.experts else None
        self.attention_gate = gate(s.width, s.attention_experts, s.attention_top_k) if s.attention_experts else None
        self.attention = AttentionExperts(s.attention_experts, s.width) if s.attention_experts else None
        self.latent = nn.Linear(s.width, s.latent)
        nn.init.xavier_normal_(self.latent.weight)
        nn.init.zeros_(self.latent.bias)

    def forward(
        self, x_BG: Tensor, cancer_B: Tensor, generator: torch.Generator | None = None, off: Off | None = None
    ) -> ModelOutput:
        """The latent mean as both `score` and `latent`. Training noise is drawn from `generator`; without one there is none."""
        s = self.settings
        group, index = off or ("", None)
        shares: dict[str, Tensor] = {}
        logits: dict[str, Tensor] = {}
        x_BG = dropout(x_BG, s.input_dropout, generator)
        h_BD = x_BG.new_zeros(len(x_BG), s.width)
        if self.experts is not None and self.gate is not None:
            gate_BE, logits[EXPERT] = self.gate.route(x_BG, cancer_B, generator, index if group == EXPERT else None)
            h_BD = s.expert_scale * self._mix(self.experts, x_BG, gate_BE)
            shares[EXPERT] = gate_BE
        if self.shared is not None and group != SHARED:
            h_BD = h_BD + self._mix(self.shared, x_BG, x_BG.new_ones(len(x_BG), 1))
        h_BD = dropout(h_BD, s.dropout, generator)
        if self.attention is not None and self.attention_gate is not None:
            gate_BA, logits[ATTENTION] = self.attention_gate.route(
                h_BD, cancer_B, generator, index if group == ATTENTION else None
            )
            h_BD = h_BD + self._mix(self.attention, h_BD, gate_BA)
            shares[ATTENTION] = gate_BA
        z_BZ = torch.tanh(self.latent(h_BD))
        return ModelOutput(score=z_BZ, latent=h_BD, shares=shares, logits=logits)

    def _mix(self, layer: ExpertLayer | AttentionExperts, x: Tensor, gate: Tensor) -> Tensor:
        bf16 = self.settings.expert_dtype == "bfloat16"
        context = torch.autocast(x.device.type, dtype=torch.bfloat16) if bf16 else contextlib.nullcontext()
        with context:
            y = layer.mix(x, gate, dense=self.settings.dispatch == "dense")
        return y.to(x.dtype)

    def mixtures(self) -> dict[str, int]:
        """Experts in each mixture, by its name in `ModelOutput.shares`."""
        s = self.settings
        return {group: n for group, n in ((EXPERT, s.experts), (ATTENTION, s.attention_experts)) if n}

    def removable(self) -> dict[str, int]:
        """Experts that can be taken out, by mixture, where there are others to go on with."""
        shared = self.shared is not None and self.experts is not None
        several = {group: n for group, n in self.mixtures().items() if n > 1}  # a gate cannot route to nobody
        return several | ({SHARED: 1} if shared else {})

    def owner(self, name: str, rows: int, by_cancer: tuple[str, ...], trunk: str = "trunk") -> str | tuple[str, ...]:
        """The block of one of the encoder's parameters: each expert its own, a cancer's gate row that cancer's."""
        if name == "gate.cancer":
            return by_cancer
        for prefix, group in (("experts.", EXPERT), ("attention.", ATTENTION)):
            if name.startswith(prefix):
                return tuple(f"{group}/{e}" for e in range(rows))
        return trunk


class GeneMOE(nn.Module):
    """Encoder and head: `Inputs` (expression, cancer type, covariates) -> `ModelOutput`."""

    def __init__(self, encoder: Encoder, head: SurvivalHead | ClassHead, cancers: tuple[str, ...]) -> None:
        super().__init__()
        self.encoder, self.head, self.cancers = encoder, head, cancers
        self.still = False
        """Whether the encoder is frozen: then it has no noise in training either."""

    def forward(self, inputs: Inputs, generator: torch.Generator | None = None, off: Off | None = None) -> ModelOutput:
        """Training noise is drawn from `generator`; without one the output is deterministic. `off` takes an expert out."""
        encoded = self.encoder(inputs.x_BG, inputs.cancer_B, None if self.still else generator, off)
        score, baseline = self.head.read(encoded.score, inputs.cancer_B, inputs.v_BV)
        return replace(encoded, score=score, latent=encoded.score, log_baseline=baseline)

    def penalty(self, output: ModelOutput, load: dict[str, Tensor]) -> Tensor:
        """Balance loss `[B]` of both mixtures against the federation's load."""
        return torch.stack([balance_penalty(output.logits[g], load[g]) for g in output.logits]).sum(0)

    def mixtures(self) -> dict[str, int]:
        """Experts in each mixture, by its name in `ModelOutput.shares`."""
        return self.encoder.mixtures()

    def removable(self) -> dict[str, int]:
        """Experts that can be taken out, by mixture, where there are others to go on with."""
        return self.encoder.removable()

    def blocks(self) -> Blocks:
        """Experts row by row; one block a cancer type for its baseline, coefficients and gate row, or a class for its row of
        the head; the rest as the trunk."""

        def owner(name: str, rows: int) -> str | tuple[str, ...]:
            return head_owner(self.head, name.removeprefix("head."), self.cancers)

        return owned(self, owner)


def cancer_blocks(cancers: tuple[str, ...], modality: str = "") -> tuple[str, ...]:
    """The block of each cancer type, or of its patients who have a modality."""
    return tuple(f"cancer/{c}@{modality}" if modality else f"cancer/{c}" for c in cancers)


def head_owner(head: SurvivalHead | ClassHead, name: str, cancers: tuple[str, ...]) -> str | tuple[str, ...]:
    """The block of one of a head's parameters."""
    if name in BY_CANCER:
        return cancer_blocks(cancers)
    return class_blocks(cancers) if name in head.by_class else "trunk"


def owned(model: nn.Module, other: Callable[[str, int], str | tuple[str, ...]]) -> Blocks:
    """Blocks of a model with an encoder; `other` names the owner of a parameter elsewhere, by its name and number of rows."""
    encoder, cancers = model.encoder, model.cancers
    assert isinstance(encoder, Encoder)
    owners: dict[str, str | tuple[str, ...]] = {}
    for name, parameter in model.named_parameters():
        inner = name.removeprefix("encoder.")
        owners[name] = (
            other(name, len(parameter))
            if inner == name
            else encoder.owner(inner, len(parameter), cancer_blocks(cancers))  # type: ignore[arg-type]
        )
    return Blocks(owners)
