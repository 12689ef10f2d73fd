"""Patient-level folds that each site deals for itself, so that no one needs to see all patients."""

from __future__ import annotations

import hashlib

import numpy as np

ALL_PATIENTS = -1
"""The fold number of a refit: every patient trains, none is held out."""

NEVER = -2
"""The fold of a patient who is never held out: of a site that is not among `splits.held_out_sites`."""


def seed_from(*parts: object) -> int:
    """A 63-bit seed from names and numbers, the same on every machine (unlike `hash`)."""
    text = "\x1f".join(str(p) for p in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def deal_folds(
    patients: np.ndarray, cancer: np.ndarray, event: np.ndarray, *, folds: int, seed: int, site: str
) -> np.ndarray:
    """Fold `[patients]` of each patient, stratified by cancer type and event.

    Within a stratum the patients, in an order drawn from the seed and their names, are dealt round the table from a
    starting fold drawn for the site: every fold gets its share even where each site holds one patient of a stratum.
    """
    order = np.array([seed_from(seed, "patient", p) for p in patients])
    fold = np.zeros(len(patients), dtype=np.int64)
    for stratum in sorted({(str(c), int(e)) for c, e in zip(cancer, event, strict=True)}):
        rows = np.flatnonzero((cancer.astype(str) == stratum[0]) & (event == stratum[1]))
        rows = rows[np.argsort(order[rows], kind="stable")]
        fold[rows] = (np.arange(len(rows)) + seed_from(seed, "start", site, *stratum)) % folds
    return fold


def deal_alone(patients: np.ndarray, *, folds: int, seed: int) -> np.ndarray:
    """Fold `[patients]` of each patient, from the seed and her name alone: who comes or goes moves nobody else."""
    return np.array([seed_from(seed, "alone", p) % folds for p in patients], dtype=np.int64)


def choose_validation(
    patients: np.ndarray, cancer: np.ndarray, event: np.ndarray, *, share: float, seed: int, fold: int, site: str
) -> np.ndarray:
    """Booleans `[patients]`: who of a fold's training patients is kept aside to choose the round, dealt like the folds."""
    if not share:
        return np.zeros(len(patients), dtype=bool)
    inner = seed_from(seed, "validation", fold)
    return deal_folds(patients, cancer, event, folds=max(2, round(1 / share)), seed=inner, site=site) == 0
