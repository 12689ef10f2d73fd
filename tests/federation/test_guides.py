"""A newcomer's run of each guide: its commands, copied in their order into a folder where nothing is, end well."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from oncofed.deploy.services.edge import find_nginx
from oncofed.deploy.services.processes import free_port

GUIDES = Path(__file__).resolve().parents[2] / "docs" / "guides"
BLOCK = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TIMEOUT_S = 900

try:
    find_nginx()
    WITHOUT = ""
except ValueError as error:
    WITHOUT = str(error)

COORDINATOR = """
cat > consortium.toml <<'END'
name = "Rehearsal"
address = "127.0.0.1"
members = ["Aachen", "Bergen", "Coimbra"]
END
oncofed consortium init consortium.toml --out coordinator
oncofed data synth --out sites --sites 3 --patients 240 --genes 80 --cancers 3
mv sites/aachen aachen
cp coordinator/kits/Aachen.zip .
for name in Bergen Coimbra; do
  oncofed site enrol coordinator/kits/$name.zip --site sites/${name,}
  oncofed consortium admit coordinator sites/${name,}/consortium/enrolment-$name.json
done
cat > study.toml <<'END'
name = "first"
[model]
size = "tiny"
[training]
rounds = 1
local_steps = 2
[splits]
only = [0]
[panel]
scale_by = "patient"
[task]
time_edges = [0, 12, 24, 60]
[aggregation]
min_sites = 3
[privacy]
unit = "patient"
epsilon = 6.0
secure_sum = true
END
oncofed study sign study.toml --key coordinator/coordinator.key
coordinator() {
  until [ -f aachen/consortium/enrolment-Aachen.json ]; do sleep 0.5; done
  oncofed consortium admit coordinator aachen/consortium/enrolment-Aachen.json
  for site in sites/bergen sites/coimbra; do oncofed site roster coordinator/roster.json --site $site; done
  oncofed study bundle --out bundles && mv bundles/*.fab bundle.fab
  cp coordinator/roster.json unfinished.json && mv unfinished.json roster.json
  oncofed server start coordinator > server.log 2>&1 &
  until oncofed server status coordinator > /dev/null; do sleep 2; done
  for site in sites/bergen sites/coimbra; do oncofed site start $site > $site.log 2>&1 & done
  for site in aachen sites/bergen sites/coimbra; do until oncofed site status $site > /dev/null 2>&1; do sleep 2; done; done
  FLWR_HOME=$PWD/coordinator/state/flower oncofed study run study.toml --out run
}
coordinator > coordinator.log 2>&1 &
"""
"""What the coordinator, and the other hospitals, do while one hospital follows its guide."""


def with_free_ports(text: str) -> str:
    """Ports of its own for a consortium on loopback: the usual ones may be taken on a machine that tests."""
    return text.replace(
        'address = "127.0.0.1"\n',
        f'address = "127.0.0.1"\nport = {free_port()}\nsuperlink_port = {free_port()}\n',
    )


def run_commands(guide: Path, folder: Path, before: str = "") -> str:
    """Run all `sh` blocks of a guide as one script that stops at the first failure; what it started in the background ends with it.

    `before` is what others have done before the guide begins.
    """
    blocks = BLOCK.findall(guide.read_text())
    assert blocks, f"{guide.name} has no commands"
    script = folder / "commands.sh"
    script.write_text(with_free_ports("\n".join(["set -euo pipefail", before, *blocks])))
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


@pytest.mark.slow
@pytest.mark.rehearsal
@pytest.mark.skipif(bool(WITHOUT), reason=WITHOUT or "nginx is there")
def test_the_coordinators_guide_ends_well(tmp_path: Path) -> None:
    run_commands(GUIDES / "coordinator.md", tmp_path)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["sites"] == ["Aachen", "Bergen", "Coimbra"]
    assert results["left_out"] == []
    assert "finished" in results
    assert "epsilon" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.rehearsal
@pytest.mark.skipif(bool(WITHOUT), reason=WITHOUT or "nginx is there")
def test_the_hospitals_guide_ends_well(tmp_path: Path) -> None:
    told = run_commands(GUIDES / "hospital.md", tmp_path, COORDINATOR)
    assert re.search(r"^20.{17} +masked ", told, re.MULTILINE)
