"""The local training loop: a site's patients, the round's weights, a few optimiser steps, one sum."""

from __future__ import annotations

import math

import numpy as np
import torch
from oncofed.client.batch import Batch
from oncofed.client.modulation import Modulation
from oncofed.client.objectives import class_log_prior, objective_for
from oncofed.common.blocks import Blocks, Sum, weigh
from oncofed.common.errors import Refusal
from oncofed.common.models.build import Model, get_weights, set_weights, trainable
from oncofed.common.models.gene_moe import cancer_blocks
from oncofed.common.models.heads import class_blocks
from oncofed.common.models.output import ModelOutput
from oncofed.common.models.path_gptomic import PathGPTOmic
from oncofed.common.modulation import BRANCHES
from oncofed.common.rates import learning_rate, modality_by_parameter, rates_of
from oncofed.common.study import PRETRAIN, TRAIN, Study
from torch import Tensor


def train_locally(
    model: Model,
    weights: Sum,
    batch: Batch,
    study: Study,
    *,
    round_: int,
    seed: int,
    load: dict[str, np.ndarray],
    branches: np.ndarray | None = None,
    classes: np.ndarray | None = None,
    phase: str = TRAIN,
) -> tuple[Sum, float]:
    """One site's share of a round of a phase: its local steps from `weights`.

    Returns the training sum (evidence and evidence-weighted change, block by block) and the mean loss over the steps.
    `load` is the federation's share of each expert in the round before, by mixture, `branches` what all sites saw of the
    modalities then (common/modulation.py); both are constant within the round. `classes` are the federation's training
    patients by class, in a classification.
    """
    t, device = study.steps(phase), batch.x_BG.device
    here_C = torch.bincount(batch.cancer_B, minlength=len(model.cancers))
    everywhere_C = here_C if classes is None else torch.tensor(classes, device=device)
    log_prior_C = class_log_prior(study, here_C, everywhere_C)
    objective = objective_for(study, phase, log_prior_C)
    # a class that the site's softmax leaves out has no evidence there
    learned_C = torch.ones_like(here_C) if log_prior_C is None else torch.isfinite(log_prior_C)
    set_weights(model, weights)
    model.train()
    moving = trainable(model)
    start = {n: p.detach().clone() for n, p in model.named_parameters() if n in moving} if t.prox_mu else {}
    blocks = model.blocks()
    load_t = {group: torch.tensor(value, dtype=torch.float32, device=device) for group, value in load.items()}
    generator = torch.Generator(device=device).manual_seed(seed)
    optimizer = optimizer_for(model, study, phase, round_)
    modulation = None
    if isinstance(model, PathGPTOmic) and model.additive:
        modulation = Modulation(study, optimizer, branches, model.modalities)
    size = min(t.batch_size or len(batch), len(batch))
    losses: list[Tensor] = []
    shares: dict[str, Tensor] = {}
    for rows in _batches(len(batch), size, t.local_steps, generator):
        part = batch if rows is None else batch.select(rows)
        objective.before_step(model, part, generator)
        output, loss = objective.run(model, part, generator)
        losses.append(loss.detach())
        if t.balance and output.logits:
            loss = loss + t.balance * model.penalty(output, load_t).mean()
        for name, at_start in start.items():
            loss = loss + 0.5 * t.prox_mu * (model.get_parameter(name) - at_start).square().sum()
        optimizer.zero_grad(set_to_none=False)
        loss.backward()
        used = shares_of(model, output, part) | _by_class(model, learned_C * len(part))
        if modulation is not None:
            assert isinstance(model, PathGPTOmic)
            modulation.step(model, output, part)
        # Clip before blocks are rescaled: afterwards experts hold most of the norm and would starve the trunk.
        if t.clip_norm:
            torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], t.clip_norm)
        if t.optimizer == "sgd" and study.aggregation.rule == "evidence":
            _average_within_blocks(model, blocks, used, len(part))
        if isinstance(model, PathGPTOmic):
            _leave_absent(model, used)
        optimizer.step()
        shares = {block: shares.get(block, torch.zeros((), device=device)) + value for block, value in used.items()}
    mean_loss = float(torch.stack(losses).mean())
    if not math.isfinite(mean_loss):
        raise Refusal(
            f"{phase}ing diverged in round {round_} (loss {mean_loss}); lower {phase}ing.learning_rate or set {phase}ing.clip_norm"
        )
    after = get_weights(model)
    delta = {name: after[name] - weights[name] for name in after if name in moving}
    evidence = _evidence(study, blocks, shares, patients=len(batch), seen=size * t.local_steps)
    total = weigh(delta, evidence, blocks)
    return total if modulation is None else total | {BRANCHES: modulation.table}, mean_loss


def optimizer_for(model: Model, study: Study, phase: str, round_: int) -> torch.optim.Optimizer:
    """The study's local optimiser, anew each round, with a rate and weight decay for every parameter."""
    t, by_name = study.steps(phase), dict(model.named_parameters())
    groups = [
        {"params": [by_name[name]], "lr": r.learning_rate, "weight_decay": r.decay, "modality": r.modality}
        for name, r in rates_of(modality_by_parameter(model), study, phase, round_).items()
    ]
    rate = learning_rate(study, phase, round_)
    if t.optimizer == "adam":
        betas = (0.5, 0.9) if phase == PRETRAIN and study.pretraining.critic else (0.9, 0.999)
        return torch.optim.AdamW(groups, lr=rate, betas=betas)
    return torch.optim.SGD(groups, lr=rate)


def _batches(n: int, size: int, steps: int, generator: torch.Generator) -> list[Tensor | None]:
    """Rows of each step, epoch by epoch in a drawn order; None for the whole cohort, unshuffled, so sums stay exact."""
    if size >= n:
        return [None] * steps
    epochs = -(-steps * size // n)
    order = torch.cat([torch.randperm(n, generator=generator, device=generator.device) for _ in range(epochs)])
    return list(order[: steps * size].split(size))


def shares_of(model: Model, output: ModelOutput, batch: Batch) -> dict[str, Tensor]:
    """How many patients of the batch stand behind each block: gate mass of experts, patients of a cancer type or with a
    modality, all."""
    n = len(model.cancers)
    counts = torch.bincount(batch.cancer_B, minlength=n).float()
    used = dict(zip(cancer_blocks(model.cancers), counts, strict=True))
    for modality, there_B in output.present.items():
        by_cancer = torch.bincount(batch.cancer_B, weights=there_B, minlength=n)
        used |= dict(zip(cancer_blocks(model.cancers, modality), by_cancer, strict=True)) | {modality: there_B.sum()}
    for group, share_BE in output.shares.items():
        mass = share_BE.detach().sum(0)
        used |= {f"{group}/{e}": mass[e] for e in range(len(mass))}
    return used | {"trunk": torch.tensor(float(len(batch)), device=counts.device)}


def _by_class(model: Model, patients_C: Tensor) -> dict[str, Tensor]:
    """The patients who stand behind each class's row of a head."""
    return dict(zip(class_blocks(model.cancers), patients_C.float(), strict=True))


def _leave_absent(model: PathGPTOmic, used: dict[str, Tensor]) -> None:
    """Drop the gradients of modalities that nobody in the batch has: weight decay must not move their encoders either."""
    absent = [m for m in model.modalities if not used[m]]
    for name, p in model.named_parameters() if absent else ():
        if model.modality_of(name) in absent:
            p.grad = None


def _average_within_blocks(model: Model, blocks: Blocks, used: dict[str, Tensor], patients: int) -> None:
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
