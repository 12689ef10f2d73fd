"""Which genes an ablation takes out: shares of the panel, the same at every site and at the server."""

from __future__ import annotations

ORDER = "ablation/order"
"""The name of the ranked genes of each class `[C, genes of the largest share]` in a request; -1 where they are not known."""

SHARES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
"""Shares of the panel that are taken out, one after the other."""

DRAWS = 5
"""Sets of random genes of each size that the ranked ones are held against."""


def genes_of(share: float, genes: int) -> int:
    """Genes in a share of the panel, one at least."""
    return max(1, round(share * genes))
