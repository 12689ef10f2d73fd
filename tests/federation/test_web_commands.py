"""The commands `oncofed study serve` and `oncofed study track`, as a coordinator gives them."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from oncofed.deploy.cli import cli
from toy_journal import write_journal
from typer.testing import CliRunner


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return write_journal(tmp_path / "out")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@pytest.mark.slow
def test_serve_prints_a_token_that_opens_the_page(out: Path) -> None:
    port = free_port()
    command = [sys.executable, "-c", "from oncofed.deploy.cli import main; main()", "study", "serve", str(out)]
    process = subprocess.Popen(
        [*command, "--port", str(port)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == f"http://127.0.0.1:{port}/\n"
        told = re.fullmatch(r"token: ([\w-]{43})\n", process.stdout.readline())
        assert told, "whole, on a line of its own"
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", follow_redirects=True) as client:
            for _ in range(200):
                try:
                    client.get("/login")
                    break
                except httpx.ConnectError:
                    time.sleep(0.05)
            assert "pan-cancer-1" not in client.get("/").text
            page = client.post("/login", data={"token": told[1]})
            assert "pan-cancer-1" in page.text
            assert "server" not in page.headers, "what serves it is nobody's business"
    finally:
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=20)
    assert "Traceback" not in rest
    assert told[1] not in rest


def test_serve_refuses_what_it_cannot_do(out: Path, tmp_path: Path) -> None:
    for args, wanted in (
        ([str(tmp_path)], "no run was started here"),
        ([str(out), "--host", "192.0.2.1"], "in the clear"),
        ([str(out), "--certificate", "a.pem"], "belong together"),
    ):
        result = CliRunner().invoke(cli, ["study", "serve", *args])
        assert wanted in str(result.exception)
    assert not (out / "web.token").exists()
    assert not (tmp_path / "web.token").exists()


def test_track_adds_what_is_new(out: Path, tmp_path: Path) -> None:
    command = ["study", "track", str(out), "--to", f"tensorboard:{tmp_path / 'board'}"]
    assert CliRunner().invoke(cli, command).stdout == "7 rounds added\n"
    assert CliRunner().invoke(cli, command).stdout == "0 rounds added\n"
    assert "tensorboard:DIR" in str(CliRunner().invoke(cli, [*command[:4], "here"]).exception)
