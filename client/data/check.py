"""Check a site folder in one pass: every problem with file, column, count and remedy, never a patient's row or name."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pandera.pandas as pa
from oncofed.client.data.check_images import check_pathology, has_images
from oncofed.client.data.findings import SiteReport, check_patients, check_table, file_name, some
from oncofed.client.data.read import (
    OUTCOME,
    REQUIRED,
    all_text,
    expression_table,
    not_genes,
    read_alterations,
    read_clinical,
    wordy_cells,
)
from oncofed.client.data.site import ALTERATIONS, CLINICAL, EXPRESSION, SiteFolder, Unit
from oncofed.client.data.units import impossible
from oncofed.common.cancers import CANCER_TYPES
from oncofed.common.errors import Refusal
from oncofed.common.gene_names import ids_meet_symbols
from oncofed.common.panel import GenePanel

EXTREME: dict[Unit, float] = {"counts": 1e8, "tpm": 1e6, "log2": 40.0, "zscore": 100.0}
"""Largest plausible absolute value by unit; beyond it the declared unit is usually wrong."""


def check_site(folder: Path, panel: GenePanel | None = None) -> SiteReport:
    """Read everything in `folder` and report; raises nothing for a fault of the data."""
    report = SiteReport(folder.name)
    try:
        site = SiteFolder.open(folder)
    except Refusal as error:
        report.error("site.toml", "", 1, str(error), "see the message")
        return report
    report.site = site.name
    report.facts["units"] = f"expression {site.description.expression_unit}, time in {site.description.time_unit}"
    try:
        clinical = _read_clinical(site)
    except Refusal as error:
        report.error("clinical", "", 1, str(error), "see the message")
        return report
    _check_clinical(report, site, clinical)
    patients = pd.Index(clinical["patient"].dropna().unique().astype(str))
    checks: dict[str, Callable[[SiteReport, SiteFolder, pd.Index], None]] = {
        "expression": partial(_check_expression, panel=panel),
        "pathology": check_pathology,
        "alterations": _check_alterations,
    }
    for kind, check in checks.items():
        try:
            check(report, site, patients)
        except Refusal as error:
            report.error(kind, "", 1, str(error), "see the message")
    return report


def _read_clinical(site: SiteFolder) -> pd.DataFrame:
    """The clinical table, which may lack both outcome columns but not one of them."""
    try:
        return read_clinical(site)
    except Refusal as refusal:
        with contextlib.suppress(Refusal):
            table = read_clinical(site, outcome=False)
            if not set(OUTCOME) & set(table.columns):
                return table
        raise refusal from None


def _check_clinical(report: SiteReport, site: SiteFolder, table: pd.DataFrame) -> None:
    file = file_name(site, CLINICAL)
    known = set(CANCER_TYPES) | set(site.description.extra_cancer_types)
    number = {c: pd.to_numeric(table[c], errors="coerce") for c in OUTCOME if c in table.columns}
    numeric = table.assign(**number, cancer_type=table["cancer_type"].astype("string"))
    text = {c: int((number[c].isna() & table[c].notna()).sum()) for c in number}
    without = table[list(number)].isna().all(axis=1) & bool(number)
    remedies = {
        ("patient", "missing"): "give every row a patient identifier",
        ("patient", "unique"): "keep one row a patient",
        ("cancer_type", "missing"): "fill in the code",
        ("cancer_type", "known"): "use a TCGA code, or list the code under extra_cancer_types in site.toml",
        ("time", "missing"): "fill in the follow-up time or remove the row",
        ("time", "positive"): "follow-up must be above 0; remove the row or correct the dates",
        ("event", "missing"): "fill in 1 (death) or 0 (censored)",
        ("event", "binary"): "code 1 for death and 0 for censored",
    }
    check = {
        "missing": pa.Check(lambda s: s.notna(), name="missing", error="missing values", ignore_na=False),
        "outcome": pa.Check(lambda s: s.notna() | without, name="missing", error="missing values", ignore_na=False),
        "positive": pa.Check(lambda s: s > 0, name="positive", error="zero or negative times"),
        "binary": pa.Check(lambda s: s.isin([0, 1]), name="binary", error="values other than 0 and 1"),
        "known": pa.Check(lambda s: s.isin(known), name="known", error="unknown cancer types"),
        "unique": pa.Check(
            lambda s: ~s.duplicated() | s.isna(), name="unique", error="duplicate patients", ignore_na=False
        ),
    }
    rules = {c: rule for c, rule in zip(OUTCOME, ("positive", "binary"), strict=True) if c in number}
    schema = pa.DataFrameSchema(
        {
            "patient": pa.Column(None, [check["missing"], check["unique"]], nullable=True),
            "cancer_type": pa.Column(None, [check["missing"], check["known"]], nullable=True),
        }
        | {c: pa.Column(None, [check["outcome"], check[rule]], nullable=True) for c, rule in rules.items()}
    )
    for column, count in text.items():
        report.error(file, column, count, "values that are not numbers", "export plain numbers")
    try:
        schema.validate(numeric, lazy=True)
    except pa.errors.SchemaErrors as failed:
        cases = failed.failure_cases
        for (column, name), rows in cases.groupby(["column", "check"]):
            key = next(k for k, c in check.items() if c.error == name or k == name)
            count = len(rows) - (text.get(str(column), 0) if key == "missing" else 0)
            problem = str(check[key].error)
            if key == "known":  # codes are not patient data: naming them is the useful message
                codes = sorted({str(v) for v in rows["failure_case"]})
                near = [difflib.get_close_matches(c.upper(), known, 1) for c in codes[:5]]
                problem += f" {codes[:5]}" + (f" (nearest: {[n[0] for n in near if n]})" if any(near) else "")
            report.error(file, str(column), count, problem, remedies[str(column), key])
    report.warn(
        file,
        ", ".join(OUTCOME),
        int(without.sum()),
        "patients without an outcome",
        "they take part in classification; a survival study leaves them out",
    )
    counts = table["cancer_type"].value_counts()
    types = ", ".join(f"{c} {n}" for c, n in counts.items())
    if number:
        over = number["time"] * site.description.months_per_unit > 600
        report.warn(file, "time", int(over.sum()), "follow-up above 50 years", "check time_unit in site.toml")
        report.facts["patients"] = f"{len(table)} with {int((number['event'] == 1).sum())} events; {types}"
    else:
        remedy = "enough for classification; a survival study needs both"
        report.warn(file, ", ".join(OUTCOME), 1, "table without the outcome columns", remedy)
        report.facts["patients"] = f"{len(table)} without outcomes; {types}"
    covariates = [c for c in table.columns if c not in REQUIRED]
    if covariates:
        report.facts["covariates"] = ", ".join(f"{c} ({table[c].isna().mean():.0%} missing)" for c in covariates[:12])


def _check_expression(report: SiteReport, site: SiteFolder, patients: pd.Index, panel: GenePanel | None) -> None:
    file = file_name(site, EXPRESSION)
    if site.find(EXPRESSION) is None and has_images(site):
        report.facts["expression"] = "none"
        report.warn(file, "", 1, "no expression", "the site takes part in multimodal studies only")
        return
    table, about = expression_table(site, patients)
    report.facts["expression"] = f"{len(table)} patients x {table.shape[1]} genes"
    report.warn(
        file,
        some(about),
        len(about),
        "columns of text that are no patients",
        "they are left out; mend the cells if they are patients",
    )
    check_patients(report, file, table.index, patients, missing_level="warning")
    report.error(
        file,
        "genes",
        int(table.columns.duplicated().sum()),
        "duplicate genes",
        "keep one column a gene (sum counts, average the rest)",
    )
    odd = not_genes(table.columns)
    report.error(file, some(odd), len(odd), "columns that are no genes", "leave out what is no gene's expression")
    table = _numbers(report, file, table)
    x = table.to_numpy(dtype=np.float64, na_value=np.nan)
    rate = np.isnan(x).mean(axis=0) if len(x) else np.zeros(x.shape[1])
    report.warn(
        file,
        some(table.columns[rate > 0.2]),
        int((rate > 0.2).sum()),
        f"genes with more than 20 % missing cells (highest {rate.max(initial=0):.0%})",
        "they will be filled with the federation's mean",
    )
    report.error(file, "", int(np.isinf(x).sum()), "infinite cells", "write missing values as empty cells")
    unit = site.description.expression_unit
    for count, what, remedy in impossible(x, unit):
        report.error(file, "", count, f"{what}, impossible for {unit}", remedy)
    over = np.abs(x) > EXTREME[unit]
    report.warn(
        file,
        some(table.columns[over.any(axis=0)]),
        int(over.sum()),
        f"cells beyond {EXTREME[unit]:g}, extreme for {unit}",
        "check expression_unit; extreme z-scores are compressed by a signed logarithm",
    )
    if unit == "log2" and x.size and np.nanmax(x) <= 1.0:
        report.warn(file, "", 1, "log2 values never exceed 1", "check expression_unit; the table may be scaled already")
    if panel is not None:
        _check_panel(report, file, table.columns, panel)


def _numbers(report: SiteReport, file: str, table: pd.DataFrame) -> pd.DataFrame:
    """The table with its cells as numbers, NaN where they are none, without columns that hold nothing but text."""
    words = wordy_cells(table)
    if not words.any():
        return table
    text = all_text(table)
    slips = (words > 0).to_numpy() & ~text
    report.error(
        file, some(table.columns[text]), int(text.sum()), "columns of text", "leave out what is no gene's expression"
    )
    report.error(
        file,
        some(table.columns[slips]),
        int(words[slips].sum()),
        "cells that are not numbers",
        "export plain numbers; write missing values as empty cells",
    )
    return table.loc[:, ~text].apply(pd.to_numeric, errors="coerce")


def _check_panel(report: SiteReport, file: str, columns: pd.Index, panel: GenePanel) -> None:
    """Genes of the panel that the site lacks, and whether other names for genes would find them."""
    here = set(panel.names_of(columns))
    missing = [gene for gene in panel.genes if gene not in here]
    report.facts["panel"] = f"{len(panel) - len(missing)} of {len(panel)} genes"
    other = not panel.others and ids_meet_symbols(panel.genes, list(columns))
    hint = "; a study with HGNC's table in panel.names finds genes under both: try it with --names" if other else ""
    if len(missing) == len(panel):
        remedy = f"use the panel's identifiers (symbols or Ensembl ids){hint}"
        report.error(file, "genes", len(missing), "no gene of the panel", remedy)
    else:
        remedy = f"they will be filled with the federation's mean{hint}"
        report.warn(file, some(missing), len(missing), "genes of the panel that the site lacks", remedy)


def _check_alterations(report: SiteReport, site: SiteFolder, patients: pd.Index) -> None:
    """Copy numbers and mutations, one column each."""
    table = read_alterations(site)
    if table is not None:
        report.facts["alterations"] = f"{len(table)} patients x {table.shape[1]} features"
        check_table(report, file_name(site, ALTERATIONS), table, patients)
