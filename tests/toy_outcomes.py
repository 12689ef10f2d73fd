"""Clinical tables dealt to hospitals, and an analysis over them as a simulation or behind real policies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from lifelines.datasets import load_rossi
from oncofed.client.app import app as client_app
from oncofed.client.data.site import list_sites
from oncofed.common.plan import Plan
from oncofed.deploy.engine import run_in_process
from oncofed.server.app import app as server_app
from oncofed.server.classical import RESULT


def rossi() -> pd.DataFrame:
    """The recidivism data of Rossi et al. (432 men, many ties) as a clinical table, weeks taken as months."""
    table = load_rossi().rename(columns={"week": "time", "arrest": "event"})
    return table.assign(patient=[f"man-{i}" for i in range(len(table))], cancer_type="BRCA")


def deal(table: pd.DataFrame, owner: np.ndarray, root: Path, policy: str = "", unit: str = "months") -> Path:
    """A site folder for each value of `owner`; a `policy` makes them hospitals that mean it."""
    for name in np.unique(owner):
        folder = root / f"site-{name}"
        folder.mkdir(parents=True)
        (folder / "site.toml").write_text(f'name = "Site {name}"\nexpression_unit = "log2"\ntime_unit = "{unit}"\n')
        if policy:
            (folder / "policy.toml").write_text(policy)
        table[owner == name].to_csv(folder / "clinical.csv", index=False)
    return root


def analyse_at_hospitals(plan: Plan, root: Path, work: Path) -> dict[str, Any]:
    """The plan's result with real site folders in the node config: every policy's defaults hold."""
    nodes: list[dict[str, bool | int | float | str]] = [
        {"site-dir": str(f), "work-dir": str(work / f.name)} for f in list_sites(root)
    ]
    run_in_process(server_app, client_app, nodes, {"plan": plan.model_dump_json()})
    return dict(json.loads((Path(plan.out) / RESULT).read_text()))
