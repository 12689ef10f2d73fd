"""The local training loop: a site's patients, the round's weights, a few optimiser steps, one sum."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from oncofed.client.data.cohort import Cohort
from oncofed.common.blocks import Blocks, Sum, weigh
from oncofed.common.errors import Refusal
from oncofed.common.models.build import get_weights, set_weights
from oncofed.common.models.gene_moe import GeneMOE
from oncofed.common.models.output import ModelOutput
from oncofed.common.study import Study
from oncofed.common.survival import TimeGrid, cox_loss, piecewise_exponential_loss
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Tensors of B patients on the training device."""

    x_BG: Tensor
    cancer_B: Tensor
    time_B: Tensor
    event_B: Tensor
    exposure_BK: Tensor
    interval_B: Tensor

    def __len__(self) -> int:
        return len(self.cancer_B)

    def select(self, rows: Tensor) -> Batch:
        return Batch(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))

    @classmethod
    def of(cls, cohort: Cohort, mean_G: np.ndarray, sd_G: np.ndarray, grid: TimeGrid, device: torch.device) -> Batch:
        """Standardise a cohort and lay its follow-up over the time grid."""
        return cls(
            x_BG=_tensor(cohort.standardised(mean_G, sd_G), device),
            cancer_B=_tensor(cohort.cancer, device),
            time_B=_tensor(cohort.time, device),
            event_B=_tensor(cohort.event.astype(np.float32), device),
            exposure_BK=_tensor(grid.exposure(cohort.time), device),
            interval_B=_tensor(grid.interval(cohort.time), device),
        )


def patient_losses(model: GeneMOE, output: ModelOutput, batch: Batch) -> Tensor:
    """Piecewise-exponential negative log-likelihood `[B]`."""
    return piecewise_exponential_loss(
        output.risk, model.log_baseline, batch.exposure_BK, batch.interval_B, batch.event_B, batch.cancer_B
    )


def batch_loss(study: Study, model: GeneMOE, output: ModelOutput, batch: Batch) -> Tensor:
    """The task's mean loss over a batch."""
    if study.task.loss == "cox":
        return cox_loss(output.risk, batch.time_B, batch.event_B, batch.cancer_B)
    return patient_losses(model, output, batch).mean()


def train_locally(
    model: GeneMOE,
    weights: Sum,
    batch: Batch,
    study: Study,
    *,
    round_: int,
    seed: int,
    load: dict[str, np.ndarray],
) -> tuple[Sum, float]:
    """One site's share of a round: `study.training.local_steps` steps from `weights`.

    Returns the training sum (evidence and evidence-weighted change, block by block) and the mean loss over the steps.
    `load` is the federation's share of each expert in the round before, by mixture; it is constant within the round.
    """
    t, device = study.training, batch.x_BG.device
    set_weights(model, weights)
    model.train()
    start = {name: p.detach().clone() for name, p in model.named_parameters()} if t.prox_mu else {}
    blocks = model.blocks()
    load_t = {group: torch.tensor(value, dtype=torch.float32, device=device) for group, value in load.items()}
    generator = torch.Generator(device=device).manual_seed(seed)
    optimizer = _optimizer(model, study, round_)
    size = min(t.batch_size or len(batch), len(batch))
    losses: list[Tensor] = []
    shares: dict[str, Tensor] = {}
    for rows in _batches(len(batch), size, t.local_steps, generator):
        part = batch if rows is None else batch.select(rows)
        output = model(part.x_BG, part.cancer_B, generator)
        loss = batch_loss(study, model, output, part)
        losses.append(loss.detach())
        if t.balance and output.logits:
            loss = loss + t.balance * model.penalty(output, load_t).mean()
        for name, p in model.named_parameters() if t.prox_mu else ():
            loss = loss + 0.5 * t.prox_mu * (p - start[name]).square().sum()
        optimizer.zero_grad(set_to_none=False)
        loss.backward()
        used = _shares(model, output, part)
        # Clip before blocks are rescaled: afterwards experts hold most of the norm and would starve the trunk.
        if t.clip_norm:
            torch.nn.utils.clip_grad_norm_(model.parameters(), t.clip_norm)
        if t.optimizer == "sgd" and study.aggregation.rule == "evidence":
            _average_within_blocks(model, blocks, used, len(part))
        optimizer.step()
        shares = {block: shares.get(block, torch.zeros((), device=device)) + value for block, value in used.items()}
    mean_loss = float(torch.stack(losses).mean())
    if not math.isfinite(mean_loss):
        raise Refusal(
            f"training diverged in round {round_} (loss {mean_loss}); lower training.learning_rate or set training.clip_norm"
        )
    after = get_weights(model)
    delta = {name: after[name] - weights[name] for name in after}
    evidence = _evidence(study, blocks, shares, patients=len(batch), seen=size * t.local_steps)
    return weigh(delta, evidence, blocks), mean_loss


def learning_rate(study: Study, round_: int) -> float:
    """The local rate in round 1, 2, ..., `training.rounds`."""
    t = study.training
    if t.schedule == "constant":
        return t.learning_rate
    return t.learning_rate * 0.5 * (1.0 + math.cos(math.pi * (round_ - 1) / t.rounds))


def _optimizer(model: GeneMOE, study: Study, round_: int) -> torch.optim.Optimizer:
    """Weight decay spares the baselines: they are hazards of a cancer, to be estimated and not shrunk to exp(0)."""
    t, rate = study.training, learning_rate(study, round_)
    groups = [
        {"params": [p for n, p in model.named_parameters() if n != "log_baseline"], "weight_decay": t.weight_decay},
        {"params": [model.log_baseline], "weight_decay": 0.0},
    ]
    if t.optimizer == "adam":
        return torch.optim.AdamW(groups, lr=rate)
    return torch.optim.SGD(groups, lr=rate)


def _batches(n: int, size: int, steps: int, generator: torch.Generator) -> list[Tensor | None]:
    """Rows of each step, epoch by epoch in a drawn order; None for the whole cohort, unshuffled, so sums stay exact."""
    if size >= n:
        return [None] * steps
    epochs = -(-steps * size // n)
    order = torch.cat([torch.randperm(n, generator=generator, device=generator.device) for _ in range(epochs)])
    return list(order[: steps * size].split(size))


def _shares(model: GeneMOE, output: ModelOutput, batch: Batch) -> dict[str, Tensor]:
    """How many patients of the batch stand behind each block: gate mass of experts, patients of a cancer type, all."""
    counts = torch.bincount(batch.cancer_B, minlength=len(model.cancers)).float()
    used = {f"cancer/{c}": counts[i] for i, c in enumerate(model.cancers)}
    for group, share_BE in output.shares.items():
        mass = share_BE.detach().sum(0)
        used |= {f"{group}/{e}": mass[e] for e in range(len(mass))}
    return used | {"trunk": torch.tensor(float(len(batch)), device=counts.device)}


def _average_within_blocks(model: GeneMOE, blocks: Blocks, used: dict[str, Tensor], patients: int) -> None:
    """Turn gradients of the batch mean into means over the patients behind each block.

    Evidence then multiplies back exactly what was divided: sum_i n_ib * (G_ib / n_ib) / sum_i n_ib is the pooled mean
    gradient of block b, so full-batch SGD by evidence has the pooled optimum as its fixed point, whatever the sites'
    case mix (a test says so). Adam's steps have no scale to correct, and FedAvg weighs by patients, so both go without.
    A block with less than one patient's worth in the batch counts as one: a stray patient is no mean.
    """
    for name, p in model.named_parameters():
        if p.grad is None:
            continue
        owner = blocks.owners[name]
        if isinstance(owner, str):
            p.grad.mul_(patients / used[owner].clamp(min=1.0))
            continue
        mass = torch.stack([used[block] for block in owner])
        factor = patients / mass.clamp(min=1.0)
        p.grad.mul_(factor.reshape(-1, *([1] * (p.grad.ndim - 1))))


def _evidence(study: Study, blocks: Blocks, shares: dict[str, Tensor], *, patients: int, seen: int) -> np.ndarray:
    """Patients behind each block over the round, scaled from the patients seen in its steps to the site's patients."""
    if study.aggregation.rule == "fedavg":
        return blocks.vector(dict.fromkeys(blocks.names, float(patients)))
    return blocks.vector({name: float(shares[name]) * patients / seen for name in blocks.names})


def _tensor(array: np.ndarray, device: torch.device) -> Tensor:
    """A tensor on `device`; floats become float32, integers int64."""
    kind = torch.float32 if np.issubdtype(array.dtype, np.floating) else torch.int64
    # memory-mapped arrays are read-only, and torch must own what it may write to
    return torch.from_numpy(np.require(array, requirements=["C", "W"])).to(device=device, dtype=kind)
