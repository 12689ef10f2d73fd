"""One private step: each patient's gradient clipped to one norm, the sum covered by noise (Abadi et al. 2016, algorithm 1).

Norms are ghost norms (Goodfellow 2015; Li et al. 2022) by Opacus' samplers and ours (samplers.py): a first pass back gives the
gradients of what came out of each layer, from which every patient's norm follows; a second one the sum of gradients so scaled.
Opacus' own hooks do the same, but count the parameters of a layer within a layer twice, and make every weight's gradient in the
first pass, which nobody needs. A batch is taken in parts, which changes memory alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from oncofed.client.privacy.separable import check_layers, own_parameters, refuse_keywords
from oncofed.common.errors import Refusal
from oncofed.common.noise import LEVELS, SecureNoise
from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import GradSampleHooksFastGradientClipping as Ghost
from torch import Tensor, nn

SLACK = 1e-5
"""Below the clip, for what rounding of norms in single precision adds."""

Call = tuple[nn.Module, list[Tensor], Tensor]
"""A layer with parameters, what went in, and what came out."""


class PatientGradients:
    """Gradients by patient of a model while it is open; `opened` makes one."""

    def __init__(self, model: nn.Module, clip: float) -> None:
        self.model, self.clip = model, clip
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        # the sum is laid on the noise's lattice as a whole, which may move each of its numbers by a step more
        steps = math.sqrt(sum(p.numel() for p in self.parameters)) / LEVELS
        self.bound = clip * (1.0 - SLACK - 2.0 * steps)
        """The norm that gradients are really cut to, so that rounding stays within `clip`."""
        self._calls: list[Call] = []
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

    def norms(self, losses_of: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        """Gradient norm of each patient `[B]`, and the losses `[B]` with their graph."""
        self._calls, self._recording = [], True
        losses_B = losses_of()
        self._recording = False
        calls, self._calls = self._calls, []
        outputs = [output for _, _, output in calls]
        grads = torch.autograd.grad(losses_B.sum(), outputs, retain_graph=True, allow_unused=True)
        squares_B = torch.zeros_like(losses_B)
        by_layer: dict[nn.Module, list[tuple[list[Tensor], Tensor]]] = {}
        for (layer, inputs, _), grad in zip(calls, grads, strict=True):
            if grad is not None:
                by_layer.setdefault(layer, []).append((inputs, grad))
        for layer, passes in by_layer.items():
            squares_B = squares_B + _squared_norms(layer, passes)
        self._seen = set(by_layer)
        return squares_B.detach().sqrt(), losses_B

    def _check_seen(self) -> None:
        """Refuse a gradient of a parameter whose layer no hook has seen: nobody knows whose it is."""
        for module in self.model.modules():
            if module not in self._seen and any(
                p.grad is not None and bool(p.grad.any()) for p in own_parameters(module)
            ):
                raise Refusal(
                    f"parameters of a {type(module).__name__} are used outside its own forward, so the gradient of a patient has a part "
                    "that no hook has seen; use them in the forward alone"
                )

    def clipped_sum(self, parts: Iterable[Callable[[Tensor | None], Tensor]]) -> list[Tensor]:
        """Sum over patients of gradients of norm `clip` at most, a tensor a parameter.

        Each part gives the losses of its patients, or of those rows of them that it is called with: a patient whose gradient is
        not finite is left out, as no factor would bound it.
        """
        total = [torch.zeros_like(p) for p in self.parameters]
        for part in parts:
            norm_B, losses_B = self.norms(lambda part=part: part(None))  # type: ignore[misc]
            rows = torch.nonzero(torch.isfinite(norm_B)).squeeze(1)
            if len(rows) < len(norm_B):  # a loss is a function of its patient alone, so the others stay as they were
                if not len(rows):
                    continue
                norm_B, losses_B = self.norms(lambda part=part, rows=rows: part(rows))  # type: ignore[misc]
            factor_B = (self.bound / norm_B.clamp(min=1e-30)).clamp(max=1.0)
            (factor_B * losses_B).sum().backward()
            self._check_seen()
            for sum_, p in zip(total, self.parameters, strict=True):
                if p.grad is not None:
                    sum_ += p.grad
            self.model.zero_grad(set_to_none=True)
        return total


def _squared_norms(layer: nn.Module, passes: list[tuple[list[Tensor], Tensor]]) -> Tensor:
    """Squared norm `[B]` of each patient's gradient of a layer's own parameters; of a layer that is passed twice the gradients add up first."""
    if len(passes) == 1 and type(layer) in Ghost.NORM_SAMPLERS:
        norms = Ghost.NORM_SAMPLERS[type(layer)](layer, *passes[0])
        return torch.stack([norm_B.square() for norm_B in norms.values()]).sum(0)
    total: dict[nn.Parameter, Tensor] = {}
    for inputs, grad in passes:
        for p, sample in Ghost.GRAD_SAMPLERS[type(layer)](layer, inputs, grad).items():
            total[p] = total[p] + sample if p in total else sample
    return torch.stack([sample.flatten(1).square().sum(1) for sample in total.values()]).sum(0)


def cover(total: list[Tensor], *, clip: float, deviation: float, noise: SecureNoise) -> list[Tensor]:
    """The sum with Gaussian noise of `deviation` times `clip` on every number of every parameter, also of an expert that
    nobody passed: noise on the used ones alone would tell which they are."""
    return [noise.covered(t, sensitivity=clip, deviation=deviation).to(t.dtype) for t in total]
