"""A lock that one process holds: it is free when the process has ended, however it did."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from os import getpid
from pathlib import Path


@contextlib.contextmanager
def locked(file: Path) -> Iterator[None]:
    """Hold the lock; raises `ValueError` that names the process which has it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a+") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.seek(0)
            raise ValueError(
                f"process {handle.read().strip() or '?'} runs this already ({file}); stop it first, or leave it"
            ) from None
        handle.truncate(0)
        handle.write(f"{getpid()}\n")
        handle.flush()
        yield


def holder(file: Path) -> int | None:
    """The process that holds the lock, None where nobody does. 0: it is in another container."""
    try:
        with file.open() as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return int(handle.read().strip() or 0)
    except FileNotFoundError:
        pass
    return None
