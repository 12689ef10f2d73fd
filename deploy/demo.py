"""The main job on embedded data: a synthetic consortium, the federation, and what it is compared with."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from oncofed.common.study import Study
from oncofed.deploy.comparison.compare import compare
from oncofed.deploy.comparison.survival import METHODS
from oncofed.deploy.sites.synth import SynthSettings, write_consortium


def demo_study(out: Path) -> Study:
    """A Gene-MOE small enough for two cores, with the rate that 240 genes take (the default is for some 1,500)."""
    return Study().changed(
        name="demo",
        model__width=64,
        model__latent=32,
        training__rounds=20,
        training__learning_rate=0.01,
        training__weight_decay=0.3,
        runtime__out=str(out),
    )


def run_demo(out: Path) -> dict[str, Any]:
    """Write the consortium below `out` anew, run and compare; returns the comparison."""
    sites = out / "sites"
    if (sites / "truth.json").exists():  # only ever remove what this function wrote
        shutil.rmtree(sites)
    write_consortium(sites, SynthSettings())
    return compare(demo_study(out), sites, METHODS)
