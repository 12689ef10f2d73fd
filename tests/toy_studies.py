"""Toy studies over copies of the synthetic consortium, for what is done with a finished one."""

from __future__ import annotations

import shutil
from pathlib import Path

from oncofed.common.study import Study
from oncofed.deploy.simulate import SimulatedRun, simulate


def copy_sites(root: Path, consortium: Path) -> Path:
    """`root/sites`: the consortium's sites, to be changed."""
    shutil.copytree(consortium, root / "sites", ignore=shutil.ignore_patterns(".oncofed"))
    return root / "sites"


def train(root: Path, **dotted: object) -> SimulatedRun:
    """Train a toy over `root/sites`; model and results lie in `root/out`, the sites' own predictions in their folders."""
    base: dict[str, object] = {
        "name": "mine",
        "model__size": "tiny",
        "panel__covariates": ["age", "sex=female|male"],
        "training__rounds": 3,
        "training__learning_rate": 0.01,
        "splits__only": [0],
        "runtime__threads": 1,
        "runtime__out": str(root / "out"),
    }
    return simulate(Study().changed(**(base | dotted)), root / "sites")


def model_of(root: Path) -> Path:
    return root / "out" / "model-fold-0.safetensors"
