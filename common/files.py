"""Files that are written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path that takes the place of `path` when the block ends well: a crash leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    yield temporary
    os.replace(temporary, path)


def write_text(path: Path, text: str) -> None:
    """Replace a file's text in one step."""
    with replacing(path) as temporary:
        temporary.write_text(text)


@contextmanager
def secret_file(path: Path, *, lasting: bool = False) -> Iterator[BinaryIO]:
    """A file to be written whole that its owner alone may read; a `lasting` one is on the disk when the block has ended."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    with replacing(path) as temporary, os.fdopen(os.open(temporary, flags, 0o600), "wb") as file:
        yield file
        if lasting:
            file.flush()
            os.fsync(file.fileno())


def write_secret(path: Path, content: bytes, *, lasting: bool = False) -> None:
    """Replace such a file's content in one step."""
    with secret_file(path, lasting=lasting) as file:
        file.write(content)
