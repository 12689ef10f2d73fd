"""Whether a model's and a loss's patients can be told apart: what breaks the bound of a clipped gradient is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from oncofed.client.privacy import samplers  # noqa: F401 - registers them
from oncofed.common.errors import Refusal
from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import GradSampleHooksFastGradientClipping as Ghost
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

ALIKE = 1e-4
"""Relative difference of a patient's loss alone and among others that rounding may make."""


def own_parameters(module: nn.Module) -> list[nn.Parameter]:
    """A layer's trained parameters, without those of layers within."""
    return [p for p in module.parameters(recurse=False) if p.requires_grad]


def check_layers(model: nn.Module) -> None:
    """Refuse layers whose gradient by patient is unknown, and those that look at a batch as a whole."""
    for name, module in model.named_modules():
        kind = type(module).__name__
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise Refusal(
                f"layer '{name}' is a {kind}: it divides by the spread of the batch, so every patient is in everyone's gradient and "
                "its running statistics are released without noise; use LayerNorm or GroupNorm"
            )
        if isinstance(module, nn.MultiheadAttention):
            raise Refusal(
                f"layer '{name}' is a {kind}, whose gradients by patient Opacus has for another module alone, with other numbers; use "
                "nn.Linear and scaled_dot_product_attention"
            )
        if (
            own_parameters(module)
            and type(module) not in Ghost.NORM_SAMPLERS
            and type(module) not in Ghost.GRAD_SAMPLERS
        ):
            raise Refusal(
                f"layer '{name}' ({kind}) has parameters and no sampler of gradients by patient; register one in client/privacy/samplers.py"
            )


def refuse_keywords(model: nn.Module) -> list[RemovableHandle]:
    """Make layers with parameters refuse tensors by keyword: hooks see positional ones alone, and the norm would be wrong in silence."""

    def check(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        named = [key for key, value in kwargs.items() if isinstance(value, Tensor)]
        if named:
            raise Refusal(
                f"a {type(module).__name__} with parameters got the tensors {named} by keyword, which gradients by patient do not see; "
                "hand them over by position"
            )

    return [m.register_forward_pre_hook(check, with_kwargs=True) for m in model.modules() if own_parameters(m)]


def check_separable(losses_of: Callable[[Tensor], Tensor], patients: int) -> None:
    """Refuse a loss that couples patients: batch statistics, capacity limits, means weighted over the batch, risk sets.

    `losses_of` gives the losses of rows of some made-up patients; nobody's data are looked at.
    """
    rows = torch.arange(patients)
    with torch.no_grad():
        together = losses_of(rows)
        if together.shape != (patients,):
            raise Refusal(
                f"the loss gives {tuple(together.shape)} numbers for {patients} patients; a private step needs one for each"
            )
        alone = torch.cat([losses_of(rows[i : i + 1]) for i in range(patients)])
    if not torch.allclose(together, alone, rtol=ALIKE, atol=ALIKE):
        worst = int((together - alone).abs().argmax())
        raise Refusal(
            f"the loss of a patient depends on who else is in the batch ({float(alone[worst]):.4f} alone, {float(together[worst]):.4f} "
            "among others), so clipping bounds nothing: no batch statistics, no capacity limit of experts, no mean weighted by the batch's "
            "classes; reduce by a sum over patients"
        )
