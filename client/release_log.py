"""The release log of a site: one line a message that left, refusals too; append-only, chained, and on the disk before it leaves.

`release-log.jsonl` in the working folder. A line tells names, shapes, norms and counts of what left, how it was protected, its
size and its SHA-256, to be held against what the coordinator received; it holds no value of a patient, and of a sum that stays
at the site under masks no norm.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from oncofed.client.chain_file import Chain, Words, is_unchained
from oncofed.common import wire
from oncofed.common.blocks import Sum

FILE = "release-log.jsonl"

WORDS = Words(
    "release log",
    "nothing leaves while nobody can tell what did",
    "put it and its .head back from a backup; without one, keep both files as evidence, move them away together, and a new log begins",
)

SAID = ("analysis", "plan", "step", "members")
"""What a line takes over from an answer beside study, fold, phase and round."""

LONGEST = 2000
"""Characters of a refusal: what a message says may come back in it, and must not fill the disk."""


@dataclass(frozen=True)
class Protection:
    """What kept single patients from showing: `withheld` cells by array, the factor that counts were rounded to, noise, masks."""

    withheld: Mapping[str, int]
    rounding: int = 1
    epsilon: float = 0.0
    noise: tuple[dict[str, Any], ...] = ()
    masks: bool = False

    def line(self) -> dict[str, Any]:
        """What there is to say; nothing is said of what was not done."""
        said: dict[str, Any] = {}
        if self.withheld:
            said["withheld"] = dict(self.withheld)
        if self.rounding > 1:
            said["rounding"] = self.rounding
        if self.epsilon:
            said["epsilon"] = self.epsilon
        if self.noise:
            said["noise"] = list(self.noise)
        if self.masks:
            said["masks"] = True
        return said


NOTHING = Protection({})


@dataclass(frozen=True)
class ReleaseLog:
    """The log of one site. That of a `simulated` one has neither chain nor digests: there is nobody to prove it to."""

    file: Path
    site: str
    simulated: bool = False

    @property
    def chain(self) -> Chain:
        return Chain(self.file, self.site, WORDS, durable=not self.simulated)

    def released(
        self, kind: str, config: wire.Config, total: Sum, patients: int, protection: Protection = NOTHING, said: int = 0
    ) -> None:
        """Write down an answer before it leaves; `said` is the size of its words, which come to its bytes beside the arrays."""
        stays = protection.masks  # under masks the sum is kept, and leaves as words that have a line of their own
        line: dict[str, Any] = {
            "time": now(),
            "kind": kind,
            "study": config.get("study", ""),
            **{k: config[k] for k in SAID if k in config},
            "fold": config.get("fold", -1),
            "phase": config.get("phase", ""),
            "round": config.get("round", 0),
            "patients": patients,
            "arrays": {name: list(value.shape) for name, value in total.items()},
            "bytes": 0 if stays else sum(value.nbytes for value in total.values()),
            "words": said,
        }
        if stays and total:
            line["under_masks"] = True
        elif not self.simulated and kind != wire.MASKED:
            line["norms"] = {name: _norm(value) for name, value in total.items()}
        if protection.line():
            line["protection"] = protection.line()
        if not self.simulated:
            line["sha256"] = digest(total)
        self.add(line)

    def refused(self, kind: str, reason: str, study: str = "") -> None:
        """Write down a refusal: its text leaves."""
        about = {"study": study} if study else {}
        self.add({"time": now(), "kind": kind, **about, "refusal": reason})

    def lacked(self, kind: str, wanted: str) -> None:
        """Write down an answer that weights are lacking: their hash alone leaves."""
        self.add({"time": now(), "kind": kind, "lacks": wanted})

    def add(self, line: dict[str, Any]) -> None:
        """Append a line. A log that was written without a chain, by a simulation, is moved aside first, and the new one says so."""
        if self.simulated and not self.chain.head.exists():  # a chain costs as much as a training step
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a") as file:
                file.write(json.dumps(line) + "\n")
            return
        if is_unchained(self.file):
            aside = self.file.with_name(f"{self.file.stem}-unchained-{time.time_ns()}{self.file.suffix}")
            os.replace(self.file, aside)
            old = hashlib.sha256(aside.read_bytes()).hexdigest()
            self.chain.add({"time": now(), "kind": "log", "before": aside.name, "sha256": old})
        self.chain.add(line)

    @property
    def chained(self) -> bool:
        """Whether a line that is changed or removed shows; not in the log of a simulation."""
        return not is_unchained(self.file)

    def read(self) -> list[dict[str, Any]]:
        """All lines; raises `Refusal` where one was changed or removed, at the end too."""
        if not self.chained:
            return [json.loads(line) for line in self.file.read_text().splitlines()]
        return self.chain.read()

    def sent(self, study: str) -> int:
        """Bytes that left for a study or analysis so far."""
        if not self.file.exists():
            return 0
        with self.file.open("rb") as lines:  # parsed only where the name stands: a log is long
            found = [json.loads(line) for line in lines if study.encode() in line and line.endswith(b"\n")]
        return sum(int(line.get("bytes", 0)) + int(line.get("words", 0)) for line in about(found, study))


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def digest(total: Sum) -> str:
    """The SHA-256 of arrays by name."""
    out = hashlib.sha256()
    for name in sorted(total):
        out.update(name.encode())
        out.update(np.ascontiguousarray(total[name]).data if total[name].size else b"")
    return out.hexdigest()


def size_of_words(values: Mapping[str, Any]) -> int:
    """Bytes of what an answer says beside its arrays: text as UTF-8, eight for a number."""
    return sum(_size(value) for pair in values.items() for value in pair)


def about(lines: list[dict[str, Any]], study: str) -> Iterator[dict[str, Any]]:
    """The lines about one study or analysis."""
    for line in lines:
        # exchanges of a sum under masks name an analysis "analysis NAME DIGEST"
        names = {line.get("analysis"), line.get("study"), *str(line.get("study", "")).split()[1:2]}
        if study in names:
            yield line


def _size(value: Any) -> int:
    if isinstance(value, str):
        return len(value.encode())
    return sum(map(_size, value)) if isinstance(value, list | tuple) else 8


def _norm(value: np.ndarray) -> float:
    """Euclidean, to four digits: enough to see an odd message."""
    return float(f"{float(np.linalg.norm(value.astype(np.float64).ravel())):.4g}")
