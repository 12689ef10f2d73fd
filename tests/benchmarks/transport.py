"""What fewer bytes cost on nine TCGA cancers: C-index and bytes of a round in float32, bfloat16 and int8, on the same folds.

    ONCOFED_DATA=... python tests/benchmarks/transport.py --out out [--folds 0,1,2,3,4] [--rounds 10] [--only int8] [--sites folders]

Differences from float32 are paired by patient, with the intervals of `oncofed compare`. What has been run lies in `out` and is
not run again.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
from collections import Counter
from pathlib import Path

import pandas as pd
from oncofed.common.study import Study
from oncofed.deploy.comparison.survival import difference, summarise
from oncofed.deploy.simulate import simulate
from oncofed.deploy.sites.split import split_pooled
from rich.console import Console
from rich.table import Table

LEAST = 40
"""Institutions with fewer patients are put together as one site."""

PLAIN = "float32"
CODINGS: dict[str, dict[str, object]] = {
    PLAIN: {},
    "bfloat16": {"transport__upload": "bfloat16"},
    "int8": {"transport__upload": "int8"},
    "bfloat16/bfloat16": {"transport__upload": "bfloat16", "transport__download": "bfloat16"},
    "int8/int8": {"transport__upload": "int8", "transport__download": "int8"},
    "norm": {"aggregation__robust": "norm"},
    "median": {"aggregation__robust": "median", "aggregation__min_sites": 3},
    "trimmed_mean": {"aggregation__robust": "trimmed_mean", "aggregation__min_sites": 3},
    "krum": {"aggregation__robust": "krum", "aggregation__min_sites": 3},
}
"""Of a change, and after the bar of the weights; robust rules stand beside them: what they cost where nobody is bad."""


def run(name: str, fold: int, rounds: int, sites: Path, out: Path) -> tuple[pd.DataFrame, Counter[str]]:
    """Predictions of a fold, and the bytes of its training; from `out` where it was run before."""
    folder = out / f"{name}-{fold}".replace("/", "-and-")
    table, moved = folder / "predictions.csv", folder / "moved.json"
    if not moved.exists():
        keys = CODINGS[name] | {"splits__only": (fold,), "name": folder.name, "runtime__out": str(folder)}
        keys |= {"training__rounds": rounds} if rounds else {}
        study = Study().changed(**keys, runtime__threads=1, analysis__experts=False, evaluation__tables=False)
        done = simulate(study, sites)
        done.predictions.to_csv(table, index=False)
        only = done.results["folds"][0]
        every = {"all_to_sites": only["bytes_to_sites"], "all_from_sites": only["bytes_from_sites"]}
        moved.write_text(json.dumps(only["training_bytes"] | every | {"seconds": only["seconds"]}))
    return pd.read_csv(table, dtype={"patient": str}), Counter(json.loads(moved.read_text()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--folds", default="0,1,2,3,4")
    parser.add_argument("--rounds", type=int, default=0, help="0: the study's own")
    parser.add_argument("--only", default=",".join(CODINGS), help="comma-separated")
    parser.add_argument("--sites", type=Path, help="site folders that were made before; written to")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    sites = args.sites or args.out / "sites"
    if not sites.exists():
        split_pooled(Path(os.environ["ONCOFED_DATA"]) / "tcga", sites, min_patients=LEAST)
    tables: dict[str, pd.DataFrame] = {}
    bytes_: dict[str, Counter[str]] = {}
    for name in dict.fromkeys([PLAIN, *args.only.split(",")]):
        parts = [run(name, int(fold), args.rounds, sites, args.out) for fold in args.folds.split(",")]
        tables[name] = pd.concat([p for p, _ in parts], ignore_index=True)
        bytes_[name] = sum((b for _, b in parts), Counter())
        print(name, dict(bytes_[name]), flush=True)
    shown = Table("", "C-index", "minus float32", "up", "down", "both", "study", "seconds", title=f"folds {args.folds}")
    whole = bytes_[PLAIN]
    for name, table in tables.items():
        b, own = bytes_[name], summarise(table, 0)["c_index"]
        gap = difference(table, tables[PLAIN], 0)
        shares = (
            b["from_sites"] / b["plain_from_sites"],
            b["to_sites"] / b["plain_to_sites"],
            (b["from_sites"] + b["to_sites"]) / (b["plain_from_sites"] + b["plain_to_sites"]),
            (b["all_from_sites"] + b["all_to_sites"]) / (whole["all_from_sites"] + whole["all_to_sites"]),
        )
        shown.add_row(
            name,
            f"{own['value']:.4f} ({own['low']:.3f} to {own['high']:.3f})",
            f"{gap['value']:+.4f} ({gap['low']:+.4f} to {gap['high']:+.4f})",
            *(f"{100 * s:.1f} %" for s in shares),
            f"{b['seconds']:.0f}",
        )
    Console(width=150).print(shown)


if __name__ == "__main__":
    main()
