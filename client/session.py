"""One message at one site: the request, the site's data as the study sees them, and the model."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from flwr.app import RecordDict
from oncofed.client.admission import Admission
from oncofed.client.asked_patients import AskedPatients
from oncofed.client.asked_study import asked_study
from oncofed.client.batch import Batch, Lens
from oncofed.client.data.cohort import Cohort, cohort_key, fingerprint, open_cohort, with_modalities
from oncofed.client.data.site import ALTERATIONS as ALTERATION_FILES
from oncofed.client.data.site import EXPRESSION, SiteFolder
from oncofed.client.data.site import PATHOLOGY as PATHOLOGY_FILES
from oncofed.client.device import choose_device, describe
from oncofed.client.folds import in_site_folds, split_names
from oncofed.client.greeting import greet, known_patients
from oncofed.client.members import Identity, Pins
from oncofed.client.message_check import check_place
from oncofed.client.policy import Policy
from oncofed.client.privacy.evidence import Held
from oncofed.client.reference import Reference
from oncofed.client.release import Door, Release
from oncofed.client.resident import Resident
from oncofed.client.scale import lens_of
from oncofed.client.secure_sum import SecureSums
from oncofed.common import wire
from oncofed.common.ablation import ORDER
from oncofed.common.blocks import Sum, digests, part
from oncofed.common.broadcast import BASE, HASH, WEIGHTS
from oncofed.common.covariates import input_names
from oncofed.common.errors import Refusal
from oncofed.common.files import write_text
from oncofed.common.modalities import ALTERATIONS, PATHOLOGY, RNA, Beside
from oncofed.common.models.build import Model, Sizes
from oncofed.common.panel import GenePanel
from oncofed.common.privacy.accounting import Mechanism
from oncofed.common.privacy.releases import EVIDENCE, STATISTICS, TRAINING, Promise, kept
from oncofed.common.privacy.sharing import SHARED_BITS, sharing_of
from oncofed.common.scaling import Scaling
from oncofed.common.signed_study import identity_text
from oncofed.common.splits import ALL_PATIENTS
from oncofed.common.study import TRAIN, Study
from oncofed.common.survival import TimeGrid
from oncofed.common.tables import scale_prefix, table_widths

PLACES = ("powers", "validation", "final", "table", ORDER, wire.NETWORK_GENES)
"""What tells the questions of one kind and round of a study apart."""


@dataclass(frozen=True)
class Session:
    """A validated request at a site. Arrays of a request: `scaling/*`, `covariate_mean`, `covariate_sd`, `weights/*`, `load/*`."""

    ask: wire.Config
    sent: Sum
    study: Study
    site: SiteFolder
    work: Path
    resident: Resident
    own_device: str
    policy: Policy

    @classmethod
    def of(
        cls, content: RecordDict, site: SiteFolder, work: Path, resident: Resident, own_device: str, policy: Policy
    ) -> Session:
        """Read a request, whose form is checked; raises `Refusal` on a study that is not valid here."""
        ask = wire.read_config(content, "ask")
        study = asked_study(ask, site.name)
        if study.runtime.threads:
            torch.set_num_threads(min(study.runtime.threads, os.cpu_count() or 1))
        return cls(ask, wire.read_arrays(content), study, site, work, resident, own_device, policy)

    @cached_property
    def arrays(self) -> Sum:
        """The request's arrays as if its weights had come in full; raises `Lacking` where the site cannot make them.

        Asked for after `admit`, so that no study that the policy refuses leaves a file here.
        """
        file = self.work / "weights" / f"{self.study.name}-{self.study_digest}.safetensors"
        return Reference(file, self.site.name, self.resident).resolved(self.ask, self.sent)

    def admit(self, door: Door, kind: str) -> None:
        """Refuse what the site's policy, or the study's own promise of privacy, does not allow."""
        signature = str(self.ask.get("signature", ""))
        Admission(self.site.name, self.policy, self.site.path, door.simulated).study(kind, self.study, signature)
        if self.study.privacy.on and kind not in (wire.HELLO, wire.STATISTICS, wire.TRAIN, wire.EVALUATE):
            raise Refusal(
                f"site {self.site.name}: the study promises privacy.unit = '{self.study.privacy.unit}', and '{kind}' lets sums over patients out "
                "without noise"
            )
        check_place(kind, self.phase, self.round, self.site.name)
        if sharing_of(self.study, kind):
            self._check_sharing(simulated=door.simulated)
        if self.study.privacy.secure_sum and kind != wire.HELLO:
            door.masks.append(lambda total: self._under_masks(kind, total, forget=door.simulated))
        mechanisms = self._mechanisms(kind)
        if mechanisms:
            _ = self.panel  # what is wrong with the message must cost nothing
            door.reserve(self._release(kind, mechanisms))

    def _mechanisms(self, kind: str) -> tuple[Mechanism, ...]:
        """The releases with noise that an answer to this message makes."""
        study = self.study
        if kind == wire.EVALUATE and study.evaluation.epsilon and self.ask.get("table"):
            return (Mechanism("pure", study.evaluation.epsilon / 2, 2),)
        if not study.privacy.of_patients or kind not in (wire.STATISTICS, wire.TRAIN):
            return ()
        of = self.promise.mechanisms
        if kind == wire.STATISTICS and STATISTICS in of:
            return (dataclasses.replace(of[STATISTICS], count=1),)
        if kind == wire.TRAIN:
            counted = (dataclasses.replace(of[EVIDENCE], count=1),) if self.counts_evidence else ()
            return (dataclasses.replace(of[TRAINING], count=study.training.local_steps), *counted)
        return ()

    def _check_sharing(self, *, simulated: bool) -> None:
        """Refuse to share noise with members whom nobody has agreed on, or in numbers that would be rounded after it is added."""
        if not simulated:
            Pins(self.site.path, self.work, self.site.name).want_agreement()
        if self.ask.get("bits") != SHARED_BITS:
            raise Refusal(
                f"site {self.site.name}: a sum of {self.ask.get('bits')!r} fractional bits, shared noise lies on a lattice of {SHARED_BITS}; install "
                "the same oncofed version on both sides"
            )

    @property
    def counts_evidence(self) -> bool:
        """Whether counts of evidence leave with this round."""
        p = self.study.privacy
        return p.of_patients and p.evidence == "noised" and (self.round - 1) % p.evidence_every == 0

    @property
    def _told(self) -> str:
        return identity_text(self.study)

    @property
    def study_digest(self) -> str:
        """Names the study by all that its signature covers: what a server writes beside it makes no other study of it."""
        return hashlib.sha256(self._told.encode()).hexdigest()[:8]

    def _release(self, kind: str, mechanisms: tuple[Mechanism, ...]) -> Release:
        """The release under an id that is the same when the server asks again."""
        study = f"{self.study.name} {self.study_digest}"
        what = "evaluation" if kind == wire.EVALUATE else kind.removeprefix("query.")
        cap = (self.study.privacy.epsilon, self.study.privacy.delta) if self.study.privacy.of_patients else None
        purpose = f"{what}, noise of the total" if sharing_of(self.study, kind) else what
        return Release(
            f"{study}/{self.fold}/{self.phase}/{self.round}/{what}", self._asked, study, purpose, mechanisms, cap
        )

    @cached_property
    def _asked(self) -> str:
        """A digest of all that was asked: the study, the request and every number in it. Every site that is asked alike has it."""
        unasked = ("study_json", "signature", "package", HASH, BASE)
        asked = sorted((k, v) for k, v in self.ask.items() if k not in unasked)
        return _digest([self._told, asked, digests(self.arrays)])

    def _under_masks(self, kind: str, total: Sum, *, forget: bool) -> wire.Config:
        """Keep a sum that may leave for the exchanges that add it to the others' under masks; what the answer says of it."""
        privacy = self.study.privacy
        sums = SecureSums(self.work, self.site.path, self.site.name, self.policy.min_members)
        question = _digest([kind, self._asked])
        bits = self.ask.get("bits")
        flags = [k for k in PLACES if self.ask.get(k) or k in self.arrays]
        slot = _digest([self._told, kind, self.fold, self.phase, self.round, flags])
        shares = sharing_of(self.study, kind)
        least, colluding = (shares.least, shares.colluding) if shares else (0, 0)
        told = self.study.name, total, bits, privacy.secure_threshold
        return sums.begin(question, slot, *told, least=least, colluding=colluding, forget=forget)  # type: ignore[arg-type]

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
        told = greet(self.site, self.work, self.study, self.policy)
        if self.study.privacy.secure_sum:
            told["identity"] = Identity.of(self.work, self.site.name).public.hex()
        return told

    @cached_property
    def beside(self) -> Beside:
        """What the federation agreed on beside genes."""
        return Beside.of(self.ask)

    @cached_property
    def panel(self) -> GenePanel:
        """The panel that the server names; it travels once, with the statistics, and is kept at the site by its hash."""
        wanted = str(self.ask["panel_hash"])
        if not re.fullmatch("[0-9a-f]{16}", wanted):  # it names a file below
            raise Refusal(f"site {self.site.name}: {wanted[:40]!r} is no panel hash")
        file = self.work / "panels" / f"{wanted}.txt"
        if "genes" in self.ask:
            panel = GenePanel.of_lines(map(str, self.ask["genes"]))  # type: ignore[arg-type]
            if panel.hash != wanted:
                raise Refusal(
                    f"site {self.site.name}: the panel in the message has hash {panel.hash}, the message says {wanted}"
                )
            if not file.exists():
                write_text(file, "\n".join(panel.lines) + "\n")
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
        if not self.study.privacy.on:  # where a fold is a patient's own, others stay where they were
            self._keep_folds(cohort)
            self._keep_patients(cohort)
        return cohort

    def _keep_patients(self, cohort: Cohort) -> None:
        """Refuse cancer types, the server's choice, whose patients differ by few from those of the study's earlier questions."""
        if self.policy.min_cell > 1:  # a hospital whose own files have changed begins anew
            of = f"{self.study.name}-{self.study_digest}-{fingerprint(self.site, self.study.multimodal)[:16]}"
            asked, patients = (
                AskedPatients(self.work / "asked" / of, self.site.name),
                frozenset(cohort.patient.tolist()),
            )
            asked.check(patients, self.policy.min_patients)

    def _keep_folds(self, cohort: Cohort) -> None:
        """Refuse to go on where patients have come or gone since the fold began: others would move from test to training.

        The statistics begin a fold, and begin it anew unless the study resumes.
        """
        s = self.study
        deal = _digest(
            [s.seed, s.splits.model_dump(mode="json"), s.independent_folds, s.model.name, s.task.kind, self.cancers]
        )
        file = self.work / "folds" / f"{s.name}-{deal[:16]}-{self.fold}.txt"
        who = _digest([cohort.patient.tolist(), cohort.fold.tolist()])
        begins = "genes" in self.ask and not self.ask.get("final")
        if file.exists() and file.read_text() != who and not (begins and not self.study.runtime.resume):
            raise Refusal(
                f"site {self.site.name}: its patients are others than when fold {self.fold} began, so held-out ones would be trained "
                "on; restore the site's files, or begin the study anew"
            )
        if begins:
            write_text(file, who)

    @cached_property
    def split(self) -> np.ndarray:
        """`train`, `validation` or `test` for each patient of the cohort."""
        return split_names(self.cohort, self.study, self.fold, self.site.name)

    @cached_property
    def promise(self) -> Promise:
        """What the study lets out of a patient, with noise of the scale that the message names; refused where that is too little."""
        try:
            if "noise_scale" not in self.ask:
                raise ValueError("the message names no noise_scale")
            return kept(self.study, float(self.ask["noise_scale"]))  # type: ignore[arg-type]
        except (TypeError, ValueError) as error:
            raise Refusal(f"site {self.site.name}: the study's privacy does not hold: {error}") from None

    @property
    def held(self) -> Held:
        """What everyone knows of the site from its greeting: cancer types, and modalities by the files that are there."""
        told = self.site.description.cancer_types if self.study.task.label == "cancer_type" else ()
        cancers = (
            {self.cancers.index(c) for c in told if c in self.cancers} if told else set(np.unique(self.cohort.cancer))
        )
        images = self.site.find(PATHOLOGY_FILES) is not None or (self.site.path / self.site.description.slides).is_dir()
        files = {
            RNA: self.site.find(EXPRESSION) is not None,
            PATHOLOGY: images,
            ALTERATIONS: self.site.find(ALTERATION_FILES) is not None,
        }
        modalities = frozenset(m for m, there in files.items() if there)
        return Held(frozenset(int(c) for c in cancers), modalities, self.known_patients)

    @property
    def known_patients(self) -> int:
        """The site's training patients as everyone may know them: of its known patients those that a fold leaves, on average."""
        s = self.study.splits
        share = 1.0 if self.fold == ALL_PATIENTS or s.held_out_sites else 1.0 - 1.0 / s.folds
        return max(1, round(share * known_patients(self.site, self.work)))

    def training_cohort(self) -> Cohort:
        chosen = self.cohort.select(self.split == "train")
        if not len(chosen) and not self.study.privacy.of_patients:  # noise covers nobody as well
            raise Refusal(f"site {self.site.name}: no training patient in fold {self.fold}")
        return chosen

    def scored_cohort(self) -> Cohort:
        """The held-out patients, or those kept aside to choose the round."""
        return self.cohort.select(self.split == ("validation" if self.ask.get("validation") else "test"))

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
        return {m: Scaling.of(self.arrays, scale_prefix(m)) for m in self.tables}

    @property
    def tables(self) -> tuple[str, ...]:
        """The modalities whose numbers the study brings to one scale."""
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
        """The model's weights that the question is about, in float32 however they came."""
        return part(WEIGHTS, self.arrays)


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
