"""A newcomer's run of each guide: its commands, copied in their order into a folder where nothing is, end well."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

GUIDES = Path(__file__).resolve().parents[2] / "docs" / "guides"
BLOCK = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TIMEOUT_S = 900


def run_commands(guide: Path, folder: Path) -> str:
    """Run all `sh` blocks of a guide as one script that stops at the first failure; what it started in the background ends with it."""
    blocks = BLOCK.findall(guide.read_text())
    assert blocks, f"{guide.name} has no commands"
    script = folder / "commands.sh"
    script.write_text("set -euo pipefail\n" + "\n".join(blocks))
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    output = folder / "output.txt"
    with output.open("w") as out:
        process = subprocess.Popen(
            ["bash", "-x", str(script)],
            cwd=folder,
            env=environment,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(TIMEOUT_S)
        except subprocess.TimeoutExpired:
            code = -1
        finally:
            _end(process.pid)
    told = output.read_text()
    assert code == 0, f"{guide.name} stopped with {code}:\n{told[-4000:]}"
    return told


def _end(group: int) -> None:
    """End what a guide has left in the background: asked first, since supervisors end their own children."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(group, sign)
        except ProcessLookupError:
            return


@pytest.mark.slow
def test_the_researchers_guide_ends_well(tmp_path: Path) -> None:
    told = run_commands(GUIDES / "researcher.md", tmp_path)
    assert "finished, there is nothing to resume" in told
    for made in ("out/report.html", "out/comparison.json", "private/report.html", "km/analysis.html", "risks.csv"):
        assert (tmp_path / made).stat().st_size > 0, made
