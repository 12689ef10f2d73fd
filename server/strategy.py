"""Aggregation by evidence: what a round sends, and what it makes of the answers.

This is not a subclass of Flower's `Strategy`: that class fixes a loop without checkpoints or a deadline, and hands over
all replies at once, while this one adds each answer as it arrives and keeps one accumulator (architecture.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
from oncofed.common.blocks import EVIDENCE, LOSS, Blocks, Sum, part, under
from oncofed.common.compression import Coding, nbytes
from oncofed.common.models.autoencoder import GeneAutoencoder
from oncofed.common.models.build import Model, get_weights, trainable
from oncofed.common.models.path_gptomic import PathGPTOmic
from oncofed.common.modulation import BRANCHES, COLUMNS, contributions
from oncofed.common.study import Aggregation
from oncofed.server.aggregate import UPDATE_BITS, Accumulator, mean_by_block
from oncofed.server.noise import Turn
from oncofed.server.optimizer import ServerOptimizer
from oncofed.server.robust import Guard
from oncofed.server.roster import Answer, NotEnoughSites, Roster
from oncofed.server.secure_sum import SecureTotal


@dataclass
class RoundSummary:
    """What a round's answers say beside the update: mean loss over patients, evidence by block, who took part, on what."""

    round: int
    loss: float | None
    evidence: dict[str, float]
    sites: list[str]
    seconds_at_sites: float
    devices: dict[str, str]
    site_evidence: dict[str, np.ndarray]
    branches: dict[str, dict[str, float]]
    plain_bytes: int
    """What the answers would have been in float32 and in full."""


@dataclass
class EvidenceStrategy:
    """The global weights, the server optimiser, and the share of each expert in the federation (`load`).

    Of `weights` the `trainable` ones move; the others travel to the sites and stay as they are.
    """

    settings: Aggregation
    blocks: Blocks
    weights: Sum
    mixtures: dict[str, int]
    removable: dict[str, int]
    trainable: frozenset[str]
    modalities: tuple[str, ...] = ()
    silent: bool = False
    """Whether sites do not tell their losses: under privacy."""
    cover: Callable[[Sum], Sum] | None = None
    """Noise of the server on a round's total, where a hospital's presence must not show."""
    turn: Turn | None = None
    """Makes a change of a round's total of gradients, where sites share the noise on them."""
    first: Sum = field(default_factory=dict)
    """The weights that training began with, where the study pulls back to them."""
    last: list[Sum] = field(default_factory=list)
    """The trained weights of the last rounds, where the model is their mean."""
    coding: Coding = field(default_factory=Coding)
    """How sites write their changes."""
    guard: Guard = field(default_factory=Guard)
    """What is known of the sites' changes where single ones are held against the others."""
    optimizer: ServerOptimizer = field(init=False)
    load: dict[str, np.ndarray] = field(init=False)
    branches: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.optimizer = ServerOptimizer(self.settings, self.blocks)
        self.load = {group: np.full(n, 1.0 / n) for group, n in self.mixtures.items()}
        self.branches = np.zeros((len(self.modalities), len(COLUMNS)))

    @classmethod
    def of(cls, settings: Aggregation, model: Model) -> EvidenceStrategy:
        """The strategy for a model, from its weights."""
        weights = {name: np.array(value) for name, value in get_weights(model).items()}
        removable = {} if isinstance(model, GeneAutoencoder) else model.removable()
        modalities = model.modalities if isinstance(model, PathGPTOmic) and model.additive else ()
        return cls(settings, model.blocks(), weights, model.mixtures(), removable, trainable(model), modalities)

    def arrays(self) -> Sum:
        """What every site gets: weights, and of the round before the experts' load and what was seen of the modalities."""
        seen = {BRANCHES: self.branches} if self.modalities else {}
        return under("weights/", self.weights) | under("load/", self.load) | seen

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The arrays of a site's training sum."""
        shapes = {n: self.weights[n].shape for n in self.trainable} | {EVIDENCE: (len(self.blocks.names),)}
        return shapes | ({BRANCHES: self.branches.shape} if self.modalities else {})

    def check_told(self, answer: Answer) -> None:
        """Refuse, by `ValueError`, what a training answer says beside a sum under masks."""
        _told(answer, silent=True)

    def take_total(self, summed: SecureTotal, round_: int) -> RoundSummary:
        """Divide and step by a total of which no site's part is known; of a site its patients, rounded, and device are told."""
        total = dict(summed.total)
        loss, patients = total.pop(LOSS, np.zeros(2))
        if self.turn is not None:
            total = self.turn(total, self.weights, round_)
        by_block = self.take(total if self.cover is None else self.cover(total))
        sites = [answer.site for answer in summed.answers]
        devices = {answer.site: str(answer.config.get("device", "")) for answer in summed.answers}
        branches = contributions(self.branches, self.modalities)
        mean = float(loss / patients) if patients else None
        plain = 4 * len(sites) * sum(math.prod(shape) for shape in self.shapes.values())
        return RoundSummary(round_, mean, by_block, sites, 0.0, devices, {}, branches, plain)

    def aggregate(self, answers: Iterable[Answer], round_: int, roster: Roster) -> RoundSummary:
        """Add answers as they arrive, divide by evidence, step. A bad answer is left out by name; too few raise."""
        shapes = self.shapes
        accumulator = self.guard.over(Accumulator(shapes, UPDATE_BITS), self.settings, self.blocks)
        plain_bytes = 0
        losses: dict[str, tuple[float, float, float]] = {}
        devices: dict[str, str] = {}
        site_evidence: dict[str, np.ndarray] = {}
        for answer in answers:
            try:  # all of an answer is read before any of it is added
                told = _told(answer, silent=self.silent)
                arrays = self.coding.unpack(answer.arrays, self.blocks, shapes, answer.site)
                accumulator.add(arrays, answer.site)
            except ValueError as error:
                roster.leave_out(answer.site, "train", round_, str(error))
                plain_bytes += answer.bytes
                continue
            plain_bytes += nbytes(arrays)
            losses[answer.site] = told
            devices[answer.site] = str(answer.config.get("device", ""))
            site_evidence[answer.site] = np.array(answer.arrays[EVIDENCE])
            del answer  # or it would be held while the next one is fetched
        if accumulator.count < self.settings.min_sites:
            reasons = [
                f"{x['site']}: {x['reason']}" for x in roster.left_out if x["round"] == round_ and x["kind"] == "train"
            ]
            raise NotEnoughSites(
                f"round {round_}: {accumulator.count} good answers, aggregation.min_sites = {self.settings.min_sites}. "
                + "; ".join(reasons)
            )
        total = accumulator.total()
        self.guard.learn(accumulator, round_)
        by_block = self.take(total if self.cover is None else self.cover(total))
        # Sorted by site: floats are summed in the same order whatever the order of arrival.
        rows = np.array([losses[site] for site in sorted(losses)])
        known = bool(np.isfinite(rows[:, 0]).all())  # under privacy sites do not tell
        loss = float((rows[:, 0] * rows[:, 1]).sum() / rows[:, 1].sum()) if known else None
        seconds, branches = float(rows[:, 2].sum()), contributions(self.branches, self.modalities)
        return RoundSummary(
            round_, loss, by_block, sorted(losses), seconds, devices, site_evidence, branches, plain_bytes
        )

    def take(self, total: Sum) -> dict[str, float]:
        """A round's total: its change is divided and stepped, the rest kept for the next round; evidence by block's name."""
        self.branches = total.pop(BRANCHES, self.branches)
        return self.step(*mean_by_block(total, self.blocks, self.settings.tau))

    def step(self, mean: Sum, evidence: np.ndarray) -> dict[str, float]:
        """Move the global weights by the mean change; returns the evidence by block's name."""
        moving = {name: value for name, value in self.weights.items() if name in self.trainable}
        if self.settings.pull and not self.first:
            self.first = moving
        moved = self.optimizer.step(moving, mean, evidence)
        if self.settings.pull:
            back = np.float32(self.settings.pull)
            moved = {name: value + back * (self.first[name] - value) for name, value in moved.items()}
        self.weights = self.weights | moved
        if self.settings.average_last:
            self.last = [*self.last, moved][-self.settings.average_last :]
        by_block = dict(zip(self.blocks.names, evidence.tolist(), strict=True))
        self._update_load(by_block)
        return by_block

    def _update_load(self, evidence: dict[str, float]) -> None:
        for group, n in self.mixtures.items():
            mass = np.array([evidence[f"{group}/{e}"] for e in range(n)])
            if mass.sum() > 0:
                self.load[group] = mass / mass.sum()

    def settle(self) -> None:
        """Take the mean of the last rounds for the model, where the study asks for it."""
        if self.last:
            mean = {
                n: np.mean([w[n] for w in self.last], axis=0, dtype=np.float64).astype(v.dtype)
                for n, v in self.last[0].items()
            }
            self.weights = self.weights | mean

    # -- checkpoint ----------------------------------------------------------------------------------------------------

    def state(self) -> Sum:
        """Everything that the next round depends on."""
        state = self.arrays()
        for name, moments in self.optimizer.state.items():
            state |= under(f"optimizer/{name}/", moments)
        state |= under("first/", self.first)
        for i, weights in enumerate(self.last):
            state |= under(f"last/{i:04d}/", weights)
        return state | under("guard/", self.guard.state())

    def restore(self, state: Sum) -> None:
        """Continue from `state`; raises where it belongs to another model."""
        weights = part("weights/", state)
        if {n: v.shape for n, v in weights.items()} != {n: v.shape for n, v in self.weights.items()}:
            raise ValueError(
                "the checkpoint belongs to another model; resume with the study that wrote it, or choose another runtime.out"
            )
        self.weights = weights
        self.load = part("load/", state)
        self.guard.restore(part("guard/", state))
        self.branches = state.get(BRANCHES, self.branches)
        self.first, kept = part("first/", state), part("last/", state)
        self.last = [part(f"{i}/", kept) for i in sorted({key.partition("/")[0] for key in kept})]
        self.optimizer.state = {}
        for key, value in part("optimizer/", state).items():
            name, _, moment = key.rpartition("/")
            self.optimizer.state.setdefault(name, {})[moment] = value


def _told(answer: Answer, *, silent: bool = False) -> tuple[float, float, float]:
    """Loss (NaN where a site does not tell), patients and seconds of a training answer; raises where one is no number."""
    values = []
    for key in ("loss", "patients", "seconds"):
        value = answer.config.get(key)
        if key == "loss" and value is None and silent:
            values.append(math.nan)
            continue
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
