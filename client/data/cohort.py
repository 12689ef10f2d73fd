"""A cohort: one site's patients as arrays that a model can take, cached on the site's disk.

In deployment every message is handled in a new process, so what is prepared once lies there as memory-mapped arrays.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pandas as pd
from oncofed.client.data.read import read_clinical, read_expression
from oncofed.client.data.site import CLINICAL, EXPRESSION, SiteFolder
from oncofed.client.data.units import harmonise
from oncofed.common.covariates import parse_covariates
from oncofed.common.errors import Refusal
from oncofed.common.panel import GenePanel
from oncofed.common.splits import deal_folds
from oncofed.common.study import Study

log = logging.getLogger("oncofed.client")

FORMAT = 2
"""Raised when the meaning of the cached arrays changes."""


@dataclass(frozen=True)
class Cohort:
    """Patients of one site, or of several put together: N patients, G genes of the panel, V covariate inputs.

    `x_NG` and `v_NV` are not standardised yet, NaN where a value or gene is missing; times are in months, and with the
    events 0 where a study has no outcome.
    """

    x_NG: np.ndarray
    v_NV: np.ndarray
    time: np.ndarray
    event: np.ndarray
    cancer: np.ndarray
    fold: np.ndarray
    patient: np.ndarray

    def __len__(self) -> int:
        return len(self.time)

    def select(self, rows: np.ndarray) -> Cohort:
        """The cohort of a boolean or integer index."""
        return Cohort(*(np.asarray(getattr(self, f.name)[rows]) for f in fields(self)))

    @classmethod
    def concatenate(cls, cohorts: list[Cohort]) -> Cohort:
        """All patients of several cohorts of the same panel (simulation only: no one may do this with real sites)."""
        return cls(*(np.concatenate([getattr(c, f.name) for c in cohorts]) for f in fields(cls)))


@dataclass(frozen=True)
class CohortKey:
    """What a prepared cohort depends on: the site's files, the panel, the cancer types, the covariates and the folds."""

    files: str
    panel: str
    cancers: tuple[str, ...]
    covariates: tuple[str, ...]
    outcome: bool
    folds: int
    seed: int

    @property
    def name(self) -> str:
        text = json.dumps([getattr(self, f.name) for f in fields(self)])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def cohort_key(site: SiteFolder, study: Study, panel: GenePanel, cancers: tuple[str, ...]) -> CohortKey:
    """The key of a site's cohort as its files stand now."""
    outcome = study.task.kind == "survival"
    return CohortKey(
        _fingerprint(site), panel.hash, cancers, study.panel.covariates, outcome, study.splits.folds, study.seed
    )


def open_cohort(key: CohortKey, site: SiteFolder, work: Path, panel: GenePanel) -> Cohort:
    """The prepared cohort from the cache, or prepared now and written there atomically."""
    folder = work / "cohorts" / key.name
    if not folder.exists():
        _write(prepare(site, panel, key), folder)
    return _load(folder)


def prepare(site: SiteFolder, panel: GenePanel, key: CohortKey) -> Cohort:
    """Read, harmonise and order by patient; patients without expression, outcome or a studied cancer type take no part."""
    cancers = key.cancers
    clinical = clinical_by_patient(site, outcome=key.outcome)
    usable = clinical["cancer_type"].isin(cancers)
    time = event = pd.Series(0.0, index=clinical.index)
    if key.outcome:
        time = pd.to_numeric(clinical["time"], errors="coerce") * site.description.months_per_unit
        event = pd.to_numeric(clinical["event"], errors="coerce")
        usable &= (time > 0) & event.isin([0, 1])
    patients, x = expression_of(site, clinical.index, clinical.index[usable], panel)
    if not patients:
        raise Refusal(
            f"site {site.name}: no patient has {'outcome, ' if key.outcome else ''}expression and one of the study's cancer types; "
            "run `oncofed site check`"
        )
    rows = clinical.loc[patients]
    cancer = rows["cancer_type"].map({c: i for i, c in enumerate(cancers)}).to_numpy(dtype=np.int64)
    names = np.array(patients, dtype=str)
    events = event.loc[patients].to_numpy(dtype=np.int64)
    codes = rows["cancer_type"].to_numpy(dtype=str)
    fold = deal_folds(names, codes, events, folds=key.folds, seed=key.seed, site=site.name)
    v = encode_covariates(rows, key.covariates, site.name)
    return Cohort(x, v, time.loc[patients].to_numpy(dtype=np.float64), events, cancer, fold, names)


def clinical_by_patient(site: SiteFolder, *, outcome: bool) -> pd.DataFrame:
    """The clinical table by patient; rows without a name are left out, a name that stands twice is refused."""
    table = read_clinical(site, outcome=outcome)
    table = table[table["patient"].notna()].assign(patient=lambda t: t["patient"].astype(str)).set_index("patient")
    if table.index.duplicated().any():
        raise Refusal(
            f"site {site.name}: {int(table.index.duplicated().sum())} duplicate patients in the clinical table; run `oncofed site check`"
        )
    return table


def expression_of(
    site: SiteFolder, names: pd.Index, wanted: pd.Index, panel: GenePanel
) -> tuple[list[str], np.ndarray]:
    """Those of `wanted` who have expression, in order, and their values `[N, G]` on a log-like scale, NaN where missing.

    `names` are all patients of the clinical table: they tell which axis of the expression table is the patients'.
    """
    expression = read_expression(site, names)
    if expression.index.duplicated().any() or expression.columns.duplicated().any():
        raise Refusal(
            f"site {site.name}: duplicate patients or genes in the expression table; run `oncofed site check`"
        )
    patients = sorted(wanted.intersection(expression.index))
    try:
        values = expression.loc[patients].to_numpy(dtype=np.float64, na_value=np.nan)
    except (ValueError, TypeError):
        raise Refusal(
            f"site {site.name}: the expression table holds cells that are not numbers; run `oncofed site check`"
        ) from None
    values[np.isinf(values)] = np.nan
    whole = pd.DataFrame(
        harmonise(values, site.description.expression_unit), index=patients, columns=expression.columns
    )
    return patients, whole.reindex(columns=list(panel.genes)).to_numpy(dtype=np.float32)


def encode_covariates(rows: pd.DataFrame, covariates: tuple[str, ...], site: str) -> np.ndarray:
    """Covariate inputs `[N, V]` of clinical rows, NaN where a value is missing, no number or none of the levels."""
    columns = []
    for c in parse_covariates(covariates):
        if c.column not in rows.columns:
            log.warning("%s: no clinical column '%s'; it is taken as unknown for all patients", site, c.column)
            columns += [np.full(len(rows), np.nan)] * len(c.inputs)
        elif not c.levels:
            values = pd.to_numeric(rows[c.column], errors="coerce").to_numpy(dtype=np.float64, copy=True)
            values[np.isinf(values)] = np.nan
            columns.append(values)
        else:
            # whole numbers beside an empty cell are read as 1.0, 2.0: as text they must be 1, 2
            text = rows[c.column].convert_dtypes().astype("string").str.strip().str.lower()
            known = text.isin([level.lower() for level in c.levels]).to_numpy(dtype=bool, na_value=False)
            other = int((text.notna().to_numpy() & ~known).sum())
            if other:
                log.warning("%s: %d values of '%s' are none of %s; taken as unknown", site, other, c.column, c.levels)
            for level in c.levels[1:]:
                is_level = (text == level.lower()).to_numpy(dtype=np.float64, na_value=np.nan)
                columns.append(np.where(known, is_level, np.nan))
    return np.array(columns, dtype=np.float32).T.reshape(len(rows), len(columns))


def gene_names(site: SiteFolder, work: Path) -> list[str]:
    """Genes of the site's expression table, remembered so that a greeting need not read the table."""
    file = work / f"genes-{_fingerprint(site)}.json"
    if not file.exists():
        clinical = read_clinical(site, outcome=False)
        genes = [str(g) for g in read_expression(site, pd.Index(clinical["patient"].dropna().astype(str))).columns]
        work.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps(genes))
        os.replace(temporary, file)
    return list(json.loads(file.read_text()))


def _fingerprint(site: SiteFolder) -> str:
    """Changes when a file of the site does."""
    paths = [p for p in (site.find(CLINICAL), site.find(EXPRESSION), site.path / "site.toml") if p is not None]
    stats = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in paths]
    return hashlib.sha256(json.dumps([FORMAT, stats]).encode()).hexdigest()[:16]


def _write(cohort: Cohort, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent))
    for f in fields(cohort):
        np.save(temporary / f"{f.name}.npy", getattr(cohort, f.name), allow_pickle=False)
    try:
        os.replace(temporary, folder)
    except OSError:  # another process of this site was faster; its copy is the same
        shutil.rmtree(temporary)
        if not folder.exists():
            raise


def _load(folder: Path) -> Cohort:
    return Cohort(*(np.load(folder / f"{f.name}.npy", mmap_mode="r", allow_pickle=False) for f in fields(Cohort)))
