"""Gene panel: an ordered list of genes with a hash, the contract between data and model."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path


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
    def from_file(cls, path: Path) -> GenePanel:
        """One gene a line; blank lines and lines that start with # are skipped."""
        try:
            lines = [line.strip() for line in path.read_text().splitlines()]
        except OSError as error:
            raise ValueError(f"panel.file = {path}: cannot be read ({error.strerror}); name an existing file") from None
        return cls(tuple(line for line in lines if line and not line.startswith("#")))

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
