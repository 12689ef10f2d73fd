"""What differential privacy costs on nine TCGA cancers: C-index at epsilon 1, 3, 8 and without, recommended recipe and naive one.

Institutions of 40 patients and more are the private federation (28 hospitals); the patients of the smaller ones are one public
cohort, from which the recommended recipe takes its encoder, first heads and baselines. Every fold is a study of its own
with the whole budget, as a hospital would run it; settings come from public patients alone (deploy/public_start.py).

    ONCOFED_DATA=... python tests/benchmarks/privacy_utility.py --out out [--seeds 3] [--naive-seeds 1]
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from oncofed.common.metrics import mean_within_cancer, pair_counts
from oncofed.common.saved import SavedModel
from oncofed.common.study import Study
from oncofed.deploy.public_start import fit_start
from oncofed.deploy.simulate import simulate
from oncofed.deploy.sites.split import split_pooled
from rich.console import Console
from rich.table import Table

LEAST = 40
EPSILONS = (1.0, 3.0, 8.0)
FOLDS = range(5)
PLAIN = {"privacy__unit": "none", "aggregation__rule": "fedavg", "training__batch_size": 0, "training__clip_norm": 0.0}


def sites_of(data: Path, out: Path) -> tuple[Path, Path]:
    """Folders of the public site and of the private hospitals, made once."""
    clinical = pd.read_csv(data / "tcga" / "clinical.csv")
    size = clinical["institution"].map(clinical["institution"].value_counts())
    folders = []
    for name, rows in (("public", clinical[size < LEAST]), ("private", clinical[size >= LEAST])):
        pooled, sites = out / f"{name}-pooled", out / name
        if not sites.exists():
            (pooled / "expression").mkdir(parents=True, exist_ok=True)
            rows.to_csv(pooled / "clinical.csv", index=False)
            for file in (data / "tcga" / "expression").glob("*.parquet"):
                table = pd.read_parquet(file)
                table[table.index.isin(rows["patient"])].to_parquet(pooled / "expression" / file.name)
            split_pooled(pooled, sites, min_patients=LEAST)
        folders.append(sites)
    return folders[0], folders[1]


def c_index(predictions: pd.DataFrame) -> float:
    """Mean over cancer types of the C-index of held-out patients, pairs within folds: each fold has a scale of its own."""
    test = predictions[predictions["split"] == "test"]
    counts = [
        sum(
            np.array(pair_counts(*(g[k].to_numpy() for k in ("risk", "time_months", "event"))), dtype=float)
            for _, g in rows.groupby("fold")
        )
        for _, rows in test.groupby("cancer_type")
    ]
    return mean_within_cancer(*np.array(counts).T)


def run(study: Study, sites: Path, out: Path, key: str, known: dict[str, Any]) -> float:
    """The C-index of a study over five folds; remembered in `out`."""
    if key not in known:
        parts = []
        for fold in FOLDS:
            name = re.sub(r"[^A-Za-z0-9.]+", "-", f"{key}-{fold}")
            s = study.changed(
                splits__only=(fold,), name=name, runtime__out=str(out / "runs" / name), runtime__threads=1
            )
            parts.append(simulate(s, sites).predictions)
        known[key] = c_index(pd.concat(parts, ignore_index=True))
        (out / "utility.json").write_text(json.dumps(known, indent=1))
    return known[key]


def recipes(public: Path, out: Path, age: bool) -> Iterator[tuple[str, str, Study]]:
    """Recipe, epsilon and study of every row and column."""
    covariates = ("age",) if age else ()
    label = "recommended, with age" if age else "recommended"
    for epsilon in EPSILONS:
        folder = out / f"start-{epsilon:g}{'-age' if age else ''}"
        fit_start(public, folder, epsilon=epsilon, covariates=covariates)
        study = Study.from_toml(folder / "study.toml")
        yield label, f"{epsilon:g}", study
        if epsilon == max(EPSILONS):
            yield label, "inf", study.changed(**PLAIN, splits__deal="independent")
            yield (
                label,
                "0",
                study.changed(**PLAIN, splits__deal="independent", training__learning_rate=1e-9, training__rounds=1),
            )


def naive() -> Iterator[tuple[str, str, Study]]:
    """The default Gene-MOE from scratch, with privacy switched on and nothing else done."""
    base = Study().changed(
        panel__scale_by="patient",
        task__time_edges=(0, 12, 24, 36, 60),
        training__local_steps=1,
        training__rounds=20,
        training__learning_rate=0.005,
        training__weight_decay=0.1,
        analysis__experts=False,
    )
    for epsilon in EPSILONS:
        yield "naive", f"{epsilon:g}", base.changed(privacy__unit="patient", privacy__epsilon=epsilon)
    yield "naive", "inf", base.changed(splits__deal="independent", training__batch_size=0)


def full() -> Iterator[tuple[str, str, Study]]:
    """The product's default federation without privacy, on the same hospitals and folds."""
    yield (
        "default federation, no privacy",
        "inf",
        Study().changed(splits__deal="independent", analysis__experts=False, evaluation__tables=False),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default="", help="comma-separated: recommended,age,naive,full")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    public, private = sites_of(Path(os.environ["ONCOFED_DATA"]), args.out)
    file = args.out / "utility.json"
    known: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    wanted = [w for w in args.only.split(",") if w] or ["recommended", "age", "full", "naive"]
    parts = {
        "recommended": lambda: recipes(public, args.out, False),
        "age": lambda: recipes(public, args.out, True),
        "naive": naive,
        "full": full,
    }
    scores: dict[str, dict[str, list[float]]] = {}
    for part in wanted:
        for recipe, epsilon, study in parts[part]():
            for seed in range(args.seeds):
                value = run(study.changed(seed=seed), private, args.out, f"{recipe}/{epsilon}/{seed}", known)
                scores.setdefault(recipe, {}).setdefault(epsilon, []).append(value)
                print(recipe, epsilon, seed, round(value, 4), flush=True)
    table = Table(
        "recipe", *("0", *(f"{e:g}" for e in EPSILONS), "inf"), title="C-index within cancer, by epsilon at delta 1e-5"
    )
    for recipe, by in scores.items():
        table.add_row(
            recipe,
            *(
                f"{np.mean(by[e]):.3f} ± {np.std(by[e]):.3f}" if e in by else ""
                for e in ("0", *(f"{x:g}" for x in EPSILONS), "inf")
            ),
        )
    Console(width=140).print(table)
    model = SavedModel.read(args.out / "start-8" / "model.safetensors") if "recommended" in wanted else None
    if model:
        print(f"{len(model.cancers)} cancer types, {len(model.panel)} genes")


if __name__ == "__main__":
    main()
