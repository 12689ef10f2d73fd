"""One message at one site: the request, the site's data, and what the handlers do with them."""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from flwr.app import RecordDict
from oncofed.client.batch import Batch, Lens
from oncofed.client.data.cohort import Cohort, cohort_key, gene_names, open_cohort
from oncofed.client.data.read import read_clinical
from oncofed.client.data.site import SiteFolder
from oncofed.client.data.units import FAMILY
from oncofed.client.device import choose_device, describe
from oncofed.client.release import Answer
from oncofed.client.resident import Resident
from oncofed.client.train import train_locally
from oncofed.common import wire
from oncofed.common.blocks import Sum, part
from oncofed.common.covariates import input_names
from oncofed.common.errors import Refusal
from oncofed.common.models.build import Model, Sizes
from oncofed.common.panel import GenePanel
from oncofed.common.scaling import NUMBERS, Scaling, groups, moments, power_moments
from oncofed.common.splits import ALL_PATIENTS, NEVER, choose_validation, seed_from
from oncofed.common.study import TRAIN, Study
from oncofed.common.survival import TimeGrid, event_table

log = logging.getLogger("oncofed.client")


@dataclass(frozen=True)
class Session:
    """A validated request at a site. Arrays of a request: `scaling/*`, `covariate_mean`, `covariate_sd`, `weights/*`, `load/*`."""

    ask: wire.Config
    arrays: Sum
    study: Study
    site: SiteFolder
    work: Path
    resident: Resident
    own_device: str

    @classmethod
    def of(cls, content: RecordDict, site: SiteFolder, work: Path, resident: Resident, own_device: str) -> Session:
        """Read a request; raises `Refusal` on another protocol or a study that is not valid here."""
        ask = wire.read_config(content, "ask")
        wire.check_protocol(ask, "the server")
        try:
            study = Study.from_json(str(ask["study_json"]))
        except (ValueError, KeyError) as error:
            raise Refusal(f"site {site.name}: the study in the message is not valid here: {error}") from None
        fold, round_, phase = ask.get("fold", 0), ask.get("round", 0), ask.get("phase", TRAIN)
        known = set(range(study.splits.count)) | ({ALL_PATIENTS} if study.splits.refit else set())
        if (
            fold not in known
            or phase not in study.phases
            or not isinstance(round_, int)
            or not 0 <= round_ <= study.steps(str(phase)).rounds
        ):
            raise Refusal(
                f"site {site.name}: fold {fold!r}, phase {phase!r}, round {round_!r} is not part of the study in the message"
            )
        if study.runtime.threads:
            torch.set_num_threads(study.runtime.threads)
        return cls(ask, wire.read_arrays(content), study, site, work, resident, own_device)

    @property
    def fold(self) -> int:
        return int(self.ask.get("fold", 0))  # type: ignore[arg-type]

    @property
    def round(self) -> int:
        return int(self.ask.get("round", 0))  # type: ignore[arg-type]

    @property
    def phase(self) -> str:
        return str(self.ask.get("phase", TRAIN))

    @property
    def stamp(self) -> wire.Config:
        """What every answer repeats, so that the server can refuse an answer to another question."""
        return {
            "study": self.study.name,
            "fold": self.fold,
            "phase": self.phase,
            "round": self.round,
            "panel_hash": str(self.ask.get("panel_hash", "")),
        }

    @property
    def cancers(self) -> tuple[str, ...]:
        return tuple(map(str, self.ask["cancers"]))  # type: ignore[arg-type]

    # -- data ----------------------------------------------------------------------------------------------------------

    def greeting(self) -> wire.Config:
        """Genes, cancer types and unit family. Counts of patients do not leave with it."""
        clinical = read_clinical(self.site, outcome=self.study.task.kind == "survival")
        return {
            "genes": gene_names(self.site, self.work),
            "cancers": sorted(clinical["cancer_type"].dropna().astype(str).unique().tolist()),
            "unit_family": FAMILY[self.site.description.expression_unit],
        }

    @cached_property
    def panel(self) -> GenePanel:
        """The panel that the server names; it travels once, with the statistics, and is kept at the site by its hash."""
        wanted = str(self.ask["panel_hash"])
        if not re.fullmatch("[0-9a-f]{16}", wanted):  # it names a file below
            raise Refusal(f"site {self.site.name}: {wanted[:40]!r} is no panel hash")
        file = self.work / "panels" / f"{wanted}.txt"
        if "genes" in self.ask:
            panel = GenePanel(tuple(map(str, self.ask["genes"])))  # type: ignore[arg-type]
            if panel.hash != wanted:
                raise Refusal(
                    f"site {self.site.name}: the panel in the message has hash {panel.hash}, the message says {wanted}"
                )
            if not file.exists():
                file.parent.mkdir(parents=True, exist_ok=True)
                temporary = file.with_suffix(f".{os.getpid()}.tmp")
                temporary.write_text("\n".join(panel.genes) + "\n")
                os.replace(temporary, file)
            return panel
        if not file.exists():
            raise Refusal(
                f"site {self.site.name}: gene panel {wanted} is unknown here; the study must begin with its statistics phase"
            )
        panel = self.resident.panel(file)
        if panel.hash != wanted:
            raise Refusal(
                f"site {self.site.name}: the kept panel {wanted} has been altered; remove it and begin the study anew"
            )
        return panel

    @cached_property
    def cohort(self) -> Cohort:
        key = cohort_key(self.site, self.study, self.panel, self.cancers)
        cohort = self.resident.cohort(self.work, key, lambda: open_cohort(key, self.site, self.work, self.panel))
        return in_site_folds(cohort, self.study, self.site.name)

    @cached_property
    def split(self) -> np.ndarray:
        """`train`, `validation` or `test` for each patient of the cohort."""
        return split_names(self.cohort, self.study, self.fold, self.site.name)

    def training_cohort(self) -> Cohort:
        chosen = self.cohort.select(self.split == "train")
        if not len(chosen):
            raise Refusal(f"site {self.site.name}: no training patient in fold {self.fold}")
        return chosen

    def scored_cohort(self) -> Cohort:
        """The held-out patients, or those kept aside to choose the round."""
        return self.cohort.select(self.split == ("validation" if self.ask.get("validation") else "test"))

    def missing_genes(self, cohort: Cohort) -> int:
        """Genes of the panel without any value here; they are filled with the federation's mean."""
        missing = int(np.isnan(cohort.x_NG).all(axis=0).sum())
        if missing:
            log.warning(
                "%s: %d of %d genes of the panel are missing and filled with the federation's mean",
                self.site.name,
                missing,
                len(self.panel),
            )
        return missing

    # -- model ---------------------------------------------------------------------------------------------------------

    @cached_property
    def device(self) -> torch.device:
        return choose_device(self.own_device or self.study.runtime.device)

    @property
    def device_name(self) -> str:
        return describe(self.device)

    @cached_property
    def lens(self) -> Lens:
        grid = TimeGrid(tuple(float(s) for s in self.ask["grid"]))  # type: ignore[union-attr]
        covariates = self.arrays["covariate_mean"], self.arrays["covariate_sd"]
        return Lens(Scaling.of(self.arrays), covariates, grid)

    @cached_property
    def model(self) -> Model:
        covariates = len(input_names(self.study.panel.covariates))
        sizes = Sizes(len(self.panel), self.cancers, len(self.lens.grid), covariates)
        return self.resident.model(self.study, sizes, self.device, self.phase)

    def batch(self, cohort: Cohort) -> Batch:
        return Batch.of(cohort, self.lens, self.device)

    @cached_property
    def weights(self) -> Sum:
        return part("weights/", self.arrays)

    # -- what the handlers do ------------------------------------------------------------------------------------------

    def statistics(self) -> Answer:
        """Sums over training patients: first moments of genes and covariates and event tables, then moments of powers."""
        cohort = self.training_cohort()
        count = len(self.cancers) if self.study.scale_by_cancer else 1
        group = groups(cohort.cancer, count > 1)
        cells = np.bincount(group, minlength=count)
        if self.ask.get("powers"):
            total = power_moments(cohort.x_NG, group, Scaling.of(self.arrays))
            return Answer({}, total, len(cohort), dict.fromkeys(total, cells), NUMBERS)
        genes = moments(cohort.x_NG, group, count)
        covariates = moments(cohort.v_NV, np.zeros(len(cohort), dtype=np.int64), 1)
        events, exposure = event_table(cohort.time, cohort.event, cohort.cancer, len(self.cancers))
        total = (
            genes | {f"covariate_{k}": v[0] for k, v in covariates.items()} | {"events": events, "exposure": exposure}
        )
        config: wire.Config = {"missing_genes": self.missing_genes(cohort)}
        return Answer(config, total, len(cohort), dict.fromkeys(genes, cells), len(genes))

    def train(self) -> Answer:
        """The local steps of a round: training sum, mean loss, and the seconds that they took."""
        cohort, t = self.training_cohort(), self.study.steps(self.phase)
        model, batch = self.model, self.batch(cohort)
        if self.round <= 1:
            log.info("%s: trains %d patients on %s", self.site.name, len(cohort), self.device_name)
        seed = seed_from(self.study.seed, self.phase, self.fold, self.round, self.site.name)
        begin = time.perf_counter()
        total, loss = train_locally(
            model,
            self.weights,
            batch,
            self.study,
            phase=self.phase,
            round_=self.round,
            seed=seed,
            load=part("load/", self.arrays),
        )
        seconds = time.perf_counter() - begin
        seen = min(len(cohort), t.batch_size * t.local_steps) if t.batch_size else len(cohort)
        config: wire.Config = {
            "loss": loss,
            "patients": len(cohort),
            "seconds": seconds,
            "device": self.device_name,
        }
        return Answer(config, total, seen)


def in_site_folds(cohort: Cohort, study: Study, site: str) -> Cohort:
    """The cohort with its folds, or, where whole sites are held out, with the site's number for all its patients."""
    sites = study.splits.held_out_sites
    if not sites:
        return cohort
    fold = sites.index(site) if site in sites else NEVER
    return dataclasses.replace(cohort, fold=np.full(len(cohort), fold))


def split_names(cohort: Cohort, study: Study, fold: int, site: str) -> np.ndarray:
    """`train`, `validation` or `test` for each patient of a site's cohort in a fold."""
    names = np.where(cohort.fold == fold, "test", "train").astype("<U10")
    rows = np.flatnonzero(names == "train")
    c = cohort
    aside = choose_validation(
        c.patient[rows],
        c.cancer[rows],
        c.event[rows],
        share=study.splits.validation,
        seed=study.seed,
        fold=fold,
        site=site,
    )
    names[rows[aside]] = "validation"
    return names
