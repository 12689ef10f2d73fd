"""Gene sets on a model's panel: which inputs of the model belong to which pathway."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from oncofed.common.gene_sets import read_gmt
from oncofed.common.panel import GenePanel

LEAST = 3
"""A set with fewer genes in the panel says more of these genes than of the pathway: it is left out."""


def pathways_on(panel: GenePanel, file: Path) -> dict[str, np.ndarray]:
    """Indices into the panel of each set of a GMT file; raises `ValueError` where the panel holds too little of all of them."""
    return members(read_gmt(file), panel, str(file))


def members(sets: Mapping[str, tuple[str, ...]], panel: GenePanel, source: str = "gene sets") -> dict[str, np.ndarray]:
    """Indices into the panel of each set with `LEAST` genes or more in it, under any name that the panel has for them."""
    place = {gene: i for i, gene in enumerate(panel.genes)}
    found = {name: {place[gene] for gene in panel.names_of(genes) if gene in place} for name, genes in sets.items()}
    kept = {name: np.array(sorted(there)) for name, there in found.items() if len(there) >= LEAST}
    if not kept:
        example = next((gene for genes in sets.values() for gene in genes), "none")
        raise ValueError(
            f"{source}: none of its {len(sets)} sets has {LEAST} genes in the panel; the panel names genes such as "
            f"{panel.genes[0]}, the sets such as {example}: use sets of the same kind of names, or train with HGNC's table of names in panel.names"
        )
    return kept
