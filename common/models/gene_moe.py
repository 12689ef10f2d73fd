"""Gene-MOE: a sparsely gated encoder of gene expression (Meng et al., arXiv 2311.17401), without the original's defects.

MoE (G -> D) -> mixture of attention experts (D, residual) -> latent mean (Z) -> head. The gates are parameters, experts
merge linearly, and attention stays within a patient. Shapes: B patients, G genes, D width, Z latent, E experts, C cancers.
"""

from __future__ import annotations

import contextlib

import torch
from oncofed.common.blocks import Blocks
from oncofed.common.models.layers import AttentionExperts, ExpertLayer, NoisyTopKGate, balance_penalty, dropout
from oncofed.common.models.output import ModelOutput
from torch import Tensor, nn

EXPERT, ATTENTION = "expert", "attention"


class GeneMOE(nn.Module):
    """Encoder with a survival head: expression `[B, G]` -> `ModelOutput`.

    `dispatch` is `routed` (only the chosen experts), `dense` (all experts, for per-sample gradients). `expert_dtype`
    bfloat16 runs the expert matrices under autocast; attention and heads stay in float32.
    """

    def __init__(
        self,
        *,
        genes: int,
        cancers: tuple[str, ...],
        intervals: int,
        width: int,
        latent: int,
        experts: int,
        top_k: int,
        attention_experts: int,
        attention_top_k: int,
        dropout: float,
        input_dropout: float,
        gate_noise: bool,
        gate_sees_cancer: bool,
        shared_expert: bool,
        first_layer_scale: float,
        dispatch: str,
        expert_dtype: str,
    ) -> None:
        super().__init__()
        self.cancers, self.p_hidden, self.p_input = cancers, dropout, input_dropout
        self.dispatch, self.expert_dtype = dispatch, expert_dtype
        gate_cancers = len(cancers) if gate_sees_cancer else 0
        self.gate = NoisyTopKGate(genes, experts, top_k, noise=gate_noise, cancers=gate_cancers)
        self.experts = ExpertLayer(experts, genes, width)
        self.shared = nn.Linear(genes, width) if shared_expert else None
        with torch.no_grad():
            self.experts.weight.mul_(first_layer_scale)
            if self.shared is not None:
                nn.init.xavier_normal_(self.shared.weight).mul_(first_layer_scale)
                nn.init.zeros_(self.shared.bias)
        self.attention_gate = (
            NoisyTopKGate(width, attention_experts, attention_top_k, noise=gate_noise) if attention_experts else None
        )
        self.attention = AttentionExperts(attention_experts, width) if attention_experts else None
        self.latent = nn.Linear(width, latent)
        nn.init.xavier_normal_(self.latent.weight)
        nn.init.zeros_(self.latent.bias)
        # No bias: the baseline hazards carry the level, and under the partial likelihood its gradient is zero.
        self.risk = nn.Linear(latent, 1, bias=False)
        nn.init.xavier_normal_(self.risk.weight)
        self.log_baseline = nn.Parameter(torch.zeros(len(cancers), intervals))

    def _mix(self, layer: ExpertLayer | AttentionExperts, x: Tensor, gate: Tensor) -> Tensor:
        bf16 = self.expert_dtype == "bfloat16"
        context = torch.autocast(x.device.type, dtype=torch.bfloat16) if bf16 else contextlib.nullcontext()
        with context:
            y = layer(x, gate) if self.dispatch == "dense" else layer.forward_routed(x, gate)
        return y.float()

    def forward(self, x_BG: Tensor, cancer_B: Tensor, generator: torch.Generator | None = None) -> ModelOutput:
        """Training noise is drawn from `generator`; without one the output is deterministic."""
        x_BG = dropout(x_BG, self.p_input, generator)
        gate_BE, clean_BE = self.gate(x_BG, cancer_B, generator)
        h_BD = self._mix(self.experts, x_BG, gate_BE)
        if self.shared is not None:
            h_BD = h_BD + torch.tanh(self.shared(x_BG))
        h_BD = dropout(h_BD, self.p_hidden, generator)
        shares, logits = {EXPERT: gate_BE}, {EXPERT: clean_BE}
        if self.attention is not None and self.attention_gate is not None:
            gate_BA, clean_BA = self.attention_gate(h_BD, cancer_B, generator)
            h_BD = h_BD + self._mix(self.attention, h_BD, gate_BA)
            shares[ATTENTION], logits[ATTENTION] = gate_BA, clean_BA
        z_BZ = torch.tanh(self.latent(h_BD))
        return ModelOutput(risk=self.risk(z_BZ).squeeze(-1), latent=z_BZ, shares=shares, logits=logits)

    def penalty(self, output: ModelOutput, load: dict[str, Tensor]) -> Tensor:
        """Balance loss `[B]` of both mixtures against the federation's load."""
        return torch.stack([balance_penalty(output.logits[g], load[g]) for g in output.logits]).sum(0)

    def mixtures(self) -> dict[str, int]:
        """Experts in each mixture, by its name in `ModelOutput.shares`."""
        sizes = {EXPERT: len(self.experts.weight)}
        return sizes | ({ATTENTION: len(self.attention.query)} if self.attention is not None else {})

    def blocks(self) -> Blocks:
        """Experts row by row, one baseline and one row of gate logits a cancer type, the rest as the trunk."""
        owners: dict[str, str | tuple[str, ...]] = {}
        by_cancer = tuple(f"cancer/{c}" for c in self.cancers)
        for name, parameter in self.named_parameters():
            if name in ("log_baseline", "gate.cancer"):
                owners[name] = by_cancer
            elif name.startswith("experts."):
                owners[name] = tuple(f"{EXPERT}/{e}" for e in range(len(parameter)))
            elif name.startswith("attention."):
                owners[name] = tuple(f"{ATTENTION}/{e}" for e in range(len(parameter)))
            else:
                owners[name] = "trunk"
        return Blocks(owners)
