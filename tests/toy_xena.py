"""Files as UCSC Xena's GDC hub writes them, of both releases, and the GDC's table of tissue source site codes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

GENES = [f"ENSG{i:011d}" for i in range(40)]
CODES = {"BRCA": ["A8", "NA"], "COAD": ["AA", "02"]}
TABLE = """TSS Code	Source Site	Study Name	BCR
A8	North Clinic	Breast invasive carcinoma	X
NA	St. Ann's Hospital (East)	Breast invasive carcinoma	X
AA	 North  clinic	Colon adenocarcinoma	X
02	St Anns Hospital - East	Colon adenocarcinoma	X
ZY	University of the "South	Colon adenocarcinoma	X
"""
"""Of each cancer a code of two institutions, spelled in two ways; NA is a code."""
NORTH, EAST = "North Clinic", "St. Ann's Hospital (East)"
EACH = 20
"""Patients of each cancer at each institution."""


def patients_of(cancer: str) -> list[str]:
    return [f"TCGA-{code}-{i:04d}" for code in CODES[cancer] for i in range(EACH)]


def true_counts(cancer: str) -> pd.DataFrame:
    """Counts `[genes, patients]`, some of them large; the cancers differ in half of the genes."""
    rng = np.random.default_rng(len(cancer) + ord(cancer[0]))
    mean = np.where(np.arange(40) % 2 == (cancer == "BRCA"), 300, 20)[:, None]
    x = rng.poisson(mean, (40, 2 * EACH))
    x[0] = rng.integers(0, 5_000_000, 2 * EACH)
    return pd.DataFrame(x, index=GENES, columns=patients_of(cancer))


def write_matrix(file: Path, linear: pd.DataFrame) -> None:
    np.log2(linear + 1.0).rename_axis("Ensembl_ID").to_csv(file, sep="\t")


def write_project(folder: Path, cancer: str, release: int, unit: str = "counts") -> None:
    """One project as the hub's loader wrote it in 2019 or in 2024."""
    folder.mkdir(exist_ok=True)
    counts = true_counts(cancer)
    people = patients_of(cancer)
    samples = counts.set_axis([f"{p}-01A" for p in people], axis=1)
    # what stays behind: a second vial that stands before the first, a metastasis, normal tissue
    extra = {f"{people[0]}-01B": 1, f"{people[1]}-06A": 2, f"{people[2]}-11A": 3, f"{people[3]}-11B": 4}
    x = pd.concat([pd.DataFrame(extra, index=GENES), samples], axis=1)
    x = x.set_axis([f"{g}.{i % 17}" for i, g in enumerate(GENES)])
    if release == 2019:
        x.loc["ENSGR0000000003.5"] = 0
        x.loc["__no_feature"] = 10**7
        x.loc["__alignment_not_unique"] = 10**6
    else:
        x.loc[f"{GENES[3]}.3_PAR_Y"] = 7
    name = f"TCGA-{cancer}"
    write_matrix(folder / f"{name}.{'htseq' if release == 2019 else 'star'}_{unit}.tsv.gz", x)
    rows = pd.DataFrame({"sample": x.columns, "_PATIENT": x.columns.str[:12]})
    number = np.array([people.index(p) for p in rows["_PATIENT"]])
    survival = rows.assign(OS=number % 2, **{"OS.time": 100 + number})
    age = 40.0 + number % 30
    sex = np.where(number % 3 == 0, "male", "female")
    if release == 2019:
        survival = survival[["sample", "OS", "_PATIENT", "OS.time"]]
        survival.to_csv(folder / f"{name}.survival.tsv", sep="\t", index=False)
        clinical = pd.DataFrame(
            {
                "submitter_id.samples": rows["sample"],
                "age_at_initial_pathologic_diagnosis": age,
                "gender.demographic": sex,
            }
        )
        clinical.to_csv(folder / f"{name}.GDC_phenotype.tsv.gz", sep="\t", index=False)
    else:
        survival = survival[["sample", "OS.time", "OS", "_PATIENT"]]
        survival.to_csv(folder / f"{name}.survival.tsv.gz", sep="\t", index=False)
        clinical = pd.DataFrame(
            {
                "sample": rows["sample"],
                "gender.demographic": sex,
                "age_at_earliest_diagnosis_in_years.diagnoses.xena_derived": age,
                "treatment_type.treatments": "['Radiation Therapy, NOS', '']",
            }
        )
        clinical.to_csv(folder / f"{name}.clinical.tsv.gz", sep="\t", index=False)


def write_hub(folder: Path, release: int = 2024, unit: str = "counts") -> Path:
    for cancer in CODES:
        write_project(folder, cancer, release, unit)
    (folder / "tissueSourceSite.tsv").write_text(TABLE)
    return folder
