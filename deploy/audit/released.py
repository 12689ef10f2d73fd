"""What a site releases, beside what it should have covered: rounds of the study by the product's own messages, watched from outside.

A site answers the study's training messages as in a simulation. Of each private step are known the weights and the clipped sum
before anything is added; the released change of the round tells the sum with noise: SGD moves by -rate (sum / (q n) + decay w +
prox (w - w0)). Of Adam the optimiser's gradient is read, and the answer is held against where the optimiser left the weights.
Their difference, the residual, is all that protects a patient.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from oncofed.client.batch import Batch
from oncofed.client.privacy.dp_sgd import PatientGradients
from oncofed.client.train import optimizer_for
from oncofed.common.blocks import EVIDENCE, Sum
from oncofed.common.noise import SecureNoise
from oncofed.common.study import TRAIN
from oncofed.deploy.audit.setting import Setting
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

Numbers = dict[str, np.ndarray]

ROUNDING = 1e-5
"""Relative difference that single precision leaves between an answer and the weights that its last step left."""


@dataclass
class Step:
    """A private step as it was watched: weights, clean sum, canaries that the product drew, and which patients' losses were asked."""

    weights: Numbers
    clean: Numbers
    present: np.ndarray
    patients: list[bytes]
    gradient: Numbers = field(default_factory=dict)
    after: Numbers = field(default_factory=dict)


class Watch:
    """Listens to private steps, and adds canaries to clipped sums before the product covers them.

    `place [m]` are numbers of all that are trained, in the model's order; `inside [m]` says which canaries are patients of the site.
    The product's own Poisson sample decides in which steps they are.
    """

    def __init__(self, place: np.ndarray, inside: np.ndarray, height: float) -> None:
        self.place, self.inside, self.height = place, inside, height
        self.steps: list[Step] = []
        self._present = inside
        self._patients: list[bytes] | None = None

    @contextmanager
    def on(self) -> Iterator[Watch]:
        """The product under watch; afterwards it is as it was."""
        clipped, chosen, inputs = PatientGradients.clipped_sum, SecureNoise.chosen, Batch.inputs

        def watched_sum(gradients: PatientGradients, parts: Any) -> list[Tensor]:
            self._patients = []
            clean = clipped(gradients, parts)
            named = _trained(gradients.model)
            weights = {n: _numbers(p) for n, p in named.items()}
            sums = dict(zip(named, map(_numbers, clean), strict=True))
            self.steps.append(Step(weights, sums, self._present, self._patients))
            self._patients, present, self._present = None, self._present, self.inside
            return self._with_canaries(clean, present)

        def watched_choice(noise: SecureNoise, count: int, rate: float) -> Tensor:
            rows = chosen(noise, count + len(self.place), rate)
            here = rows[rows >= count].cpu().numpy() - count
            self._present = self.inside & np.isin(np.arange(len(self.place)), here)
            return rows[rows < count]

        def watched_inputs(batch: Batch, generator: torch.Generator | None = None) -> Any:
            if self._patients is not None:
                self._patients += _names(batch)
            return inputs(batch, generator)

        def before(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            if self.steps and not self.steps[-1].gradient:
                grads = (p.grad for group in optimizer.param_groups for p in group["params"])
                values = [np.zeros(0) if g is None else _numbers(g) for g in grads]
                self.steps[-1].gradient = dict(zip(self.steps[-1].clean, values, strict=False))

        def after(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            if self.steps:
                values = [_numbers(p) for group in optimizer.param_groups for p in group["params"]]
                self.steps[-1].after = dict(zip(self.steps[-1].clean, values, strict=False))

        PatientGradients.clipped_sum, SecureNoise.chosen, Batch.inputs = watched_sum, watched_choice, watched_inputs  # type: ignore[method-assign, assignment]
        handles = [register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)]
        try:
            yield self
        finally:
            PatientGradients.clipped_sum, SecureNoise.chosen, Batch.inputs = clipped, chosen, inputs  # type: ignore[method-assign]
            for handle in handles:
                handle.remove()

    def _with_canaries(self, clean: list[Tensor], present: np.ndarray) -> list[Tensor]:
        flat = torch.cat([t.reshape(-1) for t in clean])
        flat[torch.from_numpy(self.place[present]).to(flat.device)] += self.height
        pieces = flat.split([t.numel() for t in clean])
        return [piece.reshape(t.shape) for piece, t in zip(pieces, clean, strict=True)]


@dataclass(frozen=True)
class Released:
    """Residuals `[steps, numbers]`: released sums less clean ones, in clips; canaries are in them. NaN where nothing is released.

    `present [steps, m]` are canaries that were in, `patients` whose losses each step asked. `rounding [numbers]` is the deviation that
    single precision adds; `odd` are sentences on what does not fit, each of which fails a release.
    """

    residual: np.ndarray
    present: np.ndarray
    patients: list[list[bytes]]
    rounding: np.ndarray
    odd: list[str]


def release(setting: Setting, rounds: int, place: np.ndarray, inside: np.ndarray, height: float) -> Released:
    """Ask the setting's site for the first `rounds` rounds of the study, of all its local steps each."""
    site, study, odd = setting.site, setting.study, []
    if site is None:
        raise ValueError("an audit of what is released needs a site's folder; open_setting() gives one")
    watch, rows, counts = Watch(place, inside, height), [], study.training.local_steps
    present: list[Any] = []
    patients: list[Any] = []
    names = list(_trained(setting.model))
    n = site.known
    rounding: list[np.ndarray] = []
    with watch.on():

        def share(round_: int, weights: Sum, load: Any) -> Sum:
            watch.steps = []
            total = site.ask(setting, round_, weights, load)
            steps = watch.steps
            if len(steps) != counts:
                odd.append(f"a round formed {len(steps)} clipped sums for its {counts} steps")
                return total
            found, coarse = _decoded(setting, steps, total, weights, round_, n, odd)
            rows.extend(found)
            rounding.append(coarse)
            present.extend(s.present for s in steps)
            patients.extend(s.patients for s in steps)
            told = total[EVIDENCE]
            if study.privacy.evidence == "public" and not np.isin(told, (0.0, n)).all():
                odd.append(f"evidence is not the {n} patients that everyone knows of")
            if set(total) != {EVIDENCE, *names}:
                odd.append(f"{sorted(set(total) ^ {EVIDENCE, *names})[:3]} should not be, or be missing, in an answer")
            return total

        setting.train(share, rounds)
    width = sum(p.numel() for p in _trained(setting.model).values())
    residual = np.array(rows).reshape(-1, width) / study.privacy.clip
    coarse = np.max(rounding, axis=0) / study.privacy.clip if rounding else np.zeros(width)
    return Released(residual, np.array(present).reshape(-1, len(place)), patients, coarse, sorted(set(odd)))


def _decoded(
    setting: Setting, steps: list[Step], total: Sum, sent: Sum, round_: int, patients: int, odd: list[str]
) -> tuple[list[np.ndarray], np.ndarray]:
    """Residuals of a round's steps, and the deviation of rounding in each number."""
    study, model = setting.study, setting.model
    t, divisor = study.training, study.privacy.sample_rate * patients
    groups = optimizer_for(model, study, TRAIN, round_).param_groups
    blocks = model.blocks()
    rows: list[list[np.ndarray]] = [[] for _ in steps]
    coarse: list[np.ndarray] = []
    for name, group in zip(_trained(model), groups, strict=True):
        # the product keeps shapes; a flat row for each parameter
        start = sent[name].astype(np.float64)
        evidence = np.broadcast_to(blocks.spread(total[EVIDENCE], name, start.ndim), start.shape)
        released = total.get(name, np.zeros(start.shape)).astype(np.float64)
        shown = evidence > 0
        if (released[~shown] != 0).any():
            odd.append(f"'{name}' leaves where nobody is said to stand behind it")
        with np.errstate(divide="ignore", invalid="ignore"):
            end = start + np.where(shown, released / evidence, np.nan)
        rate, decay = float(group["lr"]), float(group["weight_decay"])
        if not rate:
            if (released != 0).any():
                odd.append(f"'{name}' moves at a rate of 0")
            shown = np.zeros_like(shown)
        adam = t.optimizer == "adam"
        if adam and not np.allclose(end[shown], steps[-1].after[name][shown], rtol=ROUNDING, atol=ROUNDING * rate):
            odd.append(f"'{name}' is not released where its last step left it")
        path = [start, *(s.weights[name] for s in steps[1:]), end]
        for s, step in enumerate(steps):
            if adam:
                gradient = (
                    step.gradient[name].reshape(start.shape) if step.gradient[name].size else np.zeros(start.shape)
                )
            else:
                gradient = -(path[s + 1] - path[s]) / (rate or np.nan) - decay * path[s]
            gradient = gradient - t.prox_mu * (path[s] - start)
            rows[s].append(np.where(shown, gradient * divisor - step.clean[name], np.nan).reshape(-1))
        unit = np.finfo(np.float32).eps * (np.abs(start) + np.abs(np.nan_to_num(end)))
        coarse.append((np.zeros_like(unit) if adam or not rate else unit * divisor / rate).reshape(-1))
    return [np.concatenate(row) for row in rows], np.concatenate(coarse)


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _numbers(value: Tensor) -> np.ndarray:
    return value.detach().double().cpu().numpy().copy()


def _names(batch: Batch) -> list[bytes]:
    """Each patient by what a model sees of her."""
    parts = [getattr(batch, f.name) for f in fields(batch)]
    tables = [t.detach().cpu().numpy().reshape(len(batch), -1) for t in parts if isinstance(t, Tensor)]
    slides = batch.bags.slides if batch.bags is not None else np.full(len(batch), "")
    return [b"".join(t[i].tobytes() for t in tables) + str(slides[i]).encode() for i in range(len(batch))]
