"""What speaks for each of a hospital's own patients: pathways and genes, by integrated gradients of a saved model.

The file stays at the hospital, as the predictions do: a patient's attributions follow her expression. N patients, G genes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from oncofed.client.attributions import attribute, score_of
from oncofed.client.batch import Batch
from oncofed.client.predict import Prediction, or_empty
from oncofed.client.score import write_columns
from oncofed.common.modalities import RNA
from oncofed.common.pathways import pathways_on

TAKEN = ("patient", "cancer_type", "predicted")
"""Columns that no set may be called."""

FIRST = 5
"""Genes that are named for a patient."""


def choose_sets(prediction: Prediction, file: Path) -> dict[str, np.ndarray]:
    """Indices into the model's panel of each set of a GMT file; raises where the model does not see genes one by one."""
    study = prediction.model.study
    if study.embeds or RNA not in study.modalities:
        raise ValueError(
            "--pathways adds up what single genes do, and this model sees "
            f"{'embeddings of scGPT' if study.embeds else 'no expression'}; leave it out"
        )
    sets = pathways_on(prediction.model.panel, file)
    taken = [name for name in sets if name in TAKEN or name.startswith("gene_")]
    if taken:
        raise ValueError(f"{file}: the sets {taken[:3]} are called as other columns of the file are; rename them")
    return sets


def attributions(prediction: Prediction) -> np.ndarray:
    """Integrated gradients `[N, G]` of the predicted class's log-probability, or of the log hazard, from the mean patient.

    NaN where a patient has no expression. Of several modalities it is expression's part: the others are left out.
    """
    cohort, scorer = prediction.cohort, prediction.scorer
    batch = Batch.of(cohort, scorer.lens, scorer.device)
    if not prediction.survival:  # such a model never sees the cancer type: here it names the class to attribute
        batch = replace(batch, cancer_B=torch.from_numpy(prediction.score.argmax(1)).to(batch.cancer_B))
    a = attribute(score_of(scorer.network), batch, prediction.model.study.analysis.steps)
    return np.where(cohort.has(RNA)[:, None], a, np.nan)


def pathway_columns(prediction: Prediction, sets: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The columns of the hospital's file: mean attribution of each set's genes, and the genes that count most with theirs."""
    a = attributions(prediction)
    group = prediction.cohort.cancer if prediction.survival else prediction.score.argmax(1)
    names, genes = np.array(prediction.model.cancers), np.array(prediction.model.panel.genes)
    columns = {"patient": prediction.cohort.patient}
    columns["cancer_type" if prediction.survival else "predicted"] = names[group]
    columns |= {name: or_empty(a[:, members].mean(1)) for name, members in sets.items()}
    order = np.argsort(-np.abs(np.nan_to_num(a)), axis=1, kind="stable")
    known = ~np.isnan(a).any(1)
    for n in range(min(FIRST, len(genes))):
        columns[f"gene_{n + 1}"] = np.where(known, genes[order[:, n]], "")
        columns[f"gene_{n + 1}_attribution"] = or_empty(np.take_along_axis(a, order[:, n : n + 1], axis=1)[:, 0])
    return columns


def write_pathways(prediction: Prediction, sets: Mapping[str, np.ndarray], rows: Path) -> Path:
    """Write `<stem of rows>-pathways.csv` beside the file of the patients' rows, a row a patient."""
    file = rows.with_name(f"{rows.stem}-pathways.csv")
    write_columns(file, pathway_columns(prediction, sets))
    return file
