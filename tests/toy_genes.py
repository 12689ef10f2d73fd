"""A few genes with Ensembl ids and other names, and a file of them as HGNC's table is written."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path

from oncofed.common.gene_names import Gene

FEW = (
    Gene("CCN1", "ENSG00000142871", ("CYR61",), ("GIG1", "IGFBP10")),
    Gene("CCN2", "ENSG00000118523", ("CTGF",), ("IGFBP8",)),
    Gene("TP53", "ENSG00000141510", (), ("p53", "LFS1")),
    Gene("VEGFA", "ENSG00000112715", ("VEGF",), ()),
    Gene("C6orf62", "ENSG00000112308", (), ("XTP12",)),
)


def write_hgnc(file: Path, genes: Iterable[Gene] = FEW) -> Path:
    """Genes in the columns of `hgnc_complete_set.txt`, and one that was withdrawn."""
    with file.open("w", newline="") as stream:
        table = csv.writer(stream, delimiter="\t")
        table.writerow(["hgnc_id", "symbol", "name", "status", "alias_symbol", "prev_symbol", "ensembl_gene_id"])
        for i, g in enumerate(genes):
            row = [g.symbol, f"gene {i}", "Approved", "|".join(g.aliases), "|".join(g.previous), g.ensembl]
            table.writerow([f"HGNC:{i}", *row])
        table.writerow(["HGNC:99", "GONE", "withdrawn", "Entry Withdrawn", "LONGGONE", "", ""])
    return file
