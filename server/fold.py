"""One fold of a study at the server: statistics, rounds of training, evaluation."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from oncofed.common import wire
from oncofed.common.blocks import Sum
from oncofed.common.metrics import mean_within_cancer
from oncofed.common.models.build import build_model, get_weights
from oncofed.common.panel import GenePanel
from oncofed.common.splits import ALL_PATIENTS
from oncofed.common.study import Study
from oncofed.common.survival import PUBLIC_EDGES, TimeGrid, coarsen, initial_log_baseline
from oncofed.server.aggregate import STATISTICS_BITS, Accumulator
from oncofed.server.checkpoint import load_arrays, save_arrays
from oncofed.server.roster import Answer, NotEnoughSites, Roster
from oncofed.server.strategy import EvidenceStrategy

log = logging.getLogger("oncofed.server")

CHECKPOINT_EVERY_S = 10.0
"""What a killed server loses at most; an error loses nothing. Short rounds would spend their time on the disk."""

MIN_SD = 1e-3
"""A gene that hardly varies keeps its scale: dividing by its deviation would blow up noise."""


@dataclass
class FoldRun:
    """One fold at the server; `grid` is set once the statistics (or the checkpoint) have fixed it."""

    study: Study
    roster: Roster
    panel: GenePanel
    cancers: tuple[str, ...]
    fold: int
    out: Path

    def run(self, advance: Callable[[str], None]) -> dict[str, Any]:
        """All phases; `advance` is called with a line of news after each round. Returns the fold's part of the results."""
        begin, sent, received = time.perf_counter(), self.roster.sent, self.roster.received
        statistics = self._gather_statistics()  # also when resuming: it brings the panel to sites that have come since
        scaling = scaling_from(statistics)
        self.grid = TimeGrid.from_events(statistics["events"].sum(0), self.study.task.intervals)
        checkpoint = self._read_checkpoint()
        if checkpoint:  # the weights were learned on that scale and grid, whoever has answered now
            scaling = {name: checkpoint[0][f"scaling/{name}"] for name in scaling}
            self.grid = TimeGrid(tuple(checkpoint[1]["grid_months"]))
        strategy = self._first_strategy(statistics)
        curve = []
        if checkpoint:
            strategy.restore(checkpoint[0])
            curve = list(checkpoint[1]["curve"])
            log.info("fold %d: resumes after round %d", self.fold, len(curve))
        at_sites, devices = self._train(strategy, scaling, curve, advance)
        result: dict[str, Any] = {"fold": self.fold, "curve": curve, "grid_months": list(self.grid.starts)}
        result["devices"] = dict(sorted(devices.items()))
        if self.fold != ALL_PATIENTS:
            evaluation = self._evaluate(scaling, strategy, self.study.training.rounds, final=True)
            curve[-1] |= _headline(evaluation)
            result["evaluation"] = {name: value.tolist() for name, value in evaluation.items()}
        self._save_model(strategy, scaling)
        result |= {
            "seconds": time.perf_counter() - begin,
            "seconds_in_local_steps": at_sites,
            "bytes_to_sites": self.roster.sent - sent,
            "bytes_from_sites": self.roster.received - received,
            "parameters": int(sum(v.size for v in strategy.weights.values())),
        }
        return result

    def _train(
        self, strategy: EvidenceStrategy, scaling: Sum, curve: list[dict[str, Any]], advance: Callable[[str], None]
    ) -> tuple[float, dict[str, str]]:
        """The rounds that `curve` lacks, appended to it; returns the seconds of the sites' steps, and their devices."""
        t = self.study.training
        at_sites, saved = 0.0, time.monotonic()
        devices: dict[str, str] = {}
        try:
            for round_ in range(len(curve) + 1, t.rounds + 1):
                answers = self._ask(wire.TRAIN, round_, {"grid": list(self.grid.starts)}, scaling | strategy.arrays())
                summary = strategy.aggregate(answers, round_, self.roster)
                at_sites += summary.seconds_at_sites
                devices |= summary.devices
                point: dict[str, Any] = {"round": round_, "train_loss": summary.loss, "sites": len(summary.sites)}
                curve.append(point | {"evidence": summary.evidence})
                if (
                    self.fold != ALL_PATIENTS
                    and t.evaluate_every
                    and round_ % t.evaluate_every == 0
                    and round_ < t.rounds
                ):
                    curve[-1] |= _headline(self._evaluate(scaling, strategy, round_, final=False))
                if time.monotonic() - saved >= CHECKPOINT_EVERY_S:
                    self._save(strategy, scaling, curve)
                    saved = time.monotonic()
                advance(f"fold {self.fold} round {round_}: loss {summary.loss:.4f}, {len(summary.sites)} sites")
        finally:
            if curve:  # also on the way out of an error: the last whole round is never lost
                self._save(strategy, scaling, curve)
        return at_sites, devices

    # -- phases --------------------------------------------------------------------------------------------------------

    def _gather_statistics(self) -> Sum:
        """Federated sums for scaling, time grid and baselines, over training patients only."""
        genes, cancers, edges = len(self.panel), len(self.cancers), len(PUBLIC_EDGES)
        shapes: dict[str, tuple[int, ...]] = {"n": (genes,), "sum": (genes,), "squares": (genes,)}
        shapes |= {"events": (cancers, edges), "exposure": (cancers, edges)}
        total = self._add_up(wire.STATISTICS, 0, {"genes": list(self.panel.genes)}, None, shapes)
        empty = int((total["n"] == 0).sum())
        if empty:
            log.warning("fold %d: %d genes of the panel have no value at any site and stay at 0", self.fold, empty)
        return total

    def _evaluate(self, scaling: Sum, strategy: EvidenceStrategy, round_: int, *, final: bool) -> Sum:
        """Summed evaluation of the held-out fold by cancer type, over the whole federation."""
        cancers = len(self.cancers)
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(
            ("patients", "events", "loss", "concordant", "comparable"), (cancers,)
        )
        shapes |= {f"routing/{group}": (cancers, n) for group, n in strategy.mixtures.items()}
        arrays = scaling | {f"weights/{n}": v for n, v in strategy.weights.items()}
        return self._add_up(wire.EVALUATE, round_, {"grid": list(self.grid.starts), "final": final}, arrays, shapes)

    def _add_up(
        self, kind: str, round_: int, config: wire.Config, arrays: Sum | None, shapes: dict[str, tuple[int, ...]]
    ) -> Sum:
        accumulator = Accumulator(shapes, STATISTICS_BITS)
        for answer in self._ask(kind, round_, config, arrays):
            try:
                accumulator.add(answer.arrays, answer.site)
            except ValueError as error:
                self.roster.leave_out(answer.site, kind, round_, str(error))
        if accumulator.count < self.study.aggregation.min_sites:
            raise NotEnoughSites(
                f"'{kind}': {accumulator.count} good answers, aggregation.min_sites = {self.study.aggregation.min_sites}"
            )
        return accumulator.total()

    def _ask(self, kind: str, round_: int, config: wire.Config, arrays: Sum | None) -> Iterator[Answer]:
        """Ask all sites; an answer to another study, fold, round or panel is left out."""
        stamp: wire.Config = {"fold": self.fold, "round": round_, "panel_hash": self.panel.hash}
        hello = greeting(self.study)
        text: wire.Config = hello | {"cancers": list(self.cancers)}
        self.roster.greet_newcomers(hello)
        for answer in self.roster.ask(kind, {**stamp, **text, **config}, arrays, round_=round_):
            wrong = {k: answer.config.get(k) for k, v in stamp.items() if answer.config.get(k) != v}
            if wrong:
                self.roster.leave_out(
                    answer.site, kind, round_, f"answers {wrong}, asked { {k: stamp[k] for k in wrong} }"
                )
                continue
            yield answer

    # -- state ---------------------------------------------------------------------------------------------------------

    def _first_strategy(self, statistics: Sum) -> EvidenceStrategy:
        model = build_model(
            self.study, genes=len(self.panel), cancers=self.cancers, intervals=len(self.grid), fold=self.fold
        )
        weights = {name: np.array(value) for name, value in get_weights(model).items()}
        baseline = initial_log_baseline(
            coarsen(statistics["events"], self.grid), coarsen(statistics["exposure"], self.grid)
        )
        weights["log_baseline"] = baseline.astype(np.float32)
        return EvidenceStrategy(self.study.aggregation, model.blocks(), weights, model.mixtures())

    @property
    def _checkpoint(self) -> Path:
        return self.out / "checkpoints" / f"fold-{self.fold}.safetensors"

    def _about(self) -> dict[str, Any]:
        """What a checkpoint must share with the study that resumes it. Waiting times and paths may differ."""
        study = self.study.model_dump(mode="json", exclude={"runtime"})
        return {"study": study, "panel_hash": self.panel.hash, "cancers": list(self.cancers), "fold": self.fold}

    def _save(self, strategy: EvidenceStrategy, scaling: Sum, curve: list[dict[str, Any]]) -> None:
        arrays = strategy.state() | {f"scaling/{name}": value for name, value in scaling.items()}
        save_arrays(self._checkpoint, arrays, self._about() | {"curve": curve, "grid_months": list(self.grid.starts)})

    def _read_checkpoint(self) -> tuple[Sum, dict[str, Any]] | None:
        if not (self.study.runtime.resume and self._checkpoint.exists()):
            return None
        state, about = load_arrays(self._checkpoint)
        if {k: about[k] for k in self._about()} != self._about():
            raise ValueError(
                f"{self._checkpoint.name} was written by another study, panel or set of cancer types; choose another runtime.out"
            )
        return state, about

    def _save_model(self, strategy: EvidenceStrategy, scaling: Sum) -> None:
        """The model with all that is needed to use it: weights, scaling, panel, cancer types, time grid, study."""
        name = "model" if self.fold == ALL_PATIENTS else f"model-fold-{self.fold}"
        about = self._about() | {"grid_months": list(self.grid.starts), "genes": list(self.panel.genes)}
        save_arrays(
            self.out / f"{name}.safetensors", {f"weights/{n}": v for n, v in strategy.weights.items()} | scaling, about
        )


def greeting(study: Study) -> wire.Config:
    """The study as a site needs it: without the coordinator's own paths."""
    return {"study_json": study.model_dump_json(exclude={"runtime": {"out"}})}


def scaling_from(statistics: Sum) -> Sum:
    """Mean and standard deviation of each gene from its sums; genes without values get 0 and 1."""
    n = np.maximum(statistics["n"], 1.0)
    mean = statistics["sum"] / n
    sd = np.sqrt(np.maximum(statistics["squares"] / n - np.square(mean), 0.0))
    return {"mean": mean, "sd": np.where(sd < MIN_SD, 1.0, sd)}


def _headline(evaluation: Sum) -> dict[str, float]:
    """Loss and within-cancer, within-site C-index of the held-out fold; NaN (no pairs) becomes None in JSON."""
    c = mean_within_cancer(evaluation["concordant"], evaluation["comparable"])
    loss = float(evaluation["loss"].sum() / max(evaluation["patients"].sum(), 1.0))
    return {"test_loss": loss} | ({} if math.isnan(c) else {"test_c_index": c})
