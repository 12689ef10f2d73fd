"""A saved model at a hospital, offline: risks or classes of its own patients, also of new ones without any outcome.

Rows of patients go into the hospital's own file and nowhere else; what is said beside it are counts.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from oncofed.client.batch import Batch, Lens
from oncofed.client.data.cohort import Cohort
from oncofed.client.data.site import SiteFolder
from oncofed.client.device import choose_device
from oncofed.client.new_patients import WORDS, listed, new_patients
from oncofed.client.scale import lens_of
from oncofed.client.score import CURVE_MONTHS, write_columns
from oncofed.common.models.autoencoder import GeneAutoencoder
from oncofed.common.models.build import Predictor, Sizes, build_empty, set_weights
from oncofed.common.models.output import ModelOutput
from oncofed.common.saved import SavedModel
from oncofed.common.survival import median_survival, risk_percentile, survival_curve
from scipy.special import softmax

PLACES = ("predicted", "second", "third")
"""The classes that are named for a patient, most likely first."""

UNCERTAIN = "uncertain"
"""The answer where no class is likely enough (task.abstain_below)."""


@dataclass(frozen=True)
class Scorer:
    """A saved model's network, ready to score."""

    network: Predictor
    lens: Lens
    device: torch.device

    @classmethod
    def of(cls, model: SavedModel, device_name: str = "auto") -> Scorer:
        """The network with its weights, on the device that is there or is named."""
        device = choose_device(device_name)
        lens = lens_of(model.study, model.beside, model.scales, model.covariates, model.grid)
        sizes = Sizes(len(model.panel), model.cancers, len(model.grid), len(model.covariates[0]), model.beside)
        network = build_empty(model.study, sizes, device)
        assert not isinstance(network, GeneAutoencoder)
        set_weights(network, model.weights)
        return cls(network.eval(), lens, device)

    @torch.no_grad()
    def score(self, cohort: Cohort) -> ModelOutput:
        """The model's output for patients, all of their tiles included."""
        return Batch.of(cohort, self.lens, self.device).through(self.network)


@dataclass(frozen=True)
class Prediction:
    """What a model makes of N patients.

    `score` are log hazards `[N]` or class logits `[N, classes]`. Of several modalities `present[m]` says who has one `[N]`
    and `parts[m]` what it adds to the log hazard `[N]`, NaN where it is absent. `notes` count what the user should know.
    """

    model: SavedModel
    scorer: Scorer
    cohort: Cohort
    score: np.ndarray
    present: dict[str, np.ndarray]
    parts: dict[str, np.ndarray]
    notes: tuple[str, ...] = ()

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

    @cached_property
    def probability(self) -> np.ndarray:
        """Of a classification `[N, classes]`."""
        return np.asarray(softmax(self.score, axis=1))

    @cached_property
    def answer(self) -> np.ndarray:
        """Each patient's likeliest class or, where that has less probability than the study asks, `UNCERTAIN` `[N]`."""
        chosen = np.array(self.model.cancers, dtype=object)[self.score.argmax(1)]
        return np.where(self.probability.max(1) < self.model.study.task.abstain_below, UNCERTAIN, chosen)

    @property
    def count_by_cancer(self) -> dict[str, int]:
        """Patients by cancer type or, in classification, by answer: classes in the model's order, then those without one."""
        names = np.array(self.model.cancers)[self.cohort.cancer] if self.survival else self.answer
        counts = Counter(names.tolist())
        return {name: counts[name] for name in (*self.model.cancers, UNCERTAIN) if counts[name]}

    def columns(self) -> dict[str, np.ndarray]:
        """The columns of the hospital's file."""
        names = np.array(self.model.cancers)
        if not self.survival:
            return {"patient": self.cohort.patient, "answer": self.answer} | self._classes(names)
        n = len(self.cohort)
        curve, median = np.full((n, len(CURVE_MONTHS)), np.nan), np.full(n, np.nan)
        for c in self._calibrated:
            rows = self.cohort.cancer == c
            curve[rows] = self.curves(c, np.array(CURVE_MONTHS))
            median[rows] = median_survival(self.model.explanation["log_baseline"][c], self.model.grid, self.score[rows])
        columns = {"patient": self.cohort.patient, "cancer_type": names[self.cohort.cancer], "risk": self.score}
        columns |= {"percentile": or_empty(self.percentile)}
        columns |= {f"survival_{m:.0f}_months": or_empty(curve[:, i]) for i, m in enumerate(CURVE_MONTHS)}
        return columns | {"median_survival_months": or_empty(median)} | self._modalities()

    def _modalities(self) -> dict[str, np.ndarray]:
        """Of several modalities each one's part of the risk, which of them a patient has, and whose part is the largest."""
        if not self.present:
            return {}
        has = [
            [m for m, there in zip(self.present, row, strict=True) if there]
            for row in zip(*self.present.values(), strict=True)
        ]
        columns = {f"risk_{m}": or_empty(part) for m, part in self.parts.items()}
        columns["modalities"] = np.array(["+".join(mine) for mine in has])
        if self.parts:
            size_MN = np.nan_to_num(np.abs(np.stack(list(self.parts.values()))), nan=-1.0)
            columns["driver"] = np.array(list(self.parts))[size_MN.argmax(0)]
        return columns

    def _classes(self, names: np.ndarray) -> dict[str, np.ndarray]:
        order = np.argsort(-self.score, axis=1, kind="stable")
        columns = {}
        for i, place in enumerate(PLACES[: len(names)]):
            columns[place] = names[order[:, i]]
            key = "probability" if i == 0 else f"{place}_probability"
            columns[key] = np.take_along_axis(self.probability, order[:, i : i + 1], axis=1)[:, 0]
        return columns

    def write(self, file: Path) -> None:
        """One row a patient; a value that is not known is empty."""
        write_columns(file, self.columns())


def predict(model_file: Path, folder: Path) -> Prediction:
    """Score every patient of a site folder who has one of the model's modalities; the clinical table needs no outcome.

    Raises `ValueError` or `Refusal` with the remedy, as `new_patients` does, where the site's data are none that the model reads.
    """
    model, site = SavedModel.read(model_file), SiteFolder.open(folder)
    cohort, notes = new_patients(site, model)
    scorer = Scorer.of(model)
    output = scorer.score(cohort)
    present, parts = {}, {}
    if len(output.present) > 1:
        present = {m: there.bool().cpu().numpy() for m, there in output.present.items()}
        parts = {m: np.where(present[m], v.double().cpu().numpy(), np.nan) for m, v in output.branches.items()}
    prediction = Prediction(model, scorer, cohort, output.score.double().cpu().numpy(), present, parts)
    notes += _incomplete(present)
    if prediction.survival and np.isnan(prediction.percentile).any():
        notes.append(
            f"{int(np.isnan(prediction.percentile).sum())} patients are of cancer types of which too few trained: "
            "their percentile and survival are left empty"
        )
    if not prediction.survival:
        notes += _uncertain(prediction)
    return replace(prediction, notes=tuple(notes))


def _uncertain(prediction: Prediction) -> list[str]:
    """How many patients get no answer."""
    below, n = prediction.model.study.task.abstain_below, prediction.count_by_cancer.get(UNCERTAIN, 0)
    if not n:
        return []
    return [
        f"{n} of {len(prediction.cohort)} patients are uncertain: their likeliest class has a probability below {below:g}; "
        "it stands in the column predicted, with the next ones beside it"
    ]


def _incomplete(present: dict[str, np.ndarray]) -> list[str]:
    """How many patients lack which modalities, and what their risk then rests on."""
    notes = []
    for mine, n in sorted(Counter(zip(*present.values(), strict=True)).items()):
        there = [WORDS[m] for m, has in zip(present, mine, strict=True) if has]
        lacking = [WORDS[m] for m, has in zip(present, mine, strict=True) if not has]
        if lacking:
            alone = " alone" if len(there) == 1 else ""
            notes.append(f"{n} patients lack {listed(lacking, 'and')}: predicted from {listed(there, 'and')}{alone}")
    return notes


def or_empty(values: np.ndarray) -> np.ndarray:
    """NaN and infinity as empty text, for a CSV file."""
    return np.array([v if np.isfinite(v) else "" for v in values.tolist()], dtype=object)
