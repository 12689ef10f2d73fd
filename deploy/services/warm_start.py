"""A node's answers begin at once: ClientApps are forked from a process that has already imported what they need.

Flower starts a process for every message, and importing Python's numerical libraries takes each some seconds of a core. Here
SuperNode finds a `flower-superexec` of ours, which is Flower's own with a fork server beside it (as in Python's multiprocessing):
that process imports oncofed once, waits, and forks a ClientApp for every message, in which all else stays as it was: one message,
one process, which ends with its answer. A program that is not ours to fork, or asked for before the imports are done, is started
as Flower would. When the installed package changes, the waiting process is replaced: no message is answered by old code.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from oncofed.common.files import write_program

FOLDER = "warm"
SUPEREXEC, CLIENTAPP = "flower-superexec", "flwr-clientapp"
IMPORTED = ("oncofed.client.app", "flwr.supernode.cli", "oncofed.deploy.engine")
OURS = "oncofed."
READY = b"ready\n"
IMPORTS_S = 120.0
"""How long SuperExec waits for the imports before it starts ClientApps from nothing."""


def warm(environment: Mapping[str, str], home: Path) -> dict[str, str]:
    """The environment of a SuperNode that is to find our `flower-superexec` before Flower's own; it is written below the node's `home`."""
    folder = home / FOLDER
    write_program(folder / SUPEREXEC, "oncofed.deploy.services.warm_start", "superexec()")
    return {**environment, "PATH": f"{folder}{os.pathsep}{environment['PATH']}"}


def superexec() -> None:
    """Flower's `flower-superexec`, whose ClientApps are forked."""
    from oncofed.deploy.engine import run_superexec

    server = ForkServer()
    # a message waits at SuperNode meanwhile; what is started from nothing beside the imports would take as long as both
    server.wait()
    run_superexec(server.begin)


class ForkServer:
    """SuperExec's side: the process that waits with everything imported, and how it is asked to fork."""

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        self.code, self.ready = _code(), False
        self.line, theirs = socket.socketpair()
        # -P: nothing is imported from the folder that it happens to stand in
        command = [sys.executable, "-P", "-m", "oncofed.deploy.services.warm_start", CLIENTAPP, str(theirs.fileno())]
        # ends with us: the line between us breaks
        self.process = subprocess.Popen(command, pass_fds=(theirs.fileno(),))
        theirs.close()

    def wait(self, patience_s: float = IMPORTS_S) -> bool:
        """Whether it is ready to fork, at the latest after so long."""
        if not self.ready and select.select([self.line], [], [], patience_s)[0]:
            self.ready = self.line.recv(len(READY)) == READY
        return self.ready

    def close(self) -> None:
        """End the process that waits; its forks go on."""
        self.line.close()

    def begin(self, command: Sequence[str]) -> bool:
        """Fork the program of a command; False where it has to be started instead."""
        program = shutil.which(command[0])
        if command[0] != CLIENTAPP or program is None or not _is_python(Path(program)):
            return False
        if self.code != _code() or self.process.poll() is not None:
            self.close()
            self._start()
        try:
            if not self.wait(0.0):
                return False
            self.line.sendall(json.dumps([program, *command[1:]]).encode() + b"\n")
        except OSError:  # it has just ended
            return False
        return True


def serve(line: socket.socket) -> list[str]:
    """Import, then fork for every command that comes down the line; returns it in the fork, and ends this process when the line breaks."""
    from oncofed.client.approval import package_hash

    package_hash()  # of the code that is imported now: forks tell it
    for name in IMPORTED:
        importlib.import_module(name)
    told, tell = os.pipe()
    heard: list[socket.socket | int] = [line, told]
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # ended forks leave nothing behind
    line.sendall(READY)
    commands = line.makefile("rb")
    while True:
        gc.collect()
        gc.freeze()  # a collection in a fork would copy all of it
        readable, _, _ = select.select(heard, [], [])
        if line not in readable:
            _import(os.read(told, 65536).decode().split())
            continue
        command = commands.readline()
        if not command:
            os._exit(0)
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            commands.close()
            line.close()
            os.close(told)
            atexit.register(_tell, tell, set(sys.modules))
            return list(json.loads(command))


def _tell(tell: int, before: set[str]) -> None:
    """What a message needed beyond what was imported; the next one finds it there."""
    more = " ".join(name for name in set(sys.modules) - before if name.startswith(OURS))
    if more:
        os.write(tell, more.encode()[:4096] + b" ")


def _import(names: Sequence[str]) -> None:
    for name in names:
        if name.startswith(OURS) and name not in sys.modules:
            with contextlib.suppress(ImportError):  # a name that was cut off
                importlib.import_module(name)


def _code() -> dict[str, int]:
    """When the installed package's files changed."""
    root = Path(__file__).resolve().parents[2]
    return {
        str(file): file.stat().st_mtime_ns
        for part in ("client", "common", "deploy", "server")
        for file in (root / part).rglob("*.py")
    }


def _is_python(program: Path) -> bool:
    """Whether a program is a script of this environment's Python: Flower's own beside us, or the hospital's guard."""
    with program.open("rb") as file:
        first = file.readline(4096).decode(errors="replace").strip()
    return first.startswith("#!") and Path(first[2:]).parent == Path(sys.executable).parent


if __name__ == "__main__":
    argv = serve(socket.socket(fileno=int(sys.argv[2])))
    sys.argv = argv
    runpy.run_path(argv[0], run_name="__main__")
