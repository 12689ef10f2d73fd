"""Encoders of what stands beside expression: tiles of slides, and tables of genomic alterations.

Shapes: B patients, T tiles of all of them, P numbers of a tile, A alterations, D width, Z latent.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from oncofed.common.models.layers import dropout
from torch import Tensor, nn

ALTERATION_WIDTHS = (64, 48, 32, 32)
"""Of the SNN for copy numbers and mutations (Chen et al. 2020, arXiv 1912.08937, as its code has it)."""

ATTENTION_WIDTH = 128


class TileEncoder(nn.Module):
    """A patient's tiles -> latent `[B, Z]` by gated attention pooling (Ilse et al. 2018, arXiv 1802.04712, eq. 9).

    Each tile is normalised and embedded, h_t = relu(W x_t + b); the patient is sum_t a_t h_t, with a_t a softmax over the
    patient's own tiles of w . (tanh(V h_t) * sigmoid(U h_t)): no patient's weights depend on who else is in the batch.
    """

    def __init__(self, inputs: int, width: int, latent: int, *, dropout: float) -> None:
        super().__init__()
        self.p = dropout
        self.norm = nn.LayerNorm(inputs)
        self.embed = nn.Linear(inputs, width)
        self.tanh = nn.Linear(width, ATTENTION_WIDTH)
        self.gate = nn.Linear(width, ATTENTION_WIDTH)
        self.score = nn.Linear(ATTENTION_WIDTH, 1, bias=False)  # a softmax does not see a constant
        self.latent = nn.Linear(width, latent)

    def forward(
        self, x_TP: Tensor, owner_T: Tensor, patients: int, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        """Latent `[B, Z]` and attention `[T]`, which sums to 1 over the tiles of a patient; no tiles, latent of 0."""
        h_TD = dropout(torch.relu(self.embed(self.norm(x_TP))), self.p, generator)
        score_T = self.score(torch.tanh(self.tanh(h_TD)) * torch.sigmoid(self.gate(h_TD))).squeeze(-1)
        a_T = softmax_by_owner(score_T, owner_T, patients)
        pooled_BD = h_TD.new_zeros(patients, h_TD.shape[1]).index_add(0, owner_T, a_T[:, None] * h_TD)
        return torch.tanh(self.latent(pooled_BD)), a_T

    def in_step(
        self, x_TP: Tensor, owner_T: Tensor, patients: int, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        """The same with every patient's tiles as a row `[B, tiles, P]`, filled up with nothing: gradients by patient want it."""
        counts_B = torch.bincount(owner_T, minlength=patients)
        order_T = torch.argsort(owner_T, stable=True)
        place_T = torch.empty_like(owner_T)
        starts_B = counts_B.cumsum(0) - counts_B
        place_T[order_T] = torch.arange(len(owner_T), device=owner_T.device) - starts_B[owner_T[order_T]]
        at = owner_T, place_T
        most = max(1, int(counts_B.max())) if len(owner_T) else 1
        x_BSP = x_TP.new_zeros(patients, most, x_TP.shape[1]).index_put(at, x_TP)
        there_BS = torch.zeros(patients, most, dtype=torch.bool, device=x_TP.device)
        there_BS[at] = True
        h_BSD = dropout(torch.relu(self.embed(self.norm(x_BSP))), self.p, generator)
        score_BS = self.score(torch.tanh(self.tanh(h_BSD)) * torch.sigmoid(self.gate(h_BSD))).squeeze(-1)
        # who has no tiles at all has a softmax over nothing but padding, of which nothing counts
        padding_BS = ~there_BS & there_BS.any(1, keepdim=True)
        a_BS = torch.softmax(score_BS.masked_fill(padding_BS, -torch.inf), dim=1) * there_BS
        return torch.tanh(self.latent((a_BS[:, :, None] * h_BSD).sum(1))), a_BS[at]


def softmax_by_owner(score_T: Tensor, owner_T: Tensor, patients: int) -> Tensor:
    """Softmax over the tiles of each patient."""
    peak_B = score_T.new_full((patients,), -math.inf).scatter_reduce(0, owner_T, score_T.detach(), "amax")
    odds_T = torch.exp(score_T - peak_B[owner_T])
    total_B = score_T.new_zeros(patients).index_add(0, owner_T, odds_T)
    return odds_T / total_B[owner_T]


class AlterationEncoder(nn.Module):
    """Copy numbers and mutations `[B, A]` -> `[B, 32]`: linear layers, each with ELU and alpha dropout (the original's is 0.25)."""

    def __init__(self, inputs: int, *, dropout: float) -> None:
        super().__init__()
        self.p = dropout
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise((inputs, *ALTERATION_WIDTHS)))

    def forward(self, x_BA: Tensor, generator: torch.Generator | None) -> Tensor:
        for layer in self.layers:
            x_BA = alpha_dropout(torch.nn.functional.elu(layer(x_BA)), self.p, generator)
        return x_BA


def alpha_dropout(x: Tensor, p: float, generator: torch.Generator | None) -> Tensor:
    """Dropout that keeps mean 0 and variance 1 (Klambauer et al. 2017, arXiv 1706.02515, section 3)."""
    if generator is None or p == 0.0:
        return x
    low = -1.7580993408473766  # of SELU, as torch.nn.AlphaDropout has it
    keep = torch.rand(x.shape, generator=generator, device=x.device, dtype=x.dtype) >= p
    a = ((1 - p) * (1 + p * low**2)) ** -0.5
    return a * torch.where(keep, x, torch.full_like(x, low)) - a * p * low
