"""A consortium as it is deployed, made from nothing with oncofed's own commands: coordinator's folder, hospitals, their supervisors."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from oncofed.client import bundle_store
from oncofed.client.consortium import FOLDER
from oncofed.client.data.site import SiteFolder
from oncofed.common import wire
from oncofed.deploy import cli
from oncofed.deploy.consortium.folder import KITS, ROSTER, Folder
from oncofed.deploy.services.coordinator import Server
from oncofed.deploy.services.edge import find_nginx
from oncofed.deploy.services.node import SiteNode
from oncofed.deploy.services.processes import Child, free_port
from oncofed.deploy.services.running import Running, members_seen
from oncofed.server.journal import JOURNAL
from toy_processes import until
from typer.testing import CliRunner

SERVER = "server"
"""The coordinator's name among the parties; the others are the hospitals'."""


def without_nginx() -> str:
    """Why no server can be started here; empty where it can."""
    try:
        find_nginx()
    except ValueError as error:
        return str(error)
    return ""


def called(*words: object) -> str:
    """What a command prints, in one line; it must end well."""
    result = CliRunner().invoke(cli.cli, list(map(str, words)))
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    text = " ".join(result.output.split())
    assert result.exit_code == 0, text
    return text


class Consortium:
    """Folders of all parties, and the commands that run in them. `within` puts words before a party's long-running commands."""

    def __init__(
        self,
        root: Path,
        sites: Sequence[Path],
        address: str = "127.0.0.1",
        within: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self.root, self.address, self.within = root, address, within or {}
        self.sites = {SiteFolder.open(folder).name: folder for folder in sites}
        self.port, self.health = free_port(), free_port()
        settings = root / "consortium.toml"
        settings.write_text(
            f'name = "Toy"\naddress = "{address}"\nport = {self.port}\nsuperlink_port = {free_port()}\n'
            f"members = {json.dumps(list(self.sites))}\n"
        )
        coordinator = root / "coordinator"
        called("consortium", "init", settings, "--out", coordinator)
        for name, site in self.sites.items():
            called("site", "enrol", coordinator / KITS / f"{name}.zip", "--site", site)
            called("consortium", "admit", coordinator, site / FOLDER / f"enrolment-{name}.json")
        for site in self.sites.values():
            called("site", "roster", coordinator / ROSTER, "--site", site)
        self.folder, self.server = Folder.open(coordinator), Server.open(coordinator)
        self.started: dict[str, subprocess.Popen[bytes]] = {}

    def command(self, *words: object, at: str = "") -> list[str]:
        """A command as a process of a party."""
        program = [sys.executable, "-c", "from oncofed.deploy.cli import main; main()"]
        return [*self.within.get(at, ()), *program, *map(str, words)]

    def start(self, name: str, *words: object) -> None:
        """Run a supervisor in the background; it ends with the test, also when that is killed."""
        with (self.root / f"{name}.out").open("ab") as log:
            command = self.command(*words, at=name)
            self.started[name] = Child(command, folder=self.root, environment=os.environ, output=log).process

    def run(self, *words: object, at: str = "", timeout_s: float = 120.0) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*words, at=at),
            env=os.environ | ({"FLWR_HOME": str(self.server.flower_home)} if at == SERVER else {}),
            cwd=self.root,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def coordinator(self, *words: object, timeout_s: float = 120.0) -> str:
        """What a command in the coordinator's shell prints, in one line; it must end well."""
        done = self.run(*words, at=SERVER, timeout_s=timeout_s)
        assert done.returncode == 0, done.stdout + done.stderr + self.last_words()
        return " ".join(done.stdout.split())

    def approve_bundle(self) -> None:
        """At each hospital a person approves the bundle of studies; `unlock` lets it be removed again."""
        called("study", "bundle", "--out", self.root / "sent")
        (bundle,) = (self.root / "sent").iterdir()
        for site in self.sites.values():
            said = ("--by", "Dr. Ada Lovelace", "--bundle", bundle, "--flower-home", site / ".oncofed" / "flower")
            called("site", "approve", site, *said, "--yes")

    def unlock(self) -> None:
        """Or nobody could remove what is locked at the hospitals."""
        for site in self.sites.values():
            bundle_store.unlock(site / ".oncofed" / "flower" / bundle_store.APPS)

    def start_all(self) -> None:
        health = f"127.0.0.1:{self.health}"
        self.start(SERVER, "server", "start", self.folder.path, "--bind", self.address, "--health", health)
        for name, site in self.sites.items():
            self.start(name, "site", "start", site)
        self.until_online(*self.sites)

    def nodes(self) -> dict[str, str]:
        return {m.name: m.node for m in members_seen(self.server)}

    def until_online(self, *names: str) -> None:
        until(lambda: {self.nodes()[n] for n in names} == {"online"} and all(self.node(n).ready for n in names), 240.0)

    def node(self, name: str) -> Running:
        return Running.read(SiteNode.open(self.sites[name]).status_file)

    def log(self, name: str) -> str:
        return (self.sites[name] / ".oncofed" / "logs" / "node.log").read_text()

    def last_words(self) -> str:
        """The ends of the server's logs and the nodes', for a test that failed."""
        files = sorted((self.server.state / "logs").glob("*.log"))
        files += [site / ".oncofed" / "logs" / "node.log" for site in self.sites.values()]
        return "\n".join(f"--- {f}\n{f.read_text(errors='replace')[-1500:]}" for f in files if f.exists())

    def stop_all(self) -> None:
        for process in self.started.values():
            process.terminate()
        for process in self.started.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(40)
            process.kill()
            process.wait()


def events(out: Path) -> list[dict[str, Any]]:
    """The journal of a run so far; a line that is being written is left for the next time."""
    file = out / JOURNAL
    return (
        [json.loads(line) for line in file.read_text().splitlines(True) if line.endswith("\n")] if file.exists() else []
    )


def asked(out: Path, round_: int) -> bool:
    """Whether a run's server has asked for a round of training."""
    return any((e["event"], e.get("kind"), e.get("round")) == ("question", wire.TRAIN, round_) for e in events(out))


def answered(out: Path, round_: int, site: str) -> float:
    """When a site's answer to a round of training came in, in seconds since 1970; 0 before."""
    answer = ("answer", wire.TRAIN, round_, site)
    told = [e for e in events(out) if (e["event"], e.get("kind"), e.get("round"), e.get("site")) == answer]
    return datetime.fromisoformat(told[0]["time"]).timestamp() if told else 0.0
