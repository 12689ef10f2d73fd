"""Gene-set files (.gmt), as MSigDB, Enrichr and g:Profiler give them: a set a line, all by tabs."""

from __future__ import annotations

from pathlib import Path

ENDINGS = (".gmt", ".gmt.txt")
"""Of a gene-set file's name; browsers add the .txt."""


def is_gmt(path: Path) -> bool:
    """Whether a file is one of gene sets, by its name."""
    return path.name.lower().endswith(ENDINGS)


def read_gmt(path: Path) -> dict[str, tuple[str, ...]]:
    """The genes of each set, sets and genes in the file's order, a gene that a set repeats once.

    A line is `name, description or address, gene, gene, ...`, by tabs; blank lines are skipped. Raises `ValueError` with
    file, line and remedy on a file that cannot be read or is none of this kind, on a set without genes or named twice.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); name an existing gene-set file") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path}: is no text; name a gene-set file (.gmt), unpacked") from None
    sets: dict[str, tuple[str, ...]] = {}
    lines: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        if "\t" not in line:
            raise ValueError(f"{where}: {_no_tabs(line)}")
        name, _, *genes = (cell.strip() for cell in line.split("\t"))
        named = tuple(dict.fromkeys(g for g in genes if g))
        if not name:
            raise ValueError(f"{where}: the set has no name; give it one before the first tab")
        if not named:
            raise ValueError(
                f"{where}: the set {name!r} has no genes; they stand from the third column on, after name and description"
            )
        if name in sets:
            raise ValueError(f"{where}: the set {name!r} stands in line {lines[name]} already; rename or remove one")
        sets[name], lines[name] = named, number
    if not sets:
        raise ValueError(f"{path}: holds no gene set; write one a line: name, description, genes, by tabs")
    return sets


def _no_tabs(line: str) -> str:
    wanted = "write one set a line: name, description, genes, by tabs"
    if line.lstrip().startswith("["):
        return f"this is a printed array, not a gene-set file; {wanted}, without brackets and quotes"
    return f"{line[:40]!r} has no tabs; {wanted}, or call a plain list of genes .txt"
