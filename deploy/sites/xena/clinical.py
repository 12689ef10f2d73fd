"""Outcome, age, sex and source site of one TCGA project's patients.

Verified in the hub's loader (see files.py) and in public code: the survival table has the columns sample, OS (1 = death),
OS.time (days) and _PATIENT in an order that differs between releases; a patient's values stand once for each sample. The
clinical table names samples in `submitter_id.samples` (2019) or `sample` (2024), sex in `gender.demographic` in both; years of
age in `age_at_initial_pathologic_diagnosis` (2019), `age_at_index.demographic` (both) and, derived by Xena as days / 365,
`age_at_earliest_diagnosis_in_years.diagnoses.xena_derived` (2024); the name of the tissue source site in
`name.tissue_source_site` in both.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from oncofed.client.data.read import read_table

SAMPLE_COLUMNS = ("sample", "submitter_id.samples")
AGE_COLUMNS = (
    "age_at_earliest_diagnosis_in_years.diagnoses.xena_derived",
    "age_at_index.demographic",
    "age_at_initial_pathologic_diagnosis",
)
SEX_COLUMNS = ("gender.demographic",)
SITE_NAME = "name.tissue_source_site"
SEXES = ("female", "male")
BARCODE_LENGTH = 12
"""Characters of a sample's barcode that are the patient's."""
CODE_IN_BARCODE = slice(5, 7)
"""Characters of a barcode that are the tissue source site's code."""


def read_outcome(file: Path, patients: pd.Index) -> pd.DataFrame:
    """`time` in days and `event` (1 = death) of `patients`; both empty where the time is missing or not above 0.

    Raises `ValueError` where a column is missing or the table has none of the patients.
    """
    table = _by_patient(file)
    missing = [c for c in ("OS", "OS.time") if c not in table.columns]
    if missing:
        raise ValueError(f"{file.name} lacks columns {missing}; it has {table.columns.tolist()[:8]}; download it again")
    if not table.index.isin(patients).any():
        raise ValueError(f"{file.name} has none of its project's {len(patients)} patients; download it again")
    time = pd.to_numeric(table["OS.time"], errors="coerce")
    event = pd.to_numeric(table["OS"], errors="coerce")
    odd = int((event.notna() & ~event.isin([0, 1])).sum())
    if odd:
        raise ValueError(f"{file.name}: {odd} values of OS are neither 0 nor 1; download it again")
    rows = pd.DataFrame({"time": time, "event": event})[(time > 0) & event.notna()]
    rows = rows[~rows.index.duplicated()].reindex(patients)
    return rows.astype({"event": "Int64"})


def read_covariates(file: Path, patients: pd.Index) -> pd.DataFrame:
    """`age` in years and `sex` (female, male) of `patients`, each empty where the table does not say it."""
    table = _by_patient(file)
    age, sex = pd.Series(index=patients, dtype=float), pd.Series(index=patients, dtype=object)
    for column in AGE_COLUMNS:
        if column in table.columns:
            age = age.fillna(_first(pd.to_numeric(table[column], errors="coerce")).reindex(patients))
    for column in SEX_COLUMNS:
        if column in table.columns:
            text = table[column].str.strip().str.lower()
            sex = sex.fillna(_first(text.where(text.isin(SEXES))).reindex(patients))
    return pd.DataFrame({"age": age.round(1), "sex": sex})


def read_site_names(file: Path) -> list[tuple[str, str]]:
    """Each tissue source site code with the name that the table gives it, as often as they differ; none where it has no such column."""
    table = _by_patient(file)
    if SITE_NAME not in table.columns:
        return []
    names = table[SITE_NAME].dropna().str.strip()
    return sorted({(patient[CODE_IN_BARCODE], name) for patient, name in names.items() if name})


def _by_patient(file: Path) -> pd.DataFrame:
    """A table of samples as text, by the patient's barcode."""
    table = read_table(file, dtype=str)
    column = next((c for c in SAMPLE_COLUMNS if c in table.columns), None)
    if column is None:
        raise ValueError(
            f"{file.name} has no column of samples ({' or '.join(SAMPLE_COLUMNS)}); it has {table.columns.tolist()[:8]}; "
            "download it again"
        )
    return table.set_axis(table[column].astype(str).str[:BARCODE_LENGTH])


def _first(values: pd.Series) -> pd.Series:
    """A patient's first value that is there."""
    known = values.dropna()
    return known[~known.index.duplicated()]
