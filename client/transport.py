"""The last step of a round's answer: its sum is coded, and what rounding drops is kept at the site for its next one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from oncofed.client.session import Session
from oncofed.common.blocks import Blocks, Sum
from oncofed.common.compression import Coding
from oncofed.common.files import replacing
from oncofed.common.splits import seed_from
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

SLOTS = (0, 1, 2)


@dataclass(frozen=True)
class Remainder:
    """What rounding has dropped, after each of the last three rounds that were answered: three files, `base` and a number.

    The older ones are kept so that a server that asks the last round again, or goes back one more to an older checkpoint, gets the same
    bytes. A file that is lost or damaged counts as nothing dropped: the sum of the changes then lacks less than one step of the scale.
    """

    base: Path

    def at(self, round_: int) -> Sum:
        """What is to be added to the change of a round, left by the one before it; nothing in the first, which begins anew."""
        rounds = {slot: r for slot in SLOTS if 0 < (r := self._round(slot)) < round_}
        if round_ <= 1 or not rounds:
            return {}
        with safe_open(self._file(max(rounds, key=rounds.__getitem__)), framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def keep(self, round_: int, dropped: Sum) -> None:
        """Write what a round dropped, whole or not at all, in place of the same round's or of the oldest one's."""
        rounds = {slot: self._round(slot) for slot in SLOTS}
        stale = [slot for slot, r in rounds.items() if r >= round_]  # asked again, or of a study that was begun anew
        slot = stale[0] if stale else min(rounds, key=rounds.__getitem__)
        for other in stale[1:]:
            self._file(other).unlink()
        with replacing(self._file(slot)) as temporary:
            save_file({n: np.ascontiguousarray(v) for n, v in dropped.items()}, temporary, {"round": str(round_)})

    def _round(self, slot: int) -> int:
        """The round that a file is of; 0 where there is none that can be read."""
        try:
            with safe_open(self._file(slot), framework="numpy") as file:
                return int((file.metadata() or {})["round"])
        except (OSError, SafetensorError, KeyError, ValueError):
            return 0

    def _file(self, slot: int) -> Path:
        return self.base.with_name(f"{self.base.name}-{slot}.safetensors")


def code_change(session: Session, total: Sum, blocks: Blocks) -> Sum:
    """A training sum as the study's transport writes it.

    Draws depend on study, fold, phase, round and site alone: noise of privacy is in the sum already, and needs no secret after it.
    """
    s = session.study
    coding = Coding.of(s.transport, secure_sums=s.secure_sums)
    seed = seed_from(s.seed, "transport", session.phase, session.fold, session.round, session.site.name)
    kept = Remainder(session.work / "remainders" / f"{s.name}-{session.study_digest}-{session.fold}-{session.phase}")
    before = kept.at(session.round) if coding.upload != "float32" else {}
    packed, after = coding.pack(total, blocks, np.random.default_rng(seed), before)
    if after:
        kept.keep(session.round, after)
    return packed
