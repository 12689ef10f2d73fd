"""What a site answers to the statistics and to a round of training."""

from __future__ import annotations

import dataclasses
import logging
import time

import numpy as np
import torch
from oncofed.client.batch import Batch
from oncofed.client.data.cohort import Cohort
from oncofed.client.release import Answer
from oncofed.client.scale import moment_sums, power_sums
from oncofed.client.session import Session
from oncofed.client.train import train_locally
from oncofed.common import wire
from oncofed.common.blocks import part
from oncofed.common.errors import Refusal
from oncofed.common.modalities import RNA
from oncofed.common.modulation import BRANCHES
from oncofed.common.scaling import NUMBERS, moments
from oncofed.common.splits import seed_from
from oncofed.common.study import PRETRAIN
from oncofed.common.survival import event_table
from oncofed.common.tables import CLASSES

log = logging.getLogger("oncofed.client")


def statistics(session: Session) -> Answer:
    """Sums over training patients: first moments of each table and event tables, then moments of powers."""
    cohort = session.training_cohort()
    names, count = session.tables, len(session.cancers) if session.study.scale_by_cancer else 1
    if session.ask.get("powers"):
        total, cells = power_sums(cohort, names, count, session.scales)
        return Answer({}, total, len(cohort), cells, NUMBERS)
    total, cells = moment_sums(cohort, names, count)
    covariates = moments(cohort.v_NV, np.zeros(len(cohort), dtype=np.int64), 1)
    events, exposure = event_table(cohort.time, cohort.event, cohort.cancer, len(session.cancers))
    total |= {f"covariate_{k}": v[0] for k, v in covariates.items()} | {"events": events, "exposure": exposure}
    if session.study.task.kind == "classification":
        total |= {CLASSES: np.bincount(cohort.cancer, minlength=len(session.cancers)).astype(np.float64)}
    if session.policy.min_cell > 1:  # of a few patients months of death would leave
        outcome = [name for name in ("events", "exposure", CLASSES) if name in total]
        cells |= dict.fromkeys(outcome, np.bincount(cohort.cancer, minlength=len(session.cancers)))
    config: wire.Config = {"missing_genes": _missing_genes(session, cohort)}
    return Answer(config, total, len(cohort), cells, 3)


def _missing_genes(session: Session, cohort: Cohort) -> int:
    """Genes of the panel without any value here; they are filled with the federation's mean."""
    if session.study.embeds or not cohort.has(RNA).any():
        return 0
    missing = int(np.isnan(cohort.x_NG).all(axis=0).sum())
    if missing:
        log.warning(
            "%s: %d of %d genes of the panel are missing and filled with the federation's mean",
            session.site.name,
            missing,
            len(session.panel),
        )
    return missing


def train(session: Session) -> Answer:
    """The local steps of a round: training sum, mean loss, and the seconds that they took."""
    cohort, t = session.training_cohort(), session.study.steps(session.phase)
    if session.phase == PRETRAIN and session.study.multimodal:
        cohort = cohort.select(cohort.has(RNA))
        if not len(cohort):
            raise Refusal(f"site {session.site.name}: no patient with expression, so it takes no part in pre-training")
    model, batch = session.model, _of_enough(session, session.batch(cohort))
    if session.round <= 1:
        log.info("%s: trains %d patients on %s", session.site.name, len(cohort), session.device_name)
    seed = seed_from(session.study.seed, session.phase, session.fold, session.round, session.site.name)
    begin = time.perf_counter()
    total, loss = train_locally(
        model,
        session.weights,
        batch,
        session.study,
        phase=session.phase,
        round_=session.round,
        seed=seed,
        load=part("load/", session.arrays),
        branches=session.arrays.get(BRANCHES),
        classes=session.arrays.get(CLASSES),
    )
    seconds = time.perf_counter() - begin
    seen = min(len(cohort), t.batch_size * t.local_steps) if t.batch_size else len(cohort)
    config: wire.Config = {
        "loss": loss,
        "patients": len(cohort),
        "seconds": seconds,
        "device": session.device_name,
    }
    return Answer(config, total, seen)


def _of_enough(session: Session, batch: Batch) -> Batch:
    """The batch without modalities that fewer patients have than the policy wants: their encoders would tell of these few."""
    if not session.study.multimodal:
        return batch
    least = session.policy.min_patients
    few = [m for m in session.study.modalities if 0 < int(batch.has[m].sum()) < least]
    if few and session.round <= 1:
        log.warning(
            "%s: fewer than %d patients have %s; it is left out here", session.site.name, least, " and ".join(few)
        )
    return dataclasses.replace(batch, has=batch.has | {m: torch.zeros_like(batch.has[m]) for m in few})
