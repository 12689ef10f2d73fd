"""One fold of a study at the server: statistics, phases of training, evaluation, explanation."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from oncofed.common import wire
from oncofed.common.blocks import Sum, under
from oncofed.common.compression import Coding
from oncofed.common.covariates import input_names
from oncofed.common.modalities import NO_BESIDE, Beside
from oncofed.common.models.build import Sizes, begin_from, build_model, transfer
from oncofed.common.panel import GenePanel
from oncofed.common.saved import SavedModel, model_file
from oncofed.common.splits import ALL_PATIENTS
from oncofed.common.study import PRETRAIN, TRAIN, Study
from oncofed.server.broadcast import Broadcast
from oncofed.server.checkpoint import save_arrays
from oncofed.server.cross_site import CrossSite
from oncofed.server.evaluation import gather_table, table_file
from oncofed.server.explanation import PUBLIC_RISKS, Explanation, public_explanation
from oncofed.server.inquiry import Inquiry
from oncofed.server.noise import change_of_gradients, noise_of_the_server
from oncofed.server.roster import NotEnoughSites, Roster
from oncofed.server.rounds import Rounds, headline, headline_of
from oncofed.server.statistics import Frame, gather_statistics
from oncofed.server.strategy import EvidenceStrategy

log = logging.getLogger("oncofed.server")


@dataclass
class FoldRun:
    """One fold at the server."""

    study: Study
    roster: Roster
    panel: GenePanel
    cancers: tuple[str, ...]
    fold: int
    out: Path
    beside: Beside = NO_BESIDE
    start: SavedModel | None = None

    def run(self, advance: Callable[[str], None]) -> dict[str, Any]:
        """All phases; `advance` is called with a line of news after each round. Returns the fold's part of the results."""
        begin, sent, received = time.perf_counter(), self.roster.sent, self.roster.received
        broadcast = Broadcast.of(self.study)
        inquiry = Inquiry(self.study, self.roster, self.panel, self.cancers, self.fold, broadcast, self.beside)
        # also when resuming: it brings the panel to sites that came since
        frame, baseline, follow_up = gather_statistics(inquiry, self.start)
        result: dict[str, Any] = {"fold": self.fold}
        rounds, before = self._train(inquiry, frame, baseline, advance, self.out)
        result |= {"pretraining": {"curve": before.curve}} if before else {}
        strategy, frame = rounds.strategy, rounds.frame
        result |= {"curve": rounds.curve, "grid_months": list(frame.grid.starts)}
        result["devices"] = dict(sorted(rounds.devices.items()))
        result["blocks"] = list(strategy.blocks.names)
        result["site_evidence"] = {site: v.tolist() for site, v in sorted(rounds.site_evidence.items())}
        result["robust"] = strategy.guard.found()
        result["site_rounds"] = dict(sorted(rounds.site_rounds.items()))
        private = self.study.privacy.on
        if private and self.fold != ALL_PATIENTS and not self.study.evaluation.epsilon:
            list(
                inquiry.ask(
                    wire.EVALUATE, frame.config | {"own": True}, frame.arrays | under("weights/", strategy.weights)
                )
            )
        if self.fold != ALL_PATIENTS and not self.study.evaluation.epsilon and not private:
            try:
                evaluation = rounds.score(len(rounds.curve), {"final": True})
            except NotEnoughSites as error:  # what is measured of a model must not cost the model
                log.warning("fold %d: the model is not evaluated: %s", self.fold, error)
            else:
                rounds.curve[rounds.kept - 1] |= headline(evaluation, "test")
                result["evaluation"] = {name: value.tolist() for name, value in evaluation.items()}
        asked = Explanation(inquiry, frame, strategy)
        explanation = public_explanation(self.study, frame, strategy.weights) if private else asked.gather()
        self._save_model(strategy, frame, explanation)
        evaluated = self.study.evaluation.tables and not (private and not self.study.evaluation.epsilon)
        if self.study.task.kind == "survival" and evaluated and self.fold != ALL_PATIENTS:
            if private:
                explanation = explanation | {"risk_counts": PUBLIC_RISKS * np.ones((len(self.cancers), 1))}
            table = gather_table(inquiry, frame, strategy.weights, explanation, follow_up)
            if table is not None:
                table.save(table_file(self.out, self.fold))
        ablation = asked.ablate(explanation) if self.fold != ALL_PATIENTS else None
        result |= {"ablation": ablation} if ablation else {}
        result |= {
            "seconds": time.perf_counter() - begin,
            "seconds_in_local_steps": rounds.seconds_at_sites + (before.seconds_at_sites if before else 0.0),
            "seconds_saving": rounds.seconds_saving + (before.seconds_saving if before else 0.0),
            "bytes_to_sites": self.roster.sent - sent,
            "bytes_from_sites": self.roster.received - received,
            "training_bytes": dict(sum((r.bytes_moved for r in (rounds, before) if r), Counter())),
            "bytes_by_round": [{"phase": r.phase} | one for r in (before, rounds) if r for one in r.moved],
            "parameters": int(sum(v.size for v in strategy.weights.values())),
            "trained": int(sum(strategy.weights[name].size for name in strategy.trainable)),
        }
        if self.study.analysis.cross_site and self.fold != ALL_PATIENTS:
            crossed = CrossSite(rounds, lambda alone: self._train(alone, frame, baseline, lambda _: None, None)[0])
            result["cross_site"] = crossed.run()
        test = headline_of(rounds.curve[rounds.kept - 1], "test") if rounds.curve else None
        self.roster.journal.write("fold", fold=self.fold, seconds=round(time.perf_counter() - begin, 3), test=test)
        return result

    def _train(
        self,
        inquiry: Inquiry,
        frame: Frame,
        baseline: np.ndarray | None,
        advance: Callable[[str], None],
        out: Path | None,
    ) -> tuple[Rounds, Rounds | None]:
        """Training after its last round and, where there is one, pre-training; their checkpoints lie below `out`."""
        before = None
        if self.study.pretraining.rounds:
            before = self._phase(inquiry, PRETRAIN, frame, baseline, None, out)
            before.run(advance)
            frame = before.frame  # the scale that the encoder was trained on, whoever has answered now
        rounds = self._phase(inquiry, TRAIN, frame, baseline, before.strategy.weights if before else None, out)
        rounds.run(advance)
        return rounds, before

    def _phase(
        self,
        inquiry: Inquiry,
        phase: str,
        frame: Frame,
        baseline: np.ndarray | None,
        pretrained: Sum | None,
        out: Path | None,
    ) -> Rounds:
        """A phase at its start, or where its checkpoint left it."""
        covariates = len(input_names(self.study.panel.covariates))
        sizes = Sizes(len(self.panel), self.cancers, len(frame.grid), covariates, self.beside)
        model = build_model(self.study, sizes, phase=phase, fold=self.fold)
        strategy = EvidenceStrategy.of(inquiry.aggregation, model)
        strategy.coding = Coding.of(self.study.transport, secure_sums=self.study.secure_sums)
        if self.study.privacy.on:  # what sites saw of the modalities is not told
            strategy.modalities, strategy.silent = (), True
        if self.start is not None and phase == TRAIN:
            strategy.weights = begin_from(strategy.weights, self.start.weights)
        if baseline is not None and "head.log_baseline" in strategy.weights:
            strategy.weights["head.log_baseline"] = baseline
        if pretrained is not None:
            strategy.weights = transfer(strategy.weights, pretrained)
        if self.study.privacy.unit == "hospital":
            strategy.cover = noise_of_the_server(self.study)
        if self.study.privacy.sharing is not None:
            strategy.turn = change_of_gradients(self.study, model)
        rounds = Rounds(inquiry, phase, frame, strategy, out)
        rounds.resume()
        return rounds

    def _save_model(self, strategy: EvidenceStrategy, frame: Frame, explanation: Sum) -> None:
        """The model with all that is needed to use it: weights, scale, panel, cancer types, time grid, study, spread of risks."""
        about = {
            "study": self.study.model_dump(mode="json", exclude={"runtime"}),
            "panel_hash": self.panel.hash,
            "cancers": list(self.cancers),
            "fold": self.fold,
            "grid_months": list(frame.grid.starts),
            "genes": self.panel.lines,
            "unit_family": "/".join(sorted({str(h["unit_family"]) for h in self.roster.hellos.values()} - {""})),
            "beside": self.beside.config(),
        }
        arrays = under("weights/", strategy.weights) | frame.arrays | under("explanation/", explanation)
        save_arrays(self.out / model_file(self.fold), arrays, about)
