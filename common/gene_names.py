"""One name for a gene: Ensembl ids, earlier and other symbols become the symbol that the HGNC approves.

`gene_names.tsv.gz` holds four columns of the complete set of the HUGO Gene Nomenclature Committee (Seal et al. 2023): 43,882
approved genes, the newest entry of 2024-10-18; public domain (CC0 1.0). Beside the previous symbols stand 139 Ensembl ids that
the set of 2018-11 had and this one has no more: much expression is still delivered under them (SOD2's, for one).
`write_table` makes it anew from a later `hgnc_complete_set.txt`.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

Naming = Literal["as_given", "symbols"]
"""The values of `panel.names`: names as files have them, or approved symbols."""

TABLE = Path(__file__).with_name("gene_names.tsv.gz")
COLUMNS = ("symbol", "ensembl_gene_id", "prev_symbol", "alias_symbol")

_VERSIONED = re.compile(r"(ENSG\d{11})\.\d+")


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
    another gene's. `folded` is the same without regard to case. `version` is the digest of the table.
    """

    exact: dict[str, str]
    folded: dict[str, str]
    ids: dict[str, str]
    version: str

    @classmethod
    def of(cls, genes: Iterable[Gene], version: str = "") -> GeneNames:
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
            ids={g.symbol: g.ensembl for g in rows},
            version=version,
        )

    @staticmethod
    def load() -> GeneNames:
        """The table that comes with the package; read once a process."""
        return _load()

    def approved(self, name: str) -> str:
        """The approved symbol; a name that is unknown, or stands for several genes, stays as it is.

        An Ensembl id may have a version (`.12`); `_PAR_Y`, a gene's copy on the other chromosome, is no version.
        """
        known = self.exact.get(name)
        if known is None and (versioned := _VERSIONED.fullmatch(name)):
            known = self.exact.get(versioned[1])
        if known is None:
            known = self.folded.get(name.casefold())
        return known or name

    def ensembl(self, symbol: str) -> str:
        """The Ensembl id of an approved symbol, empty where there is none."""
        return self.ids.get(symbol, "")


def naming_version(naming: Naming) -> str:
    """What a cache must know of how genes are named: empty for names as they are, else the table's version."""
    return GeneNames.load().version if naming == "symbols" else ""


def approve(names: Iterable[str], naming: Naming) -> list[str]:
    """Names in their order as a study names genes."""
    if naming == "as_given":
        return list(names)
    approved = GeneNames.load().approved
    return [approved(name) for name in names]


def write_table(complete_set: Path, earlier: Path, table: Path = TABLE) -> None:
    """The package's table from HGNC's `hgnc_complete_set.txt` and an earlier one; the same bytes from the same files."""
    genes = {row["hgnc_id"]: row for row in _approved_rows(complete_set)}
    ids = {row["ensembl_gene_id"] for row in genes.values()}
    for row in _approved_rows(earlier):
        gene, retired = genes.get(row["hgnc_id"]), row["ensembl_gene_id"]
        if gene and retired not in ids | {""}:
            gene["prev_symbol"] = "|".join(filter(None, [gene["prev_symbol"], retired]))
    lines = ["\t".join(COLUMNS), *sorted("\t".join(row[c] for c in COLUMNS) for row in genes.values())]
    table.write_bytes(gzip.compress(("\n".join(lines) + "\n").encode(), mtime=0))


def _approved_rows(complete_set: Path) -> list[dict[str, str]]:
    with complete_set.open(encoding="utf-8", newline="") as file:
        return [row for row in csv.DictReader(file, delimiter="\t") if row["status"] == "Approved"]


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


@cache
def _load() -> GeneNames:
    try:
        data = TABLE.read_bytes()
    except OSError as error:
        raise ValueError(
            f"panel.names = 'symbols' needs the table of gene names, {TABLE.name}, which cannot be read ({error.strerror}); "
            "install oncofed again"
        ) from None
    header, *lines = gzip.decompress(data).decode().splitlines()
    if tuple(header.split("\t")) != COLUMNS:
        raise ValueError(
            f"{TABLE.name} has the columns {header.split()}, wanted {list(COLUMNS)}; install oncofed again"
        )
    return GeneNames.of(map(_gene, lines), hashlib.sha256(data).hexdigest()[:16])


def _gene(line: str) -> Gene:
    symbol, ensembl, previous, aliases = line.split("\t")
    return Gene(symbol, ensembl, _split(previous), _split(aliases))


def _split(names: str) -> tuple[str, ...]:
    return tuple(names.split("|")) if names else ()
