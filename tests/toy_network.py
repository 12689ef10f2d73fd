"""Machines of a test that are network namespaces: each with one cable to a switch, an address of its own, and no way elsewhere."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

SWITCH = "switch"
PREFIX = "oncofed-test-"
"""Of namespaces' names; the process id of the test follows."""


def ip(*words: str) -> str:
    """What `ip` answers; raises `OSError` with what it says where it fails."""
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=30, check=False)
    if done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


def without_namespaces() -> str:
    """Why no network can be made here; empty where it can."""
    if shutil.which("ip") is None:
        return "iproute2 is not installed"
    try:
        with Network([]):
            return ""
    except OSError as error:
        return f"network namespaces are not permitted here ({error})"


class Network:
    """Machines by name, in order at 10.77.0.1, 10.77.0.2 and so on; nothing of it shows outside, and it is gone at the end."""

    def __init__(self, machines: Sequence[str]) -> None:
        self.machines = list(machines)
        self.made: list[str] = []

    def __enter__(self) -> Network:
        for name in _left_behind():
            ip("netns", "del", name)
        try:
            self._make(SWITCH)
            ip("-n", self._space(SWITCH), "link", "add", "bridge", "type", "bridge")
            ip("-n", self._space(SWITCH), "link", "set", "bridge", "up")
            for machine in self.machines:
                self._connect(machine)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in reversed(self.made):
            subprocess.run(["ip", "netns", "del", self._space(name)], capture_output=True, timeout=30, check=False)
        self.made.clear()

    def address(self, machine: str) -> str:
        return f"10.77.0.{1 + self.machines.index(machine)}"

    def within(self, machine: str) -> list[str]:
        """Words before a command that is to run on a machine; its process is the command's own."""
        return ["ip", "netns", "exec", self._space(machine)]

    def cut(self, machine: str) -> None:
        """Pull a machine's cable out of the switch."""
        ip("-n", self._space(SWITCH), "link", "set", self._port(machine), "down")

    def mend(self, machine: str) -> None:
        ip("-n", self._space(SWITCH), "link", "set", self._port(machine), "up")

    def listeners(self, machine: str) -> set[str]:
        """Where somebody listens on a machine, by TCP, as `ADDRESS:PORT`."""
        command = [*self.within(machine), "ss", "-Hltn"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
        return {line.split()[3] for line in done.stdout.splitlines()}

    def _connect(self, machine: str) -> None:
        self._make(machine)
        here, switch, port = self._space(machine), self._space(SWITCH), self._port(machine)
        ip("-n", here, "link", "set", "lo", "up")
        ip("-n", here, "link", "add", "cable", "type", "veth", "peer", "name", port, "netns", switch)
        ip("-n", switch, "link", "set", port, "master", "bridge", "up")
        ip("-n", here, "address", "add", f"{self.address(machine)}/24", "dev", "cable")
        ip("-n", here, "link", "set", "cable", "up")

    def _make(self, name: str) -> None:
        ip("netns", "add", self._space(name))
        self.made.append(name)

    def _space(self, name: str) -> str:
        number = 0 if name == SWITCH else 1 + self.machines.index(name)
        return f"{PREFIX}{os.getpid()}-{number}"

    def _port(self, machine: str) -> str:
        return f"port{1 + self.machines.index(machine)}"


def _left_behind() -> list[str]:
    """Namespaces of tests that were killed before they could remove them."""
    ours = [line.split()[0] for line in ip("netns", "list").splitlines() if line.startswith(PREFIX)]
    return [name for name in ours if not Path("/proc", name.removeprefix(PREFIX).partition("-")[0]).exists()]
