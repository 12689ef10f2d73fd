"""One message at one site: the request, the site's data, and what the handlers do with them."""

from __future__ import annotations

import csv
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
from oncofed.client.data.cohort import Cohort, cohort_key, gene_names, open_cohort
from oncofed.client.data.read import read_clinical
from oncofed.client.data.site import SiteFolder
from oncofed.client.data.units import FAMILY
from oncofed.client.device import choose_device, describe
from oncofed.client.resident import Resident
from oncofed.client.train import Batch, patient_losses, train_locally
from oncofed.common import wire
from oncofed.common.blocks import Sum
from oncofed.common.errors import Refusal
from oncofed.common.metrics import survival_sums
from oncofed.common.models.build import set_weights
from oncofed.common.models.gene_moe import GeneMOE
from oncofed.common.panel import GenePanel
from oncofed.common.splits import ALL_PATIENTS, seed_from
from oncofed.common.study import Study
from oncofed.common.survival import TimeGrid, event_table

log = logging.getLogger("oncofed.client")


@dataclass(frozen=True)
class Session:
    """A validated request at a site. Arrays of a request: `mean`, `sd` (panel scaling) and `weights/<parameter>`."""

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
        fold, round_ = ask.get("fold", 0), ask.get("round", 0)
        known = set(range(study.splits.folds)) | ({ALL_PATIENTS} if study.splits.refit else set())
        if fold not in known or not isinstance(round_, int) or not 0 <= round_ <= study.training.rounds:
            raise Refusal(f"site {site.name}: fold {fold!r}, round {round_!r} is not part of the study in the message")
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
    def stamp(self) -> wire.Config:
        """What every answer repeats, so that the server can refuse an answer to another question."""
        return {
            "study": self.study.name,
            "fold": self.fold,
            "round": self.round,
            "panel_hash": str(self.ask.get("panel_hash", "")),
        }

    @property
    def cancers(self) -> tuple[str, ...]:
        return tuple(map(str, self.ask["cancers"]))  # type: ignore[arg-type]

    # -- data ----------------------------------------------------------------------------------------------------------

    def greeting(self) -> wire.Config:
        """Genes, cancer types and unit family. Counts of patients do not leave with it."""
        clinical = read_clinical(self.site)
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
        key = cohort_key(self.site, self.panel, self.cancers, self.study.splits.folds, self.study.seed)
        return self.resident.cohort(
            self.work, key, lambda: open_cohort(key, self.site, self.work, self.panel, self.cancers)
        )

    def training_cohort(self) -> Cohort:
        chosen = self.cohort.select(self.cohort.fold != self.fold)
        if not len(chosen):
            raise Refusal(f"site {self.site.name}: no training patient in fold {self.fold}")
        return chosen

    def test_cohort(self) -> Cohort:
        return self.cohort.select(self.cohort.fold == self.fold)

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
    def grid(self) -> TimeGrid:
        return TimeGrid(tuple(float(s) for s in self.ask["grid"]))  # type: ignore[union-attr]

    @cached_property
    def model(self) -> GeneMOE:
        return self.resident.model(self.study, self.device, len(self.panel), self.cancers, len(self.grid))

    def batch(self, cohort: Cohort) -> Batch:
        return Batch.of(cohort, self.arrays["mean"], self.arrays["sd"], self.grid, self.device)

    @cached_property
    def weights(self) -> Sum:
        return {
            name.removeprefix("weights/"): value for name, value in self.arrays.items() if name.startswith("weights/")
        }

    # -- what the handlers do ------------------------------------------------------------------------------------------

    def statistics(self, cohort: Cohort) -> Sum:
        """`n, sum, squares [G]` over present values and `events, exposure [C, public edges]`."""
        events, exposure = event_table(cohort.time, cohort.event, cohort.cancer, len(self.cancers))
        return cohort.gene_sums() | {"events": events, "exposure": exposure}

    def train(self, cohort: Cohort) -> tuple[Sum, float, float]:
        """Training sum, mean loss, and the seconds that the local steps took."""
        load = {name.removeprefix("load/"): value for name, value in self.arrays.items() if name.startswith("load/")}
        model, batch = self.model, self.batch(cohort)
        if self.round <= 1:
            log.info("%s: trains %d patients on %s", self.site.name, len(cohort), self.device_name)
        seed = seed_from(self.study.seed, "train", self.fold, self.round, self.site.name)
        begin = time.perf_counter()
        total, loss = train_locally(model, self.weights, batch, self.study, round_=self.round, seed=seed, load=load)
        return total, loss, time.perf_counter() - begin

    def evaluate(self, cohort: Cohort) -> Sum:
        """Sums by cancer type: patients, events, loss, pair counts within the site, gate mass of each mixture."""
        risk, loss, shares = self._score(cohort)
        total = survival_sums(risk, cohort.time, cohort.event, loss, cohort.cancer, len(self.cancers))
        for group, share in shares.items():
            table = np.zeros((len(self.cancers), share.shape[1]))
            np.add.at(table, cohort.cancer, share)
            total[f"routing/{group}"] = table
        if self.ask.get("final"):
            self._write_predictions()
        return total

    def _score(self, cohort: Cohort) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        """Risk `[N]`, loss `[N]` and gates by mixture, without noise."""
        model = self.model
        set_weights(model, self.weights)
        model.eval()
        batch = self.batch(cohort)
        with torch.no_grad():
            output = model(batch.x_BG, batch.cancer_B)
            loss = patient_losses(model, output, batch)
        as_array = {group: share.double().cpu().numpy() for group, share in output.shares.items()}
        return output.risk.double().cpu().numpy(), loss.double().cpu().numpy(), as_array

    def _write_predictions(self) -> None:
        """Risks of the site's own patients, in a file that stays at the site."""
        risk, _, _ = self._score(self.cohort)
        c = self.cohort
        file = self.work / "predictions" / self.study.name / f"fold-{self.fold}.csv"
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(".tmp")
        with temporary.open("w", newline="") as out:
            writer = csv.writer(out)
            writer.writerow(["patient", "cancer_type", "time_months", "event", "split", "risk"])
            for i in range(len(c)):
                split = "test" if c.fold[i] == self.fold else "train"
                writer.writerow(
                    [c.patient[i], self.cancers[c.cancer[i]], c.time[i], c.event[i], split, repr(float(risk[i]))]
                )
        os.replace(temporary, file)
