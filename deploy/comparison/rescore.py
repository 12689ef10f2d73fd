"""Saved models of a federation on patients in one place, also with a modality taken away from some of them.

Shapes: B patients of a batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from oncofed.client.batch import Batch
from oncofed.client.predict import Scorer
from oncofed.common.modalities import PATHOLOGY
from oncofed.common.saved import SavedModel
from oncofed.deploy.comparison.reference import Pool, prediction_table


def predict_again(
    model: SavedModel, pool: Pool, *, held_out: bool = True, lost: Sequence[str] = (), device: str = "auto"
) -> pd.DataFrame:
    """Predictions for the pool's held-out (or all other) patients of the model's fold, as if nobody had what is in `lost`.

    The pool is opened with the model's study, panel, cancer types and `beside`; sites are scored one by one, as they score
    themselves. A patient's risk rests on no other patient's data, so whoever loses a modality can be chosen afterwards.
    """
    scorer = Scorer.of(model, device)
    parts = []
    for site, cohort in pool.cohorts.items():
        chosen = cohort.select((cohort.fold == model.fold) == held_out)
        if not len(chosen):
            continue
        batch = Batch.of(chosen, scorer.lens, scorer.device)
        for modality in lost:
            batch = without(batch, modality, np.ones(len(batch), dtype=bool))
        with torch.no_grad():
            score = batch.through(scorer.network).score.double().cpu().numpy()
        parts.append(prediction_table(pool, model.study, model.fold, chosen, score, np.repeat(site, len(chosen))))
    return pd.concat(parts, ignore_index=True)


def without(batch: Batch, modality: str, lost_B: np.ndarray) -> Batch:
    """The batch in which the patients that `lost_B` marks lack a modality; slides of theirs are not read."""
    has = batch.has[modality] & ~torch.from_numpy(lost_B).to(batch.has[modality].device)
    changed = dataclasses.replace(batch, has=batch.has | {modality: has})
    if modality == PATHOLOGY and batch.bags is not None:
        slides = np.where(lost_B, "", batch.bags.slides)
        changed = dataclasses.replace(changed, bags=dataclasses.replace(batch.bags, slides=slides))
    return changed
