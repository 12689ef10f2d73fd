"""Which files of a Xena folder belong together: expression, survival and clinical table of each TCGA project.

Names and layouts were verified in the hub's own loader (ucscXena/xena-GDC-ETL, its state of 2019 for the hub's release 18,
of 2024 for release 41) and in public code that reads the files. Both releases write tab-separated text, gzipped by the hub:

  expression  `TCGA-BRCA.<kind>.tsv.gz`, kinds in `KINDS`: 2019 HTSeq (GENCODE v22), 2024 STAR (GENCODE v36)
  survival    `TCGA-BRCA.survival.tsv` or .gz in both releases
  clinical    `TCGA-BRCA.GDC_phenotype.tsv.gz` in 2019, `TCGA-BRCA.clinical.tsv.gz` in 2024
"""

from __future__ import annotations

import re
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

KINDS = ("htseq_counts", "htseq_fpkm", "htseq_fpkm-uq", "star_counts", "star_tpm", "star_fpkm", "star_fpkm-uq")
SURVIVAL = "survival"
CLINICAL = ("clinical", "GDC_phenotype")
NAME = re.compile(rf"(TCGA-[A-Z0-9]+)\.({'|'.join((*KINDS, SURVIVAL, *CLINICAL))})\.tsv(?:\.gz)?")


@dataclass(frozen=True)
class XenaProject:
    """One TCGA project's files; `survival` and `clinical` may be absent."""

    name: str
    kind: str
    expression: Path
    survival: Path | None
    clinical: Path | None

    @property
    def cancer(self) -> str:
        return self.name.removeprefix("TCGA-")

    @property
    def counts(self) -> bool:
        return self.kind.endswith("_counts")


def find_projects(folder: Path, expression: str | None = None) -> tuple[list[XenaProject], list[str]]:
    """The projects that have expression, by name, all of one kind; and the names of those that have none.

    `expression` is one of `KINDS`, or its unit alone (tpm), and chooses where there are several kinds. Raises `ValueError` where nothing
    fits, a file is there twice, the projects' kinds differ or some projects have a survival table and others have none.
    """
    found = _find(folder)
    kinds = {kind for files in found.values() for kind in files if kind in KINDS}
    fitting = sorted(k for k in kinds if expression is None or expression in (k, k.split("_")[1]))
    if not fitting:
        raise ValueError(
            f"{folder}: no expression of kind {expression}; it holds {sorted(kinds)}"
            if kinds
            else f"{folder}: no expression file of UCSC Xena's GDC hub; looked for TCGA-<PROJECT>.<kind>.tsv.gz or .tsv with "
            f"<kind> one of {', '.join(KINDS)}; it holds {_some(p.name for p in _listed(folder))}"
        )
    if len(fitting) > 1:
        holders = "; ".join(f"{k}: {_some(f[k].name for f in found.values() if k in f)}" for k in fitting)
        raise ValueError(
            f"{folder} holds several kinds of expression ({holders}); all projects of a run must be of one: choose it with "
            f"--expression {'|'.join(fitting)}"
        )
    kind = fitting[0]
    other = [files[k].name for files in found.values() if kind not in files for k in files if k in KINDS]
    if other:
        raise ValueError(
            f"{folder}: all projects of a run must be of one kind, {kind} was chosen and {_some(other)} stand without it; "
            "download the same kind for each project, or move those files away"
        )
    projects = [
        XenaProject(
            name=name,
            kind=kind,
            expression=files[kind],
            survival=files.get(SURVIVAL),
            # of the expression's own release, where both are there
            clinical=next((files[c] for c in _clinical_of(kind) if c in files), None),
        )
        for name, files in sorted(found.items())
        if kind in files
    ]
    without = [p.expression.name for p in projects if p.survival is None]
    if without and len(without) < len(projects):
        raise ValueError(
            f"{folder}: {_some(without)} without TCGA-<PROJECT>.survival.tsv, which the other projects have; download it for "
            "each project, or move all of them away for sites without outcomes"
        )
    return projects, sorted(name for name, files in found.items() if kind not in files)


@contextmanager
def readable(file: Path) -> Iterator[None]:
    """Whatever a broken file makes a reader raise becomes one `ValueError` that names the file and the remedy."""
    try:
        yield
    except (EOFError, zlib.error, OSError, ValueError) as error:
        raise ValueError(
            f"{file.name} cannot be read to its end as a table of numbers ({type(error).__name__}: {error}); it was cut short "
            "or is not what its name says: download it again"
        ) from None


def _find(folder: Path) -> dict[str, dict[str, Path]]:
    """Files by project and kind."""
    found: dict[str, dict[str, Path]] = defaultdict(dict)
    for file in _listed(folder):
        match = NAME.fullmatch(file.name)
        if match is None:
            continue
        name, kind = match.groups()
        if kind in found[name]:
            raise ValueError(
                f"{folder}: {found[name][kind].name} and {file.name} are both there; keep the one that is meant"
            )
        found[name][kind] = file
    return found


def _clinical_of(kind: str) -> tuple[str, ...]:
    return CLINICAL if kind.startswith("star_") else CLINICAL[::-1]


def _listed(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; name the one that holds the files of UCSC Xena's GDC hub")
    return sorted(p for p in folder.iterdir() if p.is_file())


def _some(names: Iterable[str]) -> str:
    """The first names, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - 4} more" if len(listed) > 4 else ""
    return ", ".join(listed[:4]) + more if listed else "nothing"
