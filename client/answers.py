"""What a site answers to the statistics and to a round of training."""

from __future__ import annotations

import dataclasses
import logging
import time

import numpy as np
import torch
from oncofed.client.batch import Batch
from oncofed.client.data.cohort import Cohort
from oncofed.client.privacy.evidence import noised_evidence, public_evidence
from oncofed.client.privacy.hospital import clipped_change
from oncofed.client.release import Answer
from oncofed.client.scale import moment_sums, power_sums
from oncofed.client.session import Session
from oncofed.client.train import train_locally
from oncofed.client.transport import code_change
from oncofed.common import wire
from oncofed.common.blocks import LOSS, part
from oncofed.common.errors import Refusal
from oncofed.common.files import replacing
from oncofed.common.modalities import RNA
from oncofed.common.models.autoencoder import GeneAutoencoder
from oncofed.common.models.build import set_weights
from oncofed.common.modulation import BRANCHES
from oncofed.common.noise import SecureNoise
from oncofed.common.privacy.releases import EVIDENCE, STATISTICS
from oncofed.common.privacy.sharing import HORIZON, STATISTICS_SENSITIVITY
from oncofed.common.scaling import NUMBERS, moments
from oncofed.common.splits import seed_from
from oncofed.common.study import PRETRAIN
from oncofed.common.survival import TimeGrid, event_table
from oncofed.common.tables import CLASSES

log = logging.getLogger("oncofed.client")


def statistics(session: Session) -> Answer:
    """Sums over training patients: first moments of each table and event tables, then moments of powers."""
    if session.study.privacy.on:
        return _private_statistics(session)
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


def _private_statistics(session: Session) -> Answer:
    """Nothing, or events and exposure by cancer type with noise; the message has brought the panel.

    A patient adds one event and at most `HORIZON` months: counted in horizons, a vector of norm sqrt(2) at most.
    """
    cohort = session.training_cohort()  # a fold begins here, whether or not anything is asked of it
    if not session.study.privacy.of_patients or STATISTICS not in session.promise.mechanisms:
        return Answer({})
    cancers = len(session.cancers)
    edges = tuple(float(e) for e in session.ask["edges"])  # type: ignore[union-attr]
    time = np.minimum(cohort.time, HORIZON)
    events, exposure = event_table(time, cohort.event, cohort.cancer, cancers, TimeGrid(edges))
    deviation = session.promise.mechanisms[STATISTICS].noise
    both = torch.from_numpy(np.stack([events, exposure / HORIZON]))
    sharing = session.study.privacy.sharing
    if sharing is not None:  # in sensitivities: the total alone is brought to months
        share = sharing.of_each(deviation)
        part = SecureNoise().covered(both / STATISTICS_SENSITIVITY, sensitivity=1.0, deviation=share).numpy()
        return Answer({}, {"events": part[0], "exposure": part[1]}, len(cohort), noised=True)
    noisy = SecureNoise().covered(both, sensitivity=STATISTICS_SENSITIVITY, deviation=deviation).numpy()
    return Answer({}, {"events": noisy[0], "exposure": noisy[1] * HORIZON}, len(cohort), noised=True)


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
    """A round's answer; its sum is coded at the door, once policy and checks are passed."""
    answer = _trained(session)
    return dataclasses.replace(answer, code=lambda total: code_change(session, total, session.model.blocks()))


def _trained(session: Session) -> Answer:
    """The local steps of a round: training sum, mean loss, and the seconds that they took."""
    cohort = session.training_cohort()
    if session.phase == PRETRAIN and session.study.multimodal:
        cohort = cohort.select(cohort.has(RNA))
        if not len(cohort):
            raise Refusal(f"site {session.site.name}: no patient with expression, so it takes no part in pre-training")
    # noise covers few patients as well as many, and a bound on their number would show by one of them
    whole, private = session.batch(cohort), session.study.privacy.of_patients
    model, batch = session.model, whole if private else _of_enough(session, whole)
    if session.round <= 1:
        log.info("%s: trains %d patients on %s", session.site.name, len(cohort), session.device_name)
    if private:
        return _train_privately(session, batch)
    seed = seed_from(session.study.seed, session.phase, session.fold, session.round, session.site.name)
    begin = time.perf_counter()
    alone = session.study.privacy.unit == "hospital"
    total, loss = train_locally(
        model,
        session.weights,
        batch,
        session.study.changed(aggregation__rule="fedavg") if alone else session.study,
        phase=session.phase,
        round_=session.round,
        seed=seed,
        load=part("load/", session.arrays),
        branches=session.arrays.get(BRANCHES),
        classes=session.arrays.get(CLASSES),
    )
    if alone:
        total = clipped_change(total, model.blocks(), session.study.privacy.clip, session.site.name)
        return Answer(_told_of_many(session), total, len(batch))
    if session.study.privacy.secure_sum:
        return Answer(
            _told_of_many(session),
            total | {LOSS: np.array([loss * len(batch), len(batch)])},
            _seen(session, cohort),
        )
    seconds = time.perf_counter() - begin
    config: wire.Config = {
        "loss": loss,
        "patients": len(cohort),
        "seconds": seconds,
        "device": session.device_name,
    }
    return Answer(config, total, _seen(session, cohort))


def _seen(session: Session, cohort: Cohort) -> int:
    """The patients that a round without noise rests on."""
    t = session.study.steps(session.phase)
    return min(len(cohort), t.batch_size * t.local_steps) if t.batch_size else len(cohort)


def _train_privately(session: Session, batch: Batch) -> Answer:
    """The round's steps with clipped gradients and noise; neither the loss nor the time that they took is told."""
    model, promise, p = session.model, session.promise, session.study.privacy
    assert not isinstance(model, GeneAutoencoder)
    set_weights(model, session.weights)
    evidence = public_evidence(model, batch, session.held)
    if p.evidence == "noised":
        file = session.work / "evidence" / f"{session.study_digest}-{session.fold}.npy"
        if session.counts_evidence:
            evidence = noised_evidence(
                model,
                batch,
                session.held,
                deviation=promise.mechanisms[EVIDENCE].noise,
                least=session.policy.min_patients,
            )
            with replacing(file) as temporary, temporary.open("wb") as out:
                np.save(out, evidence)
        elif file.exists():
            evidence = np.load(file)
    # Opacus is slow to import, and other messages do without
    if p.sharing is not None:
        from oncofed.client.privacy.shared_step import shared_gradients

        total = shared_gradients(
            model,
            session.weights,
            batch,
            session.study,
            load=part("load/", session.arrays),
            deviation=p.sharing.of_each(promise.deviation),
            evidence=evidence,
            probe=session.round <= 1,
        )
        return Answer(_told_of_many(session), total, len(batch), noised=True)
    from oncofed.client.privacy.train import train_privately

    total = train_privately(
        model,
        session.weights,
        batch,
        session.study,
        round_=session.round,
        load=part("load/", session.arrays),
        patients=session.held.patients,
        deviation=promise.deviation,
        evidence=evidence,
        probe=session.round <= 1,
    )
    return Answer(_told_of_many(session), total, len(batch), noised=True)


def _told_of_many(session: Session) -> wire.Config:
    """What an answer under privacy, or under masks, says beside its sum: nothing of loss or time, patients as everyone may know them."""
    return {"patients": session.held.patients, "seconds": 0.0, "device": session.device_name}


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
