"""Small multimodal cohorts and models for tests."""

from __future__ import annotations

import numpy as np
import torch
from oncofed.client.batch import Batch
from oncofed.common.modalities import ALTERATIONS, MODALITIES, PATHOLOGY, RNA, Beside
from oncofed.common.models.build import Sizes, build_model
from oncofed.common.models.path_gptomic import PathGPTOmic
from oncofed.common.study import Study
from oncofed.common.survival import TimeGrid

CANCERS = ("BRCA", "LUAD", "STAD")
GRID = TimeGrid((0.0, 6.0, 15.0))
GENES, IMAGES, ALTERED, TILE = 12, 7, 5, 6
VECTORS = Beside(image_kind="vector", image_width=IMAGES, images="vectors", alterations=("a", "b", "c", "d", "e"))
BAGS = Beside(image_kind="bag", image_width=TILE, images="bags")


def study(**keys: object) -> Study:
    """No noise and no decay unless a test asks for it."""
    base: dict[str, object] = {
        "model__name": "path_gptomic",
        "model__size": "tiny",
        "model__dropout": 0.0,
        "model__gate_noise": False,
        "model__first_layer_scale": 1.0,
        "fusion__modality_dropout": 0.0,
        "fusion__modulation": "none",
        "training__batch_size": 0,
        "training__local_steps": 1,
        "training__balance": 0.0,
        "training__clip_norm": 0.0,
        "training__weight_decay": 0.0,
        "training__learning_rate": 0.05,
    }
    return Study().changed(**(base | keys))


def build(s: Study, beside: Beside = VECTORS, covariates: int = 0) -> PathGPTOmic:
    model = build_model(s, Sizes(GENES, CANCERS, len(GRID), covariates, beside))
    assert isinstance(model, PathGPTOmic)
    return model


def batch(n: int = 20, seed: int = 0, lacks: dict[str, slice] | None = None, covariates: int = 0) -> Batch:
    """Patients who have every modality, but for the rows that `lacks` names."""
    rng = np.random.default_rng(seed)

    def normal(width: int) -> torch.Tensor:
        return torch.from_numpy(rng.normal(size=(n, width)).astype(np.float32))

    table = {RNA: normal(GENES), PATHOLOGY: normal(IMAGES), ALTERATIONS: normal(ALTERED)}
    has = {m: torch.ones(n, dtype=torch.bool) for m in MODALITIES}
    for modality, rows in (lacks or {}).items():
        has[modality][rows] = False
        table[modality][rows] = 0.0
    time = rng.uniform(1, 40, n)
    return Batch(
        x_BG=table[RNA],
        v_BV=normal(covariates),
        cancer_B=torch.from_numpy(rng.integers(0, 3, n)),
        time_B=torch.from_numpy(time.astype(np.float32)),
        event_B=torch.from_numpy((rng.random(n) < 0.6).astype(np.float32)),
        exposure_BK=torch.from_numpy(GRID.exposure(time).astype(np.float32)),
        interval_B=torch.from_numpy(GRID.interval(time)),
        has=has,
        image_BP=table[PATHOLOGY],
        alteration_BA=table[ALTERATIONS],
    )
