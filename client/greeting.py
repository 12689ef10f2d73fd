"""What a site says when a study greets it: names of genes, cancer types and units; no patient data."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
from oncofed.client.data.beside import alteration_names
from oncofed.client.data.cohort import fingerprint, scgpt_folder
from oncofed.client.data.read import read_clinical, read_expression
from oncofed.client.data.site import EXPRESSION, SiteFolder
from oncofed.client.data.slides import images_of
from oncofed.client.data.units import FAMILY
from oncofed.client.policy import DEFAULT, Policy
from oncofed.client.privacy.evidence import public_count
from oncofed.common import wire
from oncofed.common.errors import Refusal
from oncofed.common.files import write_text
from oncofed.common.modalities import ALTERATIONS, PATHOLOGY, RNA
from oncofed.common.study import Study


def greet(site: SiteFolder, work: Path, study: Study, policy: Policy = DEFAULT) -> wire.Config:
    """Genes, cancer types, unit family and what the site has beside; counts of patients do not leave with it."""
    clinical = read_clinical(site, outcome=study.task.kind == "survival", label=study.task.label, of=study.of)
    if study.privacy.on and study.task.label != "cancer_type":  # of the study's own classes, whoever is here
        return {"cancers": sorted(study.task.classes), **_holdings(site, work, study)}
    held = clinical["cancer_type"].dropna().astype(str).value_counts()
    if study.task.label != "cancer_type":
        # a column may hold anything: what few patients have is not told, unless the study names it
        held = held[(held >= policy.min_patients) | held.index.isin(study.task.classes)]
    elif site.description.cancer_types:  # then one patient more or less of a rare type does not show
        return {"cancers": sorted(site.description.cancer_types), **_holdings(site, work, study)}
    return {"cancers": sorted(held.index.tolist()), **_holdings(site, work, study)}


def known_patients(site: SiteFolder, work: Path) -> int:
    """The site's patients as everyone may know them: one number, whatever part of them a study sees.

    A count of the part that a study sees would tell of single patients: the coordinator chooses the part.
    """
    if site.description.patients:
        return site.description.patients
    file = work / f"known-patients-{fingerprint(site)}.txt"
    if not file.exists():
        names = read_clinical(site, outcome=False)["patient"].dropna().astype(str)
        write_text(file, str(public_count(names.nunique())))
    return int(file.read_text())


def _holdings(site: SiteFolder, work: Path, study: Study) -> wire.Config:
    """What the site holds for a study, remembered until one of its files changes: no table is read twice for it."""
    multimodal = study.multimodal
    files = fingerprint(site, multimodal)
    asked = [*study.modalities, "scgpt" if study.embeds else ""]
    file = work / f"greeting-{files}-{'-'.join(filter(None, asked))}.json"
    if not file.exists():
        write_text(file, json.dumps(_read(site, study, multimodal)))
    return dict(json.loads(file.read_text()))


def _read(site: SiteFolder, study: Study, multimodal: bool) -> wire.Config:
    clinical = read_clinical(site, outcome=False)
    patients = pd.Index(clinical["patient"].dropna().astype(str))
    if not multimodal:
        genes = [str(g) for g in read_expression(site, patients).columns]
        return {"genes": genes, "unit_family": FAMILY[site.description.expression_unit]}
    told: wire.Config = {"genes": [], "unit_family": ""}
    if RNA in study.modalities and site.find(EXPRESSION) is not None:
        told["genes"] = [str(g) for g in read_expression(site, patients).columns]
        told["unit_family"] = FAMILY[site.description.expression_unit]
        if study.embeds:
            from oncofed.client.embeddings import identify  # needs torch, which other greetings do without

            told["embedding"], told["embedding_width"] = identify(scgpt_folder(site))
    if PATHOLOGY in study.modalities:
        images = images_of(site, patients)
        if images is not None:
            told["images"] = images.text
    if ALTERATIONS in study.modalities:
        told["alterations"] = "\n".join(alteration_names(site, patients))
    if not any(told.get(key) for key in ("genes", "images", "alterations")):
        raise Refusal(
            f"site {site.name}: it holds nothing of what the study looks at ({', '.join(study.modalities)}); it takes no part"
        )
    return told
