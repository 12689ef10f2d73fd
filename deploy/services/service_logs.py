"""What supervised processes print: to files that are turned over, or to standard output for whoever collects it."""

from __future__ import annotations

import logging
import re
import sys
from logging.handlers import RotatingFileHandler
from pathlib import Path

LARGEST, KEPT = 10_000_000, 5
"""Bytes of a log file, and how many older ones are kept."""

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


class Logs:
    """One log a process, in a folder; without one, lines go to standard output behind the process's name."""

    def __init__(self, folder: Path | None, largest: int = LARGEST) -> None:
        self.folder, self.largest = folder, largest
        self._open: dict[str, logging.Logger] = {}

    def write(self, name: str, raw: bytes) -> str:
        """Keep a line; returns it as text without colours."""
        line = _COLOUR.sub("", raw.decode(errors="replace").rstrip("\r\n"))
        if self.folder is None:
            print(f"{name} | {line}", file=sys.stdout, flush=True)
        else:
            self._logger(name, self.folder).info("%s", line)
        return line

    def _logger(self, name: str, folder: Path) -> logging.Logger:
        if name not in self._open:
            folder.mkdir(parents=True, exist_ok=True)
            handler = RotatingFileHandler(folder / f"{name}.log", maxBytes=self.largest, backupCount=KEPT)
            handler.setFormatter(logging.Formatter("%(message)s"))
            logger = logging.Logger(name)  # of its own: not part of the program's log
            logger.addHandler(handler)
            self._open[name] = logger
        return self._open[name]
