"""Turn pooled tables into one site folder per institution."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from oncofed.client.data.read import indexed_by_patient, read_table
from oncofed.client.data.site import SiteDescription, Unit, folder_name, write_description

TIME_COLUMNS = {"time": None, "time_months": "months", "time_days": "days", "time_years": "years"}


def split_pooled(
    source: Path,
    out: Path,
    *,
    by: str = "institution",
    min_patients: int = 40,
    rest: Literal["merge", "drop"] = "merge",
    unit: Unit | None = None,
    time_unit: Literal["days", "months", "years"] | None = None,
) -> tuple[list[Path], Unit]:
    """Read `source/clinical.csv`, `source/expression/<COHORT>.parquet|csv|tsv` and `source/pathology/...`, write site folders.

    Groups of `by` with fewer than `min_patients` patients become one site `Rest` or are left out. Without `unit` the
    expression unit is recognised from the values where they leave no doubt, and returned so that it can be shown.
    Raises `ValueError` before anything is written.
    """
    clinical = _clinical(source)
    if by not in clinical.columns:
        raise ValueError(f"{source}/clinical: no column '{by}' to split by; it has {list(clinical.columns)}")
    time_column = next((c for c in TIME_COLUMNS if c in clinical.columns), None)
    if time_column is None:
        raise ValueError(f"{source}/clinical: no time column; name it one of {list(TIME_COLUMNS)}")
    months = time_unit or TIME_COLUMNS[time_column]
    if months is None:
        raise ValueError(
            f"{source}/clinical: the unit of column 'time' is not known; pass --time-unit days|months|years"
        )
    expression, pathology = _cohorts(source / "expression"), _cohorts(source / "pathology")
    if not expression:
        raise ValueError(
            f"{source}/expression: no table; expected <COHORT>.parquet, .csv or .tsv with patients in rows"
        )
    if not any(c.index.isin(clinical["patient"]).any() for c in expression.values()):
        raise ValueError(
            f"{source}/expression: no patient of the clinical table; its first column must hold the same names"
        )
    unit = unit or recognise_unit(next(iter(expression.values())))
    if out.exists() and any(out.glob("*/site.toml")):
        raise ValueError(f"{out} holds sites already; choose another folder or remove it")
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty; choose another folder")
    sizes = clinical[by].map(clinical[by].value_counts())
    group = clinical[by].astype(str).where(sizes >= min_patients, "Rest" if rest == "merge" else None)
    table = clinical.rename(columns={time_column: "time"}).drop(columns=[by])
    temporary = out.with_name(out.name + ".partial")
    shutil.rmtree(temporary, ignore_errors=True)
    for name, rows in table.groupby(group, sort=True):
        folder = temporary / folder_name(str(name))
        if folder.exists():
            raise ValueError(
                f"two institutions share the folder name '{folder.name}'; rename one in the clinical table"
            )
        write_description(folder, SiteDescription(name=str(name), expression_unit=unit, time_unit=months))
        rows.to_csv(folder / "clinical.csv", index=False)
        patients = pd.Index(rows["patient"])
        for kind, cohorts in (("expression", expression), ("pathology", pathology)):
            parts = [c.loc[c.index.isin(patients)] for c in cohorts.values()]
            parts = [p for p in parts if len(p)]
            if parts:
                pd.concat(parts).rename_axis("patient").to_parquet(folder / f"{kind}.parquet")
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.exists():
        out.rmdir()
    temporary.rename(out)
    return sorted(p for p in out.iterdir() if p.is_dir()), unit


def recognise_unit(table: pd.DataFrame) -> Unit:
    """The unit where the values leave no doubt; raises otherwise."""
    x = table.to_numpy(dtype=np.float64)
    finite = x[np.isfinite(x)]
    if (finite < 0).any():
        # medians and quartiles: real z-scores have tails beyond 10,000 that move a mean
        low, middle, high = np.nanpercentile(x, [25, 50, 75], axis=0)
        if (np.abs(middle) < 0.5).mean() > 0.8 and 0.3 < float(np.median(high - low)) < 2.5:
            return "zscore"
    elif (finite == np.floor(finite)).all() and finite.max() > 50:
        return "counts"
    raise ValueError("the expression unit is not clear from the values; pass --unit counts|tpm|log2|zscore")


def _clinical(source: Path) -> pd.DataFrame:
    for name in ("clinical.csv", "clinical.parquet"):
        if (source / name).exists():
            table = read_table(source / name, dtype={"patient": str})
            missing = [c for c in ("patient", "cancer_type", "event") if c not in table.columns]
            if missing:
                raise ValueError(f"{source}/{name} lacks columns {missing}")
            return table.assign(patient=table["patient"].astype(str))
    raise ValueError(f"{source}: no clinical.csv or clinical.parquet")


def _cohorts(folder: Path) -> dict[str, pd.DataFrame]:
    tables = {}
    for file in sorted(folder.glob("*")) if folder.is_dir() else []:
        if not file.name.startswith(".") and file.suffix in (".parquet", ".csv", ".tsv"):
            table = read_table(file, dtype={0: str})
            tables[file.stem] = indexed_by_patient(table)
    return tables
