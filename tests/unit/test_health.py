"""Health by the gRPC protocol: what probes are told, and what `oncofed health` makes of it."""

from __future__ import annotations

import time

import pytest
from oncofed.deploy.cli import cli
from oncofed.deploy.services.health import HealthServer, check
from oncofed.deploy.services.processes import free_port
from typer.testing import CliRunner


def test_services_are_told_as_they_are_now() -> None:
    told = {"": True, "ready": False, "node": True}
    with HealthServer("127.0.0.1:0", lambda: told) as server:
        address = f"127.0.0.1:{server.port}"
        assert (check(address), check(address, "ready"), check(address, "node")) == (
            "SERVING",
            "NOT_SERVING",
            "SERVING",
        )
        assert check(address, "link") == "no service 'link' there"
        told["ready"] = True
        end = time.monotonic() + 5
        while check(address, "ready") != "SERVING":
            assert time.monotonic() < end
            time.sleep(0.1)
    assert check(address).startswith(f"no answer from {address}")


def test_the_command_ends_with_the_answer() -> None:
    with HealthServer("127.0.0.1:0", lambda: {"": True, "ready": False}) as server:
        address, run = f"127.0.0.1:{server.port}", CliRunner().invoke
        assert run(cli, ["health", address]).exit_code == 0
        answer = run(cli, ["health", address, "--service", "ready"])
        assert (answer.exit_code, answer.output.strip()) == (1, "NOT_SERVING")
    assert run(cli, ["health", f"127.0.0.1:{free_port()}"]).exit_code == 1


def test_an_address_that_is_taken_is_refused() -> None:
    with (
        HealthServer("127.0.0.1:0", lambda: {"": True}) as server,
        pytest.raises(ValueError, match=f"--health 127.0.0.1:{server.port}: nothing can listen there"),
    ):
        HealthServer(f"127.0.0.1:{server.port}", lambda: {"": True})
