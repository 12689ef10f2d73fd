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
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import pandas as pd
from oncofed.client.data.beside import BesideTables, read_beside
from oncofed.client.data.read import as_text, read_clinical, read_expression
from oncofed.client.data.site import ALTERATIONS as ALTERATION_FILES
from oncofed.client.data.site import CLINICAL, EXPRESSION, SLIDES_TABLE, SiteFolder
from oncofed.client.data.site import PATHOLOGY as PATHOLOGY_FILES
from oncofed.client.data.units import FAMILY, harmonise
from oncofed.common.covariates import parse_covariates
from oncofed.common.errors import Refusal
from oncofed.common.modalities import ALTERATIONS, NO_BESIDE, PATHOLOGY, RNA, Beside
from oncofed.common.panel import GenePanel
from oncofed.common.scaling import patient_ranks
from oncofed.common.splits import deal_alone, deal_folds
from oncofed.common.study import Study

log = logging.getLogger("oncofed.client")

FORMAT = 8
"""Raised when the meaning of the cached arrays changes."""

NOTHING_BESIDE = BesideTables(pd.DataFrame(), pd.DataFrame(), pd.Series(dtype=str))


@dataclass(frozen=True)
class Cohort:
    """Patients of one site, or of several put together: N patients, G genes (or an embedding of them), V covariate inputs.

    `x_NG`, `v_NV`, image vectors `p_NP` and alterations `a_NA` are not standardised yet; NaN where a value is missing, a
    whole row of NaN where the patient lacks the modality. `slides` names the files of a patient's tiles. Times are in
    months, and with the events 0 where a study has no outcome.
    """

    x_NG: np.ndarray
    v_NV: np.ndarray
    time: np.ndarray
    event: np.ndarray
    cancer: np.ndarray
    fold: np.ndarray
    patient: np.ndarray
    p_NP: np.ndarray = field(default_factory=lambda: np.zeros(0))
    a_NA: np.ndarray = field(default_factory=lambda: np.zeros(0))
    slides: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), dtype=str))

    def __post_init__(self) -> None:
        """What is not given nobody has."""
        n = len(self.time)
        empty = {"p_NP": np.zeros((n, 0), np.float32), "a_NA": np.zeros((n, 0), np.float32), "slides": np.full(n, "")}
        for name, value in empty.items():
            if getattr(self, name).ndim != value.ndim:
                object.__setattr__(self, name, value)

    def __len__(self) -> int:
        return len(self.time)

    def select(self, rows: np.ndarray) -> Cohort:
        """The cohort of a boolean or integer index."""
        return Cohort(*(np.asarray(getattr(self, f.name)[rows]) for f in fields(self)))

    def table(self, modality: str) -> np.ndarray:
        """A modality's numbers, a row a patient."""
        return {RNA: self.x_NG, PATHOLOGY: self.p_NP, ALTERATIONS: self.a_NA}[modality]

    def has(self, modality: str) -> np.ndarray:
        """Who has a modality, booleans `[N]`."""
        some = (
            ~np.isnan(self.table(modality)).all(axis=1) if self.table(modality).shape[1] else np.zeros(len(self), bool)
        )
        return some | (self.slides != "") if modality == PATHOLOGY else some

    @classmethod
    def concatenate(cls, cohorts: list[Cohort]) -> Cohort:
        """All patients of several cohorts of the same panel (simulation only: no one may do this with real sites)."""
        return cls(*(np.concatenate([getattr(c, f.name) for c in cohorts]) for f in fields(cls)))


def with_modalities(cohort: Cohort, study: Study) -> Cohort:
    """Patients who have one of the study's modalities at least."""
    if not study.multimodal:
        return cohort
    rows = np.any([cohort.has(m) for m in study.modalities], axis=0)
    return cohort if rows.all() else cohort.select(rows)


@dataclass(frozen=True)
class CohortKey:
    """What a prepared cohort depends on: the site's files, the panel, the cancer types, the covariates and the folds.

    Where `nobody` is allowed a cohort may be empty: that there is none must not show."""

    files: str
    panel: str
    cancers: tuple[str, ...]
    covariates: tuple[str, ...]
    outcome: bool
    label: str
    of: tuple[str, ...]
    folds: int
    seed: int
    independent: bool
    ranked: bool
    nobody: bool
    multimodal: bool
    sees_images: bool
    images: str
    image_width: int
    alterations: tuple[str, ...]
    embedding: str
    embedding_width: int

    @property
    def name(self) -> str:
        text = json.dumps([getattr(self, f.name) for f in fields(self)])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def cohort_key(
    site: SiteFolder, study: Study, panel: GenePanel, cancers: tuple[str, ...], beside: Beside = NO_BESIDE
) -> CohortKey:
    """The key of a site's cohort as its files stand now."""
    outcome, multimodal = study.task.kind == "survival", study.multimodal
    files = fingerprint(site, multimodal)
    return CohortKey(
        files,
        panel.hash,
        cancers,
        study.panel.covariates,
        outcome,
        study.task.label,
        study.of,
        study.splits.folds,
        study.seed,
        study.independent_folds,
        study.ranked,
        study.privacy.of_patients,
        multimodal,
        PATHOLOGY in study.modalities,
        beside.images,
        beside.image_width if beside.image_kind == "vector" else 0,
        beside.alterations,
        beside.embedding,
        beside.embedding_width,
    )


def open_cohort(key: CohortKey, site: SiteFolder, work: Path, panel: GenePanel) -> Cohort:
    """The prepared cohort from the cache, or prepared now and written there atomically."""
    folder = work / "cohorts" / key.name
    if not folder.exists():
        _write(prepare(site, panel, key), folder)
    return _load(folder)


def prepare(site: SiteFolder, panel: GenePanel, key: CohortKey) -> Cohort:
    """Read, harmonise and order by patient; patients without outcome or a studied cancer type take no part.

    Nor do patients without expression or, in a multimodal study, without any modality. Folds are dealt among all of these,
    whichever modalities a study then uses, so that studies of one and of several modalities can be paired.
    """
    cancers = key.cancers
    clinical = clinical_by_patient(site, outcome=key.outcome, label=key.label, of=key.of)
    usable = clinical["cancer_type"].isin(cancers)
    time = event = pd.Series(0.0, index=clinical.index)
    if key.outcome:
        time = pd.to_numeric(clinical["time"], errors="coerce") * site.description.months_per_unit
        event = pd.to_numeric(clinical["event"], errors="coerce")
        usable &= (time > 0) & event.isin([0, 1])
    wanted = clinical.index[usable]
    patients: list[str] = []
    x = np.zeros((0, len(panel)), dtype=np.float32)
    if not key.multimodal or site.find(EXPRESSION) is not None:
        patients, x = expression_of(site, clinical.index, wanted, panel)
        x = patient_ranks(x) if key.ranked else x
    beside = NOTHING_BESIDE
    if key.multimodal:
        beside = read_beside(
            site,
            clinical.index,
            wanted,
            sees_images=key.sees_images,
            images=key.images,
            image_width=key.image_width,
            alterations=key.alterations,
        )
    names = sorted({*patients, *beside.patients})
    if not names and not key.nobody:
        raise Refusal(
            f"site {site.name}: no patient has {'outcome, ' if key.outcome else ''}"
            f"{'expression, images or alterations' if key.multimodal else 'expression'} and one of the study's cancer types; "
            "run `oncofed site check`"
        )
    if key.embedding:
        x = (
            embedded(site, panel, x, key.embedding)
            if patients
            else np.zeros((0, key.embedding_width), dtype=np.float32)
        )
    x = pd.DataFrame(x, index=patients).reindex(names).to_numpy(dtype=np.float32)
    rows = clinical.loc[names]
    cancer = rows["cancer_type"].map({c: i for i, c in enumerate(cancers)}).to_numpy(dtype=np.int64)
    events = event.loc[names].to_numpy(dtype=np.int64)
    codes = rows["cancer_type"].to_numpy(dtype=str)
    fold = (
        deal_alone(np.array(names), folds=key.folds, seed=key.seed)
        if key.independent
        else deal_folds(np.array(names), codes, events, folds=key.folds, seed=key.seed, site=site.name)
    )
    return Cohort(
        x_NG=x,
        v_NV=encode_covariates(rows, key.covariates, site.name),
        time=time.loc[names].to_numpy(dtype=np.float64),
        event=events,
        cancer=cancer,
        fold=fold,
        patient=np.array(names, dtype=str),
        p_NP=beside.images.reindex(names).to_numpy(dtype=np.float32),
        a_NA=beside.alterations.reindex(names).to_numpy(dtype=np.float32),
        slides=beside.slides.reindex(names, fill_value="").to_numpy(dtype=str),
    )


def embedded(site: SiteFolder, panel: GenePanel, x_NG: np.ndarray, agreed: str) -> np.ndarray:
    """Expression as the vectors of the site's frozen model `[N, E]`; raises where it is not the one that was agreed on."""
    from oncofed.client.embeddings import Embedder  # needs torch, which reading tables does without

    if FAMILY[site.description.expression_unit] != FAMILY["counts"]:
        raise Refusal(
            f"site {site.name}: expression_unit = {site.description.expression_unit!r} has negative values, which scGPT cannot "
            "read; deliver counts, tpm or log2 expression, or set fusion.rna_encoder = 'gene_moe'"
        )
    model = Embedder.open(scgpt_folder(site), panel.genes)
    if model.fingerprint != agreed:
        raise Refusal(
            f"site {site.name}: its scGPT checkpoint is now {model.fingerprint}, the study agreed on {agreed}; restore it, or "
            "begin the study anew"
        )
    return model.embed(x_NG)


def scgpt_folder(site: SiteFolder) -> Path:
    """The folder of the site's scGPT checkpoint; raises where site.toml does not name one that is there."""
    named = site.description.scgpt
    folder = site.path / named
    if not named or not folder.is_dir():
        raise Refusal(
            f"site {site.name}: fusion.rna_encoder = 'scgpt' needs a checkpoint folder, site.toml says scgpt = {named!r}; name "
            "the folder that holds args.json, best_model.pt and vocab.json"
        )
    return folder


def clinical_by_patient(
    site: SiteFolder, *, outcome: bool, label: str = "cancer_type", of: tuple[str, ...] = ()
) -> pd.DataFrame:
    """The clinical table by patient; rows without a name are left out, a name that stands twice is refused.

    With another `label` than the cancer type, that column takes its place, for patients of the cancer types `of`.
    """
    table = read_clinical(site, outcome=outcome, label=label, of=of)
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

    `names` are all patients of the clinical table: they tell which axis of the expression table is the patients'. Genes
    are found under all names that the panel has for them.
    """
    expression = read_expression(site, names, panel)
    patients = sorted(wanted.intersection(expression.index))
    values = expression.loc[patients].to_numpy(dtype=np.float64, copy=True)
    values[np.isinf(values)] = np.nan
    whole = pd.DataFrame(
        harmonise(values, site.description.expression_unit), index=patients, columns=expression.columns
    )
    return patients, whole.reindex(columns=list(panel.genes)).to_numpy(dtype=np.float32)


def encode_covariates(
    rows: pd.DataFrame, covariates: tuple[str, ...], site: str, dtype: type = np.float32
) -> np.ndarray:
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
            text = as_text(rows[c.column]).str.strip().str.lower()
            known = text.isin([level.lower() for level in c.levels]).to_numpy(dtype=bool, na_value=False)
            other = int((text.notna().to_numpy() & ~known).sum())
            if other:
                log.warning("%s: %d values of '%s' are none of %s; taken as unknown", site, other, c.column, c.levels)
            for level in c.levels[1:]:
                is_level = (text == level.lower()).to_numpy(dtype=np.float64, na_value=np.nan)
                columns.append(np.where(known, is_level, np.nan))
    return np.array(columns, dtype=dtype).T.reshape(len(rows), len(columns))


def fingerprint(site: SiteFolder, multimodal: bool = False) -> str:
    """Changes when a file of the site does that a study of expression, or of several modalities, reads."""
    found = [site.find(CLINICAL), site.find(EXPRESSION), site.path / "site.toml"]
    if multimodal:
        found += [site.find(PATHOLOGY_FILES), site.find(ALTERATION_FILES), site.path / SLIDES_TABLE]
        # whole paths: a cohort holds those of its slides, and a folder may name their encoder
        for name in filter(None, (site.description.slides, site.description.scgpt)):
            found += sorted(p for p in (site.path / name).rglob("*") if p.is_file())
    paths = [p for p in found if p is not None and p.exists()]
    stats = [(str(p.absolute()), p.stat().st_size, p.stat().st_mtime_ns) for p in paths]
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
