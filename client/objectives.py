"""What a phase of a study minimises, and what it is measured by: survival, classification, reconstruction."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from oncofed.client.batch import Batch
from oncofed.common.blocks import Sum
from oncofed.common.class_metrics import class_sums
from oncofed.common.metrics import survival_sums
from oncofed.common.models.autoencoder import GeneAutoencoder, reconstruction_loss
from oncofed.common.models.build import Predictor
from oncofed.common.models.output import ModelOutput
from oncofed.common.sections import Task
from oncofed.common.study import PRETRAIN, Pretraining, Study
from oncofed.common.survival import cox_loss, discrete_time_loss, piecewise_exponential_loss, weibull_loss
from scipy.special import softmax
from torch import Tensor


class Objective(Protocol):
    """The loss of one step: `run` gives the model's output and the mean loss over a batch."""

    def run(self, model: Any, batch: Batch, generator: torch.Generator | None) -> tuple[ModelOutput, Tensor]: ...

    def training_losses(self, output: ModelOutput, batch: Batch) -> Tensor:
        """The loss of each patient `[B]`, a function of that patient alone; raises where the loss is no sum over patients."""
        ...

    def before_step(self, model: Any, batch: Batch, generator: torch.Generator) -> None:
        """What happens to other parameters before each step; nothing unless there is an adversary."""


def objective_for(study: Study, phase: str, log_prior: Tensor | None = None) -> Objective:
    """The objective of a phase; `log_prior [C]` as `class_log_prior` gives it."""
    if phase == PRETRAIN:
        return Reconstruction(study.pretraining)
    return Classification(study.task, log_prior) if study.task.kind == "classification" else measured_objective(study)


def class_log_prior(study: Study, here_C: Tensor, everywhere_C: Tensor) -> Tensor | None:
    """What training adds to class logits `[C]`, from the patients of each class at the site and in the federation.

    A site that lacks a class learns nothing of it from patients who are not of it: `mask` and `site` take it out of the
    softmax there (Li & Zhan 2021, restricted softmax), `site` and `federation` add strength * log share, so that the logits
    themselves favour no class by its size (Menon et al. 2021, eq. 10; by site Zhang et al. 2022).
    """
    task = study.task
    if task.kind != "classification" or task.class_prior == "none":
        return None
    count_C = (everywhere_C if task.class_prior == "federation" else here_C).float()
    log_share_C = (count_C.clamp(min=1.0) / count_C.sum().clamp(min=1.0)).log() * task.prior_strength
    if task.class_prior == "mask":
        log_share_C = torch.zeros_like(log_share_C)
    if task.class_prior in ("mask", "site"):
        log_share_C = log_share_C.masked_fill(here_C == 0, -torch.inf)
    # of a class that trains nowhere the softmax shall learn that nobody is of it
    return log_share_C.masked_fill((everywhere_C == 0) & (here_C == 0), 0.0)


def measured_objective(study: Study) -> Survival | Classification:
    """The objective of the supervised phase."""
    if study.task.kind == "classification":
        return Classification(study.task)
    late = study.multimodal and study.fusion.kind == "late"
    return LateSurvival(study.task.loss) if late else Survival(study.task.loss)


class Survival:
    """A likelihood of survival times, or Cox' partial likelihood (common/survival.py)."""

    hits = "concordant"
    """Which of its sums counts what the model got right."""

    def __init__(self, loss: str) -> None:
        self.loss = loss

    def run(self, model: Predictor, batch: Batch, generator: torch.Generator | None) -> tuple[ModelOutput, Tensor]:
        output = batch.through(model, generator)
        return output, self.loss_of(output, batch)

    def loss_of(self, output: ModelOutput, batch: Batch) -> Tensor:
        """The loss of a batch."""
        if self.loss == "cox":
            return cox_loss(output.risk, batch.time_B, batch.event_B, batch.cancer_B)
        return self.training_losses(output, batch).mean()

    def training_losses(self, output: ModelOutput, batch: Batch) -> Tensor:
        if self.loss == "cox":
            raise ValueError("Cox' partial likelihood is no sum over patients: risk sets couple them")
        return self.losses(output, batch)

    def before_step(self, model: Predictor, batch: Batch, generator: torch.Generator) -> None:
        pass

    def losses(self, output: ModelOutput, batch: Batch) -> Tensor:
        """Negative log-likelihood `[B]`; of a Cox model the piecewise-exponential one."""
        assert output.log_baseline is not None
        if self.loss == "weibull":
            return weibull_loss(output.risk, output.log_baseline, batch.time_B, batch.event_B)
        if self.loss == "discrete_time":
            assert batch.width_BK is not None
            return discrete_time_loss(output.risk, output.log_baseline, batch.width_BK, batch.interval_B, batch.event_B)
        return piecewise_exponential_loss(
            output.risk, output.log_baseline, batch.exposure_BK, batch.interval_B, batch.event_B
        )

    def sums(self, output: ModelOutput, losses: Tensor, batch: Batch, cancers: int) -> Sum:
        risk, time, event, loss = (_numpy(t) for t in (output.risk, batch.time_B, batch.event_B, losses))
        return survival_sums(risk, time, event, loss, _numpy(batch.cancer_B), cancers)


class LateSurvival(Survival):
    """Each modality learns by its own log hazard alone; only the prediction adds them up."""

    def loss_of(self, output: ModelOutput, batch: Batch) -> Tensor:
        """Of a likelihood the mean of `training_losses`; of Cox the mean over modalities, each with the patients who have it."""
        if self.loss != "cox":
            return self.training_losses(output, batch).mean()
        total = output.risk.new_zeros(())
        for modality, alone in self._alone(output).items():
            rows = torch.nonzero(output.present[modality]).squeeze(1)
            if len(rows):
                part = replace(batch, bags=None).select(rows)
                total = total + super().loss_of(replace(alone, score=alone.score[rows]), part) / len(output.branches)
        return total

    def training_losses(self, output: ModelOutput, batch: Batch) -> Tensor:
        """The mean of a patient's losses by each of the modalities that she has `[B]`."""
        present_MB = torch.stack([output.present[m] for m in output.branches])
        losses_MB = torch.stack(
            [super(LateSurvival, self).training_losses(o, batch) for o in self._alone(output).values()]
        )
        return (losses_MB * present_MB).sum(0) / present_MB.sum(0).clamp(min=1.0)

    def _alone(self, output: ModelOutput) -> dict[str, ModelOutput]:
        """The output as if each modality were the only one."""
        covariates_B = output.risk - torch.stack(list(output.branches.values())).sum(0)
        return {m: replace(output, score=risk_B + covariates_B) for m, risk_B in output.branches.items()}


class Classification:
    """Cross-entropy or focal loss of the class; training may add the log shares of classes to the logits."""

    hits = "confusion"

    def __init__(self, task: Task, log_prior: Tensor | None = None) -> None:
        """`log_prior [C]` is what training adds to the logits: -inf takes a class out."""
        self.task, self.log_prior = task, log_prior

    def run(self, model: Predictor, batch: Batch, generator: torch.Generator | None) -> tuple[ModelOutput, Tensor]:
        output = batch.through(model, generator)
        return output, self.training_losses(output, batch).mean()

    def training_losses(self, output: ModelOutput, batch: Batch) -> Tensor:
        logits = output.score if self.log_prior is None else output.score + self.log_prior
        loss_B = F.cross_entropy(logits, batch.cancer_B, reduction="none")
        if (
            self.task.class_loss == "focal"
        ):  # (1 - p)^gamma of the probability p of the true class (Lin et al. 2017, eq. 4)
            loss_B = (-torch.expm1(-loss_B)).clamp(min=1e-8).pow(self.task.focal_gamma) * loss_B
        return loss_B

    def before_step(self, model: Predictor, batch: Batch, generator: torch.Generator) -> None:
        pass

    def losses(self, output: ModelOutput, batch: Batch) -> Tensor:
        """Cross-entropy `[B]` of the logits as they are: of patients from anywhere."""
        return F.cross_entropy(output.score, batch.cancer_B, reduction="none")

    def sums(self, output: ModelOutput, losses: Tensor, batch: Batch, cancers: int) -> Sum:
        return class_sums(_numpy(batch.cancer_B), softmax(_numpy(output.score), axis=1), _numpy(losses))


class Reconstruction:
    """Variational reconstruction of expression and, with a critic, its adversary (WGAN-GP)."""

    def __init__(self, settings: Pretraining) -> None:
        self.settings = settings
        self.optimizer: torch.optim.Optimizer | None = None

    def run(
        self, model: GeneAutoencoder, batch: Batch, generator: torch.Generator | None
    ) -> tuple[ModelOutput, Tensor]:
        output = model(batch.x_BG, batch.cancer_B, generator)
        loss_B = self.training_losses(output, batch)
        if model.critic is not None:
            loss_B = loss_B - self.settings.critic_weight * model.critic(output.score)
        return output, loss_B.mean()

    def training_losses(self, output: ModelOutput, batch: Batch) -> Tensor:
        return reconstruction_loss(output, batch.x_BG, self.settings.kl)[0]

    def before_step(self, model: GeneAutoencoder, batch: Batch, generator: torch.Generator) -> None:
        """The critic's steps; the reconstruction is detached, so nothing reaches the encoder (gene_moe.md, defect 16)."""
        if model.critic is None:
            return
        s = self.settings
        if self.optimizer is None:
            self.optimizer = torch.optim.Adam(model.critic.parameters(), lr=s.learning_rate, betas=(0.0, 0.9))
        for _ in range(s.critic_steps):
            with torch.no_grad():
                fake = model(batch.x_BG, batch.cancer_B, generator).score
            penalty = model.critic.gradient_penalty(batch.x_BG, fake, generator)
            loss = (model.critic(fake) - model.critic(batch.x_BG) + s.gradient_penalty * penalty).mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()


def _numpy(t: Tensor) -> np.ndarray:
    array = t.detach().cpu().numpy()
    return array.astype(np.float64) if array.dtype.kind == "f" else array
