"""Aggregation by evidence: what a round sends, and what it makes of the answers.

This is not a subclass of Flower's `Strategy`: that class fixes a loop without checkpoints or a deadline, and hands over
all replies at once, while this one adds each answer as it arrives and keeps one accumulator (architecture.md).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from oncofed.common.blocks import EVIDENCE, Blocks, Sum
from oncofed.common.study import Aggregation
from oncofed.server.aggregate import UPDATE_BITS, Accumulator, mean_by_block
from oncofed.server.optimizer import ServerOptimizer
from oncofed.server.roster import Answer, NotEnoughSites, Roster


@dataclass
class RoundSummary:
    """What a round's answers say beside the update: mean loss over patients, evidence by block, who took part, on what."""

    round: int
    loss: float
    evidence: dict[str, float]
    sites: list[str]
    seconds_at_sites: float
    devices: dict[str, str]


@dataclass
class EvidenceStrategy:
    """The global weights, the server optimiser, and the share of each expert in the federation (`load`)."""

    settings: Aggregation
    blocks: Blocks
    weights: Sum
    mixtures: dict[str, int]
    optimizer: ServerOptimizer = field(init=False)
    load: dict[str, np.ndarray] = field(init=False)

    def __post_init__(self) -> None:
        self.optimizer = ServerOptimizer(self.settings, self.blocks)
        self.load = {group: np.full(n, 1.0 / n) for group, n in self.mixtures.items()}

    def arrays(self) -> Sum:
        """What every site gets: weights, and the load of the round before as constants of the balance loss."""
        return {f"weights/{n}": v for n, v in self.weights.items()} | {f"load/{g}": v for g, v in self.load.items()}

    def aggregate(self, answers: Iterable[Answer], round_: int, roster: Roster) -> RoundSummary:
        """Add answers as they arrive, divide by evidence, step. A bad answer is left out by name; too few raise."""
        shapes = {n: v.shape for n, v in self.weights.items()} | {EVIDENCE: (len(self.blocks.names),)}
        accumulator = Accumulator(shapes, UPDATE_BITS)
        losses: dict[str, tuple[float, float, float]] = {}
        devices: dict[str, str] = {}
        for answer in answers:
            try:  # all of an answer is read before any of it is added
                told = _told(answer)
                accumulator.add(answer.arrays, answer.site)
            except ValueError as error:
                roster.leave_out(answer.site, "train", round_, str(error))
                continue
            losses[answer.site] = told
            devices[answer.site] = str(answer.config.get("device", ""))
        if accumulator.count < self.settings.min_sites:
            reasons = [
                f"{x['site']}: {x['reason']}" for x in roster.left_out if x["round"] == round_ and x["kind"] == "train"
            ]
            raise NotEnoughSites(
                f"round {round_}: {accumulator.count} good answers, aggregation.min_sites = {self.settings.min_sites}. "
                + "; ".join(reasons)
            )
        by_block = self.step(*mean_by_block(accumulator.total(), self.blocks, self.settings.tau))
        # Sorted by site: floats are summed in the same order whatever the order of arrival.
        rows = np.array([losses[site] for site in sorted(losses)])
        loss = float((rows[:, 0] * rows[:, 1]).sum() / rows[:, 1].sum())
        return RoundSummary(round_, loss, by_block, sorted(losses), float(rows[:, 2].sum()), devices)

    def step(self, mean: Sum, evidence: np.ndarray) -> dict[str, float]:
        """Move the global weights by the mean change; returns the evidence by block's name."""
        self.weights = self.optimizer.step(self.weights, mean, evidence)
        by_block = dict(zip(self.blocks.names, evidence.tolist(), strict=True))
        self._update_load(by_block)
        return by_block

    def _update_load(self, evidence: dict[str, float]) -> None:
        for group, n in self.mixtures.items():
            mass = np.array([evidence[f"{group}/{e}"] for e in range(n)])
            if mass.sum() > 0:
                self.load[group] = mass / mass.sum()

    # -- checkpoint ----------------------------------------------------------------------------------------------------

    def state(self) -> Sum:
        """Everything that the next round depends on."""
        state = {f"weights/{n}": v for n, v in self.weights.items()} | {f"load/{g}": v for g, v in self.load.items()}
        for name, parts in self.optimizer.state.items():
            state |= {f"optimizer/{name}/{part}": v for part, v in parts.items()}
        return state

    def restore(self, state: Sum) -> None:
        """Continue from `state`; raises where it belongs to another model."""
        weights = {n.removeprefix("weights/"): v for n, v in state.items() if n.startswith("weights/")}
        if {n: v.shape for n, v in weights.items()} != {n: v.shape for n, v in self.weights.items()}:
            raise ValueError(
                "the checkpoint belongs to another model; resume with the study that wrote it, or choose another runtime.out"
            )
        self.weights = weights
        self.load = {n.removeprefix("load/"): v for n, v in state.items() if n.startswith("load/")}
        self.optimizer.state = {}
        for key, value in state.items():
            if key.startswith("optimizer/"):
                name, _, part = key.removeprefix("optimizer/").rpartition("/")
                self.optimizer.state.setdefault(name, {})[part] = value


def _told(answer: Answer) -> tuple[float, float, float]:
    """Loss, patients and seconds of a training answer; raises where one is missing or no number."""
    values = []
    for key in ("loss", "patients", "seconds"):
        value = answer.config.get(key)
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not math.isfinite(value)
            or (key != "loss" and value < 0)
        ):
            raise ValueError(f"the answer's {key} is {value!r}, wanted a finite number")
        values.append(float(value))
    if values[1] == 0:
        raise ValueError("the answer rests on 0 patients")
    return values[0], values[1], values[2]
