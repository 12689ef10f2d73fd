"""The last step of a round's answer: its sum is coded, and what rounding drops is kept at the site for its next one."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from oncofed.client.session import Session
from oncofed.common.blocks import Blocks, Sum, part, under
from oncofed.common.compression import Coding
from oncofed.common.files import replacing
from oncofed.common.splits import seed_from
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

BEFORE, AFTER = "before/", "after/"


@dataclass(frozen=True)
class Remainder:
    """A file with what rounding has dropped, before and after the last round that was answered.

    Both are kept, so that a server that asks a round again gets the same bytes. A file that is lost, damaged or of a later round
    counts as nothing dropped: the next change then lacks less than one step of the scale.
    """

    file: Path

    def at(self, round_: int) -> Sum:
        """What is to be added to the change of a round; nothing in the first, which begins anew."""
        try:
            with safe_open(self.file, framework="numpy") as file:
                last = int((file.metadata() or {})["round"])
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, ValueError):
            return {}
        if round_ <= 1 or last > round_:
            return {}
        return part(BEFORE if last == round_ else AFTER, arrays)

    def keep(self, round_: int, before: Sum, after: Sum) -> None:
        """Write both, whole or not at all."""
        with replacing(self.file) as temporary:
            plain = {n: np.ascontiguousarray(v) for n, v in (under(BEFORE, before) | under(AFTER, after)).items()}
            save_file(plain, temporary, {"round": str(round_)})


def code_change(session: Session, total: Sum, blocks: Blocks) -> Sum:
    """A training sum as the study's transport writes it.

    Draws depend on study, fold, phase, round and site alone: noise of privacy is in the sum already, and needs no secret after it.
    """
    s = session.study
    coding = Coding.of(s.transport, secure_sums=s.secure_sums)
    seed = seed_from(s.seed, "transport", session.phase, session.fold, session.round, session.site.name)
    told = hashlib.sha256(s.model_dump_json(exclude={"runtime"}).encode()).hexdigest()
    kept = Remainder(session.work / "remainders" / f"{s.name}-{told[:8]}-{session.fold}-{session.phase}.safetensors")
    before = kept.at(session.round) if coding.upload != "float32" else {}
    packed, after = coding.pack(total, blocks, np.random.default_rng(seed), before)
    if after:
        kept.keep(session.round, before, after)
    return packed
