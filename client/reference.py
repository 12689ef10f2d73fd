"""The weights that a site holds of a study: what a question's weights are a step from, or are already.

In a deployment every message is handled by a new process, so they are a file in the work folder: one a study, of the last
question, replaced whole or not at all.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from oncofed.client.resident import Resident
from oncofed.common import wire
from oncofed.common.blocks import Sum, part, under
from oncofed.common.broadcast import BASE, HASH, WEIGHTS, hash_of, take_step
from oncofed.common.compression import read_weights
from oncofed.common.errors import Refusal
from oncofed.common.files import replacing
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

MOST_STUDIES = 20
"""Studies whose weights stay; a site that lacks weights is sent them in full, and a server may ask of any number of studies."""


class Lacking(Refusal):
    """The site cannot make a question's weights of what it holds: the server sends them in full."""

    def __init__(self, site: str, wanted: str) -> None:
        super().__init__(f"site {site}: it does not hold the weights that the question is a step from ({wanted[:16]})")
        self.wanted = wanted


@dataclass(frozen=True)
class Reference:
    """What one site holds of one study, in `file`."""

    file: Path
    site: str
    resident: Resident

    def resolved(self, ask: wire.Config, arrays: Sum) -> Sum:
        """A question's arrays as if its weights had come in full; raises `Lacking` where they cannot be had.

        Whoever reads them sees the same question, whatever of it travelled.
        """
        if HASH not in ask:
            return arrays
        wanted, base = str(ask[HASH]), str(ask.get(BASE, ""))
        sent, rest = part(WEIGHTS, arrays), {n: v for n, v in arrays.items() if not n.startswith(WEIGHTS)}
        return rest | under(WEIGHTS, self._weights(wanted, base, sent))

    def _weights(self, wanted: str, base: str, sent: Sum) -> Sum:
        known = self.resident.weights(wanted)
        weights, file = known or (self._made(wanted, base, sent), None)
        if self._held() != wanted:
            self._write(wanted, weights, file)
        self.resident.keep_weights(wanted, weights, self.file)
        return weights

    def _write(self, wanted: str, weights: Sum, same: Path | None) -> None:
        """Put weights in place of those before. A simulator's sites share the bytes of one file: they never change in place."""
        with replacing(self.file) as temporary:
            if same is not None:
                with suppress(OSError):
                    os.link(same, temporary)
            if not temporary.exists():
                save_file({n: np.asarray(v, order="C") for n, v in weights.items()}, temporary, {"hash": wanted})
        kept = sorted(self.file.parent.glob("*.safetensors"), key=lambda file: file.stat().st_mtime_ns, reverse=True)
        for old in kept[MOST_STUDIES:]:
            old.unlink(missing_ok=True)

    def _made(self, wanted: str, base: str, sent: Sum) -> Sum:
        """The weights of a hash, from the message or the file; what they are is checked once, at the end."""
        held = self._held()
        if sent and not base:
            weights = read_weights(sent)
            if hash_of(weights) != wanted:
                raise Refusal(
                    f"site {self.site}: the weights in the message do not have the hash {wanted[:16]} that it names; install the same "
                    "oncofed version on both sides"
                )
            return weights
        if held not in (wanted, base):
            raise Lacking(self.site, wanted)
        try:
            weights = self._read()
            weights = weights if held == wanted else take_step(weights, sent)
        except (
            OSError,
            SafetensorError,
            IndexError,
            KeyError,
            ValueError,
        ):  # a damaged file, or a step that does not fit it
            raise Lacking(self.site, wanted) from None
        if hash_of(weights) != wanted:
            raise Lacking(self.site, wanted)
        return weights

    def _held(self) -> str:
        """The hash of the weights in the file, as it says itself; empty where there is none that can be read."""
        try:
            with safe_open(self.file, framework="numpy") as file:
                return str((file.metadata() or {}).get("hash", ""))
        except (OSError, SafetensorError):
            return ""

    def _read(self) -> Sum:
        with safe_open(self.file, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
