"""Looking at real processes from tests: wait for something, and find what a process has started."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def until(there: Callable[[], Any], patience_s: float = 300.0, pause_s: float = 0.2) -> Any:
    """What `there` gives once it gives something."""
    end = time.monotonic() + patience_s
    while not (found := there()):
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(pause_s)
    return found


def in_session(session: int, program: str = "") -> list[int]:
    """The processes in the session of one that was started with a session of its own, or those of them that run a program."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError):
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == session and program in (entry / "cmdline").read_text():
                found.append(int(entry.name))
    return found


def begun(process: int) -> float:
    """When a process began, in seconds since 1970, to a hundredth; 0 of one that is no more."""
    with contextlib.suppress(OSError):
        ticks = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19])
        return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks / os.sysconf("SC_CLK_TCK")
    return 0.0


def answering(session: int, since: float) -> list[int]:
    """The ClientApps of a node, by the session of its process, that have begun after a time: a message each. The process that they are forked from began before."""
    return [p for p in in_session(session, "flwr-clientapp") if begun(p) > since]
