"""Small models of every kind and patients for them, in double precision, for tests of gradients by patient."""

from __future__ import annotations

from collections.abc import Callable

import torch
from oncofed.client.batch import Batch
from oncofed.client.objectives import objective_for
from oncofed.common.modalities import Beside
from oncofed.common.models.build import Predictor, Sizes, build_model
from oncofed.common.models.path_gptomic import PathGPTOmic
from oncofed.common.study import TRAIN, Study

CANCERS = ("BRCA", "LUAD", "STAD")
GENES, IMAGE, INTERVALS = 20, 7, 4
BESIDE = Beside(image_kind="vector", image_width=IMAGE, images="toy", alterations=tuple("abcdef"))

KINDS: dict[str, dict[str, object]] = {
    "gene_moe": {},
    "gene_moe, Weibull": {"task__loss": "weibull"},
    "gene_moe, discrete time": {"task__loss": "discrete_time"},
    "gene_moe, classes": {"task__kind": "classification", "task__class_prior": "none"},
    "gene_moe, focal": {"task__kind": "classification", "task__class_prior": "none", "task__class_loss": "focal"},
    "gene_moe, no experts": {"model__experts": 0, "model__attention_experts": 0},
    "gene_moe, dense dispatch": {"model__dispatch": "dense"},
    "gene_moe, adapters": {"training__first_layer": "adapters", "pretraining__rounds": 1},
    "gene_moe, frozen": {"training__start": "m", "training__encoder": "frozen"},
    "t_gem": {"model__name": "t_gem", "model__heads": 3},
    "t_gem, own norms, classes": {
        "model__name": "t_gem",
        "model__heads": 2,
        "model__shared_norm": False,
        "task__kind": "classification",
        "task__class_prior": "none",
    },
    "t_gem, linear": {"model__name": "t_gem", "model__layers": 0},
    "path_gptomic": {"model__name": "path_gptomic", "fusion__modalities": ("rna", "pathology", "alterations")},
    "path_gptomic, late": {"model__name": "path_gptomic", "fusion__kind": "late"},
    "path_gptomic, concat": {"model__name": "path_gptomic", "fusion__kind": "concat"},
}
"""Keys of the study by name: every model, and every loss that is a sum over patients."""


def study_of(kind: str, **keys: object) -> Study:
    """Without randomness, so that two passes can be held against each other."""
    base: dict[str, object] = {
        "model__size": "tiny",
        "model__gate_noise": False,
        "model__dropout": 0.0,
        "fusion__modality_dropout": 0.0,
        "fusion__modulation": "none",
        "training__balance": 0.1,
    }
    return Study().changed(**(base | KINDS.get(kind, {}) | keys))


def model_of(study: Study) -> Predictor:
    """In double precision, at weights that are nowhere near zero."""
    torch.manual_seed(1)
    model = build_model(study, Sizes(GENES, CANCERS, INTERVALS, 2, BESIDE)).double()
    for p in model.parameters():
        p.data.add_(0.2 * torch.randn_like(p))
    if isinstance(model, PathGPTOmic):
        model.in_step = True
    return model.train()  # type: ignore[return-value]


def patients(n: int = 9) -> Batch:
    """Some lack a modality, the first lacks none."""
    torch.manual_seed(2)
    f = torch.float64
    has = {m: torch.rand(n) < 0.6 for m in ("rna", "pathology", "alterations")}
    for there in has.values():
        there[0] = True
    has["rna"] |= ~has["pathology"]  # nobody lacks everything
    return Batch(
        x_BG=torch.randn(n, GENES, dtype=f),
        v_BV=torch.randn(n, 2, dtype=f),
        cancer_B=torch.arange(n) % 3,
        time_B=torch.rand(n, dtype=f) * 50 + 1,
        event_B=(torch.arange(n) % 2).to(f),
        exposure_BK=torch.rand(n, INTERVALS, dtype=f) * 5,
        interval_B=torch.randint(0, INTERVALS, (n,)),
        has=has,
        image_BP=torch.randn(n, IMAGE, dtype=f),
        alteration_BA=torch.randn(n, 6, dtype=f),
        width_BK=torch.full((n, INTERVALS), 6.0, dtype=f),
    )


def losses_of(model: Predictor, study: Study, batch: Batch) -> Callable[[torch.Tensor | None], torch.Tensor]:
    """The training losses of rows of a batch, balance of experts against an uneven load included."""
    objective = objective_for(study, TRAIN)
    load = {g: torch.linspace(0.5, 1.5, n, dtype=torch.float64) / n for g, n in model.mixtures().items()}

    def losses(rows: torch.Tensor | None = None) -> torch.Tensor:
        part = batch if rows is None else batch.select(rows)
        output = part.through(model)
        total = objective.training_losses(output, part)
        return total + study.training.balance * model.penalty(output, load) if output.logits else total

    return losses
