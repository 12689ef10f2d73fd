"""One private step: each patient's gradient clipped to one norm, the sum covered by noise (Abadi et al. 2016, algorithm 1).

One pass back gives, for each layer, the gradient of what came out; with what went in, it tells every patient's gradient of the
layer's parameters. From the very same numbers come the norms (ghost norms, Li et al. 2022; by Opacus' samplers and ours, in double
precision) and the sum of the gradients so scaled (book-keeping, Bu et al. 2023). A second pass would round differently, and weights
of a hostile coordinator's choice can make that difference as large as they like. A batch is taken in parts, which changes memory alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from oncofed.client.privacy.samplers import of_patients
from oncofed.client.privacy.separable import check_layers, own_parameters, refuse_keywords
from oncofed.common.noise import LEVELS, SecureNoise
from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import GradSampleHooksFastGradientClipping as Ghost
from torch import Tensor, nn

SLACK = 1e-5
"""Below the clip, for what rounding of sums in single precision adds."""

Samples = dict[nn.Parameter, Tensor]


@dataclass(frozen=True)
class Pass:
    """One call of a layer: what went in, and the gradient of what came out."""

    inputs: list[Tensor]
    grad: Tensor


class PatientGradients:
    """Gradients by patient of a model while it is open; `opened` makes one."""

    def __init__(self, model: nn.Module, clip: float) -> None:
        self.model, self.clip = model, clip
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        # the sum is laid on the noise's lattice as a whole, which may move each of its numbers by a step more
        steps = math.sqrt(sum(p.numel() for p in self.parameters)) / LEVELS
        self.bound = clip * (1.0 - SLACK - 2.0 * steps)
        """The norm that gradients are really cut to, so that rounding stays within `clip`."""
        self._calls: list[tuple[nn.Module, list[Tensor], Tensor]] = []
        self._recording = False

    @classmethod
    @contextmanager
    def opened(cls, model: nn.Module, clip: float) -> Iterator[PatientGradients]:
        """Hooks on the model's layers; afterwards it is as it was. Raises `Refusal` on a layer whose patients cannot be told apart."""
        check_layers(model)
        gradients = cls(model, clip)
        handles = refuse_keywords(model)
        handles += [m.register_forward_hook(gradients._record) for m in model.modules() if own_parameters(m)]
        try:
            yield gradients
        finally:
            for handle in handles:
                handle.remove()

    def _record(self, layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        if self._recording and torch.is_grad_enabled():
            self._calls.append((layer, [t.detach() for t in inputs], output))

    def norms(self, losses_of: Callable[[], Tensor]) -> tuple[Tensor, dict[nn.Module, list[Pass]]]:
        """Gradient norm of each patient `[B]` in double precision, and what each layer saw.

        Parameters that are used outside their own layer's forward have no part in it, nor in the sum: nothing of them is released.
        """
        self._calls, self._recording = [], True
        losses_B = losses_of()
        self._recording = False
        calls, self._calls = self._calls, []
        grads = torch.autograd.grad(losses_B.sum(), [output for _, _, output in calls], allow_unused=True)
        by_layer: dict[nn.Module, list[Pass]] = {}
        for (layer, inputs, _), grad in zip(calls, grads, strict=True):
            if grad is not None:
                by_layer.setdefault(layer, []).append(Pass(inputs, grad))
        squares_B = torch.zeros(len(losses_B), dtype=torch.float64, device=losses_B.device)
        for layer, passes in by_layer.items():
            squares_B = squares_B + _squared_norms(layer, passes)
        return squares_B.sqrt(), by_layer

    def clipped_sum(self, parts: Iterable[Callable[[], Tensor]]) -> list[Tensor]:
        """Sum over patients of gradients of norm `clip` at most, a tensor a parameter; each part gives the losses of its patients.

        A patient whose gradient is not finite counts nothing, as no factor would bound it; the others stay as they were.
        """
        total = {p: torch.zeros_like(p) for p in self.parameters}
        for part in parts:
            norm_B, by_layer = self.norms(part)
            factor_B = (self.bound / norm_B.clamp(min=1e-30)).clamp(max=1.0)
            factor_B = torch.where(torch.isfinite(norm_B), factor_B, torch.zeros_like(factor_B))
            for layer, passes in by_layer.items():
                for p, value in _weighed_sum(layer, passes, factor_B).items():
                    total[p] += value
        return [total[p] for p in self.parameters]


def cover(total: list[Tensor], *, clip: float, deviation: float, noise: SecureNoise) -> list[Tensor]:
    """The sum with Gaussian noise of `deviation` times `clip` on every number of every parameter, also of an expert that
    nobody passed: noise on the used ones alone would tell which they are."""
    return [noise.covered(t, sensitivity=clip, deviation=deviation).to(t.dtype) for t in total]


def _written_down(layer: nn.Module, passes: list[Pass]) -> bool:
    """Whether a layer's gradients by patient are written down: where no norm is known in closed form, where a layer is passed twice and
    they add up first, and where a patient has several rows, whose closed form cancels badly."""
    several_rows = isinstance(layer, nn.Linear) and passes[0].grad.ndim > 2
    return len(passes) > 1 or type(layer) not in Ghost.NORM_SAMPLERS or several_rows


def _samples(layer: nn.Module, passes: list[Pass]) -> Samples:
    """Gradients `[B, ...]` of a layer's own parameters by patient."""
    total: Samples = {}
    for one in passes:
        for p, sample in Ghost.GRAD_SAMPLERS[type(layer)](layer, one.inputs, one.grad).items():
            total[p] = total[p] + sample if p in total else sample
    return total


@torch.no_grad()
def _squared_norms(layer: nn.Module, passes: list[Pass]) -> Tensor:
    """Squared norm `[B]` of each patient's gradient of a layer's own parameters, in double precision: squares must neither vanish
    nor overflow where the numbers themselves do not."""
    if _written_down(layer, passes):
        return torch.stack([s.flatten(1).double().square().sum(1) for s in _samples(layer, passes).values()]).sum(0)
    wide = [t.double() if t.is_floating_point() else t for t in passes[0].inputs]
    norms = Ghost.NORM_SAMPLERS[type(layer)](layer, wide, passes[0].grad.double())
    return torch.stack([norm_B.square() for norm_B in norms.values()]).sum(0)


@torch.no_grad()
def _weighed_sum(layer: nn.Module, passes: list[Pass], factor_B: Tensor) -> Samples:
    """Sum over patients of factor times gradient, from the numbers that the norms were made of; a factor of 0 leaves nothing, not even NaN."""
    if _written_down(layer, passes):
        out = {}
        for p, sample in _samples(layer, passes).items():
            shaped = factor_B.to(sample.dtype).reshape(-1, *([1] * (sample.ndim - 1)))
            out[p] = torch.where(shaped != 0, sample * shaped, torch.zeros_like(sample)).sum(0)
        return out
    (one,) = passes
    factor, zero = of_patients(layer, one.inputs, factor_B)
    grad = torch.where(zero, torch.zeros_like(one.grad), (one.grad.double() * factor).to(one.grad.dtype))
    # a row whose gradient is 0 adds nothing, unless what went in is not finite
    inputs = [t.nan_to_num(0.0, 0.0, 0.0) if t.is_floating_point() else t for t in one.inputs]
    own = own_parameters(layer)
    with torch.enable_grad():
        output = layer.forward(*inputs)
    return dict(zip(own, torch.autograd.grad(output, own, grad), strict=True))
