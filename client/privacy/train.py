"""A site's share of a round under patient-level differential privacy: DP-SGD over its own patients.

The steps are those of client/train.py with three differences: a patient's gradient is clipped and the sum covered by noise; a
step divides by a number that everyone may know; and what stands behind a block is public, or counted with noise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import torch
from oncofed.client.batch import CHUNK, Batch
from oncofed.client.objectives import objective_for
from oncofed.client.privacy.dp_sgd import PatientGradients, cover
from oncofed.client.privacy.evidence import public_count
from oncofed.client.privacy.separable import check_separable
from oncofed.client.train import optimizer_for
from oncofed.common.blocks import Sum, weigh
from oncofed.common.errors import Refusal
from oncofed.common.modalities import PATHOLOGY
from oncofed.common.models.autoencoder import GeneAutoencoder
from oncofed.common.models.build import Model, Predictor, get_weights, set_weights, trainable
from oncofed.common.models.path_gptomic import PathGPTOmic
from oncofed.common.noise import SecureNoise
from oncofed.common.scaling import REACH
from oncofed.common.study import TRAIN, Study
from torch import Tensor

LARGEST = 1e3
"""Weights of a private step are no larger: trained ones are far below."""

MADE_UP = 6
"""Patients of the probe for losses that couple them."""


def train_privately(
    model: Model,
    weights: Sum,
    batch: Batch,
    study: Study,
    *,
    round_: int,
    load: Mapping[str, np.ndarray],
    deviation: float,
    evidence: np.ndarray,
    patients: int = 0,
    noise: SecureNoise | None = None,
    probe: bool = True,
) -> Sum:
    """The training sum of a round: evidence, and its product with the change of every trained parameter.

    `deviation` is the noise of a step over the clip; `evidence [blocks]` as evidence.py gives it. A step divides by
    `patients`, a number that everyone may know; 0: those of the batch, rounded.
    `noise` is made anew when it is left out. Raises `Refusal` on a model or loss whose patients cannot be told apart.
    """
    assert not isinstance(model, GeneAutoencoder)
    noise = noise or SecureNoise()
    check_sent(model, weights, load)
    set_weights(model, weights)
    model.train()
    batch = bounded(batch)
    if isinstance(model, PathGPTOmic):
        model.in_step = True
    t, p = study.training, study.privacy
    patients = patients or public_count(len(batch))
    if probe:
        probe_losses(model, batch, study, load)
    optimizer = optimizer_for(model, study, TRAIN, round_)
    moving = trainable(model)
    start = {n: q.detach().clone() for n, q in model.named_parameters() if n in moving} if t.prox_mu else {}
    try:
        with PatientGradients.opened(model, p.clip) as gradients:
            for _ in range(t.local_steps):
                parts = step_parts(model, batch, study, load, noise)
                total = cover(gradients.clipped_sum(parts), clip=p.clip, deviation=deviation, noise=noise)
                for q, sum_ in zip(gradients.parameters, total, strict=True):
                    q.grad = sum_ / (p.sample_rate * patients)
                for name, at_start in start.items():
                    q = model.get_parameter(name)
                    assert q.grad is not None
                    q.grad += t.prox_mu * (q.detach() - at_start)
                optimizer.step()
                model.zero_grad(set_to_none=True)
    finally:
        if isinstance(model, PathGPTOmic):
            model.in_step = False
    after = get_weights(model)
    delta = {name: after[name] - weights[name] for name in after if name in moving}
    return weigh(delta, evidence, model.blocks())


def step_parts(
    model: Predictor, batch: Batch, study: Study, load: Mapping[str, np.ndarray], noise: SecureNoise
) -> list[Callable[[], Tensor]]:
    """The losses of a step's patients, a part of the batch each, when they are asked for; who is in it nobody can draw again."""
    losses_of, rate = losses_by_patient(model, study, load, noise.seed()), study.privacy.sample_rate
    rows = torch.arange(len(batch)) if rate == 1.0 else noise.chosen(len(batch), rate)
    return [_part(batch, piece, losses_of) for piece in rows.split(_at_once(study, batch)) if len(piece)]


def check_sent(model: Predictor, weights: Sum, load: Mapping[str, np.ndarray]) -> None:
    """Refuse weights and loads with which rounding would be as large as what it rounds: they come from a coordinator."""
    for name, value in weights.items():
        peak = float(np.abs(value).max(initial=0.0))
        if not peak <= LARGEST:
            raise Refusal(f"the weights '{name}' reach {peak:g}; a private step takes numbers up to {LARGEST:g}")
    for group, n in model.mixtures().items():
        share = np.asarray(load.get(group, np.full(n, np.nan)), dtype=np.float64)
        if share.shape != (n,) or not ((share >= 0).all() and share.sum() <= 1.0 + 1e-6):
            raise Refusal(f"the load of '{group}' is no {n} shares of one: {share.tolist()[:4]}")


def bounded(batch: Batch) -> Batch:
    """A batch whose numbers are finite and end at `REACH`, whatever scale the message brings; each patient by herself."""

    def cut(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.nan_to_num(0.0, REACH, -REACH).clamp(-REACH, REACH)

    x, v = cut(batch.x_BG), cut(batch.v_BV)
    assert x is not None
    assert v is not None
    return replace(batch, x_BG=x, v_BV=v, image_BP=cut(batch.image_BP), alteration_BA=cut(batch.alteration_BA))


def losses_by_patient(
    model: Predictor, study: Study, load: Mapping[str, np.ndarray], tiles: int | None = None
) -> Callable[[Batch], Tensor]:
    """The training loss of each patient of a batch `[B]`: the study's, and the balance of experts against a load held constant.

    Without dropout and gate noise: drawn row by row they would change for everybody when one patient comes or is left out, and
    the noise on the gradient does their work. `tiles` is a seed for the part of a slide that is seen, by slide.
    """
    objective = objective_for(study, TRAIN)
    device = next(model.parameters()).device
    load_t = {group: torch.tensor(value, dtype=torch.float32, device=device) for group, value in load.items()}

    def losses(batch: Batch) -> Tensor:
        seen = None if tiles is None else torch.Generator().manual_seed(tiles)
        output = model(batch.inputs(seen), None)
        losses_B = objective.training_losses(output, batch)
        if study.training.balance and output.logits:
            losses_B = losses_B + study.training.balance * model.penalty(output, load_t)
        return losses_B

    return losses


def probe_losses(model: Predictor, batch: Batch, study: Study, load: Mapping[str, np.ndarray]) -> None:
    """Refuse a loss that couples patients, on made-up ones: no one's data are looked at."""
    if batch.bags is None:
        made_up = _made_up(batch)
        losses_of = losses_by_patient(model, study, load)
        check_separable(lambda rows: losses_of(made_up.select(rows)), MADE_UP)


def _part(batch: Batch, piece: Tensor, losses_of: Callable[[Batch], Tensor]) -> Callable[[], Tensor]:
    """The losses of some rows of a batch, when they are asked for."""
    chosen = batch if len(piece) == len(batch) else batch.select(piece.to(batch.cancer_B.device))
    return lambda: losses_of(chosen)


def _at_once(study: Study, batch: Batch) -> int:
    """Patients of a part; of tiles, whose norms take the square of their number, a few."""
    return (
        min(study.privacy.chunk, CHUNK)
        if batch.bags is not None and PATHOLOGY in study.modalities
        else study.privacy.chunk
    )


def _made_up(batch: Batch) -> Batch:
    """Patients like those of a batch in shape alone."""
    n, device = MADE_UP, batch.cancer_B.device
    draw = torch.Generator(device=device).manual_seed(0)

    def normal(like: Tensor | None) -> Tensor | None:
        return (
            None if like is None else torch.randn(n, *like.shape[1:], generator=draw, device=device, dtype=like.dtype)
        )

    def even(like: Tensor) -> Tensor:
        return torch.rand(n, *like.shape[1:], generator=draw, device=device, dtype=like.dtype)

    on = torch.arange(n, device=device)
    x, v = normal(batch.x_BG), normal(batch.v_BV)
    assert x is not None
    assert v is not None
    return Batch(
        x_BG=x,
        v_BV=v,
        cancer_B=torch.zeros_like(on),
        time_B=1.0 + 20.0 * even(batch.time_B),
        event_B=(on % 2).to(batch.event_B.dtype),
        exposure_BK=even(batch.exposure_BK),
        interval_B=torch.zeros_like(on),
        has={m: torch.ones(n, dtype=torch.bool, device=device) for m in batch.has},
        image_BP=normal(batch.image_BP),
        alteration_BA=normal(batch.alteration_BA),
        width_BK=None if batch.width_BK is None else 1.0 + even(batch.width_BK),
    )
