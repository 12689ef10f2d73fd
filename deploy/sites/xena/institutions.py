"""Which institution gave a TCGA patient: the tissue source site code in the barcode, and a table of names that the user brings.

The table is the GDC's `tissueSourceSite.tsv`: tab-separated text with the columns TSS Code, Source Site, Study Name and BCR,
where every code stands for one institution and one cancer. Where there is none, the hub's clinical tables name the site
too, in `name.tissue_source_site` (both releases, seen in public code that reads them). NA is a code and no missing value.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from oncofed.deploy.sites.xena.clinical import SITE_NAME, read_site_names
from oncofed.deploy.sites.xena.files import XenaProject

CODE_TABLES = (
    "tissueSourceSite.tsv",
    "tissue_source_sites.tsv",
    "tissue_source_site_codes.tsv",
    "tissue_source_site_codes.csv",
)
"""Names by which a code table is found beside the hub's files."""
COLUMNS = ("TSS Code", "Source Site")
ORIGIN = "the GDC's tissueSourceSite.tsv (gdc.cancer.gov, TCGA Code Tables)"


@dataclass(frozen=True)
class SiteNames:
    """Institution by tissue source site code, and where the names stand: the table's name or the clinical files."""

    of_code: dict[str, str]
    source: str


def find_site_names(folder: Path, codes: Path | None, projects: Iterable[XenaProject]) -> SiteNames | None:
    """From the table `codes`, else a table in `folder`, else the projects' clinical files; None where none names a site.

    Raises `ValueError` where two tables are in `folder`, one is no code table, or a code has two institutions.
    """
    if codes is None:
        found = [folder / name for name in CODE_TABLES if (folder / name).is_file()]
        if len(found) > 1:
            raise ValueError(
                f"{folder} holds several code tables: {', '.join(f.name for f in found)}; name one with --codes"
            )
        codes = found[0] if found else None
    if codes is not None:
        return SiteNames(read_codes(codes), codes.name)
    pairs = [pair for p in projects if p.clinical is not None for pair in read_site_names(p.clinical)]
    source = f"{SITE_NAME} of the clinical files"
    return SiteNames(_one_institution_a_code(pairs, source), source) if pairs else None


def read_codes(file: Path) -> dict[str, str]:
    """Institution by code, from a table separated by tabs (`.csv`: by commas) whose columns match whatever their case and punctuation.

    Raises `ValueError` where the file cannot be read, lacks a column of `COLUMNS` or has it twice, or names no site.
    """
    comma = ".csv" in file.suffixes
    remedy = f"wanted is {ORIGIN}, with columns {' and '.join(COLUMNS)}, separated by tabs, or by commas in a .csv"
    try:
        table = pd.read_csv(
            file,
            sep="," if comma else "\t",
            dtype=str,
            keep_default_na=False,
            index_col=False,  # a tab at the end of each line would shift the columns
            quoting=0 if comma else 3,  # a lone quotation mark in a name must not swallow lines
            encoding="utf-8-sig",
        ).fillna("")
    except (ValueError, OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{file.name} cannot be read as a code table ({type(error).__name__}); {remedy}") from None
    keys = [_key(str(c)) for c in table.columns]
    if any(keys.count(_key(c)) != 1 for c in COLUMNS):
        raise ValueError(
            f"{file.name} is no code table: its columns are {[str(c)[:40] for c in table.columns[:8]]}; {remedy}"
        )
    code, site = (table.iloc[:, keys.index(_key(c))].str.strip('" ') for c in COLUMNS)
    # a spreadsheet makes 2 of the code 02
    names = _one_institution_a_code(zip(code.str.zfill(2), site, strict=True), file.name)
    if not names:
        raise ValueError(f"{file.name} names no site in its {len(table)} rows; {remedy}")
    return names


def _one_institution_a_code(pairs: Iterable[tuple[str, str]], source: str) -> dict[str, str]:
    """Names by code: spellings of equal letters and digits, whatever their case, are one institution, named by the first.

    A code without a name is left out. Raises `ValueError` where a code has two institutions.
    """
    spelling: dict[str, str] = {}
    names: dict[str, str] = {}
    for code, site in pairs:
        if not _key(site):
            continue
        name = spelling.setdefault(_key(site), " ".join(site.split()))
        if names.setdefault(code, name) != name:
            raise ValueError(
                f"{source}: code {code!r} is of {names[code]!r} and of {name!r}; a code stands for one institution: correct it in a "
                "code table and give that with --codes"
            )
    return names


def _key(text: str) -> str:
    """Letters and digits alone, without case."""
    return re.sub(r"[\W_]", "", text.casefold())
