"""The state of a run, read from its journal: how far it is, who takes part, who was left out and why, and how long it will take."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any, Literal

from oncofed.common.errors import one_line
from oncofed.server.journal import JOURNAL, STUDY

Status = Literal["waiting", "running", "finished", "failed"]
LeftOut = tuple[float, str, str, int, str]
"""Time (unix seconds), site, kind of question, round, reason."""

RECENT = 10
"""Rounds whose median says how long the next ones take."""
HEAD = 64
"""Bytes of a journal's first line by which it is known: its time is among them."""
KEPT = 50
"""Reasons for being left out that a state holds."""


@dataclass(frozen=True)
class SiteState:
    """One site: when it last answered (unix seconds), how often, in how many seconds the last time, and how often it was left out."""

    name: str
    last_seen: float | None = None
    answers: int = 0
    seconds: float | None = None
    bytes_from: int = 0
    left_out: int = 0
    reason: str = ""


@dataclass(frozen=True)
class RoundState:
    """One round of training that is done; `sites` is the number that took part."""

    fold: int
    phase: str
    round: int
    seconds: float
    loss: float | None
    validation: float | None
    sites: int
    bytes_to_sites: int
    bytes_from_sites: int


@dataclass(frozen=True)
class RunState:
    """A run at one moment; times are unix seconds, `rounds_planned` counts those of all folds and phases."""

    study: str = ""
    package: str = ""
    status: Status = "waiting"
    reason: str = ""
    started: float | None = None
    updated: float | None = None
    folds: tuple[int, ...] = ()
    fold: int | None = None
    phase: str = ""
    rounds_done: int = 0
    rounds_planned: int = 0
    seconds_left: float | None = None
    rounds: tuple[RoundState, ...] = ()
    sites: tuple[SiteState, ...] = ()
    left_out: tuple[LeftOut, ...] = ()
    bytes_to_sites: int = 0
    bytes_from_sites: int = 0

    @classmethod
    def of(cls, out: Path) -> RunState:
        """The state of the run in a folder; lines that are torn, damaged or unknown are skipped. Raises where there is no run."""
        return Follower(out).state()

    def json(self) -> dict[str, Any]:
        """The same in JSON's types."""
        told: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return told


class Journaled:
    """What the events of a journal add up to; each line is taken once, in the order in which they stand.

    The method for an event reads all that it says before it changes anything.
    """

    def __init__(self) -> None:
        self.run = RunState()
        self.per_fold = 0
        self.rounds: dict[tuple[int, str, int], RoundState] = {}
        self.folds_done: set[int] = set()
        self.sites: dict[str, SiteState] = {}
        self.left_out: deque[LeftOut] = deque(maxlen=KEPT)
        self.moved = [0, 0]
        self._lines: set[int] = set()

    def add(self, line: bytes) -> None:
        """Take a line; one that was taken before, is no event, or lacks what its event must say changes nothing."""
        if (known := hash(line)) in self._lines:
            return
        try:
            event = json.loads(line)
            now = datetime.fromisoformat(event["time"]).timestamp()
            take = getattr(self, f"_{event['event']}", None) if event["event"] in EVENTS else None
            if take is None or not math.isfinite(now):
                return
            take(now, event)
        except (ArithmeticError, AttributeError, KeyError, RecursionError, TypeError, ValueError):
            return
        self._lines.add(known)
        self.run = replace(self.run, updated=max(now, self.run.updated or now))

    def state(self) -> RunState:
        """The state after the last line."""
        run, per_fold = self.run, self.per_fold
        reached: dict[int, dict[str, int]] = {}
        for fold, phase, round_ in self.rounds:
            reached.setdefault(fold, {})[phase] = max(round_, reached.get(fold, {}).get(phase, 0))
        planned = per_fold * len(run.folds)
        done = sum(
            per_fold if f in self.folds_done else min(per_fold, sum(reached.get(f, {}).values())) for f in run.folds
        )
        done = planned if run.status == "finished" else done
        recent = [r.seconds for r in self.rounds.values()][-RECENT:]
        left = (planned - done) * median(recent) if recent and run.status == "running" else None
        return replace(
            run,
            rounds_done=done,
            rounds_planned=planned,
            seconds_left=left,
            rounds=tuple(self.rounds.values()),
            sites=tuple(sorted(self.sites.values(), key=lambda s: s.name)),
            left_out=tuple(self.left_out),
            bytes_to_sites=self.moved[0],
            bytes_from_sites=self.moved[1],
        )

    def _started(self, now: float, event: Mapping[str, Any]) -> None:
        folds, rounds = tuple(_whole(f) for f in event["folds"]), _whole(event["rounds"])
        names = [_text(name) for name in event["sites"]]
        study, package, resume = _text(event["study"]), _text(event["package"]), event["resume"]
        begun = self.run.started if resume and self.run.started is not None else now
        if not resume:
            self.rounds, self.folds_done = {}, set()
        self.run = RunState(study, package, "running", started=begun, updated=self.run.updated, folds=folds)
        self.per_fold = rounds
        for name in names:
            self.sites.setdefault(name, SiteState(name))

    def _question(self, now: float, event: Mapping[str, Any]) -> None:
        size = _whole(event["bytes"])
        self._at(event)
        self.moved[0] += size

    def _answer(self, now: float, event: Mapping[str, Any]) -> None:
        name, size, seconds = _text(event["site"]), _whole(event["bytes"]), _number(event["seconds"])
        site = self.sites.get(name) or SiteState(name)
        self.moved[1] += size
        self.sites[name] = replace(
            site, last_seen=now, answers=site.answers + 1, seconds=seconds, bytes_from=site.bytes_from + size
        )

    def _left_out(self, now: float, event: Mapping[str, Any]) -> None:
        name, kind, round_, reason = (
            _text(event["site"]),
            _text(event["kind"]),
            _whole(event["round"]),
            _text(event["reason"]),
        )
        site = self.sites.get(name) or SiteState(name)
        self.sites[name] = replace(site, left_out=site.left_out + 1, reason=reason)
        self.left_out.append((now, name, kind, round_, reason))

    def _round(self, now: float, event: Mapping[str, Any]) -> None:
        seconds = _number(event["seconds"])
        if seconds is None:
            raise ValueError("a round lasts some time")
        done = RoundState(
            _whole(event["fold"]),
            _text(event["phase"]),
            _whole(event["round"]),
            seconds,
            _number(event["loss"]),
            _number(event["validation"]),
            len([_text(name) for name in event["sites"]]),
            _whole(event["bytes_to_sites"]),
            _whole(event["bytes_from_sites"]),
        )
        # a resumed run does again what its checkpoint lacks: those rounds, and all after them, are not what they were
        again = [k for k in self.rounds if k[:2] == (done.fold, done.phase) and k[2] >= done.round]
        for key in again:
            del self.rounds[key]
        self.rounds[done.fold, done.phase, done.round] = done
        self._at(event)

    def _checkpoint(self, now: float, event: Mapping[str, Any]) -> None:
        self._at(event)

    def _fold(self, now: float, event: Mapping[str, Any]) -> None:
        self.folds_done.add(_whole(event["fold"]))

    def _finished(self, now: float, event: Mapping[str, Any]) -> None:
        self.run = replace(self.run, status="finished", reason="")

    def _failed(self, now: float, event: Mapping[str, Any]) -> None:
        self.run = replace(self.run, status="failed", reason=_text(event["reason"]))

    def _back(self, now: float, event: Mapping[str, Any]) -> None:
        name = _text(event["site"])
        self.sites[name] = replace(self.sites.get(name) or SiteState(name), last_seen=now)

    def _at(self, event: Mapping[str, Any]) -> None:
        """Where the run is; questions of no fold (steps of a sum under masks) leave it where it was."""
        if event["fold"] is not None:
            self.run = replace(self.run, fold=_whole(event["fold"]), phase=_text(event["phase"]) or self.run.phase)


EVENTS = frozenset(
    ("started", "question", "answer", "left_out", "round", "checkpoint", "fold", "finished", "failed", "back")
)


class Follower:
    """Reads the journal of a run's folder as it grows: each call of `state` reads only what has come since the last."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self._begin()

    def _begin(self, head: bytes = b"") -> None:
        self.journaled, self.head, self.read = Journaled(), head, 0

    def state(self) -> RunState:
        """The state now; raises `ValueError` where the folder holds no run."""
        try:
            with (self.out / JOURNAL).open("rb") as file:
                head = file.read(HEAD)
                if not head.startswith(self.head):  # another run has begun here
                    self._begin(head)
                self.head = head
                file.seek(self.read)
                *lines, _ = file.read().split(b"\n")
                for line in lines:
                    self.journaled.add(line)
                self.read += sum(len(line) + 1 for line in lines)
        except FileNotFoundError:
            if not (self.out / STUDY).exists():
                raise ValueError(
                    f"{self.out}: no run was started here ({JOURNAL} and {STUDY} are missing); name the folder that is its runtime.out"
                ) from None
            self._begin()
        return self.journaled.state()


def _whole(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{value!r} is no whole number")
    return value


def _number(value: Any) -> float | None:
    if value is None:
        return None
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"{value!r} is no number")
    return float(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is no text")
    return one_line(value)  # a terminal obeys some characters
