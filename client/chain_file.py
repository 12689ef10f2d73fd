"""A file of JSON lines that only grows: each line is chained to those before it, and a second file says where it ends.

Each line holds `hash`, the SHA-256 of the hash before it and of the line's JSON with sorted keys; `NAME.head` beside
`NAME.jsonl` holds how many lines and bytes there were after the last write, and their last hash, for a chain alone does not
show that its end is gone. Both guard against crashes and careless hands, not against an owner who writes both anew.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO, FileIO
from pathlib import Path
from typing import Any

from oncofed.common.errors import Refusal
from oncofed.common.files import replacing

START = "0" * 64
"""The hash before the first line."""

Entry = dict[str, Any]


@dataclass(frozen=True)
class Words:
    """How a chain's errors speak of it: `what` it is, the `harm` where it cannot be trusted, and the `remedy`.

    `old` is the same about a file without hashes, of an older version; empty: such a file is as good as broken.
    """

    what: str
    harm: str
    remedy: str
    old: str = ""


@dataclass(frozen=True)
class _Content:
    """What the file holds: `size` bytes of good lines, then perhaps a line that a crash cut off."""

    entries: list[Entry]
    lines: int
    hash: str
    size: int
    torn: bytes
    ended: bool  # the last good line has its newline


class Lines:
    """The lines while nobody else writes; `append` adds to them."""

    def __init__(self, chain: Chain, file: FileIO, content: _Content) -> None:
        self.entries = content.entries
        self._chain, self._file, self._content = chain, file, content

    def append(self, *entries: Entry) -> None:
        """Write lines so that they outlive a crash from here on; a line that an earlier crash cut off goes, and another says so."""
        now, durable = self._content, self._chain.durable
        text = b"" if now.ended else b"\n"
        if now.torn:
            self._file.truncate(now.size)
            cut = {"op": "dropped", "bytes": len(now.torn), "sha256": hashlib.sha256(now.torn).hexdigest()}
            entries = (cut, *entries)
        last = now.hash
        for entry in entries:
            last = _link(last, entry)
            text += json.dumps({**entry, "hash": last}, sort_keys=True).encode() + b"\n"
        if not self._chain.head.exists():
            # before the first line: a file without a head is one whose head was taken away
            self._chain.write_head(0, START, 0)
        rest = memoryview(text)
        while rest:
            rest = rest[self._file.write(rest) :]
        if durable:
            os.fsync(self._file.fileno())
        self.entries = [*self.entries, *entries]
        self._content = _Content(self.entries, now.lines + len(entries), last, now.size + len(text), b"", True)
        self._chain.write_head(self._content.lines, last, self._content.size)


@dataclass(frozen=True)
class Chain:
    """The two files at a site. Every reading checks all lines; a line that a crash cut off at the very end is passed over.

    Without `durable` a loss of power may cost the last lines.
    """

    file: Path
    site: str
    words: Words
    durable: bool = True

    @property
    def head(self) -> Path:
        return self.file.with_suffix(".head")

    def read(self) -> list[Entry]:
        """All lines, without their hashes; raises `Refusal` where one was changed or is gone."""
        for _ in range(2):  # the first writer may come in between
            try:
                with self.file.open("rb") as file:
                    fcntl.flock(file, fcntl.LOCK_SH)
                    return self._check(file.read()).entries
            except FileNotFoundError:
                if not self.head.exists():
                    return []
        raise self._broken("it is gone")

    @contextmanager
    def writing(self) -> Iterator[Lines]:
        """The lines, while other messages and processes wait; raises `Refusal` as `read` does."""
        with self._locked() as file:
            yield Lines(self, file, self._check(file.readall()))

    def add(self, *entries: Entry) -> None:
        """Append lines in a time that does not grow with the file: what the head vouches for is not read again.

        Raises `Refusal` where the file is shorter than its head says, or goes on in another way; `read` sees the rest.
        """
        with self._locked() as file:
            lines, last, size = self._read_head(None)
            there = os.fstat(file.fileno()).st_size
            if size is None:  # of a head that an older version wrote
                content = self._check(file.readall())
            elif there < size:
                raise self._broken(f"it has {there} bytes and {self.head.name} knows of {size}")
            else:
                file.seek(size)
                content = self._follow(file.readall(), lines, last, size)
            Lines(self, file, content).append(*entries)

    @contextmanager
    def _locked(self) -> Iterator[FileIO]:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        # unbuffered: a buffer would write a failed line once more when it closes
        with self.file.open("ab+", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            yield file

    def write_head(self, lines: int, last: str, size: int) -> None:
        """Replace the head; a crash leaves the old one, which the file may be ahead of."""
        with replacing(self.head) as temporary, temporary.open("w") as file:
            json.dump({"lines": lines, "hash": last, "bytes": size}, file)
            file.flush()
            if self.durable:
                os.fsync(file.fileno())
        if not self.durable:
            return
        folder = os.open(self.file.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _check(self, raw: bytes) -> _Content:
        """All lines from the first, held against the head."""
        lines, last, _ = self._read_head(raw)
        content = self._follow(raw, 0, START, 0, known=lines, last=last)
        if content.lines < lines:
            raise self._broken(f"it has {content.lines} lines and {self.head.name} knows of {lines}")
        return content

    def _follow(self, raw: bytes, before: int, now: str, size: int, *, known: int = 0, last: str = "") -> _Content:
        """The lines of `raw` after `before` others with the hash `now`; the head knows `known` lines that end with `last`."""
        entries: list[Entry] = []
        whole, torn = 0, b""
        pieces = BytesIO(raw).readlines()
        for number, piece in enumerate(pieces, start=before + 1):
            entry = _parse(piece)
            if entry is None and number == before + len(pieces) > known:
                # never fully written, so nothing had left for it
                torn = piece
                break
            if entry is None:
                raise self._broken(f"line {number} cannot be read")
            if "hash" not in entry:
                raise self._broken(f"line {number} has no hash") if number > 1 else self._old()
            stated = entry.pop("hash")
            now = _link(now, entry)
            if stated != now:
                raise self._broken(f"line {number} was changed, or lines before it were removed")
            if number == known and now != last:
                raise self._broken(f"line {number} is not the one that {self.head.name} knows")
            entries.append(entry)
            whole += len(piece)
        ended = raw[:whole].endswith(b"\n") or not whole
        return _Content(entries, before + len(entries), now, size + whole, torn, ended)

    def _read_head(self, raw: bytes | None) -> tuple[int, str, int | None]:
        """Lines, last hash and bytes (None: not told); `raw` is the file's content, None: it has not been read."""
        try:
            head = json.loads(self.head.read_text())
            size = head.get("bytes")
            return int(head["lines"]), str(head["hash"]), None if size is None else int(size)
        except FileNotFoundError:
            raw = self.file.read_bytes() if raw is None else raw
            if not raw:
                return 0, START, 0
            first = _parse(raw.split(b"\n")[0])
            if first is not None and "hash" not in first:
                raise self._old() from None
            raise self._broken(f"{self.head.name} beside it is missing") from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise self._broken(f"{self.head.name} beside it cannot be read") from None

    def _broken(self, what: str) -> Refusal:
        w = self.words
        return Refusal(
            f"site {self.site}: its {w.what} {self.file.name} is not as it was written: {what}; {w.harm}. The site's engineer must "
            f"{w.remedy}"
        )

    def _old(self) -> Refusal:
        if not self.words.old:
            return self._broken("its lines have no hashes")
        return Refusal(f"site {self.site}: its {self.words.what} {self.file.name} {self.words.old}")


def is_unchained(file: Path) -> bool:
    """Whether a file of lines was written without a chain, and has none."""
    if file.with_suffix(".head").exists() or not file.exists():
        return False
    with file.open("rb") as lines:
        first = lines.readline()
    entry = _parse(first)
    return bool(first) and (entry is None or "hash" not in entry)


def _link(before: str, entry: Mapping[str, Any]) -> str:
    return hashlib.sha256((before + json.dumps(entry, sort_keys=True)).encode()).hexdigest()


def _parse(line: bytes) -> Entry | None:
    """The object of a line; None where it is none."""
    try:
        entry = json.loads(line)
    except ValueError:  # of JSON and of UTF-8
        return None
    return entry if isinstance(entry, dict) else None
