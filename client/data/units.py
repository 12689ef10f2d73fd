"""Bring expression units to a scale that a model can take."""

from __future__ import annotations

import numpy as np
from oncofed.client.data.site import Unit

CLIP = 5.0
"""Signed-log z-scores beyond this (|z| > 147) are artefacts of near-constant genes."""

FAMILY: dict[Unit, str] = {
    "counts": "log-expression",
    "tpm": "log-expression",
    "log2": "log-expression",
    "zscore": "zscore",
}
"""Sites of one study must be of one family: a log expression and a within-cohort z-score cannot share a scale."""


def harmonise(x: np.ndarray, unit: Unit) -> np.ndarray:
    """Expression `[patients, genes]`, all genes of the file, on a log-like scale; NaN stays NaN.

    counts: log2(CPM + 1) with each patient's own library size; tpm: log2(x + 1); log2: unchanged; zscore: signed
    log1p, clipped at +-5 (z-scores of near-constant genes exceed 10,000 in real files).
    """
    if unit == "counts":
        library = np.nansum(x, axis=1, keepdims=True)
        return np.log2(x / np.maximum(library, 1.0) * 1e6 + 1.0)
    if unit == "tpm":
        return np.log2(x + 1.0)
    if unit == "log2":
        return np.array(x, dtype=np.float64)
    return np.clip(signed_log(x), -CLIP, CLIP)


def signed_log(x: np.ndarray) -> np.ndarray:
    """sign(x) log(1 + |x|): what is small stays as it is, what reaches millions comes near."""
    return np.sign(x) * np.log1p(np.abs(x))
