"""Gene panel: an ordered list of genes with a hash, the contract between data and model."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from oncofed.common.gene_names import Naming, approve
from oncofed.common.gene_sets import is_gmt, read_gmt


@dataclass(frozen=True)
class GenePanel:
    """Genes in the order of the model's input; two panels are the same when their hashes are."""

    genes: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.genes:
            raise ValueError("the gene panel is empty; name a panel file with genes, or lower panel.min_site_share")
        odd = [g for g in self.genes if not _plain(g)]
        if odd:
            raise ValueError(
                f"{len(odd)} gene names are empty, begin with # or hold spaces at an end, e.g. {odd[:3]!r}; rename them"
            )
        repeated = [g for g, n in Counter(self.genes).items() if n > 1]
        if repeated:
            raise ValueError(f"the gene panel repeats {len(repeated)} genes, e.g. {repeated[:3]}; list each gene once")

    def __len__(self) -> int:
        return len(self.genes)

    @cached_property
    def hash(self) -> str:
        return hashlib.sha256(json.dumps(self.genes).encode()).hexdigest()[:16]

    @classmethod
    def from_file(cls, path: Path, naming: Naming = "as_given") -> GenePanel:
        """All genes of a gene-set file (.gmt) in order of first appearance, or of a list with one gene a line.

        In a list blank lines and lines that start with # are skipped, and a gene stands once: with `naming` "symbols", two
        names of one gene are an error that names both. Sets may share genes, under whichever names.
        """
        if is_gmt(path):
            union = dict.fromkeys(gene for genes in read_gmt(path).values() for gene in genes)
            return cls(tuple(dict.fromkeys(approve(union, naming))))
        try:
            lines = [line.strip() for line in path.read_text().splitlines()]
        except OSError as error:
            raise ValueError(f"panel.file = {path}: cannot be read ({error.strerror}); name an existing file") from None
        except UnicodeDecodeError:
            raise ValueError(f"panel.file = {path}: is no text; write one gene a line, or gene sets (.gmt)") from None
        genes = [line for line in lines if line and not line.startswith("#")]
        tabbed = sum("\t" in gene for gene in genes)
        if tabbed:
            raise ValueError(
                f"panel.file = {path}: {tabbed} lines hold tabs; write one gene a line, or name a file of gene sets .gmt"
            )
        given = cls(tuple(genes))
        return given if naming == "as_given" else cls._approved(path, given)

    @classmethod
    def _approved(cls, path: Path, given: GenePanel) -> GenePanel:
        genes = approve(given.genes, "symbols")
        twice = [g for g, n in Counter(genes).items() if n > 1]
        if twice:
            names = [name for name, gene in zip(given.genes, genes, strict=True) if gene == twice[0]]
            raise ValueError(
                f"panel.file = {path}: names {len(twice)} genes more than once, e.g. {' and '.join(names)} are both {twice[0]}; "
                "list each gene once"
            )
        return cls(tuple(genes))

    @classmethod
    def shared(cls, by_site: Iterable[Iterable[str]], min_site_share: float) -> GenePanel:
        """Genes that at least `min_site_share` of the sites hold, in alphabetical order; odd names take no part."""
        sites = [set(genes) for genes in by_site]
        counts = Counter(g for genes in sites for g in genes if _plain(g))
        return cls(tuple(sorted(g for g, n in counts.items() if n >= min_site_share * len(sites) - 1e-9)))


def _plain(gene: str) -> bool:
    """Whether a name survives a panel file: not empty, no comment, no control character, no space at an end."""
    return bool(gene) and gene == gene.strip() and gene.isprintable() and not gene.startswith("#")


NO_GENES = GenePanel(("(no genes)",))
"""The panel of a study that sees no expression."""
