"""Gene panel: an ordered list of genes with a hash, the contract between data and model.

A panel may carry the other names of its genes: so hospitals that name genes differently find the same ones, without a table
of names of their own, and a saved model finds them at a hospital that it has never seen.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from oncofed.common.gene_names import GeneNames, is_plain, without_version
from oncofed.common.gene_sets import is_gmt, read_gmt


@dataclass(frozen=True)
class GenePanel:
    """Genes in the order of the model's input; two panels are the same when their hashes are.

    `others` has the other names of each gene, or is empty where there are none.
    """

    genes: tuple[str, ...]
    others: tuple[tuple[str, ...], ...] = ()

    def __post_init__(self) -> None:
        if not any(self.others):
            object.__setattr__(self, "others", ())
        if not self.genes:
            raise ValueError("the gene panel is empty; name a panel file with genes, or lower panel.min_site_share")
        if self.others and len(self.others) != len(self.genes):
            raise ValueError(f"the gene panel has {len(self.genes)} genes and other names of {len(self.others)}")
        names = [*self.genes, *(name for names in self.others for name in names)]
        odd = [name for name in names if not is_plain(name)]
        if odd:
            raise ValueError(
                f"{len(odd)} gene names are empty, begin with # or hold spaces at an end, e.g. {odd[:3]!r}; rename them"
            )
        repeated = [g for g, n in Counter(self.genes).items() if n > 1]
        if repeated:
            raise ValueError(f"the gene panel repeats {len(repeated)} genes, e.g. {repeated[:3]}; list each gene once")
        claimed = [name for name, n in Counter(names).items() if n > 1]
        if claimed:
            raise ValueError(
                f"the gene panel gives {len(claimed)} names to more than one gene, e.g. {claimed[:3]}; leave out these other names"
            )

    def __len__(self) -> int:
        return len(self.genes)

    @property
    def lines(self) -> list[str]:
        """A line a gene, first its name, then its other names, by tabs: as a panel travels and is kept."""
        if not self.others:
            return list(self.genes)
        return ["\t".join((gene, *names)) for gene, names in zip(self.genes, self.others, strict=True)]

    @cached_property
    def hash(self) -> str:
        return hashlib.sha256(json.dumps(self.lines).encode()).hexdigest()[:16]

    def names_of(self, names: Iterable[str]) -> list[str]:
        """The panel's name for each; names of none of its genes stay as they are.

        An Ensembl id is found without its version too.
        """
        gene = self._gene
        return [gene.get(name) or gene.get(without_version(name), name) for name in names]

    @cached_property
    def _gene(self) -> dict[str, str]:
        """The gene of each name."""
        other = {name: gene for gene, names in zip(self.genes, self.others, strict=False) for name in names}
        return other | {gene: gene for gene in self.genes}

    def only(self, genes: Iterable[str]) -> GenePanel:
        """Without the genes that are not among these."""
        wanted = set(genes)
        return GenePanel.of_lines(line for gene, line in zip(self.genes, self.lines, strict=True) if gene in wanted)

    @classmethod
    def named(cls, genes: Iterable[str], names: GeneNames | None = None) -> GenePanel:
        """Genes with the other names that a table has for them, where there is one."""
        wanted = tuple(genes)
        return cls(wanted, tuple(names.others(wanted)) if names else ())

    @classmethod
    def of_lines(cls, lines: Iterable[str]) -> GenePanel:
        """A panel from its `lines`."""
        rows = [line.split("\t") for line in lines]
        return cls(tuple(row[0] for row in rows), tuple(tuple(row[1:]) for row in rows))

    @classmethod
    def from_file(cls, path: Path, names: GeneNames | None = None) -> GenePanel:
        """All genes of a gene-set file (.gmt) in order of first appearance, or of a list with one gene a line.

        In a list blank lines and lines that start with # are skipped, and a gene stands once: with `names`, two names of one
        gene are an error that says both. Sets may share genes, under whichever names. With `names` genes go by approved
        symbols, and the panel has their other names.
        """
        if is_gmt(path):
            union = dict.fromkeys(gene for genes in read_gmt(path).values() for gene in genes)
            return cls.named(dict.fromkeys(map(names.approved, union)) if names else union, names)
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
        return given if names is None else cls._approved(path, given, names)

    @classmethod
    def _approved(cls, path: Path, given: GenePanel, names: GeneNames) -> GenePanel:
        genes = [names.approved(gene) for gene in given.genes]
        twice = [g for g, n in Counter(genes).items() if n > 1]
        if twice:
            both = [name for name, gene in zip(given.genes, genes, strict=True) if gene == twice[0]]
            raise ValueError(
                f"panel.file = {path}: names {len(twice)} genes more than once, e.g. {' and '.join(both)} are both {twice[0]}; "
                "list each gene once"
            )
        return cls.named(genes, names)

    @classmethod
    def shared(cls, by_site: Iterable[Iterable[str]], min_site_share: float) -> GenePanel:
        """Genes that at least `min_site_share` of the sites hold, in alphabetical order; odd names take no part."""
        sites = [set(genes) for genes in by_site]
        counts = Counter(g for genes in sites for g in genes if is_plain(g))
        return cls(tuple(sorted(g for g, n in counts.items() if n >= min_site_share * len(sites) - 1e-9)))


NO_GENES = GenePanel(("(no genes)",))
"""The panel of a study that sees no expression."""
