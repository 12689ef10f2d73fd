"""A cohort: one site's patients as arrays that a model can take, cached on the site's disk.

In deployment every message is handled in a new process, so what is prepared once lies there as memory-mapped arrays.
"""

from __future__ import annotations

import hashlib
import json
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
from oncofed.common.errors import Refusal
from oncofed.common.panel import GenePanel
from oncofed.common.splits import deal_folds

FORMAT = 1
"""Raised when the meaning of the cached arrays changes."""


@dataclass(frozen=True)
class Cohort:
    """Patients of one site, or of several put together: N patients, G genes of the panel.

    `x_NG` is harmonised but not standardised, NaN where a value or gene is missing; times are in months.
    """

    x_NG: np.ndarray
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

    def gene_sums(self) -> dict[str, np.ndarray]:
        """`n, sum, squares [G]` over present values, float64: what scaling is made of."""
        x = np.asarray(self.x_NG, dtype=np.float64)
        present = ~np.isnan(x)
        filled = np.where(present, x, 0.0)
        return {"n": present.sum(0).astype(np.float64), "sum": filled.sum(0), "squares": np.square(filled).sum(0)}

    def standardised(self, mean_G: np.ndarray, sd_G: np.ndarray) -> np.ndarray:
        """Expression with the federation's mean and deviation, float32 `[N, G]`; a missing value becomes the mean, 0."""
        x = np.subtract(self.x_NG, mean_G.astype(np.float32))
        x /= sd_G.astype(np.float32)
        return np.nan_to_num(x, copy=False, nan=0.0)


@dataclass(frozen=True)
class CohortKey:
    """What a prepared cohort depends on: the site's files, the panel, the cancer types and the folds."""

    files: str
    panel: str
    cancers: tuple[str, ...]
    folds: int
    seed: int

    @property
    def name(self) -> str:
        text = json.dumps([self.files, self.panel, self.cancers, self.folds, self.seed])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def cohort_key(site: SiteFolder, panel: GenePanel, cancers: tuple[str, ...], folds: int, seed: int) -> CohortKey:
    """The key of a site's cohort as its files stand now."""
    return CohortKey(_fingerprint(site), panel.hash, cancers, folds, seed)


def open_cohort(key: CohortKey, site: SiteFolder, work: Path, panel: GenePanel, cancers: tuple[str, ...]) -> Cohort:
    """The prepared cohort from the cache, or prepared now and written there atomically."""
    folder = work / "cohorts" / key.name
    if not folder.exists():
        _write(prepare(site, panel, cancers, key.folds, key.seed), folder)
    return _load(folder)


def prepare(site: SiteFolder, panel: GenePanel, cancers: tuple[str, ...], folds: int, seed: int) -> Cohort:
    """Read, harmonise and order by patient; patients without expression, outcome or a studied cancer type take no part."""
    clinical = read_clinical(site)
    clinical = (
        clinical[clinical["patient"].notna()].assign(patient=lambda t: t["patient"].astype(str)).set_index("patient")
    )
    if clinical.index.duplicated().any():
        raise Refusal(
            f"site {site.name}: {int(clinical.index.duplicated().sum())} duplicate patients in the clinical table; run `oncofed site check`"
        )
    time = pd.to_numeric(clinical["time"], errors="coerce") * site.description.months_per_unit
    event = pd.to_numeric(clinical["event"], errors="coerce")
    usable = (time > 0) & event.isin([0, 1]) & clinical["cancer_type"].isin(cancers)
    expression = read_expression(site, clinical.index)
    if expression.index.duplicated().any() or expression.columns.duplicated().any():
        raise Refusal(
            f"site {site.name}: duplicate patients or genes in the expression table; run `oncofed site check`"
        )
    patients = sorted(clinical.index[usable].intersection(expression.index))
    if not patients:
        raise Refusal(
            f"site {site.name}: no patient has outcome, expression and one of the study's cancer types; run `oncofed site check`"
        )
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
    x = whole.reindex(columns=list(panel.genes)).to_numpy(dtype=np.float32)
    rows = clinical.loc[patients]
    cancer = rows["cancer_type"].map({c: i for i, c in enumerate(cancers)}).to_numpy(dtype=np.int64)
    names = np.array(patients, dtype=str)
    events = event.loc[patients].to_numpy(dtype=np.int64)
    fold = deal_folds(names, rows["cancer_type"].to_numpy(dtype=str), events, folds=folds, seed=seed, site=site.name)
    return Cohort(x, time.loc[patients].to_numpy(dtype=np.float64), events, cancer, fold, names)


def gene_names(site: SiteFolder, work: Path) -> list[str]:
    """Genes of the site's expression table, remembered so that a greeting need not read the table."""
    file = work / f"genes-{_fingerprint(site)}.json"
    if not file.exists():
        clinical = read_clinical(site)
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
