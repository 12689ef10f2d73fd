"""The weights of a run, and those of the same study in one process: undisturbed, or with sites that miss rounds."""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

from oncofed.client.app import app as client_app
from oncofed.client.data.site import SiteFolder
from oncofed.common import wire
from oncofed.common.study import Study
from oncofed.deploy.engine import InProcessGrid
from oncofed.server.app import run_study
from oncofed.server.checkpoint import load_arrays

Missing = AbstractSet[tuple[str, int]]
"""Sites, each with a round that it misses."""


def weights(out: Path) -> dict[str, bytes]:
    """All arrays of the model of fold 0, bit by bit."""
    arrays, _ = load_arrays(out / "model-fold-0.safetensors")
    return {name: value.tobytes() for name, value in arrays.items()}


def undisturbed(
    study: Study, sites: list[Path], out: Path, missing: Missing = frozenset(), *, simulated: bool = True
) -> dict[str, bytes]:
    """Weights of a study that runs in this process, into the folder `out`, of which some sites miss rounds.

    Sites that are not `simulated` have the policy of a hospital, and where it withholds small groups the time grid is another.
    """
    names = [SiteFolder.open(folder).name for folder in sites]

    def fault(message: Any) -> str | None:
        ask = wire.read_config(message.content, "ask")
        about = names[message.metadata.dst_node_id - 1000], int(str(ask.get("round", 0)))
        return "error" if message.metadata.message_type == wire.TRAIN and about in missing else None

    nodes: list[Any] = [
        {"site-dir": str(folder), "work-dir": str(out / "work" / folder.name), "simulated": simulated}
        for folder in sites
    ]
    run_study(study.changed(runtime__out=str(out)), InProcessGrid(client_app, nodes, {}, fault=fault))
    return weights(out)
