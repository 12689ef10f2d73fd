"""What a site remembers of its tables: over whom they were, so that no tables together tell of a few patients.

Two sums over groups that differ by three patients are a sum over these three; so are three sums, of all and of all but two
kinds. The names of the groups' patients stay in files at the site.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from oncofed.common.errors import Refusal
from oncofed.common.files import write_text

_NAME = re.compile("[0-9a-f]{32}")

PATIENTS = "patients"
KNOWN = 1e-6
"""How near to a combination of earlier sums a group is that can be computed of them."""


@dataclass(frozen=True)
class ReleasedGroups:
    """Groups of patients behind earlier tables, a file each, named by its digest; and of each patient what was told of her."""

    folder: Path
    site: str

    @classmethod
    def of(cls, work: Path, site: str) -> ReleasedGroups:
        """The memory in a site's working folder."""
        return cls(work / "released", site)

    def check(
        self,
        groups: Iterable[frozenset[str]],
        least: int,
        kind: str,
        of: str = PATIENTS,
        most: int | None = None,
    ) -> None:
        """Raise `Refusal` where all tables together tell of fewer than `least` patients, or one is in more than `most`; else remember.

        `of` keeps apart what is compared: groups of patients, and those of them who had the event.
        """
        new = {_digest(g): g for g in groups if g}
        if least <= 1 or not new:
            return
        with self._locked(of) as folder:
            fresh = {name: g for name, g in new.items() if not (folder / name).exists()}
            if not fresh:
                return
            earlier = [frozenset(f.read_text().splitlines()) for f in folder.iterdir() if _NAME.fullmatch(f.name)]
            known = [*earlier, *fresh.values()]
            if any(group & other and 0 < len(group ^ other) < least for group in fresh.values() for other in known):
                raise Refusal(
                    f"site {self.site}: '{kind}' is about {of} who differ from those of an earlier table by fewer than the {least} "
                    "that its policy wants (min_cell); the two tables together would single them out. Ask about the same patients, up "
                    "to the same horizon, as before, or about clearly others"
                )
            if of == PATIENTS and tells_of_few(known, least):  # of events small counts are told as they are
                raise Refusal(
                    f"site {self.site}: '{kind}' and earlier tables together would tell of fewer {of} than the {least} that its policy "
                    "wants (min_cell); ask about the same groups as before"
                )
            if most is not None and any(sum(p in g for g in known) > most for group in fresh.values() for p in group):
                raise Refusal(
                    f"site {self.site}: '{kind}' is about {of} of whom {most} tables were answered already (max_tables of its policy); ask "
                    "about the same groups as before"
                )
            for name, group in fresh.items():
                write_text(folder / name, "\n".join(sorted(group)) + "\n")

    def same_grid(self, group: frozenset[str], grid: str, kind: str) -> None:
        """Raise `Refusal` where times of one of the patients were told on another grid: two grids tell finer times than each."""
        with self._each() as told:
            if any(told.get(p, {}).get("grid", grid) != grid for p in group):
                raise Refusal(
                    f"site {self.site}: '{kind}' asks on a grid of {grid}, and some of these patients' times were told on another; keep to "
                    "the first, two grids tell finer times than each"
                )
            for p in group:
                told.setdefault(p, {})["grid"] = grid

    def count(self, group: frozenset[str], most: int, kind: str) -> None:
        """Count a question whose answer tells more of the same patients each time; raise `Refusal` beyond `most` about one of them."""
        with self._each() as told:
            if any(told.get(p, {}).get("questions", 0) >= most for p in group):
                raise Refusal(
                    f"site {self.site}: '{kind}' was answered {most} times about some of these patients, all that its policy allows; the "
                    "site's engineer can raise max_newton_steps, and runs of intervals get longer with it"
                )
            for p in group:
                told.setdefault(p, {})["questions"] = told.get(p, {}).get("questions", 0) + 1

    @contextmanager
    def _each(self) -> Iterator[dict[str, dict[str, Any]]]:
        """What was told of each patient; written back where the block ends well."""
        with self._locked("each") as folder:
            file = folder / "patients.json"
            told = json.loads(file.read_text()) if file.exists() else {}
            yield told
            write_text(file, json.dumps(told))

    @contextmanager
    def _locked(self, part: str) -> Iterator[Path]:
        """A folder of the memory that no other message changes meanwhile."""
        folder = self.folder / part
        folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield folder


def tells_of_few(groups: Sequence[frozenset[str]], least: int) -> bool:
    """Whether sums over the groups tell a sum over fewer than `least` patients.

    Patients who are in the same groups are one atom; a sum over an atom, or over two, is told where its indicator is a
    combination of those of the groups (the audit of query sets, Chin & Ozsoyoglu 1982).
    """
    member: dict[str, list[int]] = {}
    for i, group in enumerate(groups):
        for p in group:
            member.setdefault(p, []).append(i)
    sizes: dict[tuple[int, ...], int] = {}
    for of in member.values():
        sizes[tuple(of)] = sizes.get(tuple(of), 0) + 1
    atoms = list(sizes)
    small = [a for a, atom in enumerate(atoms) if sizes[atom] < least]
    if not small:
        return False
    rows = np.zeros((len(groups), len(atoms)))
    for a, atom in enumerate(atoms):
        rows[list(atom), a] = 1.0
    _, values, space = np.linalg.svd(rows, full_matrices=False)
    space = space[values > 1e-9 * values[0]]
    few: list[tuple[int, ...]] = [(a,) for a in small]
    few += [(a, b) for a, b in combinations(small, 2) if sizes[atoms[a]] + sizes[atoms[b]] < least]
    wanted = np.zeros((len(few), len(atoms)))
    for row, chosen in zip(wanted, few, strict=True):
        row[list(chosen)] = 1.0
    return bool((np.abs(wanted - wanted @ space.T @ space).max(axis=1) < KNOWN).any())


def _digest(group: frozenset[str]) -> str:
    return hashlib.sha256("\n".join(sorted(group)).encode()).hexdigest()[:32]
