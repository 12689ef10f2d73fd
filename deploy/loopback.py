"""A throw-away federation of real Flower processes on loopback: SuperLink, SuperExec, one SuperNode a site.

For rehearsals and tests; a deployment across hospitals adds TLS, node authentication and a supervisor.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

from oncofed.deploy.bundle import run_options, write_bundle
from oncofed.deploy.engine import QUIET, check_version
from oncofed.deploy.services.processes import Child, flower_environment, free_port
from oncofed.deploy.services.warm_start import warm


def run_on_superlink(
    config: dict[str, bool | int | float | str], site_folders: list[Path], root: Path, timeout_s: float = 1800.0
) -> None:
    """Run a run config with real processes whose logs, keys and state lie below `root`; raises when the run fails."""
    bundle = write_bundle(root / "bundle", config)
    nodes = [f'site-dir="{folder.resolve()}" simulated=true' for folder in site_folders]
    for file in root.glob("link.db*"):  # of a run that was killed: its nodes and messages are gone
        file.unlink()
    with Loopback(root, nodes) as loopback:
        wait(submit(bundle, home=loopback.home), home=loopback.home, timeout_s=timeout_s, logs=root)


def submit(bundle: Path, connection: str = "", *, home: Path | None = None) -> str:
    """Start a run of a bundle, with the run config beside it; returns its id. Without `home` the connections are those of the user's own Flower."""
    return str(flwr(home, "run", bundle, *([connection] if connection else []), *run_options(bundle))["run-id"])


def wait(
    run: str, connection: str = "", *, home: Path | None = None, timeout_s: float = math.inf, logs: Path | None = None
) -> None:
    """Wait for the end of a run; raises where it was no good one."""
    deadline, where = time.monotonic() + timeout_s, [connection] if connection else []
    hint = f"logs are in {logs}" if logs else f"`flwr log {run}` tells more"
    while True:
        # `flwr run --stream` exits with 0 even when the run failed: only the listing tells.
        asked = time.monotonic()
        state = flwr(home, "list", *where, "--run-id", run)["runs"][0]
        if state["status"].startswith("finished"):
            break
        if time.monotonic() > deadline:
            flwr(home, "stop", run, *where)
            raise TimeoutError(f"the run did not finish within {timeout_s:g} s; {hint}")
        time.sleep(max(1.0, 2 * (time.monotonic() - asked)))  # the command takes a second of a core that sites need
    if state["status"] != "finished:completed":
        raise RuntimeError(
            f"the run ended as {state['status']} ({state.get('status-details', '')}); {hint}"
            + (f"\n{_tail(logs)}" if logs else "")
        )


class Loopback:
    """SuperLink, SuperExec and SuperNodes on free loopback ports; `home` is that of the `flwr` command.

    The processes go by name: `link`, `exec`, `node-0` and so on. Each can be killed and started again, to test what then happens.
    """

    def __init__(self, root: Path, node_configs: list[str], host: str = "127.0.0.1") -> None:
        check_version()
        self.root, self.home, self.port = root, root / "home-cli", free_port()
        self.url = f"127.0.0.1:{self.port}"
        link: list[Any] = ["flower-superlink", "--insecure", "--host", host, "--port", self.port]
        link += ["--isolation", "process", "--database", root / "link.db", "--disable-runtime-dependency-installation"]
        self.commands: dict[str, list[Any]] = {
            "link": link,
            "exec": ["flower-superexec", "--insecure", "--runtime-api-address", self.url],
        }
        node = ["flower-supernode", "--insecure", "--superlink", self.url]
        for i, config in enumerate(node_configs):
            self.commands[f"node-{i}"] = [*node, "--port", free_port(), "--node-config", config]
        self.processes: dict[str, _Process] = {}

    def __enter__(self) -> Loopback:
        self.home.mkdir(parents=True, exist_ok=True)
        (self.home / "config.toml").write_text(
            f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "{self.url}"\ninsecure = true\n'
        )
        try:
            for name in self.commands:
                self.start(name)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in reversed(self.processes.values()):
            process.ask_to_stop()
        for process in reversed(self.processes.values()):
            process.stop()

    def start(self, name: str) -> None:
        """Start a process, or start it again; the SuperLink is waited for."""
        home = "link" if name == "exec" else name
        self.processes[name] = _Process(self.commands[name], self.root, name, home)
        if name == "link":
            _wait_healthy(self.url, self.processes[name], self.root)

    def kill(self, name: str) -> None:
        """End a process and its children as `kill -9` or a loss of power would."""
        self.processes[name].kill()


class _Process(Child):
    """One Flower process with a log and a home below `root`."""

    def __init__(self, command: list[Any], root: Path, name: str, home: str = "") -> None:
        root.mkdir(parents=True, exist_ok=True)
        with (root / f"{name}.log").open("ab") as log:
            environment = flower_environment(root / f"home-{home or name}")
            if name.startswith("node-"):
                environment = warm(environment, root / f"home-{name}")
            super().__init__(command, folder=root / f"work-{name}", environment=environment, output=log)


def flwr(home: Path | None, *arguments: object) -> dict[str, Any]:
    """The answer of a `flwr` command; raises `RuntimeError` with what it said where it failed."""
    command = [str(Path(sys.executable).parent / "flwr"), *map(str, arguments), "--format", "json"]
    environment = flower_environment(home) if home else os.environ | QUIET
    done = subprocess.run(command, env=environment, cwd=home, capture_output=True, text=True, timeout=120, check=False)
    answer = json.loads(done.stdout[done.stdout.index("{") :]) if "{" in done.stdout else {}
    if not answer.get("success"):
        told = str(answer.get("error-message", "")) or f"{done.stdout[-800:]} {done.stderr[-800:]}"
        raise RuntimeError(f"flwr {arguments[0]} failed ({done.returncode}): {' '.join(told.split())}")
    return answer


def _wait_healthy(url: str, process: _Process, root: Path) -> None:
    deadline = time.monotonic() + 60
    while True:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"http://{url}/health", timeout=1)
            return
        if not process.alive or time.monotonic() > deadline:
            raise RuntimeError(f"the SuperLink did not start; see {root / 'link.log'}\n{_tail(root)}")
        time.sleep(0.2)


def _tail(root: Path) -> str:
    return "\n".join(f"--- {f.name}\n{f.read_text(errors='replace')[-1500:]}" for f in sorted(root.glob("*.log")))
