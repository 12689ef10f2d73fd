"""Read a site's tables as they are; orientation is found from patient names and never guessed."""

from __future__ import annotations

import logging
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from oncofed.client.data.site import ALTERATIONS, CLINICAL, EXPRESSION, PATHOLOGY, SiteFolder
from oncofed.client.data.units import impossible, one_column_a_gene
from oncofed.common.errors import Refusal
from oncofed.common.panel import GenePanel

log = logging.getLogger("oncofed.client")

OUTCOME = ("time", "event")
REQUIRED = ("patient", "cancer_type", *OUTCOME)
COUNTER_ROWS = ("N_unmapped", "N_multimapping", "N_noFeature", "N_ambiguous")
"""Summary rows that STAR writes among the genes; htseq-count's begin with two underscores."""


def read_table(path: Path, **csv: Any) -> pd.DataFrame:
    """A CSV, TSV (also gzipped) or Parquet table."""
    try:
        if path.name.endswith(".parquet"):
            return pd.read_parquet(path)
        return pd.read_csv(path, sep="\t" if ".tsv" in path.name else ",", encoding="utf-8-sig", **csv)
    except (ValueError, OSError, EOFError, zlib.error) as error:  # the last two: a .gz that was cut short, or is none
        raise Refusal(
            f"{path.parent.name}/{path.name} cannot be read as {path.suffix.lstrip('.')} ({type(error).__name__}); export it again"
        ) from None


def read_clinical(
    site: SiteFolder, *, outcome: bool = True, label: str = "cancer_type", of: tuple[str, ...] = ()
) -> pd.DataFrame:
    """The clinical table with patients as text in a column `patient`; raises on a missing file or column.

    Without `outcome`, as for classification or for new patients, time and event may be absent. With another `label`, its
    column stands in the place of `cancer_type`, empty for patients of other cancer types than `of` (empty: of all).
    """
    if label in ("patient", *OUTCOME):
        raise Refusal(f"site {site.name}: task.label = '{label}' names no class; name a clinical column of classes")
    required = (REQUIRED if outcome else REQUIRED[:2]) + ((label,) if label != "cancer_type" else ())
    path = site.find(CLINICAL)
    if path is None:
        raise Refusal(
            f"site {site.name}: no clinical table; add {' or '.join(CLINICAL)} with columns {', '.join(required)}"
        )
    table = read_table(path, dtype={"patient": str}, low_memory=False)
    if "patient" not in table.columns and table.index.name == "patient":
        table = table.reset_index()
    missing = [c for c in required if c not in table.columns]
    if missing:
        raise Refusal(
            f"site {site.name}: {path.name} lacks columns {missing} among its {table.shape[1]}; the first line must name them"
        )
    if label != "cancer_type":
        studied = table["cancer_type"].isin(of) if of else table["cancer_type"].notna()
        text = as_text(table[label]).str.strip()
        table = table.assign(cancer_type=text.where(studied & (text != "")).astype(object))
        empty = int((studied & table["cancer_type"].isna()).sum())
        if empty:
            log.warning("%s: %d patients of the study have no '%s'; they take no part", site.name, empty, label)
    return table.assign(patient=table["patient"].astype("string"))


def as_text(column: pd.Series) -> pd.Series:
    """A clinical column as text; whole numbers beside an empty cell are read as 1.0 and must be 1.

    Cell by cell: one patient's 2.5 must not change what the others' cells say.
    """
    return column.map(_cell_text, na_action="ignore").astype("string")


def _cell_text(cell: object) -> str:
    return str(int(cell)) if isinstance(cell, float) and cell.is_integer() else str(cell)


def read_expression(site: SiteFolder, patients: pd.Index, panel: GenePanel | None = None) -> pd.DataFrame:
    """Numbers `[patients, genes]` in the site's unit, of those of `patients` whom the file has; NaN where a cell is empty.

    With a panel, columns of its genes go by its names for them, and several of one gene become one. Raises `Refusal` on
    what cannot be expression: names that stand twice, columns of text, cells that the declared unit rules out.
    """
    table, _ = expression_table(site, patients)
    table, where = table[table.index.isin(patients)], f"site {site.name}: {_expression_file(site).name}"
    twice = int(table.index.duplicated().sum() + table.columns.duplicated().sum())
    if twice:
        raise Refusal(f"{where} holds {twice} duplicate patients or genes; run `oncofed site check`")
    odd = not_genes(table.columns)
    if odd:
        raise Refusal(f"{where} has {odd} among its genes; leave out what is no gene's expression")
    unit = site.description.expression_unit
    try:
        x_NG = table.to_numpy(dtype=np.float64, na_value=np.nan)
    except (ValueError, TypeError):
        text = wordy_cells(table)
        some = text.index[text > 0]
        raise Refusal(
            f"{where} holds {int(text.sum())} cells that are not numbers, in {len(some)} columns, e.g. {list(some[:3])}; leave out "
            "columns that are no gene's expression, and write missing values as empty cells"
        ) from None
    # a logarithm of x, without the + 1, can be negative: `oncofed site check` asks, a study lets it be
    wrong = impossible(x_NG, unit) if unit != "log2" else []
    if wrong:
        faults = "; ".join(f"{count} {what}, impossible for {unit}: {remedy}" for count, what, remedy in wrong)
        raise Refusal(f"{where} holds, among {x_NG.size} cells, {faults}")
    names = panel.names_of(table.columns) if panel else table.columns
    return one_column_a_gene(pd.DataFrame(x_NG, index=table.index, columns=names), unit)


def expression_table(site: SiteFolder, patients: pd.Index) -> tuple[pd.DataFrame, list[str]]:
    """Expression with patients in rows and genes in columns, cells as they stand in the file, and what was left out.

    The axis that holds names of `patients` (from the clinical table) is the patients' axis. Where both axes or neither
    do, `orientation` in site.toml must say it. Where genes are in rows, columns of text that are no patients' (a gene's name
    beside its id) are left out; their names come second.
    """
    path = _expression_file(site)
    # names as text: read as numbers, a leading zero would be lost and the patient with it
    table = (
        _read_h5ad(path)
        if path.suffix == ".h5ad"
        else indexed_by_patient(read_table(path, low_memory=False, dtype={0: str}))
    )
    table.index, table.columns = table.index.astype(str), table.columns.astype(str)
    if not patients_in_columns(site, path, table, patients):
        return table, []
    about = all_text(table) & ~table.columns.isin(patients)
    return table.loc[:, ~about].T, table.columns[about].tolist()


def wordy_cells(table: pd.DataFrame) -> pd.Series:
    """How many cells of each column are filled, but not with numbers; counts by column."""
    counts = np.zeros(table.shape[1], dtype=np.int64)
    for i, kind in enumerate(table.dtypes):
        if not pd.api.types.is_numeric_dtype(kind):
            cells = table.iloc[:, i].astype(object)
            counts[i] = int((pd.to_numeric(cells, errors="coerce").isna() & cells.notna()).sum())
    return pd.Series(counts, index=table.columns)


def all_text(table: pd.DataFrame) -> np.ndarray:
    """Which columns hold words alone: no numbers, and not nothing; booleans."""
    words = wordy_cells(table)
    return ((words > 0) & (words == table.notna().sum())).to_numpy()


def is_counter_row(gene: str) -> bool:
    """Whether a row is a counter's summary, not a gene."""
    return gene.startswith("__") or gene in COUNTER_ROWS


def not_genes(columns: pd.Index) -> list[str]:
    """Columns that would leave the hospital as genes and are none: clinical ones and a counter's summary."""
    return [c for c in columns if c in REQUIRED or is_counter_row(c)]


def _expression_file(site: SiteFolder) -> Path:
    path = site.find(EXPRESSION)
    if path is None:
        raise Refusal(f"site {site.name}: no expression table; add one of {', '.join(EXPRESSION)}")
    return path


def patients_in_columns(site: SiteFolder, path: Path, table: pd.DataFrame, patients: pd.Index) -> bool:
    """True when genes are in rows. Raises when names and declaration disagree or names cannot decide."""
    rows, columns = int(table.index.isin(patients).sum()), int(table.columns.isin(patients).sum())
    declared = site.description.orientation
    if declared != "auto":
        here, other = (rows, columns) if declared == "patients_x_genes" else (columns, rows)
        if here == 0:  # never take names on trust: the other axis' names leave the hospital as genes
            raise Refusal(
                f"site {site.name}: site.toml says orientation = {declared!r}, but on that axis {path.name} has no patient of the "
                f"clinical table (on the other axis: {other}); correct the orientation or the patients' names"
            )
        return declared == "genes_x_patients"
    if (rows > 0) == (columns > 0):
        raise Refusal(
            f"site {site.name}: {path.name} has {rows} patients of the clinical table in rows and {columns} in columns, so its "
            'orientation is unclear; set orientation = "patients_x_genes" or "genes_x_patients" in site.toml, or mend the names'
        )
    return columns > 0


def read_pathology(site: SiteFolder) -> pd.DataFrame | None:
    """One vector of image features a patient, patients in rows; None when the site has no such table."""
    return _read_rows(site.find(PATHOLOGY))


def read_alterations(site: SiteFolder) -> pd.DataFrame | None:
    """Copy numbers and mutations, patients in rows; None when the site has no such table."""
    return _read_rows(site.find(ALTERATIONS))


def check_rows(site: SiteFolder, table: pd.DataFrame, patients: pd.Index, what: str) -> None:
    """Raise unless patients stand in rows: from a table that lies the other way their names would leave as features."""
    rows, columns = int(table.index.isin(patients).sum()), int(table.columns.isin(patients).sum())
    if columns or (len(table) and not rows):
        raise Refusal(
            f"site {site.name}: the {what} table has {rows} patients of the clinical table in rows and {columns} in columns; "
            "deliver patients in rows, by the names of the clinical table"
        )


def _read_rows(path: Path | None) -> pd.DataFrame | None:
    return None if path is None else indexed_by_patient(read_table(path, low_memory=False, dtype={0: str}))


def indexed_by_patient(table: pd.DataFrame) -> pd.DataFrame:
    """The first column (or one named patient) as the index, unless the file carries an index of names already."""
    if "patient" in table.columns:
        table = table.set_index("patient")
    elif isinstance(table.index, pd.RangeIndex):
        table = table.set_index(table.columns[0])
    return table.set_axis(table.index.astype(str)).set_axis(table.columns.astype(str), axis=1)


def _read_h5ad(path: Path) -> pd.DataFrame:
    import anndata  # slow to import and needed for this format only

    try:
        data = anndata.read_h5ad(path)
    except Exception as error:  # h5py, anndata and zarr raise what they like on a broken file
        raise Refusal(
            f"{path.parent.name}/{path.name} cannot be read as h5ad ({type(error).__name__}); export it again"
        ) from None
    matrix = data.X.toarray() if hasattr(data.X, "toarray") else data.X
    return pd.DataFrame(matrix, index=data.obs_names, columns=data.var_names)
