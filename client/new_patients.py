"""A hospital's patients as a saved model wants them: on its panel, with whichever of its modalities they have, without an outcome."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np
import pandas as pd
from oncofed.client.data.beside import BesideTables, read_beside
from oncofed.client.data.cohort import (
    NOTHING_BESIDE,
    Cohort,
    clinical_by_patient,
    embedded,
    encode_covariates,
    expression_of,
    scgpt_folder,
    with_modalities,
)
from oncofed.client.data.site import EXPRESSION, SiteFolder
from oncofed.client.data.slides import images_of
from oncofed.client.data.units import FAMILY
from oncofed.common.errors import Refusal
from oncofed.common.modalities import ALTERATIONS, PATHOLOGY, RNA
from oncofed.common.models.scgpt import fingerprint
from oncofed.common.saved import SavedModel
from oncofed.common.scaling import patient_ranks
from oncofed.common.splits import NEVER

WORDS = {RNA: "expression", PATHOLOGY: "images", ALTERATIONS: "alterations"}
"""What a modality is called in messages."""


def new_patients(site: SiteFolder, model: SavedModel) -> tuple[Cohort, list[str]]:
    """The site's patients who have any of the model's modalities, with follow-up 0, and notes on what is missing.

    Raises `Refusal` with the remedy on another unit family, other images or another frozen model, on cancer types that a
    survival model does not know, and where no gene or no patient is left.
    """
    everybody = clinical_by_patient(site, outcome=False)
    clinical, other_notes = _studied(site, model, everybody)
    code = _codes(site, model, clinical)
    x, notes = _expression(site, model, everybody.index)
    x, notes = x.loc[x.index.isin(clinical.index)], other_notes + notes
    beside, b = _beside(site, model, clinical.index), model.beside
    names = sorted({*x.index, *beside.patients})
    rows = clinical.loc[names]
    never, zero = np.full(len(names), NEVER), np.zeros(len(names))
    cohort = Cohort(
        x_NG=x.reindex(names).to_numpy(dtype=np.float32),
        v_NV=encode_covariates(rows, model.study.panel.covariates, site.name),
        time=zero,
        event=zero.astype(np.int64),
        cancer=code.loc[names].to_numpy(dtype=np.int64),
        fold=never,
        patient=np.array(names, dtype=str),
        p_NP=beside.images.reindex(names).to_numpy(dtype=np.float32),
        a_NA=beside.alterations.reindex(index=names, columns=list(b.alterations)).to_numpy(dtype=np.float32),
        slides=beside.slides.reindex(names, fill_value="").to_numpy(dtype=str),
    )
    wanted = listed((WORDS[m] for m in model.study.modalities), "or")
    cohort = with_modalities(cohort, model.study)
    if not len(cohort):
        raise Refusal(f"site {site.name}: no patient of the clinical table has {wanted}; run `oncofed site check`")
    if len(cohort) < len(clinical):
        notes.insert(0, f"{len(clinical) - len(cohort)} patients of the clinical table have no {wanted}: left out")
    return cohort, notes


def _studied(site: SiteFolder, model: SavedModel, clinical: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """Patients of the cancer types whose subtypes the model tells apart, and a note on the others: it would give them some class."""
    of = model.study.of
    others = int((~clinical["cancer_type"].isin(of)).sum()) if of else 0
    if not others:
        return clinical, []
    if others == len(clinical):
        raise Refusal(
            f"site {site.name}: the model tells classes of {', '.join(of)} apart, and no patient of the clinical table is of them; correct "
            "the codes in cancer_type, or use a model of these patients' cancer types"
        )
    note = f"{others} patients are not of {', '.join(of)}, whose classes the model tells apart: left out"
    return clinical[clinical["cancer_type"].isin(of)], [note]


def _codes(site: SiteFolder, model: SavedModel, clinical: pd.DataFrame) -> pd.Series:
    """The index of each patient's cancer type."""
    if model.study.task.kind == "classification":
        return pd.Series(0, index=clinical.index)  # this model never sees it
    code = clinical["cancer_type"].map({c: i for i, c in enumerate(model.cancers)})
    if code.isna().any():
        unknown = Counter(clinical["cancer_type"][code.isna()].fillna("(empty)").astype(str))
        found = ", ".join(f"{name}: {n}" for name, n in sorted(unknown.items()))
        raise Refusal(
            f"site {site.name}: {unknown.total()} patients have a cancer type that the model does not know ({found}); "
            f"it knows {', '.join(model.cancers)}: correct the codes, or take these patients out of the clinical table"
        )
    return code


def _expression(site: SiteFolder, model: SavedModel, patients: pd.Index) -> tuple[pd.DataFrame, list[str]]:
    """Expression (or an embedding of it) of those who have it, and notes; in a model of several modalities nobody may."""
    study, width = model.study, model.beside.embedding_width or len(model.panel)
    several = study.multimodal
    if RNA not in study.modalities or (several and site.find(EXPRESSION) is None):
        return pd.DataFrame(columns=range(width)), []
    family, notes = FAMILY[site.description.expression_unit], []
    if not model.unit_family:
        notes.append(f"the model's file does not say its unit family; {family} is assumed")
    elif family != model.unit_family:
        raise Refusal(
            f"site {site.name}: expression_unit = {site.description.expression_unit!r} is of the family {family}, the model was "
            f"trained on {model.unit_family}; deliver expression of that family, or use a model that was trained on yours"
        )
    names, x = expression_of(site, patients, patients, model.panel)
    missing = int(np.isnan(x).all(axis=0).sum()) if names else 0
    if missing == len(model.panel):
        raise Refusal(
            f"site {site.name}: none of the model's {missing} genes is in the expression table; name genes as the model does "
            f"(its first: {', '.join(model.panel.genes[:3])})"
        )
    if study.embeds:
        own = fingerprint(scgpt_folder(site))
        if own != model.beside.embedding:
            raise Refusal(
                f"site {site.name}: its scGPT checkpoint is {own}, the model reads embeddings of {model.beside.embedding}; let scgpt "
                "in site.toml name the folder that the study used, or move the expression table out to predict from the rest"
            )
        x = embedded(site, model.panel, x, own) if names else np.zeros((0, width), dtype=np.float32)
    elif study.ranked:
        x = patient_ranks(x)
    if missing and not study.embeds:
        notes.append(
            f"{missing} of the model's {len(model.panel)} genes are missing: filled with the federation's mean"
        )
    return pd.DataFrame(x, index=names), notes


def _beside(site: SiteFolder, model: SavedModel, patients: pd.Index) -> BesideTables:
    """Images and alterations as the model reads them."""
    seen, b = model.study.modalities, model.beside
    if PATHOLOGY not in seen and ALTERATIONS not in seen:
        return NOTHING_BESIDE
    images = images_of(site, patients) if PATHOLOGY in seen else None
    if images is not None and images.text != b.images:
        raise Refusal(
            f"site {site.name}: its images are {images.text}, the model reads {b.images}; encode the slides as the study did, "
            "or move the images out of the site's folder to predict from the rest"
        )
    return read_beside(
        site,
        patients,
        patients,
        sees_images=PATHOLOGY in seen,
        images=b.images,
        image_width=b.image_width if b.image_kind == "vector" else 0,
        alterations=b.alterations,
    )


def listed(words: Iterable[str], last: str) -> str:
    """`a`, `a or b`, `a, b or c`."""
    *first, end = words
    return f"{', '.join(first)} {last} {end}" if first else end
