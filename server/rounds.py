"""The rounds of one phase: ask, aggregate, score now and then, checkpoint, and stop when it gets no better."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from oncofed.common import wire
from oncofed.common.blocks import LOSS, Sum, part, under
from oncofed.common.broadcast import WEIGHTS
from oncofed.common.class_metrics import auroc_error, balanced_accuracy, class_shapes, macro_auroc, macro_f1
from oncofed.common.metrics import mean_within_cancer
from oncofed.common.privacy.sharing import SHARED_BITS
from oncofed.common.splits import ALL_PATIENTS
from oncofed.common.study import PRETRAIN, Training
from oncofed.common.survival import TimeGrid
from oncofed.server.aggregate import UPDATE_BITS
from oncofed.server.checkpoint import Checkpoints
from oncofed.server.inquiry import Inquiry
from oncofed.server.roster import NotEnoughSites
from oncofed.server.statistics import Frame
from oncofed.server.strategy import EvidenceStrategy, RoundSummary

log = logging.getLogger("oncofed.server")

AUROC_ERROR = 0.005
"""An AUROC from bins that may be further off is left out: probabilities of a model that has hardly begun lie in a few bins."""


@dataclass
class Rounds:
    """One phase of one fold; without `out` it leaves no checkpoint and begins anew.

    `site_evidence` sums over the rounds what each site said stands behind each block, `site_rounds` counts its answers, `curve` says
    of each round who took part and how it went. `moved` are the bytes of each round to and from sites, and what they would have
    been in float32 and in full (`plain_`). A checkpoint needs no random state: what is drawn in a round follows from the study's
    seed and the round's number, and noise of privacy is never drawn twice.
    """

    inquiry: Inquiry
    phase: str
    frame: Frame
    strategy: EvidenceStrategy
    out: Path | None
    curve: list[dict[str, Any]] = field(default_factory=list)
    seconds_at_sites: float = 0.0
    seconds_saving: float = 0.0
    devices: dict[str, str] = field(default_factory=dict)
    site_evidence: dict[str, np.ndarray] = field(default_factory=dict)
    site_rounds: dict[str, int] = field(default_factory=dict)
    best: Sum = field(default_factory=dict)
    moved: list[dict[str, int]] = field(default_factory=list)

    def run(self, advance: Callable[[str], None], rounds: int = 0) -> None:
        """The rounds that `curve` lacks, up to `rounds` (0: the phase's own); afterwards the strategy holds the last round's
        weights, or the best round's."""
        rounds = rounds or self.inquiry.study.steps(self.phase).rounds
        if not self.curve:
            self.inquiry.broadcast.begin()
        for round_ in range(len(self.curve) + 1, rounds + 1):
            if self._patience_is_over():
                break
            begin, before = time.perf_counter(), Counter(self._sent)
            self._round(round_)
            self._note(time.perf_counter() - begin, before)
            self.save()
            point = self.curve[-1]
            loss = f"loss {point['train_loss']:.4f}, " if "train_loss" in point else ""
            advance(f"fold {self.inquiry.fold} {self.phase} round {round_}: {loss}{point['sites']} sites")
        if self.best:
            self.strategy.weights = dict(self.best)
        else:
            self.strategy.settle()
        self.strategy.weights = self.told  # the model is what the sites hold of it

    @property
    def told(self) -> Sum:
        """The strategy's weights as the sites get them."""
        return self.inquiry.broadcast.meet(self.strategy.weights)

    def _round(self, round_: int) -> None:
        arrays, before = self.frame.arrays | self.strategy.arrays() | under(WEIGHTS, self.told), self._sent
        summary = self._summed(arrays, round_)
        now = {key: value - before[key] for key, value in self._sent.items()}
        self.moved.append({"round": round_} | now | {"plain_from_sites": summary.plain_bytes})
        self.seconds_at_sites += summary.seconds_at_sites
        self.devices |= summary.devices
        for site, evidence in summary.site_evidence.items():
            self.site_evidence[site] = self.site_evidence.get(site, np.zeros(len(evidence))) + evidence
        for site in summary.sites:
            self.site_rounds[site] = self.site_rounds.get(site, 0) + 1
        self.curve.append(
            {
                "round": round_,
                "sites": len(summary.sites),
                "took_part": summary.sites,
                "evidence": summary.evidence,
            }
            | ({"train_loss": summary.loss} if summary.loss is not None else {})
            | ({"branches": summary.branches} if summary.branches else {})
        )
        t = self.inquiry.study.training
        if self.phase == PRETRAIN or not t.evaluate_every or round_ % t.evaluate_every:
            return
        if self.inquiry.study.splits.validation:
            score = self._shown(round_, {"validation": True}, "validation", needed=bool(t.patience))
            self.curve[-1] |= score
            losses = [p["validation_loss"] for p in self.curve if "validation_loss" in p]
            if t.patience and "validation_loss" in score and score["validation_loss"] <= min(losses):
                self.best = dict(self.told)
        elif self.inquiry.fold != ALL_PATIENTS and round_ < t.rounds and not self._unseen:
            self.curve[-1] |= self._shown(round_, {}, "test")

    def _note(self, seconds: float, before: Counter[str]) -> None:
        """The last round in the journal; not one of a model that is trained beside the federation's."""
        if self.out is None:
            return
        point, now = self.curve[-1], self._sent
        self.inquiry.roster.journal.write(
            "round",
            fold=self.inquiry.fold,
            phase=self.phase,
            round=point["round"],
            seconds=round(seconds, 3),
            sites=list(point["took_part"]),
            bytes_to_sites=now["to_sites"] - before["to_sites"],
            bytes_from_sites=now["from_sites"] - before["from_sites"],
            loss=point.get("train_loss"),
            validation=headline_of(point, "validation"),
        )

    def _summed(self, arrays: Sum, round_: int) -> RoundSummary:
        """Ask for a round and step by it: answer by answer, or by a total alone where the study sums under masks."""
        config, privacy = self.frame.config, self.inquiry.study.privacy
        if not privacy.secure_sum:
            answers = self.inquiry.ask(wire.TRAIN, config, arrays, phase=self.phase, round_=round_)
            return self.strategy.aggregate(answers, round_, self.inquiry.roster)
        summed = self.inquiry.add_under_masks(
            wire.TRAIN,
            config,
            arrays,
            self.strategy.shapes | ({} if privacy.on else {LOSS: (2,)}),
            phase=self.phase,
            round_=round_,
            bits=UPDATE_BITS if privacy.sharing is None else SHARED_BITS,
            check=self.strategy.check_told,
        )
        return self.strategy.take_total(summed, round_)

    @property
    def _sent(self) -> dict[str, int]:
        roster = self.inquiry.roster
        return {"to_sites": roster.sent, "from_sites": roster.received, "plain_to_sites": roster.plain}

    @property
    def bytes_moved(self) -> Counter[str]:
        """The bytes of all rounds together."""
        return sum((Counter({k: v for k, v in one.items() if k != "round"}) for one in self.moved), Counter())

    @property
    def _unseen(self) -> bool:
        """Whether held-out patients are not scored between rounds: of a site's own model, or where only noise may leave."""
        study = self.inquiry.study
        return bool(self.inquiry.alone or study.evaluation.epsilon or study.privacy.on)

    def _shown(self, round_: int, config: wire.Config, name: str, *, needed: bool = False) -> dict[str, float]:
        """The scores of a round; nothing where hospitals let too few groups show, unless the study chooses a round by them."""
        try:
            return headline(self.score(round_, config), name)
        except NotEnoughSites as error:
            if needed:
                raise NotEnoughSites(
                    f"{error}; training.patience chooses the round by these scores, set it to 0"
                ) from None
            log.warning("fold %d round %d: no %s scores: %s", self.inquiry.fold, round_, name, error)
            return {}

    def _patience_is_over(self) -> bool:
        t = self.inquiry.study.steps(self.phase)
        losses = [p["validation_loss"] for p in self.curve if "validation_loss" in p]
        if not isinstance(t, Training) or not t.patience or not losses:
            return False
        return len(losses) - 1 - int(np.argmin(losses)) >= t.patience

    @property
    def kept(self) -> int:
        """The round whose weights the strategy holds after `run`: the best one of validation, or the last."""
        losses = [(p["validation_loss"], -p["round"]) for p in self.curve if "validation_loss" in p]
        return -min(losses)[1] if self.best and losses else len(self.curve)

    def score(self, round_: int, config: wire.Config) -> Sum:
        """Summed evaluation by cancer type with the strategy's weights, as the sites get them."""
        arrays = self.frame.arrays | under(WEIGHTS, self.told)
        return self.inquiry.add_up(
            wire.EVALUATE, self.frame.config | config, arrays, self.shapes(bool(config.get("final"))), round_=round_
        )

    def shapes(self, final: bool = False) -> dict[str, tuple[int, ...]]:
        """The arrays of a site's evaluation, of a `final` one with those of the experts."""
        c, survival = len(self.inquiry.cancers), self.inquiry.study.task.kind == "survival"
        by_cancer = ("patients", "loss", "events", "concordant", "comparable")
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(by_cancer, (c,)) if survival else class_shapes(c)
        if final:
            for group, n in self.strategy.mixtures.items():
                shapes |= {f"routing/{group}": (c, n), f"first/{group}": (c, n)}
            hits = "concordant" if survival else "confusion"
            for group, n in self.strategy.removable.items() if self.inquiry.study.analysis.experts else ():
                shapes |= {f"without/{group}/loss": (n, c), f"without/{group}/{hits}": (n, c)}
        return shapes

    # -- state ---------------------------------------------------------------------------------------------------------

    @property
    def checkpoints(self) -> Checkpoints | None:
        """Where the phase leaves them; None where it leaves none."""
        keep = self.inquiry.study.runtime.keep_checkpoints
        return Checkpoints.of(self.out, self.inquiry.fold, self.phase, keep) if self.out else None

    def _about(self) -> dict[str, Any]:
        """What a checkpoint must share with the study that resumes it. Waiting times and paths may differ, and what comes
        after pre-training may change once that is done."""
        later = {"runtime", "analysis", "evaluation"} | ({"training", "name"} if self.phase == PRETRAIN else set())
        study = self.inquiry.study.model_dump(mode="json", exclude=later)
        panel, fold = self.inquiry.panel.hash, self.inquiry.fold
        beside, cancers = self.inquiry.beside.config(), list(self.inquiry.cancers)
        return {"study": study, "panel_hash": panel, "cancers": cancers, "fold": fold, "beside": beside}

    def save(self) -> None:
        """Write everything that the next round depends on."""
        if self.checkpoints is None:
            return
        begin = time.perf_counter()
        arrays = self.strategy.state() | under("frame/", self.frame.arrays) | under("best/", self.best)
        arrays |= under("site_evidence/", self.site_evidence)
        about = {"curve": self.curve, "grid_months": list(self.frame.grid.starts), "site_rounds": self.site_rounds}
        about["moved"] = self.moved
        broadcast = self.inquiry.broadcast
        if broadcast.on:
            arrays |= under("reference/", broadcast.reference)
            about |= {"reference": broadcast.stands_for, "holds": self.inquiry.roster.holds}
        self.checkpoints.save(len(self.curve), arrays, self._about() | about)
        self.seconds_saving += time.perf_counter() - begin
        self.inquiry.roster.journal.write("checkpoint", fold=self.inquiry.fold, phase=self.phase, round=len(self.curve))

    def resume(self) -> None:
        """Continue from the newest whole checkpoint, if there is one: on its scale and grid, whoever has answered now."""
        found = self.checkpoints.newest() if self.inquiry.study.runtime.resume and self.checkpoints else None
        if found is None:
            return
        file, state, about = found
        if {k: about.get(k) for k in self._about()} != self._about():
            raise ValueError(
                f"{file.relative_to(file.parent.parent)} was written by another study, panel or set of cancer types, or for other images; "
                "choose another runtime.out"
            )
        self.frame = Frame(part("frame/", state), TimeGrid(tuple(about["grid_months"])))
        self.strategy.restore(state)
        self.best, self.site_evidence = part("best/", state), part("site_evidence/", state)
        self.curve, self.moved = list(about["curve"]), list(about.get("moved", []))
        self.inquiry.broadcast.restore(part("reference/", state), str(about.get("reference", "")))
        self.inquiry.roster.holds |= about.get("holds", {})
        # a checkpoint that does not say it: as often as can be
        self.site_rounds = dict(about.get("site_rounds") or dict.fromkeys(self.site_evidence, len(self.curve)))
        log.info("fold %d: %s resumes after round %d", self.inquiry.fold, self.phase, len(self.curve))


def headline(evaluation: Sum, name: str) -> dict[str, float]:
    """Mean loss and the scores of scored patients; a score that is unknown (no pairs) is left out, JSON has no NaN."""
    out = {f"{name}_loss": float(evaluation["loss"].sum() / max(evaluation["patients"].sum(), 1.0))}
    if "confusion" in evaluation:
        table = evaluation["confusion"]
        scores = {"macro_f1": float(macro_f1(table)), "balanced_accuracy": float(balanced_accuracy(table))}
        if float(np.nanmax(auroc_error(evaluation["ranking"]), initial=0.0)) <= AUROC_ERROR:
            scores["macro_auroc"] = float(macro_auroc(evaluation["ranking"]))
    else:
        scores = {"c_index": mean_within_cancer(evaluation["concordant"], evaluation["comparable"])}
    return out | {f"{name}_{key}": score for key, score in scores.items() if not math.isnan(score)}


def headline_of(point: Mapping[str, Any], name: str) -> float | None:
    """The one number of a round's scores that stands for it: the C-index, in a classification macro-F1; None where there is none."""
    return next((point[key] for key in (f"{name}_c_index", f"{name}_macro_f1") if key in point), None)
