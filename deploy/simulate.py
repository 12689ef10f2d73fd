"""Run a study over a folder of sites on this machine."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from oncofed.client.app import app as client_app
from oncofed.client.data.site import SiteFolder, list_sites
from oncofed.common.study import Study
from oncofed.deploy.engine import run_in_process, run_on_ray
from oncofed.deploy.loopback import run_on_superlink
from oncofed.deploy.started import Engine, Started
from oncofed.server.app import app as server_app

NAMES = ("patient", "cancer_type", "predicted")
"""Columns of predictions that are text, whatever they look like: a grade 2, a class NA."""


@dataclass(frozen=True)
class SimulatedRun:
    """What a run left: the server's results and, because all sites are ours here, the sites' own predictions."""

    results: dict[str, Any]
    predictions: pd.DataFrame


def simulate(study: Study, sites: Path, engine: Engine = "local") -> SimulatedRun:
    """Run every fold of `study` over the site folders below `sites`; results go below `study.runtime.out`."""
    folders = list_sites(sites)
    check_names(folders)
    for folder in folders:  # predictions of an earlier study of this name must not be taken for this one's
        shutil.rmtree(folder / ".oncofed" / "predictions" / study.name, ignore_errors=True)
    out = Path(study.runtime.out).resolve()
    note(out, sites, engine)
    run_on(engine, study.run_config() | {"runtime.out": str(out)}, sites, folders, out / "processes")
    results = json.loads((Path(study.runtime.out) / "results.json").read_text())
    return SimulatedRun(results, read_predictions(folders, study.name))


def note(out: Path, sites: Path, engine: Engine, methods: tuple[str, ...] | None = None) -> None:
    """Keep in the run's folder how it was started; without `methods`, what it is compared with stays as it was noted."""
    started = Started(str(sites.resolve()), engine, methods or (), str(Path.cwd()))
    before = Started.read(out) if methods is None else None
    if before is None or (before.sites, before.engine) != (started.sites, started.engine):
        started.write(out)


def run_on(
    engine: Engine, config: dict[str, bool | int | float | str], sites: Path, folders: list[Path], processes: Path
) -> None:
    """Run a config over the site `folders` below `sites` on an engine; real processes keep logs and state below `processes`."""
    if engine == "superlink":  # whose nodes name their own folders
        run_on_superlink(config, folders, processes)
        return
    config = config | {"sites": str(sites.resolve())}
    if engine == "ray":
        run_on_ray("oncofed.server.app:app", "oncofed.client.app:app", len(folders), config)
        return
    nodes: list[dict[str, bool | int | float | str]] = [
        {"partition-id": i, "num-partitions": len(folders)} for i in range(len(folders))
    ]
    run_in_process(server_app, client_app, nodes, config)


def check_names(folders: list[Path]) -> None:
    """Refuse two folders that call themselves by one name."""
    seen: dict[str, Path] = {}
    for folder in folders:
        name = SiteFolder.open(folder).name
        if name in seen:
            raise ValueError(
                f"{seen[name].name} and {folder.name} both call themselves '{name}' in site.toml; give each site its own name"
            )
        seen[name] = folder


def read_predictions(folders: list[Path], study: str) -> pd.DataFrame:
    """Predictions of all sites and folds: site, fold, patient, cancer_type, time_months, event, split, risk."""
    parts = []
    for folder in folders:
        name = SiteFolder.open(folder).name
        for file in sorted((folder / ".oncofed" / "predictions" / study).glob("fold-*.csv")):
            fold = int(file.stem.removeprefix("fold-"))
            if fold >= 0:
                parts.append(pd.read_csv(file, converters=dict.fromkeys(NAMES, str)).assign(site=name, fold=fold))
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()
