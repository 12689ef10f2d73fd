"""Read a site's tables as they are; orientation is found from patient names and never guessed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
from oncofed.client.data.site import ALTERATIONS, CLINICAL, EXPRESSION, PATHOLOGY, SiteFolder
from oncofed.common.errors import Refusal

OUTCOME = ("time", "event")
REQUIRED = ("patient", "cancer_type", *OUTCOME)


def read_table(path: Path, **csv: Any) -> pd.DataFrame:
    """A CSV, TSV (also gzipped) or Parquet table."""
    try:
        if path.name.endswith(".parquet"):
            return pd.read_parquet(path)
        return pd.read_csv(path, sep="\t" if ".tsv" in path.name else ",", encoding="utf-8-sig", **csv)
    except (ValueError, OSError, UnicodeDecodeError, pd.errors.ParserError) as error:
        raise Refusal(
            f"{path.parent.name}/{path.name} cannot be read as {path.suffix.lstrip('.')} ({type(error).__name__}); export it again"
        ) from None


def read_clinical(site: SiteFolder, *, outcome: bool = True) -> pd.DataFrame:
    """The clinical table with patients as text in a column `patient`; raises on a missing file or column.

    Without `outcome`, as for classification or for new patients, time and event may be absent.
    """
    required = REQUIRED if outcome else REQUIRED[:2]
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
    return table.assign(patient=table["patient"].astype("string"))


def read_expression(site: SiteFolder, patients: pd.Index) -> pd.DataFrame:
    """Expression with patients in rows and genes in columns, cells as they stand in the file.

    The axis that holds names of `patients` (from the clinical table) is the patients' axis. Where both axes or neither
    do, `orientation` in site.toml must say it.
    """
    path = site.find(EXPRESSION)
    if path is None:
        raise Refusal(f"site {site.name}: no expression table; add one of {', '.join(EXPRESSION)}")
    # names as text: read as numbers, a leading zero would be lost and the patient with it
    table = (
        _read_h5ad(path)
        if path.suffix == ".h5ad"
        else indexed_by_patient(read_table(path, low_memory=False, dtype={0: str}))
    )
    table.index, table.columns = table.index.astype(str), table.columns.astype(str)
    table = table.T if patients_in_columns(site, path, table, patients) else table
    outcome = [c for c in REQUIRED if c in table.columns]
    if outcome:
        raise Refusal(f"site {site.name}: {path.name} has {outcome} among its genes; leave clinical columns out of it")
    return table


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
