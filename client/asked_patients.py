"""Of whom one study has asked a site so far, where a server chooses it: no two of its questions tell of a few patients."""

from __future__ import annotations

import fcntl
import hashlib
from dataclasses import dataclass
from pathlib import Path

from oncofed.client.released import tells_of_few
from oncofed.common.errors import Refusal
from oncofed.common.files import write_text


@dataclass(frozen=True)
class AskedPatients:
    """The sets of patients of one study's questions, a file each with their names, in `folder` at the site."""

    folder: Path
    site: str

    def check(self, patients: frozenset[str], least: int) -> None:
        """Remember a set; raise `Refusal` where sums over it and over earlier ones would together tell of fewer than `least` patients."""
        text = "\n".join(sorted(patients)) + "\n"
        file = self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.txt"
        if file.exists():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            earlier = [frozenset(f.read_text().splitlines()) for f in self.folder.glob("*.txt")]
            near = any(0 < len(patients ^ other) < least for other in earlier)
            if earlier and (near or tells_of_few([*earlier, patients], least)):
                raise Refusal(
                    f"site {self.site}: the cancer types of the message are others than this study's before, and sums over both would tell of "
                    f"fewer than {least} patients (min_patients); ask about the same types, or begin a study of another name"
                )
            write_text(file, text)
