"""Child processes that end with their parent, whatever ends it, and take their own children along."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from oncofed.deploy.engine import QUIET

STOP_S = 12.0
"""Flower forces its own exit after 5 s; only then is a process killed."""

# A launcher and no `preexec_fn`: Python must not run between fork and exec of a process that has threads (health protocol, logs).
# The parent may have died before the launcher asks to be told: then its process id is another.
_LAUNCHER = (
    "import ctypes,os,sys\n"
    "ctypes.CDLL(None).prctl(1,15)\n"  # PR_SET_PDEATHSIG, SIGTERM
    "if os.getppid()!=int(sys.argv[1]): sys.exit(143)\n"
    "os.execvp(sys.argv[2],sys.argv[2:])\n"
)


def flower_environment(home: Path, more: Mapping[str, str] | None = None) -> dict[str, str]:
    """Environment of a Flower process with its own `FLWR_HOME` and nothing of the user's Flower; PATH leads to Flower's programs."""
    home.mkdir(parents=True, exist_ok=True)
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("FLWR_")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    own = {"FLWR_HOME": str(home), "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2", "PATH": path}
    return inherited | QUIET | own | dict(more or {})


class Child:
    """A process in a session of its own. On Linux it gets SIGTERM when the thread that started it ends: start it from the main one."""

    def __init__(
        self, command: Sequence[object], *, folder: Path, environment: Mapping[str, str], output: int | IO[bytes]
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        words = list(map(str, command))
        if sys.platform == "linux":
            words = [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid()), *words]
        self.process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            cwd=folder,
            start_new_session=True,
        )

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def ask_to_stop(self) -> None:
        if self.alive:
            self.process.send_signal(signal.SIGTERM)

    def stop(self) -> None:
        """Wait for the end of a process that was asked to stop; kill what is left of it."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_S)
        self.kill()

    def kill(self) -> None:
        """End the process and its children as `kill -9` would."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def free_port() -> int:
    """A port of loopback that nobody listens on now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
