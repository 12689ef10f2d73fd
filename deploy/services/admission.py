"""Keeps the SuperLink's list of nodes as the roster says: active members' keys are registered, all others are not."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key
from oncofed.common.consortium import SignedRoster
from oncofed.deploy.engine import Node, nodes_of
from oncofed.deploy.loopback import flwr

POLL_S = 2.0
AGAIN_S = 60.0
"""It is looked at anew after this long also when the roster has not changed."""
UNREGISTERED = "unregistered"


@dataclass
class Admission:
    """`folder` has roster.json and coordinator.pub, `home` Flower's configuration; `answers` says whether the SuperLink is there."""

    folder: Path
    database: Path
    home: Path
    answers: Callable[[], bool]
    say: Callable[[str], None]
    _seen: tuple[int, float] = (0, 0.0)
    _told: set[str] = field(default_factory=set)

    def keep(self, stop: threading.Event) -> None:
        """Follow the roster until `stop` is set; what fails is said once and tried again."""
        while not stop.wait(POLL_S):
            try:
                stamp = (self.folder / "roster.json").stat().st_mtime_ns
                if (stamp != self._seen[0] or time.monotonic() > self._seen[1]) and self.answers():
                    self.bring()
                    self._seen = stamp, time.monotonic() + AGAIN_S
            except Exception as error:  # also Flower's own: admission must go on
                self._once(f"{type(error).__name__}: {error}")

    def bring(self) -> None:
        """Register and unregister what differs from the roster."""
        roster = SignedRoster.read(self.folder / "roster.json", (self.folder / "coordinator.pub").read_text().strip())
        wanted = {member.node_key: name for name, member in roster.active.items()}
        owners = {member.node_key: name for name, member in roster.members.items() if member.node_key}
        known = {openssh(node): node for node in nodes_of(self.database)}
        for key, node in known.items():
            if key not in wanted and node.status != UNREGISTERED:
                flwr(self.home, "supernode", "unregister", node.identifier)
                self.say(
                    f"{owners.get(key, 'a former key')}: no node of this key is let in any more (roster {roster.serial})"
                )
        for key, name in wanted.items():
            if key not in known:
                self._register(name, key)
                self.say(f"{name}: its node is let in (roster {roster.serial})")
            elif known[key].status == UNREGISTERED:
                self._once(
                    f"{name}: its key was revoked here before, and Flower takes no key twice; make it a new kit: oncofed consortium rotate "
                    f"member {self.folder} '{name}'"
                )

    def _register(self, name: str, key: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "node.pub"
            file.write_text(key + "\n")
            flwr(self.home, "supernode", "register", file, "--name", name)

    def _once(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            self.say(text)


def openssh(node: Node) -> str:
    """A node's key as rosters write it; empty where it has none."""
    if not node.key:
        return ""
    return load_pem_public_key(node.key).public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
