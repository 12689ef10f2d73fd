"""Turn pooled tables into one site folder per institution."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from oncofed.client.data.read import OUTCOME, read_table
from oncofed.client.data.site import CLINICAL, SiteDescription, Unit
from oncofed.deploy.sites.make_sites import Rest, begin_site, group_by_size, new_sites, refuse_target
from oncofed.deploy.sites.pooled_tables import PooledTable, read_pooled

log = logging.getLogger("oncofed.deploy")

TIME_COLUMNS = {"time": None, "time_months": "months", "time_days": "days", "time_years": "years"}

TimeUnit = Literal["days", "months", "years"]


def split_pooled(
    source: Path,
    out: Path,
    *,
    by: str = "institution",
    min_patients: int = 40,
    rest: Rest = "merge",
    unit: Unit | None = None,
    time_unit: TimeUnit | None = None,
) -> tuple[list[Path], Unit]:
    """Read `source/clinical.csv`, expression in `source/expression/` or beside it, and `source/pathology/`; write site folders.

    Groups of `by` with fewer than `min_patients` patients become one site `Rest` or are left out. Without `unit` the
    expression unit is recognised from the values where they leave no doubt, and returned so that it can be shown. Without
    outcome columns in the clinical table the sites have none either: they can take part in classification.
    Raises `ValueError` before anything is written.
    """
    clinical = _clinical(source)
    if by not in clinical.columns:
        raise ValueError(f"{source}/clinical: no column '{by}' to split by; it has {list(clinical.columns)}")
    time_column, months = _time(source, clinical, time_unit)
    patients = pd.Index(clinical["patient"])
    folder = source / "expression" if (source / "expression").is_dir() else source
    expression = read_pooled(folder, patients)
    if not expression:
        raise ValueError(
            f"{source}: no expression table in expression/ or beside the clinical table; "
            "expected <COHORT>.parquet, .csv or .tsv (also .gz)"
        )
    pathology = read_pooled(source / "pathology", patients)
    unit = unit or recognise_unit(expression[0].values)
    absent = int((~patients.isin(pd.Index([p for table in expression for p in table.values.index]))).sum())
    if absent:
        log.warning("%d of %d patients of the clinical table are in no expression table", absent, len(patients))
    refuse_target(out)
    group = group_by_size(clinical[by], min_patients, rest)
    table = clinical.rename(columns={time_column: "time"} if time_column else {}).drop(columns=[by])
    with new_sites(out) as root:
        for name, rows in table.groupby(group, sort=True):
            description = SiteDescription(name=str(name), expression_unit=unit, time_unit=months)
            folder = begin_site(root, description, rows)
            for kind, tables in (("expression", expression), ("pathology", pathology)):
                _write(folder / f"{kind}.parquet", tables, pd.Index(rows["patient"]))
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
    for name in CLINICAL:
        if (source / name).exists():
            table = read_table(source / name, dtype={"patient": str})
            missing = [c for c in ("patient", "cancer_type") if c not in table.columns]
            if missing:
                raise ValueError(f"{source}/{name} lacks columns {missing}")
            table = table.assign(patient=table["patient"].astype(str))
            twice = table["patient"][table["patient"].duplicated()]
            if len(twice):
                raise ValueError(f"{source}/{name}: {len(twice)} patients stand in it twice; keep one row a patient")
            return table
    raise ValueError(f"{source}: no clinical.csv or clinical.parquet")


def _time(source: Path, clinical: pd.DataFrame, time_unit: TimeUnit | None) -> tuple[str | None, TimeUnit]:
    """The column of times, None without outcomes, and its unit."""
    column = next((c for c in TIME_COLUMNS if c in clinical.columns), None)
    if column is None and OUTCOME[1] not in clinical.columns:
        return None, "months"
    if column is None:
        raise ValueError(f"{source}/clinical: no time column beside 'event'; name it one of {list(TIME_COLUMNS)}")
    if OUTCOME[1] not in clinical.columns:
        raise ValueError(f"{source}/clinical: column '{column}' has no 'event' beside it (1 = death, 0 = censored)")
    unit = time_unit or TIME_COLUMNS[column]
    if unit is None:
        raise ValueError(
            f"{source}/clinical: the unit of column 'time' is not known; pass --time-unit days|months|years"
        )
    return column, unit  # type: ignore[return-value]


def _write(file: Path, tables: list[PooledTable], patients: pd.Index) -> None:
    """A site's part of the tables, lying as the sources lie; nothing where none of its patients is in them."""
    parts = [t.values.loc[t.values.index.isin(patients)] for t in tables]
    parts = [p for p in parts if len(p)]
    if not parts:
        return
    whole = pd.concat(parts)
    if all(
        t.genes_in_rows for t in tables
    ):  # tens of thousands of genes as Parquet columns take 30 times as long to read
        whole.T.rename_axis("gene").to_parquet(file)
    else:
        whole.rename_axis("patient").to_parquet(file)
