"""What a site holds beside expression: images (a table of vectors, or slide features) and genomic alterations."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from oncofed.client.data.read import check_rows, read_alterations, read_pathology
from oncofed.client.data.site import SiteFolder
from oncofed.client.data.slide_files import read_header
from oncofed.client.data.slides import SlideIndex, column_order, find_slides, images_of, slide_vectors
from oncofed.client.data.units import signed_log
from oncofed.common.errors import Refusal

SEPARATOR = "\n"
"""Between the files of a patient's slides in a cohort."""


@dataclass(frozen=True)
class BesideTables:
    """Tables by patient: image vectors, alterations, and for bags the files of each patient's slides."""

    images: pd.DataFrame
    alterations: pd.DataFrame
    slides: pd.Series

    @property
    def patients(self) -> pd.Index:
        """Everybody who is in one of them."""
        return self.images.index.union(self.alterations.index).union(self.slides.index)


def read_beside(
    site: SiteFolder,
    everybody: pd.Index,
    patients: pd.Index,
    *,
    sees_images: bool,
    images: str,
    image_width: int,
    alterations: tuple[str, ...],
) -> BesideTables:
    """All that the site has of `patients`, laid out as the study has agreed: `image_width` columns, and `alterations` by name.

    Raises `Refusal` where the site's images are not those that `images` describes.

    `everybody` is in the clinical table. Where the study sees no images they are not checked, and without alterations it
    sees none of these; but the tables still tell whose there are.
    """
    own = images_of(site, everybody) if sees_images else None
    if own is not None and images and own.text != images:
        raise Refusal(
            f"site {site.name}: its images are now {own.text!r}, the study agreed on {images!r}; restore them, or begin the study "
            "anew"
        )
    found, slides = pd.DataFrame(columns=range(image_width)), pd.Series(dtype=str)
    table = read_pathology(site)
    if table is not None:
        check_rows(site, table, everybody, "pathology")
        found = in_order(table).iloc[:, :image_width]
    elif own is not None and own.kind == "vector":
        found = slide_vectors(find_slides(site, everybody)).iloc[:, :image_width]
    elif files := _files_with_tiles(find_slides(site, patients)):
        slides = pd.Series(files, dtype=str)
    changes = read_alterations(site)
    if changes is not None:
        check_rows(site, changes, everybody, "alterations")
    changes = pd.DataFrame(columns=list(alterations)) if changes is None else changes.reindex(columns=list(alterations))
    found, changes = (_of(site, t, patients, what) for t, what in ((found, "pathology"), (changes, "alterations")))
    # named features count cells and measure areas, up to millions; an encoder's numbers have a scale already
    named = own is not None and bool(own.features)
    return BesideTables(signed_log(found) if named else found, changes, slides)


def _files_with_tiles(index: SlideIndex) -> dict[str, str]:
    """The files of each patient's slides; a patient of empty ones alone has no images."""
    whole = {p: [str(f.absolute()) for f in files if read_header(f).tiles] for p, files in index.by_patient.items()}
    return {patient: SEPARATOR.join(files) for patient, files in whole.items() if files}


def in_order(table: pd.DataFrame) -> pd.DataFrame:
    """A table's numbers in the order that all sites share."""
    return table[column_order(table.columns)[0]]


def alteration_names(site: SiteFolder, patients: pd.Index) -> list[str]:
    """The alterations that a site knows of its `patients`."""
    table = read_alterations(site)
    if table is None:
        return []
    check_rows(site, table, patients, "alterations")
    return [str(c) for c in table.columns]


def _of(site: SiteFolder, table: pd.DataFrame, patients: pd.Index, what: str) -> pd.DataFrame:
    """Rows of `patients` as numbers; a patient who stands twice, or text in a cell, is refused."""
    if table.index.duplicated().any():
        raise Refusal(f"site {site.name}: duplicate patients in the {what} table; run `oncofed site check`")
    rows = table.loc[table.index.isin(patients)]
    try:
        values = rows.to_numpy(dtype=np.float64, na_value=np.nan)
    except (ValueError, TypeError):
        raise Refusal(
            f"site {site.name}: the {what} table holds cells that are not numbers; run `oncofed site check`"
        ) from None
    values = np.where(np.isfinite(values), values, np.nan)
    return pd.DataFrame(values, index=rows.index.astype(str), columns=rows.columns)
