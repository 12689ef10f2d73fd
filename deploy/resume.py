"""Go on with a run that was interrupted: a simulation the way it was started, a real federation through Flower."""

from __future__ import annotations

import contextlib
import os
import shlex
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

from oncofed.common.study import Study
from oncofed.deploy.bundle import run_options, write_bundle
from oncofed.deploy.comparison.compare import compare
from oncofed.deploy.comparison.present import write_comparison
from oncofed.deploy.started import Engine, Started
from oncofed.server.run_folder import STUDY, finished


def run_and_report(study: Study, sites: Path, methods: tuple[str, ...], engine: Engine) -> tuple[dict[str, Any], Path]:
    """Run a study over the folder of sites and compare it; returns the numbers and the report's path."""
    comparison, out = compare(study, sites, methods, engine), Path(study.runtime.out)
    report = write_comparison(comparison, out)
    started = Started.read(out)
    assert started is not None
    replace(started, done=True).write(out)
    return comparison, report


def interrupted(out: Path) -> Study | None:
    """The study that was started in a folder, set to resume there; None where it is finished. Raises where there is none."""
    if not (out / STUDY).exists():
        raise ValueError(
            f"{out}: no study was started here ({STUDY} is missing); name the folder that was its runtime.out"
        )
    started = Started.read(out)
    if finished(out) and (started is None or started.done):
        return None
    return Study.from_toml(out / STUDY, {"runtime.out": str(out.resolve()), "runtime.resume": True})


def resume_simulation(study: Study, sites: Path | None, engine: Engine | None) -> tuple[dict[str, Any], Path]:
    """Run on as the folder says, or over other `sites` or on another `engine`: weights do not depend on it."""
    started = Started.read(Path(study.runtime.out))
    where = sites.resolve() if sites else Path(started.sites) if started else None
    assert where is not None
    with contextlib.chdir(started.folder if started and Path(started.folder).is_dir() else "."):
        methods = started.compare if started else ()
        return run_and_report(study, where, methods, engine or (started.engine if started else "local"))


def bundle_of(study: Study) -> Path:
    """A bundle that resumes the study, below its folder."""
    return write_bundle(Path(study.runtime.out) / "bundle", study.run_config())


def flwr_command(bundle: Path, connection: str) -> str:
    """What starts a bundle from a shell."""
    return shlex.join(
        ["flwr", "run", str(bundle), *([connection] if connection else []), *run_options(bundle), "--stream"]
    )


def configured() -> str:
    """The default connection of Flower's own configuration; empty where there is none to a SuperLink elsewhere."""
    home = Path(os.environ.get("FLWR_HOME", Path.home() / ".flwr"))
    try:
        links = tomllib.loads((home / "config.toml").read_text())["superlink"]
        name = str(links["default"])
        return "" if str(links[name]["address"]).startswith(":") else name
    except (OSError, KeyError, TypeError, tomllib.TOMLDecodeError):
        return ""
