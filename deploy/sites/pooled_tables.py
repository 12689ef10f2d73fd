"""Pooled tables as they were delivered: one a cohort, plain or gzipped, with patients in rows or in columns."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from oncofed.client.data.read import indexed_by_patient, is_counter_row, read_table

SUFFIXES = (".parquet", ".csv", ".tsv", ".csv.gz", ".tsv.gz")
SEPARATORS = ("-", "_", ".")
"""What stands between a patient's name and the rest of a sample's."""


@dataclass(frozen=True)
class PooledTable:
    """One cohort with patients in rows: `values`; `genes_in_rows`: whether it was delivered the other way round."""

    values: pd.DataFrame
    genes_in_rows: bool


def read_pooled(folder: Path, patients: pd.Index) -> list[PooledTable]:
    """Every table of a folder that has patients of the clinical table; raises `ValueError` where none has, or one is unclear."""
    files = [
        f
        for f in (sorted(folder.iterdir()) if folder.is_dir() else [])
        if f.name.endswith(SUFFIXES) and not f.name.startswith((".", "clinical."))
    ]
    tables = [t for t in (_read(f, patients) for f in files) if t is not None]
    if files and not tables:
        raise ValueError(
            f"{folder}: no patient of the clinical table in {[f.name for f in files[:5]]}; the tables must hold the same names, "
            "in the first column or in the first line"
        )
    names = pd.Index([p for t in tables for p in t.values.index])
    if names.duplicated().any():
        raise ValueError(
            f"{folder}: {int(names.duplicated().sum())} patients are in two tables or twice in one; keep one sample a patient"
        )
    return tables


def _read(file: Path, patients: pd.Index) -> PooledTable | None:
    """A table's patients; None where it has none of the clinical table's."""
    where = f"{file.parent.name}/{file.name}"
    # the names as text: a leading zero would be lost, and the patient with it
    table = indexed_by_patient(read_table(file, dtype={0: str}, low_memory=False))
    table.columns = table.columns.astype(str)
    rows, columns = table.index.isin(patients), table.columns.isin(patients)
    if rows.any() and columns.any():
        raise ValueError(
            f"{where} has {rows.sum()} patients of the clinical table in rows and {columns.sum()} in columns; "
            "which are the genes? Mend the names"
        )
    samples = _samples(table.index, patients) or _samples(table.columns, patients)
    if samples:
        raise ValueError(
            f"{where} names samples, not patients ({len(samples)}, the first: {samples[0]}); shorten each name to the "
            "clinical table's and keep one sample a patient"
        )
    if not rows.any() and not columns.any():
        return None
    # cut first: columns beside the patients (a gene's symbol or length) are no numbers of a patient's
    values = table.loc[:, columns].T if columns.any() else table.loc[rows]
    text = [c for c, kind in values.dtypes.items() if not pd.api.types.is_numeric_dtype(kind)]
    if text:
        raise ValueError(
            f"{where} holds cells that are not numbers ({len(text)} columns, the first: {text[0]}); export plain numbers, or move it "
            "out of the folder if it is no table of measurements"
        )
    genes = values.columns
    if genes.duplicated().any():
        twice = genes[genes.duplicated()]
        raise ValueError(
            f"{where}: {len(twice)} gene names stand in it twice, the first: {twice[0]}; keep one a gene (sum counts, average the rest)"
        )
    summary = [g for g in genes if is_counter_row(g)]
    if summary:
        raise ValueError(f"{where}: {summary} are a counter's summary, not genes; remove those rows")
    return PooledTable(values, bool(columns.any()))


def _samples(names: pd.Index, patients: pd.Index) -> list[str]:
    """Names that go on after a patient's, as TCGA's sample barcodes do after their first twelve characters."""
    known, lengths = set(patients), {len(p) for p in patients}
    return [
        name
        for name in names
        if name not in known and any(name[n : n + 1] in SEPARATORS and name[:n] in known for n in lengths)
    ]
