"""What is running: reads the status files that supervisors write, and asks them to stop."""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from oncofed.common.consortium import SignedRoster
from oncofed.deploy.engine import nodes_of
from oncofed.deploy.services.admission import UNREGISTERED, openssh
from oncofed.deploy.services.coordinator import Server
from oncofed.deploy.services.lock import ELSEWHERE, holder
from oncofed.deploy.services.processes import STOP_S


@dataclass(frozen=True)
class Running:
    """A supervisor's status file; `process` is the supervisor's, None where it does not run."""

    name: str
    process: int | None
    services: dict[str, dict[str, Any]]

    @classmethod
    def read(cls, file: Path) -> Running:
        """What it last wrote; of a supervisor that has ended, its processes have, too."""
        process = holder(file.with_suffix(".lock"))
        try:
            services = json.loads(file.read_text())["services"]
        except (OSError, ValueError, KeyError):
            services = {}
        if process is None:
            services = {n: s | {"state": "stopped", "ready": False, "process": None} for n, s in services.items()}
        return cls(file.stem, process, services)

    @property
    def ready(self) -> bool:
        return self.process is not None and bool(self.services) and all(s["ready"] for s in self.services.values())


def running(folder: Path) -> list[Running]:
    """All supervisors that have ever written into a folder."""
    return [Running.read(f) for f in sorted(folder.glob("*.json"))]


def stop(file: Path) -> bool:
    """End the supervisor of a status file and wait for it; False where none ran. Raises `RuntimeError` where it goes on."""
    lock = file.with_suffix(".lock")
    process = holder(lock)
    if process is None:
        return False
    if process == ELSEWHERE:
        raise ValueError(f"what {file.stem} runs is in another container; stop that one")
    os.kill(process, signal.SIGTERM)
    end = time.monotonic() + 3 * STOP_S
    while holder(lock) is not None:
        if time.monotonic() > end:
            raise RuntimeError(
                f"process {process} has not ended {3 * STOP_S:.0f} s after SIGTERM; see its log, or kill it"
            )
        time.sleep(0.1)
    return True


@dataclass(frozen=True)
class MemberSeen:
    """A member of the roster, and what the SuperLink knows of its node."""

    name: str
    status: str
    node: str
    last_seen: str


def members_seen(server: Server) -> list[MemberSeen]:
    """All members; `node` is online, offline, never seen, or why it cannot dial in."""
    roster = SignedRoster.read(server.folder / "roster.json", (server.folder / "coordinator.pub").read_text().strip())
    nodes = {openssh(n): n for n in nodes_of(server.database)}
    told = []
    for name, member in sorted(roster.members.items()):
        node = nodes.get(member.node_key) if member.node_key else None
        if node is None:
            state = "not let in yet" if member.status == "active" else "-"
        elif node.status == UNREGISTERED:
            state = "key revoked for good" if member.status == "active" else "-"
        elif node.status == "online" and node.online_until > time.time():
            state = "online"
        else:
            state = "offline" if node.activated else "never seen"
        seen = "now" if state == "online" else _time(node.online_until) if node and node.online_until else ""
        told.append(MemberSeen(name, member.status, state, seen))
    return told


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(min(seconds, time.time()), UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
