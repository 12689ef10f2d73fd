"""What a check of a site finds, and the checks that all tables of patients share. Holds counts, never a patient."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pandas as pd
from oncofed.client.data.site import SiteFolder


@dataclass(frozen=True)
class Finding:
    """One problem. An `error` keeps the data out of a study, a `warning` is for the engineer to judge."""

    level: Literal["error", "warning"]
    file: str
    column: str
    count: int
    problem: str
    remedy: str


@dataclass
class SiteReport:
    """What a site holds and what is wrong with it; holds counts only."""

    site: str
    facts: dict[str, str] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not any(f.level == "error" for f in self.findings)

    def error(self, file: str, column: str, count: int, problem: str, remedy: str) -> None:
        if count:
            self.findings.append(Finding("error", file, column, int(count), problem, remedy))

    def warn(self, file: str, column: str, count: int, problem: str, remedy: str) -> None:
        if count:
            self.findings.append(Finding("warning", file, column, int(count), problem, remedy))


def check_table(report: SiteReport, file: str, table: pd.DataFrame, patients: pd.Index) -> None:
    """A table of numbers that not every patient need have: names, types, infinite cells."""
    check_patients(report, file, table.index, patients, missing_level=None)
    text = [c for c, kind in zip(table.columns, table.dtypes, strict=True) if not pd.api.types.is_numeric_dtype(kind)]
    report.error(file, some(text), len(text), "columns that are not numeric", "export plain numbers")
    x = table.select_dtypes("number").to_numpy(np.float64, na_value=np.nan)
    report.error(file, "", int(np.isinf(x).sum()), "infinite cells", "write missing values as empty cells")


def check_patients(
    report: SiteReport, file: str, index: pd.Index, patients: pd.Index, missing_level: Literal["warning"] | None
) -> None:
    """Names of a table's rows against those of the clinical table."""
    report.error(file, "patient", int(index.duplicated().sum()), "duplicate patients", "keep one row a patient")
    report.warn(
        file,
        "patient",
        int((~index.isin(patients)).sum()),
        "patients without clinical data",
        "they take no part; add them to the clinical table or leave them out",
    )
    if missing_level == "warning":
        report.warn(
            file,
            "patient",
            int((~patients.isin(index)).sum()),
            "clinical patients without this table",
            "they take no part in models that need it",
        )
    if not index.isin(patients).any():
        report.error(
            file, "patient", len(index), "no patient of the clinical table", "use the same identifiers in all tables"
        )


def file_name(site: SiteFolder, names: tuple[str, ...]) -> str:
    """The file of a kind that the site has, else the first that it could have."""
    found = site.find(names)
    return found.name if found else names[0]


def some(columns: pd.Index | list[str]) -> str:
    """The first three of many columns."""
    shown = [str(c) for c in list(columns)[:3]]
    return ", ".join(shown) + (" ..." if len(columns) > 3 else "")
