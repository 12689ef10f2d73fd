"""What a site remembers of its tables: over whom they were, so that no two of them differ by a few patients.

Two sums over groups that differ by three patients are a sum over these three. The names of the groups' patients stay in
files at the site.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from oncofed.common.errors import Refusal
from oncofed.common.files import write_text


@dataclass(frozen=True)
class ReleasedGroups:
    """Groups of patients behind earlier tables, a file each, named by its digest."""

    folder: Path
    site: str

    def check(self, groups: Iterable[frozenset[str]], least: int, kind: str) -> None:
        """Raise `Refusal` where a group differs from an earlier one by fewer than `least` patients; else remember them all."""
        if least <= 1:
            return
        new = {_digest(g): g for g in groups if g}
        fresh = {name: g for name, g in new.items() if not (self.folder / name).exists()}
        if not fresh:
            return
        earlier = [frozenset(f.read_text().splitlines()) for f in self.folder.glob("*")] if self.folder.exists() else []
        known = [*earlier, *fresh.values()]
        for group in fresh.values():
            if any(0 < len(group ^ other) < least for other in known):
                raise Refusal(
                    f"site {self.site}: '{kind}' is about patients who differ from those of an earlier table by fewer than the "
                    f"{least} that its policy wants (min_cell); the two tables together would single them out. Ask about the same "
                    "patients as before, or about clearly others"
                )
        for name, group in fresh.items():
            write_text(self.folder / name, "\n".join(sorted(group)) + "\n")

    def count(self, group: frozenset[str], most: int, kind: str) -> None:
        """Count a question whose answer tells more of the same patients each time; raise `Refusal` beyond `most` of them."""
        file = self.folder.with_name("questions") / _digest(group)
        asked = int(file.read_text()) if file.exists() else 0
        if asked >= most:
            raise Refusal(
                f"site {self.site}: '{kind}' was answered {asked} times about these patients, its policy allows {most} in all "
                "(max_newton_steps)"
            )
        write_text(file, str(asked + 1))


def _digest(group: frozenset[str]) -> str:
    return hashlib.sha256("\n".join(sorted(group)).encode()).hexdigest()[:32]
