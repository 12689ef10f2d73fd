"""The bundle that Flower ships to sites: no code and no study, the same for one version of oncofed, so that a hospital approves it once.

What a run is about travels beside it, as Flower's run config.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import tomli_w
from oncofed.common.study import Study
from oncofed.common.wire import package_version

RUN = "run.toml"
"""Beside the bundle's files, and none of them: the run config that a run of it is started with."""

Value = bool | int | float | str


def write_bundle(folder: Path, config: Mapping[str, Value]) -> Path:
    """A Flower app folder whose components are those of the installed package, and beside it the run config to start it with."""
    folder.mkdir(parents=True, exist_ok=True)
    defaults = {"study": "", "plan": "", "sites": "", **Study().run_config()}
    app = {
        "publisher": "oncofed",
        "fab-include": ["README.md"],
        "components": {"serverapp": "oncofed.server.app:app", "clientapp": "oncofed.client.app:app"},
        "config": defaults,
    }
    project = {
        "name": "oncofed-study",
        "version": package_version(),
        "description": "The bundle of oncofed: no code and no study",
        "license": "Apache-2.0",
        "dependencies": [],
    }
    (folder / "pyproject.toml").write_text(tomli_w.dumps({"project": project, "tool": {"flwr": {"app": app}}}))
    (folder / "README.md").write_text(
        "oncofed. It holds no code and no study; every party runs the oncofed that it installed.\n"
    )
    (folder / RUN).write_text(tomli_w.dumps({k: v for k, v in config.items() if v != defaults.get(k)}))
    return folder


def run_options(folder: Path) -> list[str]:
    """What `flwr run` is told beside the bundle."""
    return ["-c", str(folder / RUN)] if (folder / RUN).exists() and (folder / RUN).read_text() else []


def build_bundle(target: Path) -> Path:
    """The bundle as the one file that hospitals approve, in the folder `target`; it has the same bytes wherever it is built alike."""
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        app = write_bundle(Path(scratch) / "oncofed-study", {})
        command = [str(Path(sys.executable).parent / "flwr"), "build", "--app", str(app)]
        done = subprocess.run(command, cwd=target, capture_output=True, text=True, timeout=120, check=False)
        found = sorted(target.glob("oncofed.oncofed-study.*.fab"), key=lambda f: f.stat().st_mtime)
    if done.returncode or not found:
        raise RuntimeError(f"flwr build failed ({done.returncode}): {done.stdout[-800:]} {done.stderr[-800:]}")
    return found[-1]
