"""The server's half of the weights that travel as steps: what the sites hold, and what each of them is sent.

State that a resumed run needs: the reference weights, and which weights they stand for. The error is their difference.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from flwr.app import RecordDict
from oncofed.common import wire
from oncofed.common.blocks import Sum, part, under
from oncofed.common.broadcast import BASE, HASH, WEIGHTS, code_step, hash_of, take_step
from oncofed.common.compression import read_weights, round_weights
from oncofed.common.splits import seed_from
from oncofed.common.study import Study


@dataclass
class Broadcast:
    """The reference weights of one study. With `kind` float32 weights travel as they are, and nothing is kept anywhere."""

    kind: str
    seed: int
    reference: Sum = field(default_factory=dict)
    hash: str = ""
    stands_for: str = ""
    """The hash of the server's own weights that the reference is as near to as it gets."""
    base: str = ""
    """What `step` leads from; empty where the reference came about in full."""
    step: Sum = field(default_factory=dict)

    @classmethod
    def of(cls, study: Study) -> Broadcast:
        """A study's, before anything was sent."""
        return cls(study.transport.download, study.seed)

    @property
    def on(self) -> bool:
        """Whether weights are sent as steps, and kept at the sites."""
        return self.kind != "float32"

    def begin(self) -> None:
        """Forget the reference: training that begins anew does not begin a step away from other weights."""
        self.reference, self.hash, self.stands_for, self.base, self.step = {}, "", "", "", {}

    def meet(self, weights: Sum) -> Sum:
        """The weights that the sites get for the server's own: those themselves, or the reference after a step towards them.

        Draws follow from the weights alone, so whoever asks again, or resumes, meets them at the same reference.
        """
        if not self.on:
            return weights
        wanted = hash_of(weights)
        if wanted in (self.stands_for, self.hash):
            return self.reference
        draws = np.random.default_rng(seed_from(self.seed, "broadcast", wanted))
        if {n: v.shape for n, v in weights.items()} == {n: v.shape for n, v in self.reference.items()}:
            step = code_step(self.reference, weights, self.kind, draws)
            self._set(take_step(self.reference, step), wanted, self.hash, step)
        else:
            step = round_weights(weights, draws)
            self._set(read_weights(step), wanted, "", step)
        return self.reference

    def contents(self, config: wire.Config, arrays: Sum, holds: Mapping[str, str]) -> dict[str, RecordDict]:
        """A question for each of the sites, by the hash of what each `holds`: its weights by name alone, as a step, or in full.

        Weights that are not the reference go to all in full, and are the reference from then on.
        """
        weights = part(WEIGHTS, arrays)
        if not self._is_reference(weights):
            self._set(weights, "", "", weights)
        rest = {n: v for n, v in arrays.items() if not n.startswith(WEIGHTS)}
        made: dict[str, RecordDict] = {}
        return {site: self._content(config, rest, held, made) for site, held in holds.items()}

    def _content(self, config: wire.Config, rest: Sum, held: str, made: dict[str, RecordDict]) -> RecordDict:
        config = config | {HASH: self.hash}
        if held == self.hash:
            kind, weights = "held", {}
        elif held and held == self.base:
            kind, weights, config = "step", self.step, config | {BASE: self.base}
        else:
            # in bfloat16 the first weights are the reference itself; later ones are not to be had in fewer bytes
            kind, weights = "full", self.reference if self.base or not self.step else self.step
        if kind not in made:
            made[kind] = wire.request(config, rest | under(WEIGHTS, weights))
        return made[kind]

    def _is_reference(self, weights: Sum) -> bool:
        mine = self.reference
        return weights.keys() == mine.keys() and (
            all(value is mine[name] for name, value in weights.items()) or hash_of(weights) == self.hash
        )

    def _set(self, reference: Sum, stands_for: str, base: str, step: Sum) -> None:
        self.reference, self.hash, self.base, self.step = reference, hash_of(reference), base, step
        self.stands_for = stands_for or self.hash

    # -- checkpoint ----------------------------------------------------------------------------------------------------

    def restore(self, reference: Sum, stands_for: str) -> None:
        """Continue from a checkpoint's reference; nothing where it has none."""
        self.begin()
        if self.on and reference:
            self._set(reference, stands_for, "", {})
