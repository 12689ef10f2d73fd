"""Sums under masks without Flower: sites with work folders, a server that asks them by calls, and the plain sum beside it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from oncofed.client.members import Identity
from oncofed.client.secure_sum import SecureSums
from oncofed.common import wire
from oncofed.common.blocks import EVIDENCE, Sum
from oncofed.common.errors import Refusal
from oncofed.server.aggregate import UPDATE_BITS, Accumulator
from oncofed.server.roster import Answer, Roster
from oncofed.server.secure_sum import SecureSum, SecureTotal

QUESTION = hashlib.sha256(b"a round").hexdigest()
SHAPES: dict[str, tuple[int, ...]] = {EVIDENCE: (3,), "weight": (7, 5), "bias": (5,)}
Ask = tuple[str, wire.Config]


class Federation:
    """Sites with work folders of their own, and a server that asks them by calls. `faults` are (kind, site) that get no answer.

    Every call makes its site's objects anew, as a process that handles one message does.
    """

    def __init__(
        self,
        root: Path,
        names: list[str],
        faults: set[tuple[str, str]] | None = None,
        least: int = 3,
        bits: int = UPDATE_BITS,
    ) -> None:
        self.bits = bits
        self.root, self.names, self.faults, self.least = root, names, faults or set(), least
        self.asked: list[tuple[str, str, wire.Config]] = []
        self.replies: dict[tuple[str, str], Any] = {}
        self.roster = Roster(grid=None, wait_s=1, timeout_s=1)  # type: ignore[arg-type]
        self.roster.hellos = {i: {"site": n, "identity": self.identity(n).public.hex()} for i, n in enumerate(names)}
        self.tamper: Callable[[str, str, wire.Config], wire.Config] = lambda kind, site, ask: ask

    def site(self, name: str) -> SecureSums:
        folder = self.root / name
        folder.mkdir(parents=True, exist_ok=True)
        return SecureSums(folder / "work", folder, name, self.least)

    def identity(self, name: str) -> Identity:
        return Identity.of(self.root / name / "work", name)

    def begin(
        self, sums: Mapping[str, Sum], question: str = QUESTION, slot: str = "slot", threshold: int = 0, **keys: Any
    ) -> Iterator[Answer]:
        """`keys` as `SecureSums.begin` takes them."""
        for name, total in sums.items():
            if (wire.TRAIN, name) in self.faults:
                continue
            try:
                config = self.site(name).begin(question, slot, "study", total, self.bits, threshold, **keys)
            except Refusal as error:
                self.roster.leave_out(name, wire.TRAIN, 1, str(error))
                continue
            yield Answer(name, config, {}, 0)

    def exchange(self, kind: str, config: wire.Config, each: Mapping[str, wire.Config]) -> Iterator[Answer]:
        for name in each:
            if (kind, name) in self.faults:
                continue
            ask = self.tamper(kind, name, {**config, **each[name]})
            self.asked.append((kind, name, ask))
            try:
                answer = self.answer(kind, name, ask)
            except Refusal as error:
                self.roster.leave_out(name, kind, 1, str(error))
                continue
            self.replies[kind, name] = answer
            yield answer

    def answer(self, kind: str, name: str, ask: wire.Config) -> Answer:
        site, question = self.site(name), str(ask["sum"])
        if kind == wire.MASKED:
            return Answer(name, {}, site.masked(question, ask), 0)
        return Answer(name, site.share(question, ask) if kind == wire.SHARES else site.unmask(question, ask), {}, 0)

    def gather(self, sums: Mapping[str, Sum], threshold: int = 0, min_sites: int = 2, **keys: Any) -> SecureTotal:
        shapes = {n: v.shape for n, v in next(iter(sums.values())).items()}
        summed = SecureSum(self.roster, self.exchange, wire.TRAIN, 1, shapes, self.bits, min_sites, threshold)
        return summed.gather(self.begin(sums, threshold=threshold, **keys))

    def last(self, kind: str, name: str) -> wire.Config:
        return next(dict(ask) for k, n, ask in reversed(self.asked) if (k, n) == (kind, name))


def names_of(count: int) -> list[str]:
    return [f"site {chr(65 + i)}" for i in range(count)]


def sums_of(names: list[str], seed: int = 0, shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> dict[str, Sum]:
    rng = np.random.default_rng(seed)
    out = {}
    for name in names:
        out[name] = {n: (100 * rng.normal(size=s)).astype(np.float32) for n, s in shapes.items()}
        out[name][EVIDENCE] = np.abs(rng.normal(size=shapes[EVIDENCE]))
    return out


def plain(sums: Mapping[str, Sum]) -> tuple[dict[str, np.ndarray], Sum]:
    """The accumulator's integers and total."""
    accumulator = Accumulator({n: v.shape for n, v in next(iter(sums.values())).items()}, UPDATE_BITS)
    for name, one in sums.items():
        accumulator.add(one, name)
    return accumulator._total, accumulator.total()


def same(got: SecureTotal, sums: Mapping[str, Sum], names: list[str]) -> None:
    integers, total = plain({n: sums[n] for n in names})
    assert [answer.site for answer in got.answers] == names
    for name, value in integers.items():
        assert got.integers[name].tobytes() == value.tobytes(), name
        assert got.total[name].tobytes() == total[name].tobytes(), name
