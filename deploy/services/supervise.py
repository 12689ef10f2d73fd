"""Supervises processes: starts them again with a growing pause, ends them with itself, and says in a file how they are."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from oncofed.common.files import write_text
from oncofed.deploy.services.lock import locked
from oncofed.deploy.services.processes import Child
from oncofed.deploy.services.service_logs import Logs

log = logging.getLogger("oncofed.supervise")

POLL_S = 0.2
TOLD_S = 5.0
"""How often the status file is written where nothing happens: a reader takes an older one for a dead supervisor's."""
SHORTEST_S, LONGEST_S = 1.0, 60.0
"""Pause before a process is started again: it doubles from the one to the other."""
STEADY_S = 60.0
"""A process that was up this long has not failed in a row."""
REFUSED_S, REFUSALS = 10.0, 12
"""SuperLink takes a node back when its former session has ended, up to a minute after; after so many refusals it is something else."""


@dataclass(frozen=True)
class Service:
    """A process to keep running. `command` and `settle` are called anew before every start: ports and files may have changed."""

    name: str
    command: Callable[[], Sequence[object]]
    folder: Path
    environment: Mapping[str, str]
    ready: str = ""
    """Text of its output that says it is at work; without it, it is once it runs."""
    refused: str = ""
    """Text of its output that says the other side will take it later."""
    gave_up: str = ""
    """How a line of its output begins after which it works no more, though it runs on: it is ended and started again."""
    watch: tuple[Path, ...] = ()
    """It is started again when one of these files has changed: certificates."""
    may_start: Callable[[], bool] = lambda: True
    """Whether what it needs is there."""


@dataclass
class _Run:
    """One life of a process, as its output tells."""

    child: Child
    since: float
    ready: bool
    refused: bool = False
    gave_up: bool = False
    reader: threading.Thread | None = None


@dataclass
class _State:
    service: Service
    run: _Run | None = None
    starts: int = 0
    failures: int = 0
    refusals: int = 0
    next_start: float = 0.0
    down_since: float = field(default_factory=time.monotonic)
    last_exit: str = ""
    changed: str = field(default_factory=lambda: _now())
    seen: dict[Path, float] = field(default_factory=dict)


class Supervisor:
    """Keeps services running until SIGTERM or SIGINT. `background` functions run beside, in threads, until their event is set."""

    def __init__(
        self,
        services: Sequence[Service],
        status: Path,
        logs: Logs,
        background: Sequence[Callable[[threading.Event], None]] = (),
    ) -> None:
        self.states = [_State(s) for s in services]
        self.status, self.logs, self.background = status, logs, background
        self.stopping = threading.Event()
        self.turned = time.monotonic()
        self._told = 0.0

    def run(self) -> None:
        """Start all and keep them up; returns when asked to stop and all have ended. Raises `ValueError` where another one is at work."""
        with locked(self.status.with_suffix(".lock")), self._signals():
            threads = [threading.Thread(target=f, args=(self.stopping,), daemon=True) for f in self.background]
            try:
                for thread in threads:
                    thread.start()
                while not self.stopping.is_set():
                    self.turn()
                    self.stopping.wait(POLL_S)
            finally:
                self.stopping.set()
                self._end()

    def turn(self) -> None:
        """Look at each process once."""
        self.turned, changed = time.monotonic(), False
        for state in self.states:
            changed |= self._look(state)
        if changed or self.turned - self._told > TOLD_S:
            self.tell()

    def health(self) -> dict[str, bool]:
        """By name whether each process runs; `""` for all of them with the supervisor, `ready` for all at work.

        A process that is being brought back counts as down only after `LONGEST_S`: whoever restarts us could do no better.
        """
        now = time.monotonic()
        turning = now - self.turned < 3 * LONGEST_S
        runs = {s.service.name: s.run is not None for s in self.states}
        lasting = all(s.run is not None or now - s.down_since < LONGEST_S for s in self.states)
        ready = all(s.run is not None and s.run.ready for s in self.states)
        return runs | {"": turning and lasting, "ready": turning and ready}

    def tell(self) -> None:
        """Write the status file."""
        self._told = time.monotonic()
        told = {
            "supervisor": os.getpid(),
            "written": _now(),
            "services": {s.service.name: _told(s) for s in self.states},
        }
        try:
            write_text(self.status, json.dumps(told, indent=1) + "\n")
        except OSError as error:  # a full disk must not end what runs
            log.error("%s", error)

    def _look(self, state: _State) -> bool:
        """Whether something has changed."""
        run, now = state.run, time.monotonic()
        if run is None:
            if now < state.next_start or not state.service.may_start():
                return False
            self._start(state)
            return True
        if run.child.alive:
            if now - run.since > STEADY_S:
                state.failures = 0
            if run.gave_up:
                pause = self._pause(state, run)
                return self._again(state, run, f"has given up: it is started again in {pause:g} s", pause)
            if run.ready:
                state.refusals = 0
            if self._is_stale(state):
                return self._again(state, run, "its files have changed: it is started again", 0.0)
            return False
        run.child.kill()  # what is left of its session
        if run.reader:
            run.reader.join(1.0)  # its last words say why
        pause = self._pause(state, run)
        state.last_exit = f"{_exit(run.child.process.returncode)} at {_now()}"
        self._down(state, pause)
        why = " (the other side does not take it yet)" if run.refused else ""
        self.say(state, f"ended with {state.last_exit}{why}; starts again in {pause:g} s")
        return True

    def _again(self, state: _State, run: _Run, why: str, pause: float) -> bool:
        """End a process that runs, to start it again."""
        self.say(state, why)
        run.child.ask_to_stop()
        run.child.stop()
        self._down(state, pause)
        return True

    def _down(self, state: _State, pause: float) -> None:
        """Note that a process has ended, and when it is started again."""
        now = time.monotonic()
        state.run, state.changed, state.down_since, state.next_start = None, _now(), now, now + pause

    def _pause(self, state: _State, run: _Run) -> float:
        """Seconds until the next start after a life that ended by itself."""
        if run.refused or run.gave_up:
            state.refusals += 1
            return REFUSED_S if state.refusals <= REFUSALS else LONGEST_S
        state.failures = 1 if time.monotonic() - run.since > STEADY_S else state.failures + 1
        return float(min(SHORTEST_S * 2 ** (state.failures - 1), LONGEST_S))

    def _start(self, state: _State) -> None:
        service = state.service
        state.seen = _times(service.watch)
        read, write = os.pipe()
        try:
            child = Child(service.command(), folder=service.folder, environment=service.environment, output=write)
        except (OSError, ValueError) as error:
            os.close(read)
            state.failures += 1
            pause = min(SHORTEST_S * 2 ** (state.failures - 1), LONGEST_S)
            state.last_exit, state.next_start = f"{error}", time.monotonic() + pause
            self.say(state, f"did not start: {error}; tried again in {pause:g} s")
            return
        finally:
            os.close(write)
        state.run = _Run(child, time.monotonic(), ready=not service.ready)
        state.starts += 1
        state.changed = _now()
        state.run.reader = threading.Thread(target=self._read, args=(service, state.run, read), daemon=True)
        state.run.reader.start()
        self.say(state, f"started, process {child.process.pid}")

    def _read(self, service: Service, run: _Run, descriptor: int) -> None:
        """Pass a process's output on to its log, and note what it tells."""
        with os.fdopen(descriptor, "rb") as pipe:
            for raw in pipe:
                line = self.logs.write(service.name, raw)
                if service.ready and service.ready in line and not run.ready:
                    run.ready, self._told = True, 0.0
                run.refused |= bool(service.refused) and service.refused in line
                run.gave_up |= bool(service.gave_up) and line.startswith(service.gave_up)

    def _is_stale(self, state: _State) -> bool:
        """Whether a watched file is another, and has stayed as it is for two seconds: certificate and key change one after the other."""
        if not state.service.watch:
            return False
        now = _times(state.service.watch)
        if now == state.seen:
            return False
        return len(now) == len(state.service.watch) and time.time() - max(now.values()) > 2.0

    def _end(self) -> None:
        """End all processes, those started last first."""
        runs = [(s, s.run) for s in reversed(self.states) if s.run is not None]
        for _, run in runs:
            run.child.ask_to_stop()
        for state, run in runs:
            run.child.stop()
            self.say(state, f"ended with {_exit(run.child.process.returncode)}")
            state.run, state.changed = None, _now()
        self.tell()

    def say(self, state: _State, text: str) -> None:
        self.logs.write("supervisor", f"{_now()} {state.service.name}: {text}\n".encode())

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT end the supervisor as long as the block lasts."""
        before = {s: signal.signal(s, lambda *_: self.stopping.set()) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _told(state: _State) -> dict[str, Any]:
    run = state.run
    return {
        "state": "up" if run else "waiting",
        "ready": run is not None and run.ready,
        "process": run.child.process.pid if run else None,
        "since": state.changed,
        "starts": state.starts,
        "last_exit": state.last_exit,
    }


def _exit(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def _times(files: Sequence[Path]) -> dict[Path, float]:
    found = {}
    for file in files:
        with contextlib.suppress(OSError):
            found[file] = file.stat().st_mtime
    return found


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
