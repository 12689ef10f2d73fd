"""The coordinator's server: nginx in front, SuperLink and SuperExec behind it, and who may dial in kept after the roster."""

from __future__ import annotations

import ssl
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import tomli_w
from oncofed.common.consortium import ConsortiumFile
from oncofed.common.files import write_text
from oncofed.deploy.engine import check_version
from oncofed.deploy.services.admission import Admission
from oncofed.deploy.services.edge import edge_command, find_nginx, write_edge
from oncofed.deploy.services.processes import flower_environment
from oncofed.deploy.services.service_logs import Logs
from oncofed.deploy.services.supervise import Service, Supervisor

NEEDED = ("consortium.toml", "roster.json", "coordinator.pub", "ca.crt", "server.crt", "server.key", "superexec.secret")
"""Of the coordinator's folder. `ca.key` and `coordinator.key` are not among them: they may stay on another machine."""

CONNECTION, MEMBERS = "consortium", "roster.txt"
"""The SuperLink's name in Flower's configuration, and the file beside it that says where its consortium's roster is."""

LINK, EXEC, EDGE = "link", "exec", "edge"
PARTS = (LINK, EXEC, EDGE)


@dataclass(frozen=True)
class Server:
    """A coordinator's folder, and where the server keeps what it makes."""

    folder: Path
    state: Path
    bind: str = ""
    """Address that the edge listens on; every one without it."""
    link_host: str = "127.0.0.1"
    """Address that the SuperLink listens on: loopback, or, in a container of its own, its private network."""
    link_at: str = "127.0.0.1"
    """Where edge and SuperExec find it."""

    @classmethod
    def open(
        cls, folder: Path, state: Path | None = None, bind: str = "", link_host: str = "", link_at: str = ""
    ) -> Server:
        """Raises `ValueError` where files are missing or consortium.toml is wrong."""
        check_version()
        missing = [n for n in NEEDED if not (folder / n).is_file()]
        if missing:
            raise ValueError(
                f"{folder} cannot be started: it has no {', '.join(missing)}; make the folder with oncofed consortium init, or copy these files "
                "of it here"
            )
        server = cls(
            folder.resolve(),
            (state or folder / "state").resolve(),
            bind,
            link_host or "127.0.0.1",
            link_at or "127.0.0.1",
        )
        _ = server.settings
        return server

    @property
    def settings(self) -> ConsortiumFile:
        return ConsortiumFile.read(self.folder / "consortium.toml")

    @property
    def database(self) -> Path:
        return self.state / "link.db"

    @property
    def flower_home(self) -> Path:
        """`FLWR_HOME` of whoever starts studies here."""
        return self.state / "flower"

    def status_file(self, part: str) -> Path:
        return self.state / "run" / f"{part}.json"

    def services(self, parts: Sequence[str]) -> list[Service]:
        """The processes of these parts, in the order in which they start."""
        self.state.mkdir(mode=0o700, parents=True, exist_ok=True)
        made = {LINK: self._link, EXEC: self._exec, EDGE: self._edge}
        return [made[part]() for part in PARTS if part in parts]

    def supervisor(self, parts: Sequence[str], logs: Path | None) -> Supervisor:
        """Of all these parts, with the roster's admission beside the SuperLink."""
        services, written, background = self.services(parts), Logs(logs), []
        if LINK in parts:
            self.write_flower_home()
            say = partial(_say, written)
            background.append(Admission(self.folder, self.database, self.flower_home, self.answers, say).keep)
        name = "server" if set(parts) >= {LINK, EXEC} else "-".join(parts)
        return Supervisor(services, self.status_file(name), written, background)

    def write_flower_home(self) -> None:
        """Flower's configuration, so that `flwr` and `oncofed study` find this SuperLink with FLWR_HOME set to it."""
        connection = {
            "address": f"127.0.0.1:{self.settings.superlink_port}",
            "root-certificates": str(self.folder / "ca.crt"),
        }
        self.flower_home.mkdir(parents=True, exist_ok=True)
        text = tomli_w.dumps({"superlink": {"default": CONNECTION, CONNECTION: connection}})
        write_text(self.flower_home / "config.toml", text)
        write_text(self.flower_home / MEMBERS, f"{self.folder / 'roster.json'}\n")

    def answers(self) -> bool:
        """Whether the SuperLink answers."""
        return responds(f"https://127.0.0.1:{self.settings.superlink_port}/health", self.folder / "ca.crt")

    def _link(self) -> Service:
        command: list[object] = ["flower-superlink", "--host", self.link_host, "--port", self.settings.superlink_port]
        command += ["--ssl-certfile", self.folder / "server.crt", "--ssl-keyfile", self.folder / "server.key"]
        command += ["--ssl-ca-certfile", self.folder / "ca.crt", "--enable-supernode-auth", "--isolation", "process"]
        command += ["--superexec-auth-secret-file", self.folder / "superexec.secret", "--database", self.database]
        command += ["--disable-runtime-dependency-installation"]
        return self._service(
            LINK, lambda: command, watch=("server.crt", "server.key"), ready="Application startup complete"
        )

    def _exec(self) -> Service:
        at = f"{self.link_at}:{self.settings.superlink_port}"
        command: list[object] = ["flower-superexec", "--runtime-api-address", at]
        command += ["--root-certificates", self.folder / "ca.crt"]
        command += ["--superexec-auth-secret-file", self.folder / "superexec.secret"]
        return self._service(EXEC, lambda: command)

    def _edge(self) -> Service:
        nginx, settings = find_nginx(), self.settings

        def command() -> list[str]:
            configuration = write_edge(
                self.state / "edge",
                certificate=self.folder / "server.crt",
                key=self.folder / "server.key",
                authority=self.folder / "ca.crt",
                port=settings.port,
                superlink=f"{self.link_at}:{settings.superlink_port}",
                bind=self.bind,
            )
            return edge_command(nginx, configuration)

        return self._service(EDGE, command, watch=("server.crt", "server.key"))

    def _service(
        self, name: str, command: Callable[[], Sequence[object]], watch: Sequence[str] = (), ready: str = ""
    ) -> Service:
        environment = flower_environment(self.state / "runtime")
        files = tuple(self.folder / n for n in watch)
        return Service(name, command, self.state / "work" / name, environment, ready=ready, watch=files)


def _say(logs: Logs, text: str) -> None:
    logs.write("admission", f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ} {text}".encode())


def responds(url: str, authority: Path, patience_s: float = 3.0) -> bool:
    """Whether something answers there with 200 under this authority."""
    try:
        context = ssl.create_default_context(cafile=str(authority))
        with urllib.request.urlopen(url, timeout=patience_s, context=context) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError, ValueError):
        return False
