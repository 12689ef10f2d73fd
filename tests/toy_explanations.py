"""Saved models without a network behind them, whose summed explanations hold planted genes, pathways and hubs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from oncofed.common.blocks import Sum, under
from oncofed.common.panel import GenePanel
from oncofed.common.study import Study
from oncofed.server.checkpoint import save_arrays

CLASSES = ("BRCA", "COADREAD", "KIRC", "LUAD", "PRAD", "THCA")
GENES, LAYERS, HEADS, CHOSEN, DRAWS = 400, 3, 5, 100, 7
OWN = 10
"""Genes of each class's own program; the first of them is its hub."""

PANEL = GenePanel(tuple(f"GENE{i:03d}" for i in range(GENES)))


def own_genes(c: int) -> np.ndarray:
    return np.arange(c * OWN, (c + 1) * OWN)


def gene_sets() -> dict[str, tuple[str, ...]]:
    """Each class's program with some other genes, sets of others, and one that the panel lacks."""
    rng = np.random.default_rng(5)
    first = len(CLASSES) * OWN
    sets = {}
    for c, name in enumerate(CLASSES):
        genes = [*own_genes(c), *rng.choice(np.arange(first, GENES), 6, replace=False)]
        sets[f"PROGRAM_OF_{name}"] = tuple(PANEL.genes[g] for g in genes)
    for n in range(18):
        sets[f"OTHER_SET_{n}"] = tuple(PANEL.genes[g] for g in rng.choice(np.arange(first, GENES), 12, replace=False))
    return sets | {"NOT_HERE": ("A", "B", "C")}


def write_gmt(file: Path) -> Path:
    file.write_text("".join("\t".join((name, "toy", *genes)) + "\n" for name, genes in gene_sets().items()))
    return file


def noise(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Attributions of pairs: most are small, few are large, of either sign."""
    return rng.laplace(size=shape) * np.exp(0.5 * rng.normal(size=shape))


def explanation(rng: np.random.Generator, hub: float = 6.0, withheld: tuple[int, ...] = ()) -> Sum:
    """One fold's sums; `hub` is how much each class's hub is read by all others, beside noise of about 1."""
    c = len(CLASSES)
    patients = rng.integers(40, 200, c).astype(float)
    mean = rng.normal(0, 0.02, (c, GENES))
    for k in range(c):
        mean[k, own_genes(k)] += np.linspace(0.4, 0.1, OWN)
    edges, null = noise(rng, c, LAYERS, CHOSEN, CHOSEN), noise(rng, DRAWS, c, LAYERS, CHOSEN, CHOSEN)
    genes = np.zeros((c, CHOSEN), dtype=np.int64)
    for k in range(c):
        others = np.setdiff1d(np.arange(GENES), own_genes(k))
        genes[k] = np.sort([*own_genes(k), *rng.choice(others, CHOSEN - OWN, replace=False)])
        own = np.searchsorted(genes[k], own_genes(k))
        edges[k][:, :, own[0]] += hub * rng.uniform(0, 2, (LAYERS, CHOSEN))
        edges[k][:, own[1]] += hub / 2 * rng.uniform(0, 2, (LAYERS, CHOSEN))
        edges[k][np.ix_(range(LAYERS), own, own)] += hub / 2 * rng.uniform(0, 2, (LAYERS, OWN, OWN))
    out = {
        "attribution/patients": patients,
        "attribution/sum": mean * patients[:, None],
        "attribution/size": np.abs(mean) * 1.3 * patients[:, None],
        "attribution/product": mean * patients[:, None],
        "attribution/squares": np.ones((c, GENES)) * patients[:, None],
        "attention/patients": patients,
        "attention/entropy": rng.uniform(4.0, 5.9, (c, LAYERS, HEADS)) * patients[:, None, None],
        "network/genes": genes,
        "network/edges": edges * patients[:, None, None, None],
        "network/patients": patients,
        "network/null": null * 50.0,
        "network/null_patients": np.full((DRAWS, c), 50.0),
        "network/covered": np.full(c, 30.0),
        "network/total": np.full(c, 100.0),
        "network/error": np.full((c, LAYERS), 0.1),
        "network/change": np.full((c, LAYERS), 10.0),
    }
    for name, value in out.items():
        if name != "network/genes":
            value[(slice(None), list(withheld)) if "null" in name else list(withheld)] = 0.0
    return out


def write_run(out: Path, *, folds: int = 3, seed: int = 0, parts: tuple[str, ...] = (), **settings: Any) -> Path:
    """A finished run below `out`: a model a fold and a bare results.json. `parts`: keep these parts of the explanation only."""
    rng = np.random.default_rng(seed)
    study = Study().changed(
        model__name="t_gem",
        task__kind="classification",
        analysis__attributions=True,
        analysis__attention=True,
        analysis__network_genes=CHOSEN,
        seed=seed,
        runtime__out=str(out),
    )
    out.mkdir(parents=True, exist_ok=True)
    about = {
        "study": study.model_dump(mode="json", exclude={"runtime"}),
        "cancers": list(CLASSES),
        "genes": list(PANEL.genes),
        "grid_months": [0.0],
        "beside": {},
    }
    for fold in range(folds):
        sums = explanation(rng, **settings)
        told = {k: v for k, v in sums.items() if not parts or k.partition("/")[0] in parts}
        arrays = under("explanation/", told) | {n: np.zeros(0) for n in ("covariate_mean", "covariate_sd")}
        arrays |= {f"scaling/{n}": np.ones((1, GENES)) for n in ("mean", "sd", "power", "centre", "spread")}
        save_arrays(out / f"model-fold-{fold}.safetensors", arrays, about | {"fold": fold})
    (out / "results.json").write_text(json.dumps({"folds": [{"fold": fold} for fold in range(folds)]}))
    return out


def toy_results(study: dict[str, Any], told: dict[str, Any], ablation: bool = True) -> dict[str, Any]:
    """What a report needs of a run, with the parts of `told`."""
    shares = [0.005, 0.01, 0.02, 0.05, 0.1, 0.2]
    rng, c = np.random.default_rng(1), len(CLASSES)
    folds = []
    for fold in range(3):
        patients = np.full(c, 30)
        kept = np.array([0.9, 0.8, 0.7, 0.5, 0.3, 0.2, 0.1])
        hits = np.round(patients[:, None] * np.clip(kept + rng.normal(0, 0.08, (c, 1)), 0, 1))
        random = patients[:, None] * np.clip(np.linspace(0.9, 0.7, 7) + rng.normal(0, 0.05, (c, 1)), 0, 1)
        row: dict[str, Any] = {
            "fold": fold,
            "curve": [{"round": 1, "train_loss": 1.0, "evidence": {}}],
            "blocks": ["trunk"],
            "site_evidence": {},
            "bytes_to_sites": 1,
            "bytes_from_sites": 1,
        }
        if ablation:
            told_of = {"patients": patients.tolist(), "hits": hits.tolist(), "random": random.tolist()}
            row["ablation"] = {"shares": shares, **told_of}
        folds.append(row)
    return {
        "study": study,
        "sites": ["a", "b"],
        "cancers": list(CLASSES),
        "panel": {"genes": GENES, "hash": PANEL.hash},
        "beside": {},
        "started": "2024-01-01T00:00:00Z",
        "package": "0",
        "folds": folds,
        "left_out": [],
    } | told
