"""Bring expression units to a scale that a model can take."""

from __future__ import annotations

import numpy as np
import pandas as pd
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


def impossible(x: np.ndarray, unit: Unit) -> list[tuple[int, str, str]]:
    """Cells of an expression table that the unit rules out: how many, what they are, the remedy; empty where all is well."""
    negative = int((x < 0).sum()) if unit != "zscore" else 0
    broken = int((np.isfinite(x) & (x != np.floor(x))).sum()) if unit == "counts" else 0
    found = [
        (negative, "negative cells", "correct expression_unit in site.toml"),
        (
            broken,
            "cells that are not whole numbers",
            "round the expected counts of RSEM, or declare tpm or log2 in site.toml",
        ),
    ]
    return [f for f in found if f[0]]


def one_column_a_gene(table: pd.DataFrame, unit: Unit) -> pd.DataFrame:
    """Columns of one name, patients in rows, made one where the first of them stood.

    Counts and tpm are added, log2 as tpm before its logarithm, z-scores averaged; what is missing in some is taken from
    the others. So a patient's library, the sum of all counts, stays what it was.
    """
    several = table.columns.duplicated(keep=False)
    if not several.any():
        return table
    order = table.columns.unique()
    parts = table.loc[:, several].T
    if unit == "log2":
        parts = np.exp2(parts) - 1.0
    genes = parts.groupby(level=0)
    merged = genes.mean() if unit == "zscore" else genes.sum(min_count=1)
    if unit == "log2":
        merged = np.log2(merged.clip(lower=0.0) + 1.0)
    return pd.concat([table.loc[:, ~several], merged.T], axis=1)[order]
