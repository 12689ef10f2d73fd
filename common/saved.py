"""A saved model: everything that is needed to use it, in one safetensors file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from oncofed.common.blocks import Sum, part
from oncofed.common.modalities import Beside
from oncofed.common.panel import GenePanel
from oncofed.common.scaling import Scaling
from oncofed.common.splits import ALL_PATIENTS
from oncofed.common.study import Study
from oncofed.common.survival import TimeGrid
from oncofed.common.tables import scale_prefix, table_widths
from safetensors import SafetensorError, safe_open


def model_file(fold: int) -> str:
    """The file name of a fold's model, or of the refit's."""
    return "model.safetensors" if fold == ALL_PATIENTS else f"model-fold-{fold}.safetensors"


def load_arrays(path: Path) -> tuple[Sum, dict[str, Any]]:
    """Arrays and JSON description of a safetensors file as `server.checkpoint.save_arrays` writes it.

    Raises `ValueError` where they are not what was written; a file without a digest is taken as it is.
    """
    with safe_open(path, framework="numpy") as file:
        arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
        metadata = file.metadata() or {}
    wanted = metadata.get("sha256")
    if wanted and wanted != digest(arrays, metadata["about"]):
        raise ValueError(
            f"{path}: its contents do not have the SHA-256 that they were written with; the file is damaged"
        )
    return arrays, json.loads(metadata["about"])


def digest(arrays: Mapping[str, np.ndarray], about: str) -> str:
    """SHA-256 over a description and the names, types, shapes and bytes of arrays."""
    whole = hashlib.sha256(about.encode())
    for name in sorted(arrays):
        value = np.ascontiguousarray(arrays[name])
        whole.update(f"{name} {value.dtype.str} {arrays[name].shape} ".encode())
        whole.update(value.reshape(-1).view(np.uint8).data if value.size else b"")
    return whole.hexdigest()


@dataclass(frozen=True)
class SavedModel:
    """Weights, scales, panel, cancer types, time grid, study, and what its training patients looked like to it.

    `explanation` holds sums by cancer type: `risk_counts`, `log_baseline`, `attribution/*`, `gate/*` (client/explain.py).
    `unit_family` is empty in files that do not say it.
    """

    study: Study
    panel: GenePanel
    cancers: tuple[str, ...]
    grid: TimeGrid
    fold: int
    unit_family: str
    scales: dict[str, Scaling]
    beside: Beside
    covariates: tuple[np.ndarray, np.ndarray]
    weights: Sum
    explanation: Sum

    @classmethod
    def read(cls, path: Path) -> SavedModel:
        """Raises `ValueError` with the remedy where the file is absent, broken or something else."""
        try:
            arrays, about = load_arrays(path)
            study, panel = Study.parse(about["study"], path.name), GenePanel.of_lines(about["genes"])
            beside = Beside.of(about.get("beside", {}))
            return cls(
                study=study,
                panel=panel,
                cancers=tuple(about["cancers"]),
                grid=TimeGrid(tuple(about["grid_months"])),
                fold=int(about["fold"]),
                unit_family=str(about.get("unit_family", "")),
                scales={m: Scaling.of(arrays, scale_prefix(m)) for m in table_widths(study, beside, len(panel))},
                beside=beside,
                covariates=(arrays["covariate_mean"], arrays["covariate_sd"]),
                weights=part("weights/", arrays),
                explanation=part("explanation/", arrays),
            )
        except (OSError, SafetensorError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}: not a model that a study has saved ({type(error).__name__}); "
                "name the model.safetensors or model-fold-K.safetensors of a finished run"
            ) from None
