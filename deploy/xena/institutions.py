"""Which institution gave a TCGA patient: the tissue source site in the barcode, and the public table of its codes."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

import pandas as pd


@cache
def institutions() -> dict[str, str]:
    """Institution by tissue source site code, two characters; every code stands for one institution and one cancer.

    `tissue_source_sites.tsv` holds the GDC's public code table (829 codes; code and source_site as they stand there). The
    GDC writes one institution in several ways (MSKCC, Memorial Sloan Kettering Cancer Center); the column institution has
    one name for each, and the networks ABS and Washington University with their branches are one institution each.
    """
    text = files("oncofed.deploy.xena").joinpath("tissue_source_sites.tsv")
    with text.open(encoding="utf-8") as file:
        # NA is a code (a uterine carcinosarcoma site), not a missing value
        table = pd.read_csv(file, sep="\t", dtype=str, keep_default_na=False, quoting=3)
    return dict(zip(table["code"], table["institution"], strict=True))
