"""Site folders from the two files of FLamby's benchmark Fed-TCGA-BRCA: six clients, survival from 39 clinical columns.

The benchmark: Ogier du Terrail et al., NeurIPS 2022, arXiv 2210.04620; the user brings its files.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import tomli_w
from oncofed.client.data.site import SiteDescription
from oncofed.deploy.sites.make_sites import begin_site, new_sites, refuse_target

TABLE, SPLIT = "brca.csv", "train_test_split.csv"
CLIENTS, COVARIATES = 6, 39
OWN = ("patient", "cancer_type", "time", "event", "split")
"""Columns of a site's clinical table that are no covariates."""

PLAN = "plan.toml"
"""Beside the sites: the Cox regression of the benchmark, for `oncofed analyse run`."""


def write_flamby_sites(source: Path, out: Path) -> tuple[list[Path], tuple[str, ...]]:
    """Folders of `Client 0` to `Client 5` below `out`, with `split` (train or test) as published; and the covariates' names.

    Times stay in days. Patients of `brca.csv` who are in no part of the published split are left out, as in the
    benchmark. Raises `ValueError` that names file and field where the files are not those of the benchmark.
    """
    table, split = _table(source / TABLE), _split(source / SPLIT)
    absent = split.index.difference(table.index)
    if len(absent):
        raise ValueError(f"{source}: {len(absent)} patients of {SPLIT} are not in {TABLE}; take both from one release")
    covariates = tuple(c for c in table.columns if c not in ("time", "event"))
    refuse_target(out)
    with new_sites(out) as root:
        for client, part in split.groupby("client"):
            rows = table.loc[part.index].assign(cancer_type="BRCA", split=part["split"]).reset_index()
            # a description wants a unit of expression, though nobody here has any
            site = SiteDescription(name=f"Client {client}", expression_unit="log2", time_unit="days")
            begin_site(root, site, rows[[*OWN, *covariates]])
        plan = {"kind": "cox", "name": "fed-tcga-brca", "covariates": list(covariates), "test": ["split=test"]}
        (root / PLAN).write_text(tomli_w.dumps(plan | {"ridge": 0.03, "ties": "breslow", "times": "exact"}))
    return sorted(p for p in out.iterdir() if p.is_dir()), covariates


def _table(file: Path) -> pd.DataFrame:
    """Time, event and covariates by patient."""
    table = _read(file, "pid", "T", "E").rename(columns={"T": "time", "E": "event"})
    wrong = table["event"][~table["event"].isin([0, 1])]
    if len(wrong):
        raise ValueError(
            f"{file}: E is the event, 0 or 1, and holds {wrong.iloc[0]} ({len(wrong)} such); the benchmark's own guide swaps the names E and T, its files do not"
        )
    covariates = [c for c in table.columns if c not in ("time", "event")]
    text = [c for c in ("time", *covariates) if not pd.api.types.is_numeric_dtype(table[c])]
    if text or len(covariates) != COVARIATES:
        raise ValueError(
            f"{file}: {len(covariates)} columns beside pid, T and E, of them no numbers: {text}; the benchmark has {COVARIATES} of numbers"
        )
    if table.isna().any(axis=None) or (table["time"] < 0).any():
        raise ValueError(f"{file}: empty cells or times T below 0; the benchmark has none")
    return table


def _split(file: Path) -> pd.DataFrame:
    """Split and client by patient."""
    table = _read(file, "pid", "fold", "fold2")
    parts = table["fold2"].astype(str).str.extract(rf"^(train|test)_([0-{CLIENTS - 1}])$")
    wrong = table["fold2"][parts[0].isna() | (parts[0] != table["fold"])]
    if len(wrong):
        raise ValueError(
            f"{file}: fold2 must be fold and client, as train_0, and holds {wrong.iloc[0]!r} ({len(wrong)} such)"
        )
    if parts[1].nunique() != CLIENTS:
        raise ValueError(f"{file}: {parts[1].nunique()} clients in fold2, the benchmark has {CLIENTS}")
    return parts.set_axis(["split", "client"], axis=1)


def _read(file: Path, *columns: str) -> pd.DataFrame:
    """A table by patient."""
    if not file.exists():
        raise ValueError(f"{file} is missing; the benchmark's files are {TABLE} and {SPLIT}")
    table = pd.read_csv(file, dtype={"pid": str})
    missing = [c for c in columns if c not in table.columns]
    if missing:
        raise ValueError(f"{file}: no columns {missing}; the benchmark's file has {list(columns)}")
    twice = int(table["pid"].duplicated().sum())
    if twice or table["pid"].isna().any():
        raise ValueError(
            f"{file}: {twice} patients (pid) stand in it twice, or lack a name; the benchmark has one row each"
        )
    return table.rename(columns={"pid": "patient"}).set_index("patient")
