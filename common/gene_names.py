"""One name for a gene: Ensembl ids, earlier and other symbols become the symbol that the HGNC approves.

The coordinator brings the table, `hgnc_complete_set.txt` of the HUGO Gene Nomenclature Committee (Seal et al. 2023). Sites
need none: a panel carries the other names of its genes to them (common/panel.py).
"""

from __future__ import annotations

import csv
import gzip
import io
import re
import zlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

COLUMNS = ("symbol", "ensembl_gene_id", "prev_symbol", "alias_symbol")
"""Wanted of the table; where `status` is there as well, rows count that are Approved."""

REMEDY = "download hgnc_complete_set.txt from genenames.org, plain or packed as .gz"

_ENSEMBL = re.compile(r"(ENSG\d{11})(\.\d+)?")


class Gene(NamedTuple):
    """A row of the table."""

    symbol: str
    ensembl: str = ""
    previous: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class GeneNames:
    """Every name that is known, with the approved symbol that it stands for; empty where it stands for several genes.

    An approved symbol beats an Ensembl id, that a previous symbol, that an alias: so each is itself, even when it was once
    another gene's. `folded` is the same without regard to case.
    """

    exact: dict[str, str]
    folded: dict[str, str]

    @classmethod
    def of(cls, genes: Iterable[Gene]) -> GeneNames:
        """From rows of a table."""
        rows = list(genes)
        tiers: list[list[tuple[str, str]]] = [
            [(g.symbol, g.symbol) for g in rows],
            [(g.ensembl, g.symbol) for g in rows if g.ensembl],
            [(name, g.symbol) for g in rows for name in g.previous],
            [(name, g.symbol) for g in rows for name in g.aliases],
        ]
        return cls(
            exact=_first(_distinct(tier) for tier in tiers),
            folded=_first(_distinct((name.casefold(), symbol) for name, symbol in tier) for tier in tiers),
        )

    @classmethod
    def from_file(cls, path: Path) -> GeneNames:
        """HGNC's table, by tabs, lists of names joined by |; raises `ValueError` with the remedy where it is something else."""
        table = csv.DictReader(io.StringIO(_text(path), newline=""), delimiter="\t")
        missing = [column for column in COLUMNS if column not in (table.fieldnames or ())]
        if missing:
            raise ValueError(
                f"panel.names = {path}: lacks the columns {missing}, its first line begins {(table.fieldnames or [])[:4]}; {REMEDY}"
            )
        try:
            genes = [_gene(row) for row in table if (row.get("status") or "Approved") == "Approved" and row["symbol"]]
        except csv.Error as error:
            raise ValueError(
                f"panel.names = {path}: line {table.line_num} cannot be read ({error}); {REMEDY}"
            ) from None
        if not genes:
            raise ValueError(f"panel.names = {path}: has no row of an approved gene; {REMEDY}")
        return cls.of(genes)

    def approved(self, name: str) -> str:
        """The approved symbol; a name that is unknown, or stands for several genes, stays as it is."""
        known = self.exact.get(name)
        if known is None:
            known = self.exact.get(without_version(name))
        if known is None:
            known = self.folded.get(name.casefold())
        return known or name

    def others(self, genes: Iterable[str]) -> list[tuple[str, ...]]:
        """All other names that stand for each approved symbol, sorted; in capitals too where a name has small letters.

        `approved` makes the symbol of each of them, so no name is two genes'. None for what is no approved symbol.
        """
        return [self._others.get(gene, ()) for gene in genes]

    @cached_property
    def _others(self) -> dict[str, tuple[str, ...]]:
        found: defaultdict[str, set[str]] = defaultdict(set)
        for name in (*self.exact, *(folded.upper() for folded in self.folded)):
            if is_plain(name) and (symbol := self.approved(name)) != name:
                found[symbol].add(name)
        return {symbol: tuple(sorted(names)) for symbol, names in found.items()}


def without_version(name: str) -> str:
    """An Ensembl id without its version (`.12`); `_PAR_Y`, a gene's copy on the other chromosome, is no version."""
    versioned = _ENSEMBL.fullmatch(name)
    return versioned[1] if versioned else name


def ids_meet_symbols(ours: Sequence[str], theirs: Sequence[str]) -> bool:
    """Whether most names are Ensembl ids on one side only."""
    most = [sum(map(bool, map(_ENSEMBL.fullmatch, names))) * 2 > len(names) for names in (ours, theirs)]
    return most[0] != most[1]


def is_plain(name: str) -> bool:
    """Whether a name survives a panel file: not empty, no comment, no control character, no space at an end."""
    return bool(name) and name == name.strip() and name.isprintable() and not name.startswith("#")


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
        return (gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"panel.names = {path}: is no text; {REMEDY}") from None
    except (OSError, EOFError, zlib.error) as error:  # the last two: a .gz that was cut short
        why = getattr(error, "strerror", None) or type(error).__name__
        raise ValueError(f"panel.names = {path}: cannot be read ({why}); {REMEDY}") from None


def _gene(row: dict[str, str]) -> Gene:
    symbol, ensembl, previous, aliases = ((row[column] or "").strip() for column in COLUMNS)
    return Gene(symbol, ensembl, _split(previous), _split(aliases))


def _split(names: str) -> tuple[str, ...]:
    return tuple(filter(None, (name.strip() for name in names.split("|"))))


def _distinct(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Name -> symbol, empty where a name goes with several."""
    found: dict[str, str] = {}
    for name, symbol in pairs:
        found[name] = symbol if found.get(name, symbol) == symbol else ""
    return found


def _first(tiers: Iterable[dict[str, str]]) -> dict[str, str]:
    """All names, each as the first tier that knows it has it."""
    found: dict[str, str] = {}
    for tier in tiers:
        found = tier | found
    return found
