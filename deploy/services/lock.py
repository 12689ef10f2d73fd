"""A lock that one process holds: it is free when the process has ended, however it did."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

ELSEWHERE = 0
"""The holder is in another container: its process id means nothing here."""


@contextlib.contextmanager
def locked(file: Path) -> Iterator[None]:
    """Hold the lock; raises `ValueError` that names the process which has it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a+") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            who = holder(file)
            name = f"process {who}" if who else "a process in another container"
            raise ValueError(f"{name} runs this already ({file}); stop it first, or leave it") from None
        handle.truncate(0)
        handle.write(f"{os.getpid()} {_namespace()}\n")
        handle.flush()
        yield


def holder(file: Path) -> int | None:
    """The process that holds the lock, `ELSEWHERE` where it cannot be named, None where nobody holds it."""
    try:
        with file.open() as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                process, _, where = handle.read().strip().partition(" ")
                return int(process) if process.isdigit() and where == _namespace() else ELSEWHERE
    except FileNotFoundError:
        pass
    return None


def _namespace() -> str:
    """Of process ids; the same in all that is no container."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
