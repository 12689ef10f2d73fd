"""Expression of one TCGA project: which samples are taken, which rows are genes, and what the values are.

Verified in the hub's loader (see files.py): genes in rows, the first column `Ensembl_ID` with versioned ids, the other columns
sample barcodes of 16 characters (TCGA-A1-A0SB-01A); values log2(x + 1) in full precision, x in the unit of the file's name.
A sample with several aliquots holds their MEAN, taken before the logarithm: such counts are halves, thirds ...
Where the releases differ: 2019 keeps HTSeq's five summary rows (__no_feature ...) and names the Y copies of the
pseudo-autosomal genes ENSGR...; 2024 drops STAR's four (N_unmapped ...) and names the copies ENSG..._PAR_Y, 44 of them.
"""

from __future__ import annotations

import gzip
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from oncofed.client.data.read import is_counter_row
from oncofed.deploy.sites.xena.files import XenaProject, readable

GENE_COLUMN = "Ensembl_ID"
BARCODE = re.compile(r"(TCGA-[A-Z0-9]{2}-[A-Z0-9]{4})-(\d{2})[A-Z]?(?:-[A-Z0-9-]+)?")
PRIMARY, PRIMARY_BLOOD = "01", "03"
SAMPLE_TYPES = {
    "01": "primary solid tumours",
    "02": "recurrent tumours",
    "03": "primary blood cancers",
    "04": "recurrent blood cancers",
    "05": "additional new primaries",
    "06": "metastases",
    "07": "additional metastases",
    "10": "normal blood",
    "11": "normal tissue",
    "14": "normal bone marrow",
}
"""The GDC's sample type codes that TCGA's expression files hold; others are shown by their code."""
FURTHER = "further samples of a patient"
ALIQUOTS = 6
"""A mean of up to so many aliquots is recognised as one of counts; TCGA has three at most."""
ROWS = 4096
"""Genes read at a time: a project as 64-bit numbers would be twice what is kept of it."""


@dataclass(frozen=True)
class ChosenSamples:
    """One sample a patient: the columns of the file to read, whose they are, and how many samples of which kind stay behind."""

    columns: tuple[int, ...]
    patients: tuple[str, ...]
    left_out: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class ProjectExpression:
    """`values[genes, patients]`: int32 counts or float32 log2(x + 1); `averaged`: patients whose sample is a mean of aliquots."""

    genes: pd.Index
    values: np.ndarray
    averaged: int


def choose_samples(project: XenaProject) -> ChosenSamples:
    """The primary tumours in a file's first line, for each patient the first vial in order; reads nothing else.

    LAML's primary is blood (type 03). Raises `ValueError` where the line is none of an expression file.
    """
    file = project.expression
    with readable(file):
        first, *barcodes = _first_line(file).rstrip("\r\n").split("\t")
    if first != GENE_COLUMN:
        raise ValueError(f"{file.name}: the first column is {first[:40]!r}, not {GENE_COLUMN}; download it again")
    parts = [BARCODE.fullmatch(b) for b in barcodes]
    odd = [b for b, match in zip(barcodes, parts, strict=True) if match is None]
    if odd:
        raise ValueError(
            f"{file.name}: {len(odd)} of {len(barcodes)} columns are no sample barcodes (TCGA-A1-A0SB-01A), the first: "
            f"{odd[0][:40]!r}; download it again, unchanged"
        )
    primary = PRIMARY_BLOOD if project.cancer == "LAML" else PRIMARY
    left_out: Counter[str] = Counter()
    taken: dict[str, int] = {}
    for position in sorted(range(len(barcodes)), key=lambda i: barcodes[i]):
        match = parts[position]
        assert match is not None
        patient, kind = match.groups()
        if kind != primary:
            left_out[SAMPLE_TYPES.get(kind, f"samples of type {kind}")] += 1
        elif patient in taken:
            left_out[FURTHER] += 1
        else:
            taken[patient] = position + 1
    if not taken:
        raise ValueError(f"{file.name}: none of its {len(barcodes)} samples is a primary tumour (type {primary})")
    return ChosenSamples(tuple(taken.values()), tuple(taken), left_out)


def read_project(project: XenaProject, samples: ChosenSamples) -> ProjectExpression:
    """The chosen samples' values, genes without version; raises `ValueError` where the values are not what the name says."""
    file = project.expression
    names: list[str] = []
    parts: list[np.ndarray] = []
    aliquots = np.ones((ALIQUOTS, len(samples.columns)), dtype=bool)
    with readable(file):
        chunks = pd.read_csv(
            file,
            sep="\t",
            header=None,
            skiprows=1,
            index_col=0,
            usecols=[0, *samples.columns],
            dtype={0: str} | dict.fromkeys(samples.columns, np.float64),
            chunksize=ROWS,
        )
    with chunks:
        while True:
            with readable(file):
                chunk = next(chunks, None)
            if chunk is None:
                break
            is_gene = np.array([not is_counter_row(str(g)) and not _y_copy(str(g)) for g in chunk.index])
            x = chunk.loc[is_gene, list(samples.columns)].to_numpy(np.float64)
            _check_log2(project, x)
            names += [str(g).split(".")[0] for g in chunk.index[is_gene]]
            if project.counts:
                x = np.exp2(x) - 1.0
                aliquots &= _means_of_counts(x)
                parts.append(np.rint(x).astype(np.int32))
            else:
                parts.append(x.astype(np.float32))
    genes = pd.Index(names)
    if not len(genes) or genes.duplicated().any():
        raise ValueError(
            f"{file.name}: {len(genes)} genes, of which {int(genes.duplicated().sum())} stand in it twice once their version is "
            "taken off; download it again"
        )
    unclear = int((~aliquots.any(axis=0)).sum()) if project.counts else 0
    if unclear:
        raise ValueError(
            f"{file.name}: {unclear} of {len(samples.patients)} samples hold no counts: with log2(x + 1) undone they are neither "
            "whole numbers nor means of a few; the file holds another unit or was transformed again: download it again"
        )
    averaged = int((~aliquots[0]).sum()) if project.counts else 0
    return ProjectExpression(genes, np.vstack(parts), averaged)


def _first_line(file: Path) -> str:
    with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8") as lines:
        return lines.readline()


def _y_copy(gene: str) -> bool:
    """The Y chromosome's copy of a pseudo-autosomal gene, whose name without version is the X copy's."""
    return gene.endswith("_PAR_Y") or gene.startswith("ENSGR")


def _check_log2(project: XenaProject, x: np.ndarray) -> None:
    """Cells must be there and possible for log2(x + 1): from 0 to 40, of counts below 31."""
    file, highest = project.expression.name, 31.0 if project.counts else 40.0
    empty = int(np.isnan(x).sum())
    if empty:
        raise ValueError(
            f"{file}: {empty} empty cells, which Xena's files do not have; it was cut short: download it again"
        )
    if x.size and (x.min() < 0 or x.max() > highest):
        raise ValueError(
            f"{file}: values from {x.min():g} to {x.max():g}, where log2(x + 1) of {project.kind} lies between 0 and "
            f"{highest:g}; deliver the file as Xena does, without undoing or scaling"
        )


def _means_of_counts(x: np.ndarray) -> np.ndarray:
    """Booleans `[k - 1, samples]`: whether a sample's small values are means of k counts, for k up to `ALIQUOTS`.

    Small ones only: there a file that was written with four digits still tells a half from a whole.
    """
    small = np.where(x < 64, x, 0.0)
    grids = [np.abs(small * k - np.rint(small * k)).max(axis=0, initial=0.0) < 0.02 * k for k in range(1, ALIQUOTS + 1)]
    return np.array(grids)
