"""A batch: a site's patients as tensors on the training device.

Shapes: B patients, G genes, V covariate inputs, K intervals of the time grid.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from oncofed.client.data.cohort import Cohort
from oncofed.common.models.gene_moe import GeneMOE, Off
from oncofed.common.models.output import ModelOutput
from oncofed.common.scaling import Scaling, groups
from oncofed.common.survival import TimeGrid
from torch import Tensor


@dataclass(frozen=True)
class Lens:
    """How the federation looks at patients: the scale of genes and of covariates (mean and deviation `[V]`), and the time grid."""

    genes: Scaling
    covariates: tuple[np.ndarray, np.ndarray]
    grid: TimeGrid

    @property
    def by_cancer(self) -> bool:
        return len(self.genes.mean) > 1

    def gene_inputs(self, cohort: Cohort) -> np.ndarray:
        """Scaled expression `[N, G]`, each patient on the scale of its own group."""
        return self.genes.apply(cohort.x_NG, groups(cohort.cancer, self.by_cancer))

    def covariate_inputs(self, v_NV: np.ndarray) -> np.ndarray:
        """Standardised covariates; an unknown one becomes the mean, 0."""
        mean, sd = self.covariates
        return np.nan_to_num((v_NV - mean) / sd, nan=0.0)


@dataclass(frozen=True)
class Batch:
    """Tensors of B patients; without outcomes the last four are zeros."""

    x_BG: Tensor
    v_BV: Tensor
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
    def of(cls, cohort: Cohort, lens: Lens, device: torch.device) -> Batch:
        """Scale a cohort and lay its follow-up over the time grid."""
        return cls(
            x_BG=_tensor(lens.gene_inputs(cohort), device),
            v_BV=_tensor(lens.covariate_inputs(cohort.v_NV), device),
            cancer_B=_tensor(cohort.cancer, device),
            time_B=_tensor(cohort.time, device),
            event_B=_tensor(cohort.event.astype(np.float32), device),
            exposure_BK=_tensor(lens.grid.exposure(cohort.time), device),
            interval_B=_tensor(lens.grid.interval(cohort.time), device),
        )

    def through(self, model: GeneMOE, generator: torch.Generator | None = None, off: Off | None = None) -> ModelOutput:
        """The model's output for these patients."""
        return model(self.x_BG, self.cancer_B, self.v_BV, generator, off)


def _tensor(array: np.ndarray, device: torch.device) -> Tensor:
    """A tensor on `device`; floats become float32, integers int64."""
    kind = torch.float32 if np.issubdtype(array.dtype, np.floating) else torch.int64
    # memory-mapped arrays are read-only, and torch must own what it may write to
    return torch.from_numpy(np.require(array, requirements=["C", "W"])).to(device=device, dtype=kind)
