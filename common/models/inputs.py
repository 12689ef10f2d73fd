"""What a model sees of B patients."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Inputs:
    """Expression `[B, G]`, cancer type `[B]`, covariates `[B, V]`, and for models of several modalities what stands beside.

    `has` marks `[B]` who has a modality; the rows of others hold zeros. Images are vectors `[B, P]`, or tiles `[T, P]` with
    the row of the patient whom each belongs to `[T]`.
    """

    x_BG: Tensor
    cancer_B: Tensor
    v_BV: Tensor
    has: dict[str, Tensor] = field(default_factory=dict)
    image_BP: Tensor | None = None
    tiles_TP: Tensor | None = None
    owner_T: Tensor | None = None
    alteration_BA: Tensor | None = None
