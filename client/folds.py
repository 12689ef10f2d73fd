"""Who of a site's patients trains, is kept aside, or is held out, in a fold of a study."""

from __future__ import annotations

import dataclasses

import numpy as np
from oncofed.client.data.cohort import Cohort
from oncofed.common.splits import NEVER, choose_validation
from oncofed.common.study import Study


def in_site_folds(cohort: Cohort, study: Study, site: str) -> Cohort:
    """The cohort with its folds, or, where whole sites are held out, with the site's number for all its patients."""
    sites = study.splits.held_out_sites
    if not sites:
        return cohort
    fold = sites.index(site) if site in sites else NEVER
    return dataclasses.replace(cohort, fold=np.full(len(cohort), fold))


def split_names(cohort: Cohort, study: Study, fold: int, site: str) -> np.ndarray:
    """`train`, `validation` or `test` for each patient of a site's cohort in a fold."""
    names = np.where(cohort.fold == fold, "test", "train").astype("<U10")
    rows = np.flatnonzero(names == "train")
    c = cohort
    aside = choose_validation(
        c.patient[rows],
        c.cancer[rows],
        c.event[rows],
        share=study.splits.validation,
        seed=study.seed,
        fold=fold,
        site=site,
    )
    names[rows[aside]] = "validation"
    return names
