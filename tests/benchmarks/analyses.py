"""Seconds, questions and bytes of each classical analysis over 20 sites and 100,000 patients, beside lifelines on the pooled table.

    OMP_NUM_THREADS=1 python tests/benchmarks/analyses.py

Simulated patients: 10 covariates, times in days over ten years. Seconds are of the processor, without the report's pictures.
Measured results stand in docs/results/benchmarks.md.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from lifelines import CoxPHFitter
from oncofed.client import analysis_session as site_side
from oncofed.client.data.site import SiteDescription, write_description
from oncofed.common.plan import Plan
from oncofed.deploy.analyse import analyse
from oncofed.server import classical
from rich.console import Console
from rich.table import Table

SITES, PATIENTS, COVARIATES, DAYS = 20, 100_000, 10, 3652
NAMES = tuple(f"x{i}" for i in range(COVARIATES))
COX: dict[str, Any] = {"kind": "cox", "covariates": NAMES}
EXACT: dict[str, Any] = {"times": "exact"}
ANALYSES: dict[str, dict[str, Any]] = {
    "Cox, grid of 3 months": COX,
    "Cox, grid, robust errors": COX | {"robust": True},
    "Cox, grid, 20 strata": COX | {"strata": ("site",)},
    "Cox, grid, C-index of 20,000 others": COX | {"test": ("split=test",)},
    "Cox, exact times": COX | EXACT,
    "Cox, exact times, Breslow": COX | EXACT | {"ties": "breslow"},
    "Cox, exact times, robust errors": COX | EXACT | {"robust": True},
    "Cox, exact times, 20 strata": COX | EXACT | {"strata": ("site",)},
    "Kaplan-Meier of 3 groups, grid": {"kind": "km", "group": "arm"},
    "Kaplan-Meier of 3 groups, exact times": {"kind": "km", "group": "arm"} | EXACT,
    "log-rank of 3 groups, 20 strata, grid": {"kind": "logrank", "group": "arm", "strata": ("site",)},
    "log-rank of 3 groups, 20 strata, exact": {"kind": "logrank", "group": "arm", "strata": ("site",)} | EXACT,
}

console = Console(width=140)


def simulate(patients: int, seed: int = 0) -> pd.DataFrame:
    """Proportional hazards, a third of ten years' follow-up censored at random, days rounded up."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(patients, COVARIATES))
    x[:, 5:] = x[:, 5:] > 0.5
    hazard = np.exp(x @ np.linspace(-0.4, 0.4, COVARIATES)) / 2500
    died, left = rng.exponential(1 / hazard), rng.uniform(0, 1.5 * DAYS, patients).clip(max=DAYS)
    table = pd.DataFrame(x, columns=list(NAMES))
    table["time"], table["event"] = np.ceil(np.minimum(died, left)).clip(1), (died <= left).astype(int)
    table["arm"] = rng.choice(["a", "b", "c"], patients)
    table["split"] = np.where(rng.random(patients) < 0.2, "test", "train")
    table["patient"], table["cancer_type"] = [f"P{i}" for i in range(patients)], "BRCA"
    return table.assign(owner=rng.integers(0, SITES, patients))


def write(table: pd.DataFrame, root: Path) -> None:
    for owner, rows in table.groupby("owner"):
        folder = root / f"site-{owner:02d}"
        write_description(folder, SiteDescription(name=f"Site {owner}", expression_unit="log2", time_unit="days"))
        rows.drop(columns="owner").to_csv(folder / "clinical.csv", index=False)


def main() -> None:
    patients = int(sys.argv[1]) if len(sys.argv) > 1 else PATIENTS
    shown = Table("analysis", "s", "of which reading", "questions", "MB to sites", "MB from sites", box=None)
    table = simulate(patients)
    spent = 0.0
    read = site_side.Outcomes.read

    def timed(*args: Any, **keys: Any) -> Any:
        nonlocal spent
        begin = time.process_time()
        found = read(*args, **keys)
        spent += time.process_time() - begin
        return found

    site_side.Outcomes.read = timed  # type: ignore[method-assign]
    classical.render_analysis = lambda result: ""
    with tempfile.TemporaryDirectory() as folder:
        write(table, Path(folder) / "sites")
        for name, keys in ANALYSES.items():
            spent = 0.0
            begin = time.process_time()
            result = analyse(Plan(**keys, out=f"{folder}/out"), Path(folder) / "sites")
            whole, sent, got = time.process_time() - begin, result["bytes_to_sites"], result["bytes_from_sites"]
            share = f"{100 * spent / whole:.0f} %"
            shown.add_row(
                name, f"{whole:.1f}", share, str(result["questions"]), f"{sent / 1e6:.1f}", f"{got / 1e6:.1f}"
            )
            console.print(name, f"{whole:.1f}")
            if keys == ANALYSES["Cox, exact times"]:
                federated = np.array(result["cox"]["coef"])
    console.print(shown)
    frame = table[[*NAMES, "time", "event"]]
    begin = time.process_time()
    pooled = CoxPHFitter().fit(frame, "time", "event", fit_options={"precision": 1e-14})
    seconds = time.process_time() - begin
    gap = np.abs(federated / pooled.params_.to_numpy() - 1).max()
    days = table.loc[table["event"] == 1, "time"].nunique()
    console.print(
        f"lifelines, pooled: {seconds:.1f} s; coefficients differ by {gap:.0e}; {days} event times, {table['event'].sum()} events"
    )


if __name__ == "__main__":
    main()
