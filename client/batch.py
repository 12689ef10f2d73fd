"""A batch: a site's patients as tensors on the training device.

Shapes: B patients, G genes, V covariate inputs, P image features, A alterations, K intervals of the time grid.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from oncofed.client.bags import Bags
from oncofed.client.data.cohort import Cohort
from oncofed.common.modalities import ALTERATIONS, MODALITIES, PATHOLOGY, RNA
from oncofed.common.models.build import Predictor
from oncofed.common.models.gene_moe import Off
from oncofed.common.models.inputs import Inputs
from oncofed.common.models.output import ModelOutput, stack_outputs
from oncofed.common.scaling import Scaling, groups
from oncofed.common.survival import TimeGrid
from torch import Tensor

CHUNK = 8
"""Patients whose whole slides are held at once when they are scored."""


@dataclass(frozen=True)
class Lens:
    """How the federation looks at patients: the scale of each table of numbers by modality, of covariates, and the time grid.

    Covariates have mean and deviation `[V]`. Tiles of `tile_width` numbers have no scale, they are normalised one by one;
    a training step sees at most `most_tiles` of a patient. A `ranked` expression is in ranks already.
    """

    scales: Mapping[str, Scaling]
    covariates: tuple[np.ndarray, np.ndarray]
    grid: TimeGrid
    tile_width: int = 0
    most_tiles: int = 0
    ranked: bool = False

    def inputs(self, cohort: Cohort, modality: str) -> np.ndarray:
        """Scaled numbers `[N, *]` of a modality's table, each patient on the scale of its own group."""
        if self.ranked and modality == RNA:
            return np.nan_to_num(cohort.x_NG)
        scale = self.scales[modality]
        return scale.apply(cohort.table(modality), groups(cohort.cancer, len(scale.mean) > 1))

    def covariate_inputs(self, v_NV: np.ndarray) -> np.ndarray:
        """Standardised covariates; an unknown one becomes the mean, 0."""
        mean, sd = self.covariates
        return np.nan_to_num((v_NV - mean) / sd, nan=0.0)


@dataclass(frozen=True)
class Batch:
    """Tensors of B patients; without outcomes the four before the modalities are zeros. `width_BK` are months of intervals."""

    x_BG: Tensor
    v_BV: Tensor
    cancer_B: Tensor
    time_B: Tensor
    event_B: Tensor
    exposure_BK: Tensor
    interval_B: Tensor
    has: dict[str, Tensor] = field(default_factory=dict)
    image_BP: Tensor | None = None
    alteration_BA: Tensor | None = None
    bags: Bags | None = None
    width_BK: Tensor | None = None

    def __len__(self) -> int:
        return len(self.cancer_B)

    def select(self, rows: Tensor) -> Batch:
        return Batch(**{f.name: _rows(getattr(self, f.name), rows) for f in fields(self)})

    @classmethod
    def of(cls, cohort: Cohort, lens: Lens, device: torch.device) -> Batch:
        """Scale a cohort and lay its follow-up over the time grid."""
        table = {m: _tensor(lens.inputs(cohort, m), device) for m in lens.scales}
        return cls(
            x_BG=table.get(RNA, torch.zeros(len(cohort), 0, device=device)),
            v_BV=_tensor(lens.covariate_inputs(cohort.v_NV), device),
            cancer_B=_tensor(cohort.cancer, device),
            time_B=_tensor(cohort.time, device),
            event_B=_tensor(cohort.event.astype(np.float32), device),
            exposure_BK=_tensor(lens.grid.exposure(cohort.time), device),
            interval_B=_tensor(lens.grid.interval(cohort.time), device),
            has={m: torch.from_numpy(cohort.has(m)).to(device) for m in MODALITIES},
            image_BP=table.get(PATHOLOGY),
            alteration_BA=table.get(ALTERATIONS),
            width_BK=_tensor(np.tile(lens.grid.widths, (len(cohort), 1)), device),
            bags=Bags(cohort.slides, lens.tile_width, lens.most_tiles, device) if lens.tile_width else None,
        )

    def inputs(self, generator: torch.Generator | None = None) -> Inputs:
        """What a model sees of these patients; tiles are read now, in training a part of them."""
        tiles, owner = self.bags.load(generator) if self.bags is not None else (None, None)
        return Inputs(self.x_BG, self.cancer_B, self.v_BV, self.has, self.image_BP, tiles, owner, self.alteration_BA)

    def through(
        self, model: Predictor, generator: torch.Generator | None = None, off: Off | None = None
    ) -> ModelOutput:
        """The model's output for these patients; whole slides are taken a few patients at a time."""
        if self.bags is None or generator is not None or len(self) <= CHUNK:
            return model(self.inputs(generator), generator, off)
        parts = [self.select(rows) for rows in torch.arange(len(self), device=self.cancer_B.device).split(CHUNK)]
        return stack_outputs([model(part.inputs(), None, off) for part in parts])


def _rows(value: Any, rows: Tensor) -> Any:
    if isinstance(value, dict):
        return {key: tensor[rows] for key, tensor in value.items()}
    if isinstance(value, Bags):
        return value.select(rows)
    return value[rows] if isinstance(value, Tensor) else value


def _tensor(array: np.ndarray, device: torch.device) -> Tensor:
    """A tensor on `device`; floats become float32, integers int64."""
    kind = torch.float32 if np.issubdtype(array.dtype, np.floating) else torch.int64
    # memory-mapped arrays are read-only, and torch must own what it may write to
    return torch.from_numpy(np.require(array, requirements=["C", "W"])).to(device=device, dtype=kind)
