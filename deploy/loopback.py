"""A throw-away federation of real Flower processes on loopback: SuperLink, SuperExec, one SuperNode a site.

For rehearsals and tests; a deployment across hospitals adds TLS, node authentication and a supervisor.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from oncofed.deploy.bundle import write_bundle
from oncofed.deploy.engine import QUIET, check_version

STOP_S = 12.0
"""Flower forces its own exit after 5 s; only then is a process killed."""


def run_on_superlink(
    config: dict[str, bool | int | float | str], site_folders: list[Path], root: Path, timeout_s: float = 1800.0
) -> None:
    """Run a run config with real processes whose logs, keys and state lie below `root`; raises when the run fails."""
    bundle = write_bundle(root / "bundle", config)
    nodes = [f'site-dir="{folder.resolve()}" simulated=true' for folder in site_folders]
    with federation(root, nodes) as home:
        run = _flwr(home, "run", bundle)
        deadline = time.monotonic() + timeout_s
        while True:
            # `flwr run --stream` exits with 0 even when the run failed: only the listing tells.
            state = _flwr(home, "list", "--run-id", run["run-id"])["runs"][0]
            if state["status"].startswith("finished"):
                break
            if time.monotonic() > deadline:
                _flwr(home, "stop", run["run-id"])
                raise TimeoutError(f"the run did not finish within {timeout_s:g} s; logs are in {root}")
            time.sleep(1)
        if state["status"] != "finished:completed":
            raise RuntimeError(
                f"the run ended as {state['status']} ({state.get('status-details', '')}); logs are in {root}\n{_tail(root)}"
            )


@contextlib.contextmanager
def federation(root: Path, node_configs: list[str]) -> Iterator[Path]:
    """Start SuperLink, SuperExec and SuperNodes on free loopback ports; yields the home of the `flwr` command."""
    check_version()
    root.mkdir(parents=True, exist_ok=True)
    port = _free_port()
    url = f"127.0.0.1:{port}"
    processes: list[_Process] = []
    try:
        link = ["flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", port, "--isolation", "process"]
        processes.append(
            _Process([*link, "--database", root / "link.db", "--disable-runtime-dependency-installation"], root, "link")
        )
        _wait_healthy(url, processes[0], root)
        processes.append(
            _Process(["flower-superexec", "--insecure", "--runtime-api-address", url], root, "exec", home="link")
        )
        for i, config in enumerate(node_configs):
            node = [
                "flower-supernode",
                "--insecure",
                "--superlink",
                url,
                "--port",
                _free_port(),
                "--node-config",
                config,
            ]
            processes.append(_Process(node, root, f"node-{i}"))
        home = root / "home-cli"
        home.mkdir(exist_ok=True)
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "{url}"\ninsecure = true\n'
        )
        yield home
    finally:
        for process in reversed(processes):
            process.ask_to_stop()
        for process in reversed(processes):
            process.stop()


class _Process:
    """One Flower process in a session of its own, so that its children end with it."""

    def __init__(self, command: list[Any], root: Path, name: str, home: str = "") -> None:
        folder = root / f"work-{name}"
        folder.mkdir(parents=True, exist_ok=True)
        self.log: IO[bytes] = (root / f"{name}.log").open("wb")
        program = str(Path(sys.executable).parent / str(command[0]))
        self.process = subprocess.Popen(
            [program, *map(str, command[1:])],
            stdout=self.log,
            stderr=subprocess.STDOUT,
            env=_environment(root / f"home-{home or name}"),
            cwd=folder,
            start_new_session=True,
        )

    def ask_to_stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)

    def stop(self) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.log.close()


def _environment(home: Path) -> dict[str, str]:
    home.mkdir(parents=True, exist_ok=True)
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("FLWR_")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return inherited | QUIET | {"FLWR_HOME": str(home), "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2", "PATH": path}


def _flwr(home: Path, *arguments: object) -> dict[str, Any]:
    command = [str(Path(sys.executable).parent / "flwr"), *map(str, arguments), "--format", "json"]
    done = subprocess.run(
        command, env=_environment(home), cwd=home, capture_output=True, text=True, timeout=120, check=False
    )
    answer = json.loads(done.stdout[done.stdout.index("{") :]) if "{" in done.stdout else {}
    if not answer.get("success"):
        raise RuntimeError(f"flwr {arguments[0]} failed ({done.returncode}): {done.stdout[-800:]} {done.stderr[-800:]}")
    return answer


def _wait_healthy(url: str, process: _Process, root: Path) -> None:
    deadline = time.monotonic() + 60
    while True:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"http://{url}/health", timeout=1)
            return
        if process.process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"the SuperLink did not start; see {root / 'link.log'}\n{_tail(root)}")
        time.sleep(0.2)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _tail(root: Path) -> str:
    return "\n".join(f"--- {f.name}\n{f.read_text(errors='replace')[-1500:]}" for f in sorted(root.glob("*.log")))
