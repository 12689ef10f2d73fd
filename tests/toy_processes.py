"""Looking at real processes from tests: wait for something, and find what a process has started."""

from __future__ import annotations

import contextlib
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


def has_torch(process: int) -> bool:
    """Whether a process has loaded torch: of a ClientApp, that it is about to compute."""
    with contextlib.suppress(OSError):
        return "libtorch" in Path(f"/proc/{process}/maps").read_text()
    return False
