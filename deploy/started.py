"""How a simulation was started, kept in its folder, so that `oncofed study resume` can go on the same way."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from oncofed.common.files import write_text

Engine = Literal["local", "ray", "superlink"]

FILE = "run.json"


@dataclass(frozen=True)
class Started:
    """Folder of sites, engine, what the federation is compared with, and the folder that relative paths of the study start from."""

    sites: str
    engine: Engine
    compare: tuple[str, ...] = ()
    folder: str = ""
    done: bool = False
    """Whether comparison and report are written."""

    @classmethod
    def read(cls, out: Path) -> Started | None:
        """None where no simulation was started: the run was one of a real federation."""
        if not (out / FILE).exists():
            return None
        try:
            told = json.loads((out / FILE).read_text())
            return cls(**told | {"compare": tuple(told["compare"])})
        except (KeyError, TypeError, ValueError):
            raise ValueError(
                f"{out / FILE}: cannot be read; remove it, and name the sites with --sites and the engine with --engine"
            ) from None

    def write(self, out: Path) -> None:
        """Replace what the folder says."""
        write_text(out / FILE, json.dumps(asdict(self), indent=1), durable=True)
