"""A hospital's node: a SuperNode under a supervisor, which dials out to the coordinator's edge and listens on loopback alone."""

from __future__ import annotations

import os
import threading
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import tomli_w
from oncofed.client.consortium import FOLDER
from oncofed.client.data.site import SiteFolder
from oncofed.client.enrol import NODE_KEY
from oncofed.common.consortium import told
from oncofed.common.enrolment import CA_FILE, KIT_FILE, Kit
from oncofed.common.files import write_text
from oncofed.deploy.engine import check_version
from oncofed.deploy.services.coordinator import responds
from oncofed.deploy.services.health import READY
from oncofed.deploy.services.processes import flower_environment, free_port
from oncofed.deploy.services.service_logs import Logs
from oncofed.deploy.services.supervise import Service, Supervisor
from oncofed.deploy.services.warm_start import warm
from pydantic import ValidationError

NODE = "node"
CONNECTED = "SuperNode ID: "
"""What Flower's node prints when SuperLink has taken it."""
NOT_YET = "[code: 2004]"
"""What it prints when SuperLink does not take its key: its last session has not ended, or it is not registered (any more)."""
NO_TLS = "ERROR :     SSL/TLS handshake error detected"
"""What it prints when a certificate is none of ours: the thread that asked ends, and nobody asks any more, whatever certificate comes later.

The whole beginning of the line: what a coordinator writes into a message stands further behind."""
GUARD = "bin"
"""Below the node's Flower home: programs that are found before Flower's own, where the hospital has a guard that holds bundles against approvals."""
LINK_S = 30.0
"""How often the way to the coordinator is tried for `ready`."""


@dataclass(frozen=True)
class SiteNode:
    """A site's folder, its work folder, and whom its node dials."""

    folder: Path
    work: Path
    kit: Kit
    device: str = ""

    @classmethod
    def open(cls, folder: Path, work: Path | None = None, device: str = "") -> SiteNode:
        """Raises `ValueError` where the site has not enrolled, or its folder is not the member's."""
        check_version()
        kit, site = installed_kit(folder), SiteFolder.open(folder)
        if site.name != kit.member:
            raise ValueError(
                f'{folder / "site.toml"} says name = "{site.name}", the start-up kit is for "{kit.member}"; correct the name in site.toml'
            )
        node = cls(folder.resolve(), (work or folder / ".oncofed").resolve(), kit, device)
        if not node.key.is_file():
            raise ValueError(
                f"{node.key} is not there: enrol first (oncofed site enrol KIT --site {folder}), or name the work folder of the enrolment with "
                "--work-dir"
            )
        return node

    @property
    def key(self) -> Path:
        return self.work / NODE_KEY

    @property
    def authority(self) -> Path:
        return self.folder / FOLDER / CA_FILE

    @property
    def status_file(self) -> Path:
        return self.work / "run" / f"{NODE}.json"

    @property
    def dials(self) -> str:
        """The edge as `HOST:PORT`."""
        host = f"[{self.kit.address}]" if ":" in self.kit.address else self.kit.address
        return f"{host}:{self.kit.port}"

    def service(self) -> Service:
        """The SuperNode; a new port of loopback for each of its lives."""
        home = self.work / "flower"
        environment = flower_environment(home)
        if (home / GUARD).is_dir():
            environment["PATH"] = f"{home / GUARD}{os.pathsep}{environment['PATH']}"
        environment = warm(environment, home)
        return Service(
            NODE,
            self._command,
            self.work / "run" / "work",
            environment,
            ready=CONNECTED,
            refused=NOT_YET,
            gave_up=NO_TLS,
            watch=(self.key,),
        )

    def supervisor(self, logs: Path | None) -> Supervisor:
        self.status_file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        return Supervisor([self.service()], self.status_file, Logs(logs))

    def _command(self) -> Sequence[object]:
        settings: dict[str, str] = {"site-dir": str(self.folder), "work-dir": str(self.work)}
        if self.device:
            settings["device"] = self.device
        # a file and no words: folders may hold blanks and quotation marks
        file = self.work / "run" / "node-config.toml"
        write_text(file, tomli_w.dumps(settings))
        command: list[object] = ["flower-supernode", "--superlink", self.dials, "--root-certificates", self.authority]
        command += ["--auth-supernode-private-key", self.key, "--host", "127.0.0.1", "--port", free_port()]
        return [*command, "--node-config", file]


class Readiness:
    """What the health protocol tells of a node: ready when it is connected and the coordinator's edge has answered lately."""

    def __init__(self, node: SiteNode, supervisor: Supervisor) -> None:
        self.node, self.supervisor, self.link = node, supervisor, False
        threading.Thread(target=self._follow, daemon=True).start()

    def health(self) -> Mapping[str, bool]:
        told = self.supervisor.health()
        return told | {READY: told[READY] and self.link}

    def _follow(self) -> None:
        while not self.supervisor.stopping.is_set():
            self.link = responds(f"https://{self.node.dials}/health", self.node.authority)
            self.supervisor.stopping.wait(LINK_S if self.link else LINK_S / 6)


def installed_kit(folder: Path) -> Kit:
    """The start-up kit that the site has enrolled with; raises `ValueError` with the remedy."""
    file = folder / FOLDER / KIT_FILE
    try:
        return Kit.model_validate(tomllib.loads(file.read_text()))
    except FileNotFoundError:
        raise ValueError(
            f"{folder} has not enrolled: there is no {file}; take the coordinator's start-up kit in with oncofed site enrol KIT --site {folder}"
        ) from None
    except ValidationError as error:
        raise ValueError(f"{file}: {told(error)}; enrol again with the coordinator's start-up kit") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is no TOML ({error}); enrol again with the coordinator's start-up kit") from None
