"""Layers that the models share: the gate, stacked experts, and experts of attention.

Shapes: B patients, G inputs, D width, E experts, K experts chosen for a patient.
Randomness (dropout, gate noise) comes only from the generator that is passed in, never from a global state, so a site's
training depends on its seed alone, whatever runs beside it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from oncofed.common.models.attention import scalar_token_attention
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def dropout(x: Tensor, p: float, generator: torch.Generator | None) -> Tensor:
    """Inverted dropout with an explicit generator; the identity without one (evaluation) or at p = 0."""
    if generator is None or p == 0.0:
        return x
    keep = torch.rand(x.shape, generator=generator, device=x.device, dtype=x.dtype) >= p
    return x * keep / (1.0 - p)


class NoisyTopKGate(nn.Module):
    """Noisy top-k gate with registered, trained weights (Shazeer et al. 2017, arXiv 1701.06538, eq. 3-5).

    The input is layer-normalised; an optional row of logits per cancer type is added, so that the gate can route by it.
    `prior` is the lead in those rows that a cancer's first experts begin with, dealt round the table as in hash layers (Roller
    et al. 2021, arXiv 2106.04426): with 0 all cancers begin alike and the gate must find out by itself.
    """

    def __init__(
        self, inputs: int, experts: int, top_k: int, *, noise: bool = True, cancers: int = 0, prior: float = 0.0
    ) -> None:
        super().__init__()
        self.top_k = top_k
        self.norm = nn.LayerNorm(inputs)
        self.weight = nn.Parameter(torch.randn(inputs, experts) * 1e-3)
        self.noise = nn.Parameter(torch.zeros(inputs, experts)) if noise else None
        self.cancer = nn.Parameter(_first_experts(cancers, experts, top_k) * prior) if cancers else None

    def forward(self, x_BG: Tensor, cancer_B: Tensor) -> Tensor:
        """Scores `[B, E]`, and beside them, with noise, what its spread is made of `[B, 2 E]`: what has parameters, and no more."""
        x_BG = self.norm(x_BG)
        clean_BE = x_BG @ self.weight
        if self.cancer is not None:
            clean_BE = clean_BE + self.cancer[cancer_B]
        return clean_BE if self.noise is None else torch.cat([clean_BE, x_BG @ self.noise], dim=1)

    def route(
        self, x_BG: Tensor, cancer_B: Tensor, generator: torch.Generator | None, off: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Gates `[B, E]` (zero outside the top k, rows sum to 1) and clean logits `[B, E]`.

        Expert `off` is never chosen: the next best takes its place, as if it had been taken out of the model.
        """
        scores = self(x_BG, cancer_B)
        clean_BE = logits_BE = scores[:, : self.weight.shape[1]]
        if self.noise is not None and generator is not None:
            scale_BE = F.softplus(scores[:, self.weight.shape[1] :]) + 0.01
            draw_BE = torch.randn(clean_BE.shape, generator=generator, device=clean_BE.device, dtype=clean_BE.dtype)
            logits_BE = clean_BE + draw_BE * scale_BE
        if off is not None:
            logits_BE = logits_BE.index_fill(1, torch.tensor([off], device=logits_BE.device), -torch.inf)
        top_BK, index_BK = logits_BE.topk(self.top_k, dim=-1)
        gate_BE = torch.zeros_like(logits_BE).scatter(1, index_BK, torch.softmax(top_BK, dim=-1))
        return gate_BE, clean_BE


def _first_experts(cancers: int, experts: int, top_k: int) -> Tensor:
    """0/1 rows `[cancers, experts]`, top-k each: all experts are used, and cancers share all of theirs only when there are many."""
    strides = [s for s in range(1, max(experts, 2)) if experts // math.gcd(s, experts) >= top_k]
    rows = torch.zeros(cancers, experts)
    for c in range(cancers):
        stride = strides[(c // experts) % len(strides)]
        rows[c, [(c + j * stride) % experts for j in range(top_k)]] = 1.0
    return rows


def balance_penalty(clean_BE: Tensor, load_E: Tensor) -> Tensor:
    """Separable balance loss `[B]`: E * sum_e load_e * p_e(x_i), with the federation's load held constant.

    A hospital with one cancer is not pushed to spread it over all experts: only the global load counts (gene_moe.md 6.1).
    """
    return load_E.numel() * (torch.softmax(clean_BE, dim=-1) * load_E).sum(-1)


class _RoutedLinear(torch.autograd.Function):
    """x_e W_e + b_e for rows `[N, G]` that lie sorted by expert, `counts` of each expert -> `[N, D]`.

    The gradient of the stacked weight is written once, in place: autograd would make one for each expert and copy them all
    together, which at the paper's size takes longer than the products.
    """

    @staticmethod
    def forward(ctx: Any, x_NG: Tensor, w_EGD: Tensor, b_ED: Tensor, counts: list[int]) -> Tensor:
        kind = x_NG.device.type
        low = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x_NG.dtype
        ctx.save_for_backward(x_NG, w_EGD)
        ctx.counts, ctx.low = counts, low
        parts = zip(x_NG.to(low).split(counts), w_EGD, b_ED, strict=True)
        with torch.autocast(kind, enabled=False):
            return torch.cat([torch.addmm(b.to(low), x, w.to(low)) for x, w, b in parts])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x_NG, w_EGD = ctx.saved_tensors
        low, counts = ctx.low, ctx.counts
        grads, rows = grad_ND.to(low).split(counts), x_NG.to(low).split(counts)
        grad_w, grad_x = None, None
        if ctx.needs_input_grad[1]:
            grad_w = torch.empty_like(w_EGD)
            for e, (x, g) in enumerate(zip(rows, grads, strict=True)):
                if low == grad_w.dtype:
                    torch.mm(x.t(), g, out=grad_w[e])
                else:
                    grad_w[e] = x.t() @ g
        if ctx.needs_input_grad[0]:
            grad_x = torch.cat([g @ w.to(low).t() for g, w in zip(grads, w_EGD, strict=True)]).to(x_NG.dtype)
        grad_b = torch.stack([g.sum(0) for g in grads]).to(w_EGD.dtype) if ctx.needs_input_grad[2] else None
        return grad_x, grad_w, grad_b, None


def dispatch(gate_BE: Tensor, dense: bool) -> tuple[Tensor, Tensor]:
    """Who passes which expert: rows of patients and experts `[N]`, sorted by expert; `dense` pairs every patient with all."""
    chosen_EB = (torch.ones_like(gate_BE) if dense else gate_BE).t().contiguous()
    expert_N, patient_N = torch.nonzero(chosen_EB, as_tuple=True)
    return patient_N, expert_N


def merge(y_ND: Tensor, gate_BE: Tensor, patient_N: Tensor, expert_N: Tensor) -> Tensor:
    """What experts made of patients, weighed by the gate and added up by patient: `[N, D]` -> `[B, D]`."""
    weighted_ND = y_ND * gate_BE[patient_N, expert_N][:, None].to(y_ND.dtype)
    return y_ND.new_zeros(len(gate_BE), y_ND.shape[1]).index_add(0, patient_N, weighted_ND)


class ExpertLayer(nn.Module):
    """E experts `tanh(W_e x + b_e)` stacked as `[E, in, out]` and merged linearly: y = sum_e g_e E_e(x).

    With `rank`, low-rank adapters stand beside the weights: W_e + A_e B_e with B = 0 at first (Hu et al. 2022,
    arXiv 2106.09685, eq. 3).
    """

    def __init__(self, experts: int, inputs: int, outputs: int, *, scale: float = 1.0, rank: int = 0) -> None:
        super().__init__()
        spread = scale * math.sqrt(2.0 / (inputs + outputs))
        self.weight = nn.Parameter(torch.randn(experts, inputs, outputs) * spread)
        self.bias = nn.Parameter(torch.zeros(experts, outputs))
        self.adapter_in = nn.Parameter(torch.randn(experts, inputs, rank) / math.sqrt(inputs)) if rank else None
        self.adapter_out = nn.Parameter(torch.zeros(experts, rank, outputs)) if rank else None

    def forward(self, x_BG: Tensor, patient_N: Tensor, expert_N: Tensor) -> Tensor:
        """W_e x + b_e of each pair, `[N, D]`: all that has parameters, and only tensors by position, so that a hook on the
        layer sees what a patient's gradient is made of (client/privacy/samplers.py)."""
        counts = torch.bincount(expert_N, minlength=len(self.weight)).tolist()
        x_NG = x_BG[patient_N]
        y_ND = _RoutedLinear.apply(x_NG, self.weight, self.bias, counts)
        if self.adapter_in is not None and self.adapter_out is not None:
            low = zip(x_NG.split(counts), self.adapter_in.unbind(0), self.adapter_out.unbind(0), strict=True)
            y_ND = y_ND + torch.cat([x @ a @ b for x, a, b in low])
        return y_ND

    def mix(self, x_BG: Tensor, gate_BE: Tensor, *, dense: bool = False) -> Tensor:
        """The layer's output `[B, D]`; of `dense` dispatch all experts are computed, otherwise the chosen ones: the same numbers."""
        pairs = dispatch(gate_BE, dense)
        return merge(torch.tanh(self(x_BG, *pairs)), gate_BE, *pairs)


class AttentionExperts(nn.Module):
    """E attention experts `[E, D, D]` for query, key and value, mixed per patient by a gate."""

    def __init__(self, experts: int, width: int) -> None:
        super().__init__()
        bound = 1.0 / math.sqrt(width)
        self.query = nn.Parameter(torch.empty(experts, width, width).uniform_(-bound, bound))
        self.key = nn.Parameter(torch.empty(experts, width, width).uniform_(-bound, bound))
        self.value = nn.Parameter(torch.empty(experts, width, width).uniform_(-bound, bound))

    def forward(self, h_BD: Tensor, patient_N: Tensor, expert_N: Tensor) -> Tensor:
        """Query, key and value of each pair, `[3, N, D]`."""
        counts = torch.bincount(expert_N, minlength=len(self.query)).tolist()
        rows = h_BD[patient_N].split(counts)
        return torch.stack(
            [
                torch.cat([x @ w for x, w in zip(rows, stacked.unbind(0), strict=True)])
                for stacked in (self.query, self.key, self.value)
            ]
        )

    def mix(self, h_BD: Tensor, gate_BE: Tensor, *, dense: bool = False) -> Tensor:
        """The layer's output `[B, D]`, as in `ExpertLayer`."""
        pairs = dispatch(gate_BE, dense)
        # The patient axis serves as attention heads of one batch: the kernel then splits the work over cores.
        q, k, v = self(h_BD, *pairs).unsqueeze(1).unbind(0)
        return merge(scalar_token_attention(q, k, v)[0].to(h_BD.dtype), gate_BE, *pairs)
