"""A coordinator at work with real processes: run, status, stop, resume, logs, and a run that fails."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from oncofed.client.data.site import list_sites
from oncofed.common.study import Study
from oncofed.deploy import cli
from oncofed.deploy.loopback import Loopback
from oncofed.deploy.operate.control import FILE, FlowerRun, asked
from oncofed.deploy.operate.state import RunState
from toy_processes import until
from typer.testing import CliRunner

pytestmark = pytest.mark.slow


ROUNDS = 8
"""Enough that a run is still at work when the command that stops it has started."""


def call(*arguments: str | Path) -> tuple[int, str]:
    """A command; its exit code and what it prints, in one line."""
    result = CliRunner().invoke(cli.cli, list(map(str, arguments)))
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, " ".join(result.output.split())


def done(out: Path) -> int:
    """Rounds that the journal says are done; 0 before there is one."""
    try:
        return RunState.of(out).rounds_done
    except ValueError:
        return 0


@pytest.fixture(scope="module")
def loopback(consortium: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loopback]:
    root = tmp_path_factory.mktemp("operation")
    nodes = [
        f'site-dir="{folder}" work-dir="{root / "work" / folder.name}" simulated=true'
        for folder in list_sites(consortium)[:2]
    ]
    with Loopback(root, nodes) as loopback:
        yield loopback


@pytest.fixture
def home(loopback: Loopback, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The shell of a coordinator: Flower's configuration names the SuperLink, and the folder is not the server's."""
    monkeypatch.setenv("FLWR_HOME", str(loopback.home))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(file: Path, **keys: Any) -> Path:
    base = {
        "model__size": "tiny",
        "training__rounds": 5,
        "training__evaluate_every": 0,
        "splits__only": [0],
        "panel__powers": False,
        "analysis__experts": False,
        "evaluation__tables": False,
        "runtime__threads": 1,
        "runtime__round_timeout_s": 120.0,
        "runtime__wait_sites_s": 60.0,
    }
    file.write_text(tomli_w.dumps(Study().changed(**(base | keys)).model_dump(mode="json")))
    return file


def test_run_status_stop_resume_logs(loopback: Loopback, home: Path) -> None:
    out, file = Path("results"), write(home / "study.toml", training__rounds=ROUNDS)  # a relative folder: of the shell
    code, text = call("study", "run", file, "--out", out)
    run = FlowerRun.read(out)
    assert run is not None
    assert (code, run.connection) == (0, "here")
    assert f"run {run.run} on 'here'" in text
    with pytest.raises(ValueError, match=f"run {run.run} on 'here' is (pending|starting|running).*study stop"):
        call("study", "run", file, "--out", out)
    until(lambda: done(out) >= 1)
    code, text = call("study", "status", out)
    assert (code, f"run {run.run} on 'here': running" in text, f"of {ROUNDS} rounds" in text) == (0, True, True)
    code, text = call("study", "stop", out)
    assert (code, "finished:stopped" in text) == (0, True)
    assert f"oncofed study resume {out} --superlink here" in text
    left = done(out)
    assert 1 <= left < ROUNDS
    code, text = call("study", "status", out)
    assert (code, "finished:stopped" in text, "failed" in text) == (0, True, True)
    assert call("study", "watch", out)[0] == 1  # it ends: the run has
    code, text = call("study", "resume", out)
    again = FlowerRun.read(out)
    assert again is not None
    assert (code, again.run != run.run, again.earlier) == (0, True, (run.run,))
    state = RunState.of(out)
    assert (state.status, state.rounds_done) == ("finished", ROUNDS)
    assert [r.round for r in state.rounds] == list(range(1, ROUNDS + 1))
    assert [s.left_out for s in state.sites] == [0, 0]
    events = [json.loads(line) for line in (out / "journal.jsonl").read_text().splitlines()]
    assert [e["resume"] for e in events if e["event"] == "started"] == [False, True]
    code, text = call("study", "status", out)
    assert (code, "finished:completed" in text, f"{ROUNDS} of {ROUNDS} rounds" in text) == (0, True, True)


def test_a_run_that_is_followed_says_how_it_ended(home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A good one; one whose cancer type no site holds; the log tells why."""
    code, text = call("study", "run", write(home / "a.toml", training__rounds=1), "--out", home / "a", "--follow")
    assert (code, "finished:completed" in text, "1 of 1 rounds" in text) == (0, True, True)
    code, text = call("study", "run", write(home / "b.toml", cancers=["XYZ"]), "--out", home / "b", "--follow")
    assert (code, "finished:failed" in text, "cancers = ['XYZ'] are at no site" in text) == (1, True, True)
    capfd.readouterr()
    assert call("study", "logs", home / "b")[0] == 0
    assert "cancers = ['XYZ'] are at no site" in " ".join(capfd.readouterr().out.split())
    # the same folder again: what the first run left must not end the view
    code, text = call("study", "run", write(home / "b.toml", training__rounds=1), "--out", home / "b", "--follow")
    assert (code, "finished:completed" in text) == (0, True)


def test_a_killed_server_shows_as_failed(loopback: Loopback, home: Path) -> None:
    out = home / "out"
    call("study", "run", write(home / "study.toml", training__rounds=30), "--out", out)
    until(lambda: done(out) >= 1)
    server = int((out / ".lock").read_text())
    assert "flwr-serverapp" in Path(f"/proc/{server}/cmdline").read_text()
    os.kill(server, signal.SIGKILL)
    run = FlowerRun.read(out)
    assert run is not None
    until(lambda: asked(run).ended)
    assert RunState.of(out).status == "running"  # it could not say so
    code, text = call("study", "status", out)
    assert (code, "Flower says finished:failed" in text) == (0, True)


def test_flower_s_reason_is_shown(home: Path, tmp_path: Path) -> None:
    file = write(home / "study.toml")
    with pytest.raises(RuntimeError, match="connection 'nowhere' not found in the Flower configuration"):
        call("study", "run", file, "--out", home / "out", "--superlink", "nowhere")
    assert not (home / "out" / FILE).exists()


def test_the_commands_of_the_page_run(tmp_path: Path) -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "operate.md"
    (block,) = re.findall(r"^```sh\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    command = ["bash", "-euo", "pipefail", "-c", block]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("3 of 3 rounds") == 2
