"""Heads: from a patient's latent vector, cancer type and covariates to a log hazard or to class logits.

Shapes: B patients, Z latent, C cancer types, V covariates, K intervals.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

BY_CANCER = ("log_baseline", "own", "covariates.own")
"""Parameters of a head with one row a cancer type: that cancer's block."""


def class_blocks(classes: tuple[str, ...]) -> tuple[str, ...]:
    """The block of each class: its row of a head of classes."""
    return tuple(f"class/{c}" for c in classes)


class Covariates(nn.Module):
    """Linear branch of clinical covariates: coefficients that all cancer types share, plus each cancer's own, from 0."""

    def __init__(self, covariates: int, outputs: int, cancers: int) -> None:
        super().__init__()
        self.shared = nn.Parameter(torch.zeros(covariates, outputs))
        self.own = nn.Parameter(torch.zeros(cancers, covariates, outputs)) if cancers else None

    def forward(self, v_BV: Tensor, cancer_B: Tensor) -> Tensor:
        y_BO = v_BV @ self.shared
        return y_BO if self.own is None else y_BO + torch.einsum("bv,bvo->bo", v_BV, self.own[cancer_B])


class LinearRisk(nn.Module):
    """Log hazard z . (w + sqrt(own) u_c) `[B]`, a part w that all cancer types share and a part u_c of each.

    While the first layer starts near zero, gradient descent gives patients i, j of cancers c, c' the kernel
    (|w|^2 + own [c = c'] |u|^2) x_i.x_j: a ridge with one shared and one own coefficient vector for each cancer
    (Evgeniou & Pontil 2004), whose ratio is `own`.
    """

    def __init__(self, latent: int, *, cancers: int, own: float, scale: float) -> None:
        super().__init__()
        spread = scale * math.sqrt(2.0 / (latent + 1))
        # No bias: the baseline hazards carry the level, and under the partial likelihood its gradient is zero.
        self.shared = nn.Parameter(torch.randn(latent) * spread)
        self.ratio = math.sqrt(own)
        self.own = nn.Parameter(torch.randn(cancers, latent) * spread) if own else None

    def forward(self, z_BZ: Tensor, cancer_B: Tensor) -> Tensor:
        risk_B = z_BZ @ self.shared
        if self.own is not None:
            risk_B = risk_B + self.ratio * (z_BZ * self.own[cancer_B]).sum(-1)
        return risk_B


class SurvivalHead(LinearRisk):
    """Linear risk, clinical covariates, and log baselines [C, K]."""

    by_class: tuple[str, ...] = ()

    def __init__(self, *, latent: int, cancers: int, intervals: int, own: float, covariates: int, scale: float) -> None:
        super().__init__(latent, cancers=cancers, own=own, scale=scale)
        self.covariates = Covariates(covariates, 1, cancers) if covariates else None
        self.log_baseline = nn.Parameter(torch.zeros(cancers, intervals))

    def forward(self, z_BZ: Tensor, cancer_B: Tensor, v_BV: Tensor) -> Tensor:  # type: ignore[override]
        """The log hazard and, beside it, the log baseline of the patient's cancer type: `[B, 1 + K]`."""
        risk_B = super().forward(z_BZ, cancer_B)
        if self.covariates is not None:
            risk_B = risk_B + self.covariates(v_BV, cancer_B).squeeze(-1)
        return torch.cat([risk_B[:, None], self.log_baseline[cancer_B]], dim=1)

    def read(self, z_BZ: Tensor, cancer_B: Tensor, v_BV: Tensor) -> tuple[Tensor, Tensor | None]:
        """The log hazard `[B]` and the log baseline of the patient's cancer type `[B, K]`."""
        both = self(z_BZ, cancer_B, v_BV)
        return both[:, 0], both[:, 1:]


class ClassHead(nn.Module):
    """Class logits [B, classes], linear in the latent vector and the covariates; the cancer type is not shown to it."""

    by_class = ("linear.weight", "linear.bias")
    """Parameters with one row a class: that class's block."""

    def __init__(self, *, latent: int, classes: int, covariates: int, scale: float) -> None:
        super().__init__()
        self.linear = nn.Linear(latent, classes)
        nn.init.xavier_normal_(self.linear.weight, gain=scale)
        nn.init.zeros_(self.linear.bias)
        self.covariates = Covariates(covariates, classes, 0) if covariates else None

    def forward(self, z_BZ: Tensor, cancer_B: Tensor, v_BV: Tensor) -> Tensor:
        logits = self.linear(z_BZ)
        return logits if self.covariates is None else logits + self.covariates(v_BV, cancer_B)

    def read(self, z_BZ: Tensor, cancer_B: Tensor, v_BV: Tensor) -> tuple[Tensor, Tensor | None]:
        """The logits, and no baseline."""
        return self(z_BZ, cancer_B, v_BV), None
