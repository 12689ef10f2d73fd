"""ClientApps that are forked from a process with everything imported: the same programs, with noise of their own, and never old code."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from oncofed.deploy.services.warm_start import CLIENTAPP, ForkServer
from toy_processes import until

pytestmark = pytest.mark.slow

TOY = f"""#!{sys.executable}
import json, os, signal, subprocess, sys

there = sorted(set(sys.modules) & {{"oncofed.client.app", "oncofed.client.explain", "flwr.supernode.cli", "torch"}})
import numpy as np
import torch
from oncofed.client.approval import package_hash
from oncofed.common.noise import SecureNoise

assert __name__ == "__main__"
assert not torch.cuda.is_initialized()
(a, b), out = (float(x) for x in sys.argv[1:3]), sys.argv[3]
noise = SecureNoise().normal(4).tolist()
told = {{
    "there": there, "noise": [list(map(float, noise)), np.random.default_rng().normal(), os.urandom(8).hex()],
    "sum": a + b, "threads": float((torch.ones(2000, 2000) @ torch.ones(2000, 2000))[0, 0]),
    "exit": subprocess.run(["false"]).returncode, "child": signal.getsignal(signal.SIGCHLD) is signal.SIG_DFL,
    "hash": package_hash(), "process": os.getpid(), "parent": os.getppid(),
}}
if len(sys.argv) > 4:
    import oncofed.client.explain
open(out + "~", "w").write(json.dumps(told))
os.rename(out + "~", out)
"""


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in which `flwr-clientapp` is a toy that tells how it was begun."""
    folder = tmp_path_factory.mktemp("programs")
    (folder / CLIENTAPP).write_text(TOY)
    (folder / CLIENTAPP).chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
        yield folder


@pytest.fixture(scope="module")
def server(programs: Path) -> Iterator[ForkServer]:
    server = ForkServer()
    assert not server.begin([CLIENTAPP, "1", "1", str(programs / "too-early")])
    yield server
    server.close()
    assert server.process.wait(10) == 0


@pytest.fixture
def fork(server: ForkServer, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """What the toy tells of itself, forked."""

    def begin(name: str = "told", *more: str) -> dict[str, Any]:
        out = tmp_path / name
        until(lambda: server.begin([CLIENTAPP, "1.5", "2", str(out), *more]), pause_s=0.05)
        until(out.exists, pause_s=0.02)
        return dict(json.loads(out.read_text()))

    return begin


def test_a_program_is_forked_as_if_it_was_started(server: ForkServer, fork: Callable[..., dict[str, Any]]) -> None:
    from oncofed.client.approval import package_hash

    told = fork()
    assert told["there"] == ["flwr.supernode.cli", "oncofed.client.app", "torch"]
    assert (told["parent"], told["sum"], told["threads"]) == (server.process.pid, 3.5, 2000.0)
    assert (told["exit"], told["child"], told["hash"]) == (1, True, package_hash())
    # ended ones leave no zombie
    until(lambda: not Path(f"/proc/{told['process']}").exists())


def test_no_two_forks_draw_the_same_noise(fork: Callable[..., dict[str, Any]]) -> None:
    drawn = [str(part) for name in ("a", "b", "c") for part in fork(name)["noise"]]
    assert len(set(drawn)) == len(drawn)


def test_what_a_message_needed_more_is_there_for_the_next(fork: Callable[..., dict[str, Any]]) -> None:
    assert "oncofed.client.explain" not in fork("a", "needs more")["there"]
    until(lambda: "oncofed.client.explain" in fork("b")["there"])


def test_other_programs_are_started_by_flower(
    server: ForkServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not server.begin(["flwr-serverapp"])
    (tmp_path / CLIENTAPP).write_text("#!/bin/sh\n")
    (tmp_path / CLIENTAPP).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert not server.begin([CLIENTAPP])


def test_code_that_has_changed_or_a_process_that_died_is_replaced(
    server: ForkServer, fork: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    fork()
    server.code = {}  # as an upgrade of the package would show
    old = server.process
    assert not server.begin([CLIENTAPP, "1", "1", str(tmp_path / "old")])
    assert old.wait(10) == 0
    assert fork("new")["parent"] == server.process.pid != old.pid
    os.kill(server.process.pid, signal.SIGKILL)
    server.process.wait(10)
    assert not server.begin([CLIENTAPP, "1", "1", str(tmp_path / "dead")])
    assert fork("again")["parent"] == server.process.pid
    assert not any((tmp_path / name).exists() for name in ("old", "dead"))
