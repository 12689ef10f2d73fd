"""The supervisor with real processes: what ends is started again, and nothing outlives it, however it ends."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from oncofed.deploy.services import supervise
from oncofed.deploy.services.lock import holder, locked
from oncofed.deploy.services.node import NO_TLS
from oncofed.deploy.services.running import Running, stop
from oncofed.deploy.services.service_logs import Logs
from oncofed.deploy.services.supervise import Service, Supervisor

PROGRAM = """
import os, sys
from pathlib import Path
from oncofed.deploy.services import processes
from oncofed.deploy.services.service_logs import Logs
from oncofed.deploy.services.supervise import Service, Supervisor
processes.STOP_S = 2.0
folder = Path(sys.argv[1])
services = [
    Service(name, lambda script=script: ["sh", "-c", script], folder / name, dict(os.environ))
    for name, script in zip(sys.argv[2::2], sys.argv[3::2])
]
Supervisor(services, folder / "run.json", Logs(folder / "logs")).run()
"""
FAMILY = "sleep 300 & echo $! > grandchild; exec sleep 300"
STUBBORN = "trap '' TERM; sleep 300 & echo $! > grandchild; while true; do sleep 0.1; done"


def until(there: Callable[[], Any], patience_s: float = 20.0) -> Any:
    end = time.monotonic() + patience_s
    while not (found := there()):
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.05)
    return found


def lives(process: int) -> bool:
    """Whether it runs; a zombie does not."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


class Started:
    """A supervisor in a process of its own."""

    def __init__(self, folder: Path, *services: str) -> None:
        self.folder, self.status = folder, folder / "run.json"
        self.process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(folder), *services])

    def told(self, name: str) -> dict[str, Any]:
        with contextlib.suppress(OSError, ValueError):
            return dict(json.loads(self.status.read_text())["services"][name])
        return {}

    def up(self, name: str, starts: int = 1) -> int:
        return int(until(lambda: self.told(name).get("starts", 0) >= starts and self.told(name)["process"]))

    def grandchild(self, name: str) -> int:
        file = self.folder / name / "grandchild"
        return int(until(lambda: file.exists() and file.read_text().strip()))


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Started]]:
    made: list[Started] = []

    def make(*services: str) -> Started:
        made.append(Started(tmp_path, *services))
        return made[-1]

    yield make
    for s in made:
        s.process.kill()
        s.process.wait()


def test_a_killed_process_is_started_again(start: Callable[..., Started]) -> None:
    s = start("a", FAMILY, "b", "exec sleep 300")
    first, other, grandchild = s.up("a"), s.up("b"), s.grandchild("a")
    os.kill(first, signal.SIGKILL)
    second = until(lambda: s.told("a").get("starts") == 2 and s.told("a")["process"])
    assert second != first
    assert not lives(grandchild), "what was left of the first life runs on"
    assert s.told("b") | {"since": ""} == {
        "state": "up", "ready": True, "process": other, "since": "", "starts": 1, "last_exit": "",
    }  # fmt: skip
    assert s.told("a")["last_exit"].startswith("signal 9 at 20")
    assert "a: ended with signal 9" in (s.folder / "logs" / "supervisor.log").read_text()


@pytest.mark.parametrize("script", [FAMILY, STUBBORN], ids=["willing", "stubborn"])
def test_sigterm_ends_all(start: Callable[..., Started], script: str) -> None:
    s = start("a", script, "b", "exec sleep 300")
    processes = [s.up("a"), s.up("b"), s.grandchild("a")]
    s.process.send_signal(signal.SIGTERM)
    assert s.process.wait(60) == 0
    assert not [p for p in processes if lives(p)]
    told = (s.folder / "logs" / "supervisor.log").read_text()
    assert f"a: ended with signal {9 if script == STUBBORN else 15}" in told, (
        "it is asked first, and killed if it will not"
    )
    assert "b: ended with signal 15" in told
    assert Running.read(s.status).services["a"]["state"] == "stopped"


def test_nothing_outlives_a_killed_supervisor(start: Callable[..., Started]) -> None:
    s = start("a", "exec sleep 300", "b", "exec sleep 300")
    processes = [s.up("a"), s.up("b")]
    assert holder(s.status.with_suffix(".lock")) == s.process.pid
    s.process.send_signal(signal.SIGKILL)
    s.process.wait()
    until(lambda: not [p for p in processes if lives(p)], 5.0)
    assert holder(s.status.with_suffix(".lock")) is None
    told = Running.read(s.status)
    assert told.process is None
    assert {v["state"] for v in told.services.values()} == {"stopped"}
    assert not told.ready


def test_a_second_supervisor_is_refused_and_stop_ends_the_first(start: Callable[..., Started]) -> None:
    s = start("a", "exec sleep 300")
    s.up("a")
    with (
        pytest.raises(ValueError, match=f"process {s.process.pid} runs this already"),
        locked(s.status.with_suffix(".lock")),
    ):
        pass
    assert stop(s.status)
    s.process.wait(5)
    assert not stop(s.status)


def service(folder: Path, script: str, **more: Any) -> Service:
    return Service("a", lambda: ["sh", "-c", script], folder / "a", dict(os.environ), **more)


def run_for(supervisor: Supervisor, there: Callable[[], Any]) -> None:
    """Run it in this thread until something is there."""

    def wait() -> None:
        with contextlib.suppress(AssertionError):
            until(there)
        supervisor.stopping.set()

    threading.Thread(target=wait, daemon=True).start()
    supervisor.run()
    assert there()


def pauses(folder: Path) -> list[float]:
    lines = (folder / "logs" / "supervisor.log").read_text().splitlines()
    return [float(line.rpartition("again in ")[2].removesuffix(" s")) for line in lines if "again in" in line]


def test_pauses_grow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "SHORTEST_S", 0.05)
    monkeypatch.setattr(supervise, "LONGEST_S", 0.3)
    supervisor = Supervisor([service(tmp_path, "exit 3")], tmp_path / "run.json", Logs(tmp_path / "logs"))
    run_for(supervisor, lambda: supervisor.states[0].starts >= 6)
    assert pauses(tmp_path)[:5] == [0.05, 0.1, 0.2, 0.3, 0.3]
    assert supervisor.states[0].last_exit.startswith("exit code 3 at ")


def test_a_process_that_was_steady_begins_with_the_shortest_pause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervise, "SHORTEST_S", 0.05)
    monkeypatch.setattr(supervise, "STEADY_S", 0.5)
    script = "n=$(cat n 2>/dev/null || echo 0); echo $((n+1)) > n; [ $n = 2 ] && sleep 1; exit 1"
    supervisor = Supervisor([service(tmp_path, script)], tmp_path / "run.json", Logs(tmp_path / "logs"))
    run_for(supervisor, lambda: supervisor.states[0].starts >= 5)
    assert pauses(tmp_path)[:4] == [0.05, 0.1, 0.05, 0.1]


def test_a_refused_node_waits_for_its_former_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Always the same pause, not a growing one; after many refusals a long one."""
    monkeypatch.setattr(supervise, "REFUSED_S", 0.1)
    monkeypatch.setattr(supervise, "REFUSALS", 3)
    monkeypatch.setattr(supervise, "LONGEST_S", 0.4)
    refused = service(
        tmp_path,
        "echo '[code: 2004] Failed to activate SuperNode'; sleep 0.1; exit 1",
        refused="[code: 2004]",
        ready="SuperNode ID",
    )
    supervisor = Supervisor([refused], tmp_path / "run.json", Logs(tmp_path / "logs"))
    run_for(supervisor, lambda: supervisor.states[0].starts >= 6)
    assert pauses(tmp_path)[:5] == [0.1, 0.1, 0.1, 0.4, 0.4]


def test_a_node_that_runs_on_and_asks_no_more_is_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Flower's does after it met a certificate that was none of the consortium's."""
    monkeypatch.setattr(supervise, "REFUSED_S", 0.1)
    stuck = service(
        tmp_path,
        "echo SuperNode ID; sleep 0.1; echo 'ERROR :     SSL/TLS handshake error detected.'; exec sleep 300",
        gave_up=NO_TLS,
        ready="SuperNode ID",
    )
    supervisor = Supervisor([stuck], tmp_path / "run.json", Logs(tmp_path / "logs"))
    run_for(supervisor, lambda: supervisor.states[0].starts >= 3)
    told = (tmp_path / "logs" / "supervisor.log").read_text()
    assert told.count("has given up: it is started again in 0.1 s") == supervisor.states[0].starts - 1


def test_what_is_said_of_a_question_starts_no_node_again(tmp_path: Path) -> None:
    """A coordinator's words stand in the node's log, in a refusal."""
    said = (
        f"echo SuperNode ID; echo \"WARNING :   Mayo: refused: no key '{NO_TLS}'\"; sleep 1; echo later; exec sleep 300"
    )
    node = service(tmp_path, said, gave_up=NO_TLS, ready="SuperNode ID")
    supervisor = Supervisor([node], tmp_path / "run.json", Logs(tmp_path / "logs"))
    log = tmp_path / "logs" / "a.log"
    run_for(supervisor, lambda: log.exists() and "later" in log.read_text())
    assert "has given up" not in (tmp_path / "logs" / "supervisor.log").read_text()


def test_a_program_that_is_not_there_is_said_and_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "SHORTEST_S", 0.05)

    def broken() -> list[str]:
        raise ValueError("nginx cannot be told of this folder")

    made = Service("a", broken, tmp_path / "a", dict(os.environ))
    supervisor = Supervisor([made], tmp_path / "run.json", Logs(tmp_path / "logs"))
    run_for(supervisor, lambda: supervisor.states[0].failures >= 2)
    assert "did not start: nginx cannot be told of this folder" in (tmp_path / "logs" / "supervisor.log").read_text()


def test_a_changed_certificate_starts_it_anew(tmp_path: Path) -> None:
    watched = tmp_path / "server.crt"
    watched.write_text("one\n")
    s = service(tmp_path, "cat ../server.crt; exec sleep 300", watch=(watched,))
    supervisor = Supervisor([s], tmp_path / "run.json", Logs(tmp_path / "logs"))
    log = tmp_path / "logs" / "a.log"

    def change_then_see() -> bool:
        if log.exists() and log.read_text() == "one\n" and watched.read_text() == "one\n":
            watched.write_text("two\n")
        return log.exists() and log.read_text() == "one\ntwo\n"

    run_for(supervisor, change_then_see)
    assert supervisor.states[0].starts == 2
    assert not supervisor.states[0].failures


def test_health_follows_the_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "LONGEST_S", 0.5)
    s = service(tmp_path, "sleep 0.5; echo at work; sleep 0.5; exit 1", ready="at work")
    supervisor = Supervisor([s], tmp_path / "run.json", Logs(tmp_path / "logs"))
    seen: list[dict[str, bool]] = []

    def enough() -> bool:
        seen.append(supervisor.health())
        return {"a": True, "": True, "ready": False} in seen and {"a": False, "": False, "ready": False} in seen

    run_for(supervisor, enough)
    assert {"a": True, "": True, "ready": True} in seen
    assert {"a": False, "": True, "ready": False} in seen, (
        "a process that is being brought back is no reason to end the rest"
    )
    supervisor.turned -= 1000.0
    assert not supervisor.health()[""], "a supervisor that hangs is not well"


def test_logs_are_turned_over_and_have_no_colours(tmp_path: Path) -> None:
    logs = Logs(tmp_path, largest=1000)
    for i in range(100):
        assert logs.write("a", b"\x1b[92mINFO \x1b[0m: line %03d\n" % i) == f"INFO : line {i:03d}"
    files = sorted(f.name for f in tmp_path.iterdir())
    assert files == ["a.log", "a.log.1"]
    assert "line 099" in (tmp_path / "a.log").read_text()
    assert max(f.stat().st_size for f in tmp_path.iterdir()) <= 1000


def test_logs_go_to_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    Logs(None).write("edge", b"refused\n")
    assert capsys.readouterr().out == "edge | refused\n"
