"""Check a site's pathology, a table or slide files: whose the slides are, whether they agree, whether they can be read."""

from __future__ import annotations

import contextlib
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
from oncofed.client.data.findings import SiteReport, check_table, file_name
from oncofed.client.data.read import read_pathology
from oncofed.client.data.site import PATHOLOGY, SLIDES_TABLE, SiteFolder
from oncofed.client.data.slide_files import CONVERT, PICKLES, SlideHeader, read_header, read_slide
from oncofed.client.data.slides import (
    NAME_ENCODER,
    SlideIndex,
    column_order,
    files_below,
    find_slides,
    images_of_headers,
    pathology_source,
    slide_faults,
)
from oncofed.common.errors import Refusal

SAMPLE = 20
"""Slides whose numbers are read: all of them can be terabytes."""


def has_images(site: SiteFolder) -> bool:
    """Whether the site has pathology in whatever state: its faults are `check_pathology`'s to report."""
    with contextlib.suppress(Refusal):
        return pathology_source(site) != ""
    return True


def check_pathology(report: SiteReport, site: SiteFolder, patients: pd.Index) -> None:
    """Facts and findings on the site's images; raises `Refusal` where it is unclear which they are."""
    folder = site.path / site.description.slides
    pickles = sum(p.suffix.lower() in PICKLES for p in files_below(folder))
    report.warn(folder.name, "", pickles, "files that may hold pickled objects are never read", CONVERT)
    report.facts["pathology"] = "none"
    source = pathology_source(site)
    if source == "table":
        _check_table(report, site, patients)
    elif source == "slides":
        _check_slides(report, find_slides(site, patients), site, patients)


def _check_table(report: SiteReport, site: SiteFolder, patients: pd.Index) -> None:
    table, file = read_pathology(site), file_name(site, PATHOLOGY)
    assert table is not None  # its source is the table
    report.facts["pathology"] = f"{len(table)} patients x {table.shape[1]} features"
    check_table(report, file, table, patients)
    if column_order(table.columns)[1] and not site.description.slide_encoder:
        report.warn(
            file, "", table.shape[1], "columns that are numbered, not named", f"for studies of images {NAME_ENCODER}"
        )


def _check_slides(report: SiteReport, index: SlideIndex, site: SiteFolder, patients: pd.Index) -> None:
    file, orphans = index.folder.name, len(index.orphans)
    remedy = f"start their names with the patient's, as in PATIENT-1.h5, or add {SLIDES_TABLE} with slide, patient"
    report.warn(file, "", orphans, "slides without a patient of the clinical table", f"they take no part; {remedy}")
    if not index.by_patient:
        report.error(file, "", orphans, "no slide belongs to a patient of the clinical table", remedy)
        return
    lacking = int((~patients.isin(list(index.by_patient))).sum())
    report.warn(file, "", lacking, "clinical patients without slides", "they take part with what else they have")
    headers = _read_headers(report, index)
    found = f"{len(index.paths)} slides of {len(index.by_patient)} patients"
    report.facts["pathology"] = found
    if not headers:
        return
    empty = sum(h.tiles == 0 for h in headers.values())
    report.warn(file, "", empty, "slides without tiles", "they count as no slide; encode them again if there is tissue")
    faults = slide_faults(site, list(headers.values()))
    for fault in faults:
        report.error(file, fault.field, fault.slides, fault.problem, fault.remedy)
    if not faults:
        images = images_of_headers(site, headers.values())
        tiles = (
            f", {np.median([h.tiles for h in headers.values()]):.0f} tiles in the median"
            if images.kind == "bag"
            else ""
        )
        report.facts["pathology"] = f"{found}; {images.text}{tiles}"
    _check_numbers(report, file, [p for p, h in headers.items() if h.tiles])


def _read_headers(report: SiteReport, index: SlideIndex) -> dict[Path, SlideHeader]:
    """Headers of the slides that can be read; the others are counted by what is wrong."""
    headers: dict[Path, SlideHeader] = {}
    refusals: Counter[str] = Counter()
    for path in index.paths:
        try:
            headers[path] = read_header(path)
        except Refusal as refusal:
            refusals[str(refusal)] += 1
    _report_refusals(report, index.folder.name, refusals)
    return headers


def _check_numbers(report: SiteReport, file: str, paths: list[Path]) -> None:
    """Read an evenly spaced sample of slides in full."""
    sample = paths[:: max(1, -(-len(paths) // SAMPLE))]
    refusals: Counter[str] = Counter()
    for path in sample:
        try:
            read_slide(path)
        except Refusal as refusal:
            refusals[str(refusal)] += 1
    _report_refusals(report, file, refusals)
    report.facts["slides read in full"] = f"{len(sample)} of {len(paths)}"


def _report_refusals(report: SiteReport, file: str, refusals: Counter[str]) -> None:
    for text, count in refusals.items():
        report.error(file, "", count, text, "see the message")
