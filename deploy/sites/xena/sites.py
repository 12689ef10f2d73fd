"""Write one site folder per institution, or per tissue source site code, from the files of UCSC Xena's GDC hub."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from oncofed.client.data.site import SiteDescription, Unit, folder_name
from oncofed.common.progress import progress_bar
from oncofed.deploy.sites.make_sites import Rest, begin_site, group_by_size, new_sites, refuse_target
from oncofed.deploy.sites.xena.clinical import CODE_IN_BARCODE, read_covariates, read_outcome
from oncofed.deploy.sites.xena.expression import ChosenSamples, choose_samples, read_project
from oncofed.deploy.sites.xena.files import XenaProject, find_projects
from oncofed.deploy.sites.xena.institutions import ORIGIN, SiteNames, find_site_names

By = Literal["institution", "code"]
CODE = "tissue_source_site"


@dataclass(frozen=True)
class XenaSites:
    """What was written: the site folders, the kind of file and unit of its expression, and what the user should know."""

    folders: list[Path]
    kind: str
    unit: Unit
    patients: int
    cancers: int
    left_out: Counter[str]
    notes: list[str]


def write_xena_sites(
    source: Path,
    out: Path,
    *,
    expression: str | None = None,
    codes: Path | None = None,
    by: By | None = None,
    min_patients: int = 40,
    rest: Rest = "merge",
) -> XenaSites:
    """Read the projects in `source`, and write their primary tumours, one a patient, as site folders below `out`.

    Counts are delivered as whole numbers, everything else as the log2(x + 1) that it is (undoing it and taking it again
    would only lose digits). Memory: one project, then one site, at a time. Raises `ValueError` before `out` is touched.

    Sites are institutions where `codes`, a code table in `source` or the clinical files name them, else codes, unless `by`
    says which. In a clinical table `tissue_source_site` is the code as it is: a plain `read_csv` takes NA for a missing value
    and 02 for a number, so read it as text; patient, institution and the site's name stand any reading.
    """
    refuse_target(out)
    projects, others = find_projects(source, expression)
    samples = {p.name: choose_samples(p) for p in projects}
    names = find_site_names(source, codes, projects)
    if by == "institution" and names is None:
        raise ValueError(
            f"{source}: --by institution, but nothing names the institutions; put {ORIGIN} there or give it with --codes, or "
            "take --by code"
        )
    clinical = pd.concat([_clinical(p, samples[p.name], names) for p in projects], ignore_index=True)
    if names is not None and not clinical[CODE].isin(names.of_code.keys()).any():
        raise ValueError(
            f"{names.source} has none of the tissue source site codes in {source} ({', '.join(sorted(set(clinical[CODE]))[:4])}); "
            f"wanted is {ORIGIN}, whole"
        )
    twice = clinical["patient"].duplicated()
    if twice.any():
        raise ValueError(f"{source}: {int(twice.sum())} patients are in the files of two projects; keep one of them")
    by_name = names is not None and by != "code"
    group = group_by_size(clinical["institution" if by_name else CODE], min_patients, rest)
    unit: Unit = "counts" if projects[0].counts else "log2"
    with new_sites(out) as root:
        genes, averaged = _write_parts(projects, samples, dict(zip(clinical["patient"], group, strict=True)), root)
        _write_sites(clinical, group, unit, genes, root)
    left_out = sum((s.left_out for s in samples.values()), Counter[str]())
    notes = _site_notes(names, by, clinical) + _notes(projects, others, clinical, group, averaged)
    folders = sorted(p for p in out.iterdir() if p.is_dir())
    kept = clinical[group.notna()]
    return XenaSites(folders, projects[0].kind, unit, len(kept), kept["cancer_type"].nunique(), left_out, notes)


def _clinical(project: XenaProject, samples: ChosenSamples, names: SiteNames | None) -> pd.DataFrame:
    """A project's patients as a site's clinical table lists them; columns of files that are absent are absent."""
    patients = pd.Index(samples.patients)
    codes = patients.str[CODE_IN_BARCODE]
    table = pd.DataFrame({"patient": patients, "cancer_type": project.cancer}, index=patients)
    if names is not None:
        # not the bare code: NA would be read back as no institution
        table["institution"] = [names.of_code.get(c, f"code {c}") for c in codes]
    table[CODE] = codes
    if project.clinical is not None:
        table = table.join(read_covariates(project.clinical, patients))
    if project.survival is not None:
        table = table.join(read_outcome(project.survival, patients))
    return table


def _write_parts(
    projects: list[XenaProject], samples: dict[str, ChosenSamples], site_of: dict[str, str | None], root: Path
) -> tuple[pd.Index, int]:
    """Each project's values cut by site, as arrays `[genes, patients]` below `root`; the genes, and how many means were rounded.

    A project is read once and then forgotten; its genes are brought into the order of the first project's.
    """
    genes = pd.Index([])
    averaged = 0
    with progress_bar() as bar:
        task = bar.add_task("reading", total=len(projects))
        for project in projects:
            bar.update(task, description=f"reading {project.name}")
            chosen = samples[project.name]
            read = read_project(project, chosen)
            genes = genes if len(genes) else read.genes
            if set(genes) != set(read.genes):
                raise ValueError(
                    f"{project.expression.name} has {len(read.genes)} genes, {len(genes.difference(read.genes))} fewer and "
                    f"{len(read.genes.difference(genes))} others than {projects[0].expression.name} with {len(genes)}; the files "
                    "are of different releases or one was cut short: download them again"
                )
            values = read.values if genes.equals(read.genes) else read.values[read.genes.get_indexer(genes)]
            averaged += read.averaged
            sites = pd.Series([site_of[p] for p in chosen.patients])
            for site, rows in sites.groupby(sites):
                np.save(_part(root, str(site), project.cancer), values[:, rows.index])
            bar.advance(task)
    return genes, averaged


def _write_sites(clinical: pd.DataFrame, group: pd.Series, unit: Unit, genes: pd.Index, root: Path) -> None:
    """A folder for each site; its parts are put together, in the clinical table's order, and removed."""
    with progress_bar() as bar:
        task = bar.add_task("writing", total=group.nunique())
        for site, rows in clinical.groupby(group, sort=True):
            folder = begin_site(root, SiteDescription(name=str(site), expression_unit=unit, time_unit="days"), rows)
            parts = [_part(root, str(site), cancer) for cancer in rows["cancer_type"].unique()]
            whole = np.concatenate([np.load(part, mmap_mode="r") for part in parts], axis=1)
            # genes in rows: tens of thousands of them as Parquet columns take 30 times as long to read
            table = pd.DataFrame(whole, index=genes.rename("gene"), columns=rows["patient"].to_numpy())
            table.to_parquet(folder / "expression.parquet")
            for part in parts:
                part.unlink()
            bar.advance(task)


def _part(root: Path, site: str, cancer: str) -> Path:
    return root / f"{folder_name(site)}.{cancer}.npy"


def _site_notes(names: SiteNames | None, by: By | None, clinical: pd.DataFrame) -> list[str]:
    """What the user should know about the sites' names."""
    if names is None:
        need = f"each tissue source site code is a site of its own; institutions need {ORIGIN}, in the folder or as --codes"
        return [need] if by is None else []
    unknown = sorted(set(clinical[CODE]) - set(names.of_code))
    if not unknown:
        return []
    return [f"codes {unknown} have no name in {names.source}: institutions of their own, named by their code"]


def _notes(
    projects: list[XenaProject], others: list[str], clinical: pd.DataFrame, group: pd.Series, averaged: int
) -> list[str]:
    notes = []
    if others:
        notes.append(f"{', '.join(others)}: files but no expression; left out")
    if "time" not in clinical.columns:
        notes.append("no survival files: the sites have no outcomes and can take part in classification only")
    elif clinical["time"].isna().any():
        n = int(clinical["time"].isna().sum())
        notes.append(
            f"{n} patients have no follow-up above 0 days: their outcome is empty, they take part in classification"
        )
    without = [p.name for p in projects if p.clinical is None]
    if without:
        notes.append(f"no clinical file of {', '.join(without)}: no age and sex there")
    if averaged:
        notes.append(f"{averaged} samples are means of several aliquots in Xena's files: their counts are rounded")
    if group.isna().any():
        notes.append(f"{int(group.isna().sum())} patients of smaller sites are dropped")
    return notes
