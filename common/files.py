"""Files that are written whole or not at all."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

_NO_ROOM = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota is used up",
    errno.EFBIG: "the file is too large",
}


class DiskFull(OSError):
    """A file was not written for want of room; what stood in its place is as it was."""


@contextmanager
def replacing(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """A temporary path that takes the place of `path` when the block ends well: a crash leaves the old file or the new one.

    A `durable` one also outlives a loss of power. Raises `DiskFull` with the remedy, and leaves nothing of the new file behind.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if durable:
            _to_disk(temporary)
        os.replace(temporary, path)
        if durable:  # the name too
            _to_disk(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)  # half a file would fill what is left of the disk
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            raise DiskFull(
                f"{path.name} was not written, {_NO_ROOM[error.errno]} at {path.parent.resolve()}; make room there and resume: what was "
                "written before is whole"
            ) from None
        raise


def write_text(path: Path, text: str, *, durable: bool = False) -> None:
    """Replace a file's text in one step."""
    with replacing(path, durable=durable) as temporary:
        temporary.write_text(text)


def write_program(path: Path, module: str, call: str) -> None:
    """A program of this Python that makes one call, as `start()`, of a function of a module."""
    with replacing(path) as temporary:
        temporary.write_text(f"#!{sys.executable}\nfrom {module} import {call.partition('(')[0]}\n\n{call}\n")
        temporary.chmod(0o755)


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def secret_file(path: Path, *, lasting: bool = False) -> Iterator[BinaryIO]:
    """A file to be written whole that its owner alone may read; a `lasting` one is on the disk when the block has ended."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    with replacing(path, durable=lasting) as temporary, os.fdopen(os.open(temporary, flags, 0o600), "wb") as file:
        yield file


def write_secret(path: Path, content: bytes, *, lasting: bool = False) -> None:
    """Replace such a file's content in one step."""
    with secret_file(path, lasting=lasting) as file:
        file.write(content)
