"""Checkpoints and models on disk: safetensors, written whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from oncofed.common.blocks import Sum
from oncofed.common.files import replacing
from oncofed.common.saved import load_arrays
from safetensors.numpy import save_file

__all__ = ["load_arrays", "save_arrays"]


def save_arrays(path: Path, arrays: Sum, about: dict[str, Any]) -> None:
    """Arrays and a JSON description in one safetensors file."""
    with replacing(path) as temporary:
        save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, temporary, {"about": json.dumps(about)})
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
