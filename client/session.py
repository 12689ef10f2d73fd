"""One message at one site: the request, the site's data, and what the handlers do with them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
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
from oncofed.client.data.cohort import Cohort, cohort_key, open_cohort
from oncofed.client.data.site import SiteFolder
from oncofed.client.device import choose_device, describe
from oncofed.client.greeting import greet, holdings
from oncofed.client.policy import Policy
from oncofed.client.release import Answer
from oncofed.client.resident import Resident
from oncofed.client.scale import lens_of, moment_sums, power_sums
from oncofed.client.train import train_locally
from oncofed.common import wire
from oncofed.common.blocks import Sum, part
from oncofed.common.covariates import input_names
from oncofed.common.errors import Refusal
from oncofed.common.modalities import RNA, Beside
from oncofed.common.models.build import Model, Sizes
from oncofed.common.modulation import BRANCHES
from oncofed.common.panel import GenePanel
from oncofed.common.scaling import NUMBERS, Scaling, moments
from oncofed.common.splits import ALL_PATIENTS, NEVER, choose_validation, seed_from
from oncofed.common.study import PRETRAIN, TRAIN, Study
from oncofed.common.survival import TimeGrid, event_table
from oncofed.common.tables import scale_prefix, table_widths

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
        """What the site says of itself, without a count of patients."""
        return greet(self.site, self.work, self.study)

    @cached_property
    def beside(self) -> Beside:
        """What the federation agreed on beside genes; raises where this site has something else."""
        agreed = Beside.of(self.ask)
        own = holdings(self.site, self.work, self.study) if self.study.model.name == "path_gptomic" else {}
        for key in ("images", "embedding"):
            if own.get(key) and getattr(agreed, key) and own[key] != getattr(agreed, key):
                raise Refusal(
                    f"site {self.site.name}: its {key} are now {own[key]!r}, the study agreed on {getattr(agreed, key)!r}; "
                    "restore them, or begin the study anew"
                )
        return agreed

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
                write_whole(file, "\n".join(panel.genes) + "\n")
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
        key = cohort_key(self.site, self.study, self.panel, self.cancers, self.beside)
        cohort = self.resident.cohort(self.work, key, lambda: open_cohort(key, self.site, self.work, self.panel))
        cohort = in_site_folds(with_modalities(cohort, self.study), self.study, self.site.name)
        self._keep_folds(cohort)
        return cohort

    def _keep_folds(self, cohort: Cohort) -> None:
        """Refuse to go on where patients have come or gone since the fold began: others would move from test to training.

        The statistics begin a fold, and begin it anew unless the study resumes.
        """
        s = self.study
        deal = _digest([s.seed, s.splits.model_dump(mode="json"), s.model.name, s.task.kind, self.cancers])
        file = self.work / "folds" / f"{s.name}-{deal[:16]}-{self.fold}.txt"
        who = _digest([cohort.patient.tolist(), cohort.fold.tolist()])
        begins = "genes" in self.ask and not self.ask.get("final")
        if file.exists() and file.read_text() != who and not (begins and not self.study.runtime.resume):
            raise Refusal(
                f"site {self.site.name}: its patients are others than when fold {self.fold} began, so held-out ones would be trained "
                "on; restore the site's files, or begin the study anew"
            )
        if begins:
            write_whole(file, who)

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
        if self.study.embeds or not cohort.has(RNA).any():
            return 0
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
        return lens_of(self.study, self.beside, self.scales, covariates, grid)

    @cached_property
    def scales(self) -> dict[str, Scaling]:
        """The scale of each modality's table in the message."""
        return {m: Scaling.of(self.arrays, scale_prefix(m)) for m in self._tables}

    @property
    def _tables(self) -> tuple[str, ...]:
        return tuple(table_widths(self.study, self.beside, len(self.panel)))

    @cached_property
    def model(self) -> Model:
        covariates = len(input_names(self.study.panel.covariates))
        sizes = Sizes(len(self.panel), self.cancers, len(self.lens.grid), covariates, self.beside)
        return self.resident.model(self.study, sizes, self.device, self.phase)

    def batch(self, cohort: Cohort) -> Batch:
        return Batch.of(cohort, self.lens, self.device)

    @cached_property
    def weights(self) -> Sum:
        return part("weights/", self.arrays)

    # -- what the handlers do ------------------------------------------------------------------------------------------

    def statistics(self) -> Answer:
        """Sums over training patients: first moments of each table and event tables, then moments of powers."""
        cohort = self.training_cohort()
        names, count = self._tables, len(self.cancers) if self.study.scale_by_cancer else 1
        if self.ask.get("powers"):
            total, cells = power_sums(cohort, names, count, self.scales)
            return Answer({}, total, len(cohort), cells, NUMBERS)
        total, cells = moment_sums(cohort, names, count)
        covariates = moments(cohort.v_NV, np.zeros(len(cohort), dtype=np.int64), 1)
        events, exposure = event_table(cohort.time, cohort.event, cohort.cancer, len(self.cancers))
        total |= {f"covariate_{k}": v[0] for k, v in covariates.items()} | {"events": events, "exposure": exposure}
        config: wire.Config = {"missing_genes": self.missing_genes(cohort)}
        return Answer(config, total, len(cohort), cells, 3)

    def _of_enough(self, batch: Batch) -> Batch:
        """The batch without modalities that fewer patients have than the policy wants: their encoders would tell of these few."""
        if self.study.model.name == "gene_moe":
            return batch
        least = Policy.read(self.site.path).min_patients
        few = [m for m in self.study.modalities if 0 < int(batch.has[m].sum()) < least]
        if few and self.round <= 1:
            log.warning(
                "%s: fewer than %d patients have %s; it is left out here", self.site.name, least, " and ".join(few)
            )
        return dataclasses.replace(batch, has=batch.has | {m: torch.zeros_like(batch.has[m]) for m in few})

    def train(self) -> Answer:
        """The local steps of a round: training sum, mean loss, and the seconds that they took."""
        cohort, t = self.training_cohort(), self.study.steps(self.phase)
        if self.phase == PRETRAIN and self.study.model.name != "gene_moe":
            cohort = cohort.select(cohort.has(RNA))
            if not len(cohort):
                raise Refusal(f"site {self.site.name}: no patient with expression, so it takes no part in pre-training")
        model, batch = self.model, self._of_enough(self.batch(cohort))
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
            branches=self.arrays.get(BRANCHES),
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


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def write_whole(file: Path, text: str) -> None:
    """Replace a file in one step."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(text)
    os.replace(temporary, file)


def with_modalities(cohort: Cohort, study: Study) -> Cohort:
    """Patients who have one of the study's modalities at least."""
    if study.model.name == "gene_moe":
        return cohort
    rows = np.any([cohort.has(m) for m in study.modalities], axis=0)
    return cohort if rows.all() else cohort.select(rows)


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
