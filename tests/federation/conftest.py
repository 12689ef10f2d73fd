"""Whole studies over in-process sites: run one, note what is asked, and read what it leaves."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from flwr.app import Message
from oncofed.client.app import app as client_app
from oncofed.client.data.site import SiteFolder, list_sites
from oncofed.common import wire
from oncofed.common.blocks import Sum, part
from oncofed.common.study import TRAIN, Study
from oncofed.deploy.engine import InProcessGrid
from oncofed.server.app import run_study
from oncofed.server.checkpoint import Checkpoints, load_arrays


@dataclass
class Federation:
    """Sites of a folder; `asked` notes of every message its kind, phase, round and site."""

    sites: Path
    asked: list[tuple[str, str, int, str]] = field(default_factory=list)

    def run(self, study: Study, fault: Callable[[str, str, int, str], bool] | None = None) -> dict[str, Any]:
        """A study; `fault` says of a message's kind, phase, round and site whether it fails."""
        folders = list_sites(self.sites)
        names = [SiteFolder.open(folder).name for folder in folders]
        self.asked.clear()

        def listen(message: Message) -> str | None:
            ask = wire.read_config(message.content, "ask")
            about = (
                message.metadata.message_type,
                str(ask.get("phase", "")),
                int(str(ask.get("round", 0))),
                names[message.metadata.dst_node_id - 1000],
            )
            self.asked.append(about)
            return "error" if fault is not None and fault(*about) else None

        nodes: list[Any] = [{"partition-id": i, "num-partitions": len(folders)} for i in range(len(folders))]
        return run_study(study, InProcessGrid(client_app, nodes, {"sites": str(self.sites)}, fault=listen))

    def rounds_asked(self, phase: str) -> set[int]:
        return {round_ for kind, p, round_, _ in self.asked if kind == wire.TRAIN and p == phase}

    def predictions(self, study: Study, fold: int = 0) -> pd.DataFrame:
        """What the sites wrote in their own folders, with the site's name."""
        parts = []
        for folder in list_sites(self.sites):
            file = folder / ".oncofed" / "predictions" / study.name / f"fold-{fold}.csv"
            if file.exists():
                parts.append(pd.read_csv(file).assign(site=SiteFolder.open(folder).name))
        return pd.concat(parts, ignore_index=True)

    def copy(self, to: Path) -> Federation:
        """The same sites in another folder, to be changed."""
        shutil.copytree(self.sites, to, ignore=shutil.ignore_patterns(".oncofed"))
        return Federation(to)

    def disturb(self, site: str, patients: set[str]) -> None:
        """Other expression, and other times, for some patients of a site that holds Parquet."""
        folder = self.sites / site.lower()
        table = pd.read_parquet(folder / "expression.parquet")
        rows = table.index.isin(patients)
        assert rows.sum() == len(patients) > 0
        values = table.to_numpy(copy=True)
        values[rows] = np.random.default_rng(1).uniform(0, 15, values[rows].shape)
        pd.DataFrame(values, index=table.index, columns=table.columns).to_parquet(folder / "expression.parquet")
        clinical = pd.read_csv(folder / "clinical.csv")
        clinical.loc[clinical["patient"].isin(patients), "time"] += 7.0
        clinical.to_csv(folder / "clinical.csv", index=False)


@pytest.fixture
def federation(consortium: Path) -> Federation:
    return Federation(consortium)


@pytest.fixture
def checkpoint() -> Callable[..., Sum]:
    """All arrays of a phase's newest checkpoint."""

    def read(study: Study, phase: str = TRAIN, fold: int = 0) -> Sum:
        found = Checkpoints.of(Path(study.runtime.out), fold, phase, 1).newest()
        assert found is not None
        return found[1]

    return read


@pytest.fixture
def model_of() -> Callable[..., Sum]:
    """All arrays of a finished model: weights, scale, explanation."""

    def read(study: Study, fold: int = 0) -> Sum:
        return load_arrays(Path(study.runtime.out) / f"model-fold-{fold}.safetensors")[0]

    return read


@pytest.fixture
def weights_of(checkpoint: Callable[..., Sum], model_of: Callable[..., Sum]) -> Callable[..., Sum]:
    """Weights and scale of a finished model, or, of a phase, those of its checkpoint."""

    def read(study: Study, phase: str = "", fold: int = 0) -> Sum:
        if phase:
            arrays = checkpoint(study, phase, fold)
            return part("weights/", arrays) | part("frame/", arrays)
        arrays = model_of(study, fold)
        return part("weights/", arrays) | {n: v for n, v in arrays.items() if n.startswith(("scaling/", "covariate_"))}

    return read


def differing(a: Sum, b: Sum) -> list[str]:
    """Names of the arrays that are not the same to the last bit."""
    assert a.keys() == b.keys()
    return [name for name in a if a[name].tobytes() != b[name].tobytes()]


@pytest.fixture(name="differing")
def _differing() -> Callable[[Sum, Sum], list[str]]:
    return differing
