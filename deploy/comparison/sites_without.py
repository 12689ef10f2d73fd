"""Copies of site folders in which some hospitals have no pathology: links to all files but those."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path

import pandas as pd
from oncofed.client.data.read import read_alterations, read_clinical, read_pathology
from oncofed.client.data.site import (
    ALTERATIONS,
    PATHOLOGY,
    SLIDES,
    SLIDES_TABLE,
    SiteDescription,
    SiteFolder,
    list_sites,
    write_description,
)
from oncofed.client.data.slides import find_slides, pathology_source
from oncofed.common.splits import seed_from
from oncofed.common.study import Study
from oncofed.deploy.comparison.reference import Pool


def choose_hospitals(sites: Path, share: float, study: Study) -> list[str]:
    """Names of a share (rounded down) of the hospitals that have pathology, drawn from the study's seed.

    A smaller share is part of a larger one. Raises where none would be chosen, or too few are left for a study of pathology.
    """
    have = with_pathology(sites)
    count = int(share * len(have) + 1e-9)
    chosen = sorted(have, key=lambda name: seed_from(study.seed, "without pathology", name))[:count]
    left = set(have) - set(chosen)
    one_out = study.splits.every_site or left & set(study.splits.held_out_sites)  # one at a time
    training = len(left) - bool(one_out)
    if not count or training < study.aggregation.min_sites:
        raise ValueError(
            f"--train-hospitals {share:g}: of {len(have)} hospitals with pathology {count} would lose it and {training} train with "
            f"it; at least 1 and {study.aggregation.min_sites} (aggregation.min_sites) must; choose another share, or 0 for none"
        )
    return sorted(chosen)


def with_pathology(sites: Path) -> list[str]:
    """Names of the hospitals that have pathology."""
    folders = (SiteFolder.open(folder) for folder in list_sites(sites))
    return [site.name for site in folders if pathology_source(site)]


def copy_without(sites: Path, target: Path, hospitals: Collection[str]) -> None:
    """Write the copies below `target` anew, which is this function's alone.

    Folds are dealt among all patients who have any modality: patients of the hospitals stay in the deal by a row, empty if
    they have none, in the table of alterations.
    """
    shutil.rmtree(target, ignore_errors=True)
    for folder in list_sites(sites):
        site, copy = SiteFolder.open(folder), target / folder.name
        bare = site.name in hospitals
        write_description(copy, description_of(site, bare))
        left_out = {"site.toml", ".oncofed"} | ({*PATHOLOGY, SLIDES, SLIDES_TABLE, *ALTERATIONS} if bare else set())
        for entry in folder.iterdir():
            if entry.name not in left_out:
                (copy / entry.name).symlink_to(entry.resolve())
        if bare:
            known = read_alterations(site)
            known = pd.DataFrame() if known is None else known
            names = known.index.union(pathology_patients(site)).rename("patient")
            known.reindex(names).to_parquet(copy / "alterations.parquet")


def description_of(site: SiteFolder, bare: bool) -> SiteDescription:
    """The site's description for a folder elsewhere: paths are absolute, and without pathology none is named."""
    d = site.description
    absolute = {k: str((site.path / getattr(d, k)).resolve()) for k in ("slides", "scgpt") if getattr(d, k)}
    if bare or d.slides == SLIDES:
        absolute["slides"] = SLIDES
    return d.model_copy(update=absolute)


def pathology_patients(site: SiteFolder) -> pd.Index:
    """Patients of the site's pathology table or slides."""
    table = read_pathology(site)
    if table is not None:
        return table.index
    clinical = read_clinical(site, outcome=False)
    return pd.Index(find_slides(site, pd.Index(clinical["patient"].dropna().astype(str))).by_patient, dtype=str)


def check_same_folds(whole: Pool, bare: Pool) -> None:
    """Raise `ValueError` where a patient of `bare` is unknown in `whole` or in another fold: she may have trained the model."""
    wrong = {}
    for site, cohort in bare.cohorts.items():
        fold = dict(zip(whole.cohorts[site].patient.tolist(), whole.cohorts[site].fold.tolist(), strict=True))
        odd = sum(fold.get(p) != f for p, f in zip(cohort.patient.tolist(), cohort.fold.tolist(), strict=True))
        if odd:
            wrong[site] = odd
    if wrong:
        listed = ", ".join(f"{site}: {n}" for site, n in wrong.items())
        raise ValueError(
            f"without pathology, patients stand in other folds than with it ({listed}), so held-out patients would have trained; "
            "was a table changed in between? Run again, or leave this part out with --train-hospitals 0"
        )
