"""The journal of a run: one line of JSON an event, for whoever watches it while it goes on or reads it afterwards.

It says no more than the server must see to do its work and tells in `results.json`: who was asked, who answered, when, with how many
bytes, who was left out and why. Losses stand there only where the study's results have them.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from io import SEEK_END, RawIOBase
from pathlib import Path
from typing import Any

from oncofed.common.errors import one_line

log = logging.getLogger("oncofed.server")

JOURNAL, STUDY = "journal.jsonl", "study.toml"
"""Files in a run's folder: this one, and the study that it runs."""
LONGEST = 1000
"""Characters of a reason: a site words it, `results.json` has it whole."""


@dataclass
class Journal:
    """Writes events as they happen, each at once; without a `file` it writes nothing.

    A journal that cannot be written is said once in the log and costs the run nothing.
    """

    file: RawIOBase | None = None
    failed: bool = False
    torn: bool = False
    """Whether the last line has no end: the next one begins on a fresh line."""

    @classmethod
    @contextmanager
    def opened(cls, path: Path) -> Iterator[Journal]:
        """The journal at `path`, which goes on where it ended."""
        with path.open("a+b", buffering=0) as file:
            torn = False
            if file.seek(0, SEEK_END):
                file.seek(-1, SEEK_END)
                torn = file.read(1) != b"\n"
            yield cls(file, torn=torn)

    def write(self, event: str, **about: Any) -> None:
        """Add an event; a number that is none (NaN, infinity) becomes null."""
        if self.file is None:
            return
        now = datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
        plain = {name: _plain(value) for name, value in about.items()}
        self._put(json.dumps({"time": now, "event": event} | plain).encode() + b"\n")

    def failure(self, error: BaseException) -> None:
        """The run ends here, and why."""
        told = str(error) or type(error).__name__
        self.write("failed", reason=told if isinstance(error, Exception) else "the server's process was told to end")

    def _put(self, line: bytes) -> None:
        assert self.file is not None
        text = b"\n" + line if self.torn else line
        try:
            self.torn = self.file.write(text) != len(text)
        except OSError as error:
            self.torn = True
            if not self.failed:
                log.error("the journal cannot be written (%s); the run goes on without it", error)
            self.failed = True


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return one_line(value)[:LONGEST] if isinstance(value, str) else value
