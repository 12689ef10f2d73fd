"""A saved model at a hospital, offline: risks or classes of its own patients, also of new ones without any outcome.

Rows of patients go into the hospital's own file and nowhere else; what is said beside it are counts.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from oncofed.client.batch import Batch
from oncofed.client.data.cohort import Cohort, clinical_by_patient, encode_covariates, expression_of
from oncofed.client.data.site import SiteFolder
from oncofed.client.data.units import FAMILY
from oncofed.client.device import choose_device
from oncofed.client.scale import lens_of
from oncofed.client.score import CURVE_MONTHS, class_columns, write_columns
from oncofed.common.errors import Refusal
from oncofed.common.models.autoencoder import GeneAutoencoder
from oncofed.common.models.build import Sizes, build_empty, set_weights
from oncofed.common.saved import SavedModel
from oncofed.common.splits import NEVER
from oncofed.common.survival import median_survival, risk_percentile, survival_curve
from torch import Tensor

PLACES = ("predicted", "second", "third")
"""The classes that are named for a patient, most likely first."""


@dataclass(frozen=True)
class Prediction:
    """Scores of N patients: log hazards `[N]` or class logits `[N, classes]`. `notes` count what the user should know."""

    model: SavedModel
    cohort: Cohort
    score: np.ndarray
    notes: tuple[str, ...]

    @property
    def survival(self) -> bool:
        return self.model.study.task.kind == "survival"

    @cached_property
    def percentile(self) -> np.ndarray:
        """Where each risk lies among the federation's training patients of the cancer type `[N]`; NaN where they were withheld."""
        out = np.full(len(self.cohort), np.nan)
        for c in self._calibrated:
            rows = self.cohort.cancer == c
            out[rows] = risk_percentile(self.model.explanation["risk_counts"][c], self.score[rows])
        return out

    def curves(self, cancer: int, months: np.ndarray) -> np.ndarray:
        """Survival probabilities `[patients of the cancer type, months]`, from the recalibrated baseline."""
        baseline = self.model.explanation["log_baseline"][cancer]
        return survival_curve(baseline, self.model.grid, self.score[self.cohort.cancer == cancer], months)

    @property
    def _calibrated(self) -> list[int]:
        """Cancer types here of which the model holds training patients; of others neither spread nor baseline is known."""
        counts = self.model.explanation.get("risk_counts")
        here = np.unique(self.cohort.cancer).tolist()
        return [] if counts is None else [c for c in here if counts[c].sum() > 0]

    @property
    def count_by_cancer(self) -> dict[str, int]:
        """Patients by cancer type or, in classification, by predicted one."""
        index = self.cohort.cancer if self.survival else self.score.argmax(1)
        counts = np.bincount(index, minlength=len(self.model.cancers)).tolist()
        return {name: n for name, n in zip(self.model.cancers, counts, strict=True) if n}

    def columns(self) -> dict[str, np.ndarray]:
        """The columns of the hospital's file."""
        names = np.array(self.model.cancers)
        if not self.survival:
            return {"patient": self.cohort.patient} | self._classes(names)
        n = len(self.cohort)
        curve, median = np.full((n, len(CURVE_MONTHS)), np.nan), np.full(n, np.nan)
        for c in self._calibrated:
            rows = self.cohort.cancer == c
            curve[rows] = self.curves(c, np.array(CURVE_MONTHS))
            median[rows] = median_survival(self.model.explanation["log_baseline"][c], self.model.grid, self.score[rows])
        columns = {"patient": self.cohort.patient, "cancer_type": names[self.cohort.cancer], "risk": self.score}
        columns |= {"percentile": _or_empty(self.percentile)}
        columns |= {f"survival_{m:.0f}_months": _or_empty(curve[:, i]) for i, m in enumerate(CURVE_MONTHS)}
        return columns | {"median_survival_months": _or_empty(median)}

    def _classes(self, names: np.ndarray) -> dict[str, np.ndarray]:
        by_class = class_columns(self.score, self.model.cancers)
        probability = np.stack([by_class[f"p_{name}"] for name in self.model.cancers], axis=1)
        order = np.argsort(-probability, axis=1, kind="stable")
        columns = {}
        for i, place in enumerate(PLACES[: len(names)]):
            columns[place] = names[order[:, i]]
            key = "probability" if i == 0 else f"{place}_probability"
            columns[key] = np.take_along_axis(probability, order[:, i : i + 1], axis=1)[:, 0]
        return columns

    def write(self, file: Path) -> None:
        """One row a patient; a value that is not known is empty."""
        write_columns(file, self.columns())


def predict(model_file: Path, folder: Path) -> Prediction:
    """Score every patient of a site folder who has expression; the clinical table needs no outcome.

    Raises `ValueError` or `Refusal` with the remedy on another unit family, on cancer types that a survival model does
    not know, and where no gene or no patient is left.
    """
    model, site = SavedModel.read(model_file), SiteFolder.open(folder)
    family = FAMILY[site.description.expression_unit]
    if model.unit_family and family != model.unit_family:
        raise Refusal(
            f"site {site.name}: expression_unit = {site.description.expression_unit!r} is of the family {family}, the model was "
            f"trained on {model.unit_family}; deliver expression of that family, or use a model that was trained on yours"
        )
    notes = [] if model.unit_family else [f"the model's file does not say its unit family; {family} is assumed"]
    cohort, more = _new_patients(site, model)
    device = choose_device("auto")
    lens = lens_of(model.study, model.beside, model.scales, model.covariates, model.grid)
    sizes = Sizes(len(model.panel), model.cancers, len(model.grid), cohort.v_NV.shape[1], model.beside)
    network = build_empty(model.study, sizes, device)
    assert not isinstance(network, GeneAutoencoder)
    set_weights(network, model.weights)
    with torch.no_grad():
        score: Tensor = Batch.of(cohort, lens, device).through(network.eval()).score
    prediction = Prediction(model, cohort, score.double().cpu().numpy(), ())
    if prediction.survival and np.isnan(prediction.percentile).any():
        more.append(
            f"{int(np.isnan(prediction.percentile).sum())} patients are of cancer types of which too few trained: "
            "their percentile and survival are left empty"
        )
    return Prediction(model, cohort, prediction.score, (*notes, *more))


def _new_patients(site: SiteFolder, model: SavedModel) -> tuple[Cohort, list[str]]:
    """The site's patients on the model's panel, with follow-up 0, and notes on what is missing."""
    clinical = clinical_by_patient(site, outcome=False)
    code = clinical["cancer_type"].map({c: i for i, c in enumerate(model.cancers)})
    if model.study.task.kind == "classification":
        code = pd.Series(0, index=clinical.index)  # this model never sees it
    elif code.isna().any():
        unknown = Counter(clinical["cancer_type"][code.isna()].fillna("(empty)").astype(str))
        listed = ", ".join(f"{name}: {n}" for name, n in sorted(unknown.items()))
        raise Refusal(
            f"site {site.name}: {unknown.total()} patients have a cancer type that the model does not know ({listed}); "
            f"it knows {', '.join(model.cancers)}: correct the codes, or take these patients out of the clinical table"
        )
    patients, x = expression_of(site, clinical.index, clinical.index, model.panel)
    if not patients:
        raise Refusal(f"site {site.name}: no patient of the clinical table has expression; run `oncofed site check`")
    notes = []
    if len(patients) < len(clinical):
        notes.append(f"{len(clinical) - len(patients)} patients of the clinical table have no expression: left out")
    missing = int(np.isnan(x).all(axis=0).sum())
    if missing == len(model.panel):
        raise Refusal(
            f"site {site.name}: none of the model's {missing} genes is in the expression table; name genes as the model does "
            f"(its first: {', '.join(model.panel.genes[:3])})"
        )
    if missing:
        notes.append(
            f"{missing} of the model's {len(model.panel)} genes are missing: filled with the federation's mean"
        )
    rows = clinical.loc[patients]
    v = encode_covariates(rows, model.study.panel.covariates, site.name)
    n = len(patients)
    never, zero = np.full(n, NEVER), np.zeros(n)
    cancer = code.loc[patients].to_numpy(dtype=np.int64)
    return Cohort(x, v, zero, zero.astype(np.int64), cancer, never, np.array(patients, dtype=str)), notes


def _or_empty(values: np.ndarray) -> np.ndarray:
    """NaN and infinity as empty text, for a CSV file."""
    return np.array([v if np.isfinite(v) else "" for v in values.tolist()], dtype=object)
