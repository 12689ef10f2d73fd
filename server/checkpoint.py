"""Checkpoints and models on disk: safetensors, written whole or not at all, and known by their SHA-256."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from oncofed.common.blocks import Sum
from oncofed.common.files import replacing
from oncofed.common.saved import digest, load_arrays
from safetensors import SafetensorError
from safetensors.numpy import save_file

__all__ = ["Checkpoints", "load_arrays", "save_arrays"]

log = logging.getLogger("oncofed.server")

CHECKPOINTS = "checkpoints"
"""The folder of a run's checkpoints."""

_ROUND = re.compile(r"round-(\d+)\.safetensors")


def save_arrays(path: Path, arrays: Sum, about: dict[str, Any]) -> None:
    """Arrays and a JSON description in one safetensors file, with a SHA-256 over both; raises `DiskFull`."""
    plain, text = {k: np.ascontiguousarray(v) for k, v in arrays.items()}, json.dumps(about)
    with replacing(path, durable=True) as temporary:
        try:
            save_file(plain, temporary, {"about": text, "sha256": digest(plain, text)})
        except SafetensorError as error:
            system = re.search(r"os error (\d+)", str(error))
            if system is None:
                raise
            raise OSError(int(system[1]), str(error)) from None


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one phase of one fold: a file a round, of which the last `keep` are kept."""

    folder: Path
    keep: int

    @classmethod
    def of(cls, out: Path, fold: int, phase: str, keep: int) -> Checkpoints:
        """Those below a run's folder."""
        return cls(out / CHECKPOINTS / f"fold-{fold}-{phase}", keep)

    @property
    def files(self) -> list[Path]:
        """Newest first; last the one file that earlier versions wrote."""
        found = [(int(m[1]), f) for f in self.folder.glob("round-*") if (m := _ROUND.fullmatch(f.name))]
        return [f for _, f in sorted(found, reverse=True)] + [f for f in (self._single,) if f.exists()]

    def save(self, round_: int, arrays: Sum, about: dict[str, Any]) -> None:
        """Write the checkpoint of a round; older ones go only when it is whole on the disk."""
        save_arrays(self.folder / f"round-{round_:04d}.safetensors", arrays, about)
        for file in self.files[self.keep :]:
            file.unlink(missing_ok=True)

    def newest(self) -> tuple[Path, Sum, dict[str, Any]] | None:
        """The newest checkpoint that is whole; damaged ones are named in the log. None where there is none."""
        for leftover in self.folder.glob("*.tmp"):  # of a server that was killed while it wrote
            leftover.unlink(missing_ok=True)
        damaged = 0
        for file in self.files:
            try:
                return file, *load_arrays(file)
            except (SafetensorError, KeyError, TypeError, ValueError) as error:
                damaged += 1
                log.error("checkpoint %s is damaged (%s); the one before it is used", file, error)
        if damaged:
            log.error("no checkpoint in %s is whole; the phase begins anew", self.folder)
        return None

    @property
    def _single(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.safetensors")
