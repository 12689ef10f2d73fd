"""Checkpoints and models on disk: safetensors, written whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from oncofed.common.blocks import Sum
from oncofed.common.saved import load_arrays
from safetensors.numpy import save_file

__all__ = ["load_arrays", "save_arrays", "write_text"]


def write_text(path: Path, text: str) -> None:
    """Replace a file in one step, so that a crash leaves the old or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def save_arrays(path: Path, arrays: Sum, about: dict[str, Any]) -> None:
    """Arrays and a JSON description in one safetensors file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, temporary, {"about": json.dumps(about)})
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
