"""How a model of RNA and pathology fares without pathology: taken from test patients, and from hospitals in training.

Late fusion of two models of one modality stands beside it. Nothing is trained for the test: saved models score held-out
patients who have both modalities, a growing share of whom loses pathology; the same patients for both methods.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from oncofed.common.modalities import PATHOLOGY, RNA
from oncofed.common.progress import progress_bar
from oncofed.common.splits import seed_from
from oncofed.common.study import Study
from oncofed.deploy.comparison.compare import difference
from oncofed.deploy.comparison.reference import Pool
from oncofed.deploy.comparison.rescore import predict_again
from oncofed.deploy.comparison.sites_without import check_same_folds, choose_hospitals, copy_without, with_pathology
from oncofed.deploy.comparison.survival import summarise
from oncofed.deploy.comparison.variants import LATE, Federations, check_variant, late_fusion, renamed

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
FUSION = "fusion"
PATIENT = ["site", "patient"]
TRAINED = ("", RNA, PATHOLOGY)
"""The federations whose models are scored: the study's own, and those of one modality."""

Advance = Callable[[], None]


@dataclass(frozen=True)
class HeldOut:
    """Held-out patients with RNA and pathology, a row a patient: risks of the fusion model with and without pathology.

    `rna` and `pathology` are tables for late fusion: these patients, and the training patients of the models.
    """

    whole: pd.DataFrame
    bare: pd.DataFrame
    rna: pd.DataFrame
    pathology: pd.DataFrame

    def fusion(self, removed: np.ndarray) -> pd.DataFrame:
        """Predictions of the fusion model where pathology is `removed` from some rows of `whole`."""
        return self.whole.assign(risk=np.where(removed, self.bare["risk"], self.whole["risk"]))

    def late(self, removed: np.ndarray) -> pd.DataFrame:
        """Predictions of late fusion for the same patients: without pathology, the standardised risk of RNA alone."""
        gone = pd.MultiIndex.from_frame(self.whole.loc[removed, PATIENT])
        gone_rows = pd.MultiIndex.from_frame(self.pathology[PATIENT]).isin(gone) & (self.pathology["split"] == "test")
        fused = late_fusion(self.rna, self.pathology[~gone_rows])
        return fused[fused["split"] == "test"]


def robustness(
    study: Study, sites: Path, shares: tuple[float, ...] = SHARES, train_hospitals: float = 0.5
) -> dict[str, Any]:
    """Run the federations, then again without pathology at a share of the hospitals, and score them; no patient rows.

    Raises `ValueError` before any work where the study has not both modalities or a share is none.
    """
    check_variant(study, LATE, "robustness, which compares with")
    shares = tuple(sorted(set(shares)))
    if not shares or not all(0 <= share <= 1 for share in shares):
        raise ValueError(f"--shares {','.join(map(str, shares))}: name shares from 0 to 1, such as 0,0.5,1")
    hospitals = choose_hospitals(sites, train_hospitals, study) if train_hospitals else []
    study = study.changed(splits__refit=False)
    out = Path(study.runtime.out)
    whole = Federations(study, sites)
    parts = [curve(whole, sites, [], shares)]
    if hospitals:
        folder = out / "sites-without"
        copy_without(sites, folder, hospitals)
        check_same_folds(whole.pool(), whole.pool(sites=folder))
        bare = Federations(renamed(study, "without", runtime__out=str(out / "without")), folder)
        parts.append(curve(bare, sites, hospitals, shares))
    return {
        "study": study.model_dump(mode="json"),
        "hospitals": len(with_pathology(sites)),
        "shares": list(shares),
        "trained": parts,
    }


def curve(federations: Federations, sites: Path, hospitals: list[str], shares: tuple[float, ...]) -> dict[str, Any]:
    """Scores of both methods at each share of patients without pathology, with intervals and the paired difference."""
    pools, seed = {name: federations.pool(name, sites) for name in TRAINED}, federations.study.seed
    with progress_bar() as progress:
        bar = progress.add_task("scoring", total=4 * len(federations.folds) + len(shares))
        patients = held_out(federations, pools, lambda: progress.advance(bar))
        points = []
        for share in shares:
            removed = choose_patients(patients.whole, share, seed)
            fusion, late = patients.fusion(removed), patients.late(removed)
            gap = difference(fusion, late, seed)
            methods = {FUSION: summarise(fusion, seed), LATE: summarise(late, seed)}
            points.append({"share": share, "removed": int(removed.sum()), "methods": methods, "difference": gap})
            progress.advance(bar)
    return {"hospitals_without": hospitals, "patients": len(patients.whole), "points": points}


def held_out(federations: Federations, pools: dict[str, Pool], advance: Advance) -> HeldOut:
    """Score the held-out patients of all folds who have both modalities."""

    def score(name: str, *lost: str) -> pd.DataFrame:
        parts = []
        for fold in federations.folds:
            model, device = federations.model(name, fold), federations.study.runtime.device
            parts.append(predict_again(model, pools[name], lost=lost, device=device))
            advance()
        table = pd.concat(parts, ignore_index=True)
        return table[pd.MultiIndex.from_frame(table[PATIENT]).isin(both)].reset_index(drop=True)

    def with_training(name: str) -> pd.DataFrame:
        table = federations.with_training(name)
        return pd.concat([table[table["split"] != "test"], score(name)], ignore_index=True)

    both = with_both(pools[""])
    return HeldOut(score(""), score("", PATHOLOGY), with_training(RNA), with_training(PATHOLOGY))


def with_both(pool: Pool) -> pd.MultiIndex:
    """Site and name of the patients who have RNA and pathology."""
    cohort = pool.all
    rows = cohort.has(RNA) & cohort.has(PATHOLOGY)
    return pd.MultiIndex.from_arrays([pool.site[rows], cohort.patient[rows]])


def choose_patients(table: pd.DataFrame, share: float, seed: int) -> np.ndarray:
    """Booleans `[rows]`: a share of the patients of each fold and cancer type, drawn from the seed and their names.

    Who is chosen at a share is chosen at every larger one.
    """
    order = [seed_from(seed, "removed", *row) for row in table[PATIENT].itertuples(index=False)]
    by = pd.Series(order, index=table.index, dtype="int64").groupby([table["fold"], table["cancer_type"]])
    return (by.rank(method="first") <= np.floor(share * by.transform("size") + 0.5)).to_numpy()
