"""A file of JSON lines that only grows: each line is chained to those before it, and a second file says where it ends.

`ledger.jsonl` holds in each line `hash`, the SHA-256 of the hash before it and of the line's JSON with sorted keys;
`ledger.head` beside it holds how many lines there were after the last write, and their last hash, for a chain alone does
not show that its end is gone. Both guard against crashes and careless hands, not against an owner who writes both anew.
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
class _Content:
    """What the file holds: `size` bytes of good lines, then perhaps a line that a crash cut off."""

    entries: list[Entry]
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
        now = self._content
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
            # before the first line: a ledger without a head is one whose head was taken away
            self._chain.write_head(0, START)
        rest = memoryview(text)
        while rest:
            rest = rest[self._file.write(rest) :]
        os.fsync(self._file.fileno())
        self.entries = [*self.entries, *entries]
        self._content = _Content(self.entries, last, now.size + len(text), b"", True)
        self._chain.write_head(len(self.entries), last)


@dataclass(frozen=True)
class Chain:
    """The two files at a site. Every reading checks all lines; a line that a crash cut off at the very end is passed over."""

    file: Path
    site: str

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
        self.file.parent.mkdir(parents=True, exist_ok=True)
        # unbuffered: a buffer would write a failed line once more when it closes
        with self.file.open("ab+", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            yield Lines(self, file, self._check(file.readall()))

    def write_head(self, lines: int, last: str) -> None:
        """Replace the head; a crash leaves the old one, which the ledger may be ahead of."""
        with replacing(self.head) as temporary, temporary.open("w") as file:
            json.dump({"lines": lines, "hash": last}, file)
            file.flush()
            os.fsync(file.fileno())
        folder = os.open(self.file.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _check(self, raw: bytes) -> _Content:
        lines, last = self._read_head(raw)
        entries: list[Entry] = []
        now, size, torn = START, 0, b""
        pieces = BytesIO(raw).readlines()
        for number, piece in enumerate(pieces, start=1):
            entry = _parse(piece)
            if entry is None and number == len(pieces) > lines:
                # never fully written, so no data were touched for it
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
            if number == lines and now != last:
                raise self._broken(f"line {number} is not the one that {self.head.name} knows")
            entries.append(entry)
            size += len(piece)
        if len(entries) < lines:
            raise self._broken(f"it has {len(entries)} lines and {self.head.name} knows of {lines}")
        return _Content(entries, now, size, torn, raw[:size].endswith(b"\n") or not size)

    def _read_head(self, raw: bytes) -> tuple[int, str]:
        try:
            head = json.loads(self.head.read_text())
            return int(head["lines"]), str(head["hash"])
        except FileNotFoundError:
            if not raw:
                return 0, START
            first = _parse(raw.split(b"\n")[0])
            if first is not None and "hash" not in first:
                raise self._old() from None
            raise self._broken(f"{self.head.name} beside it is missing") from None
        except (ValueError, KeyError, TypeError):
            raise self._broken(f"{self.head.name} beside it cannot be read") from None

    def _broken(self, what: str) -> Refusal:
        return Refusal(
            f"site {self.site}: its ledger {self.file.name} is not as it was written: {what}; nobody knows what is spent, so nothing with "
            f"noise leaves. The site's engineer must put {self.file.name} and {self.head.name} back from a backup made after the last "
            "release; without one, count the releases in release-log.jsonl, move both files away, and lower epsilon_budget in policy.toml by "
            "what they cost"
        )

    def _old(self) -> Refusal:
        return Refusal(
            f"site {self.site}: its ledger {self.file.name} was written by an older version of oncofed, which added epsilons up and kept no "
            "hashes; the site's engineer must add up the epsilons of its lines, move the file away, and lower epsilon_budget in policy.toml by "
            "the sum"
        )


def _link(before: str, entry: Mapping[str, Any]) -> str:
    return hashlib.sha256((before + json.dumps(entry, sort_keys=True)).encode()).hexdigest()


def _parse(line: bytes) -> Entry | None:
    """The object of a line; None where it is none."""
    try:
        entry = json.loads(line)
    except ValueError:  # of JSON and of UTF-8
        return None
    return entry if isinstance(entry, dict) else None
