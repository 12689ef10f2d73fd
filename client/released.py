"""What a site remembers of its tables: over whom they were, so that no two of them differ by a few patients.

Two sums over groups that differ by three patients are a sum over these three. The names of the groups' patients stay in
files at the site.
"""

from __future__ import annotations

import fcntl
import hashlib
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from oncofed.common.errors import Refusal
from oncofed.common.files import write_text

_NAME = re.compile("[0-9a-f]{32}")


@dataclass(frozen=True)
class ReleasedGroups:
    """Groups of patients behind earlier tables, a file each, named by its digest."""

    folder: Path
    site: str

    def check(self, groups: Iterable[frozenset[str]], least: int, kind: str, of: str = "patients") -> None:
        """Raise `Refusal` where a group differs from an earlier one that it meets by fewer than `least` patients; else remember all.

        `of` keeps apart what is compared: groups of patients, and those of them who had the event.
        """
        new = {_digest(g): g for g in groups if g}
        if least <= 1 or not new:
            return
        with self._locked(of) as folder:
            fresh = {name: g for name, g in new.items() if not (folder / name).exists()}
            earlier = [frozenset(f.read_text().splitlines()) for f in folder.iterdir() if _NAME.fullmatch(f.name)]
            known = [*earlier, *fresh.values()] if fresh else []
            for group in fresh.values():
                if any(group & other and 0 < len(group ^ other) < least for other in known):
                    raise Refusal(
                        f"site {self.site}: '{kind}' is about {of} who differ from those of an earlier table by fewer than the {least} "
                        "that its policy wants (min_cell); the two tables together would single them out. Ask about the same patients, up "
                        "to the same horizon, as before, or about clearly others"
                    )
            for name, group in fresh.items():
                write_text(folder / name, "\n".join(sorted(group)) + "\n")

    def same(self, group: frozenset[str], text: str, kind: str) -> None:
        """Raise `Refusal` where another `text` was remembered of this group: the grid that its times are told on."""
        with self._locked("grids") as folder:
            file = folder / _digest(group)
            if file.exists() and file.read_text() != text:
                raise Refusal(
                    f"site {self.site}: '{kind}' asks about these patients on another grid ({text}) than before ({file.read_text()}); two "
                    "grids tell finer times than each: keep to the first"
                )
            write_text(file, text)

    def count(self, group: frozenset[str], most: int, kind: str) -> None:
        """Count a question whose answer tells more of the same patients each time; raise `Refusal` beyond `most` of them."""
        with self._locked("questions") as folder:
            file = folder / _digest(group)
            asked = int(file.read_text()) if file.exists() else 0
            if asked >= most:
                raise Refusal(
                    f"site {self.site}: '{kind}' was answered {asked} times about these patients, its policy allows {most} in all; the "
                    "site's engineer can raise max_newton_steps, and runs of intervals get longer with it"
                )
            write_text(file, str(asked + 1))

    @contextmanager
    def _locked(self, part: str) -> Iterator[Path]:
        """A folder of the memory that no other message changes meanwhile."""
        folder = self.folder / part
        folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield folder


def _digest(group: frozenset[str]) -> str:
    return hashlib.sha256("\n".join(sorted(group)).encode()).hexdigest()[:32]
