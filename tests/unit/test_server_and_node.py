"""What the coordinator's server and a hospital's node are started with."""

from __future__ import annotations

import shutil
import sys
import tomllib
from pathlib import Path

import pytest
from oncofed.common.study import Study
from oncofed.deploy.cli import cli
from oncofed.deploy.operate.control import among_members
from oncofed.deploy.services.coordinator import PARTS, Server
from oncofed.deploy.services.node import SiteNode
from toy_consortium import Toy
from typer.testing import CliRunner


@pytest.fixture
def toy(tmp_path: Path) -> Toy:
    return Toy.make(tmp_path / 'a "quoted" folder')


def option(command: list[str], name: str) -> str:
    return command[command.index(name) + 1]


def command_of(server: Server, part: str) -> list[str]:
    (service,) = server.services([part])
    return list(map(str, service.command()))


def test_the_superlink_asks_nodes_for_keys_and_hides_on_loopback(toy: Toy) -> None:
    server = Server.open(toy.folder.path)
    link = command_of(server, "link")
    assert option(link, "--host") == "127.0.0.1"
    assert option(link, "--port") == "8000"
    assert "--enable-supernode-auth" in link
    assert "--disable-runtime-dependency-installation" in link
    assert "--insecure" not in link
    assert option(link, "--isolation") == "process"
    secret = option(link, "--superexec-auth-secret-file")
    executor = command_of(server, "exec")
    assert secret == option(executor, "--superexec-auth-secret-file")
    assert option(executor, "--runtime-api-address") == "127.0.0.1:8000"
    assert option(executor, "--root-certificates") == option(link, "--ssl-ca-certfile")
    assert Path(option(link, "--database")).parent == server.state
    assert oct(server.state.stat().st_mode & 0o777) == "0o700"


def test_flower_home_names_the_superlink(toy: Toy) -> None:
    server = Server.open(toy.folder.path)
    server.write_flower_home()
    told = tomllib.loads((server.flower_home / "config.toml").read_text())["superlink"]
    assert told[told["default"]] == {
        "address": "127.0.0.1:8000",
        "root-certificates": str(toy.folder.path / "ca.crt"),
    }


def test_a_study_goes_by_the_roster_of_the_server_that_it_is_sent_to(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server.open(toy.folder.path)
    monkeypatch.setenv("FLWR_HOME", str(server.flower_home))
    assert among_members(Study(), "consortium").runtime.roster == "", "no server's home"
    server.write_flower_home()
    roster = str(toy.folder.path / "roster.json")
    assert among_members(Study(), "consortium").runtime.roster == roster
    assert among_members(Study(), "elsewhere").runtime.roster == ""
    own = Study().changed(runtime__roster="own.json")
    assert among_members(own, "consortium").runtime.roster == "own.json"


def test_the_server_needs_no_signing_key(toy: Toy, tmp_path: Path) -> None:
    for name in ("ca.key", "coordinator.key"):
        (toy.folder.path / name).rename(tmp_path / name)
    folder = toy.root / "coordinator"
    assert len(Server.open(folder).services(PARTS[:2])) == 2
    (folder / "server.key").unlink()
    with pytest.raises(ValueError, match=r"has no server\.key"):
        Server.open(folder)


def test_parts_are_checked_before_anything_runs(toy: Toy) -> None:
    answer = CliRunner().invoke(cli, ["server", "start", str(toy.folder.path), "--only", "link,wedge"])
    assert isinstance(answer.exception, ValueError)
    assert "'wedge' is no part of the server; the parts are link, exec, edge" in str(answer.exception)


def test_a_node_dials_the_edge_with_its_key(toy: Toy) -> None:
    toy.enrol("St. Bergen")
    site = toy.site("St. Bergen")
    node = SiteNode.open(site, device="cuda:0")
    command = list(map(str, node.service().command()))
    assert option(command, "--superlink") == "fl.example.org:9443"
    assert option(command, "--root-certificates") == str(site / "consortium" / "ca.crt")
    assert option(command, "--auth-supernode-private-key") == str(site / ".oncofed" / "node.key")
    assert option(command, "--host") == "127.0.0.1"
    assert "--insecure" not in command
    again = list(map(str, node.service().command()))
    assert option(again, "--port") != option(command, "--port"), "another start, another port that is free"
    config = Path(option(command, "--node-config"))
    assert tomllib.loads(config.read_text()) == {
        "site-dir": str(site),
        "work-dir": str(site / ".oncofed"),
        "device": "cuda:0",
    }
    assert config.suffix == ".toml", "Flower reads it as a file by this ending alone"


def test_a_guard_of_the_hospital_is_found_before_flowers_programs(toy: Toy) -> None:
    toy.enrol("Aachen")
    node = SiteNode.open(toy.site("Aachen"))
    guard = node.work / "flower" / "bin"
    assert str(guard) not in node.service().environment["PATH"]
    guard.mkdir(parents=True)
    for program in ("flwr-clientapp", "flwr-serverapp"):
        (guard / program).touch(0o755)
    path = node.service().environment["PATH"]
    assert [shutil.which(p, path=path) for p in ("flwr-clientapp", "flwr-serverapp")] == [
        str(guard / "flwr-clientapp"),
        str(guard / "flwr-serverapp"),
    ]
    assert shutil.which("flower-superexec", path=path) == str(node.work / "flower" / "warm" / "flower-superexec")
    assert shutil.which("flower-supernode", path=path) == str(Path(sys.executable).parent / "flower-supernode")


def test_a_site_that_has_not_enrolled_or_is_another_is_refused(toy: Toy, tmp_path: Path) -> None:
    site = toy.site("Aachen")
    with pytest.raises(ValueError, match=r"has not enrolled: .* oncofed site enrol KIT"):
        SiteNode.open(site)
    toy.enrol("Aachen")
    with pytest.raises(ValueError, match=r"node\.key is not there: enrol first .* --work-dir"):
        SiteNode.open(site, tmp_path / "elsewhere")
    (site / "site.toml").write_text('name = "Aaachen"\nexpression_unit = "log2"\n')
    with pytest.raises(ValueError, match=r'says name = "Aaachen", the start-up kit is for "Aachen"'):
        SiteNode.open(site)


def test_status_of_what_never_ran(toy: Toy) -> None:
    toy.enrol("Aachen")
    run = CliRunner().invoke
    told = run(cli, ["site", "status", str(toy.site("Aachen"))])
    assert (told.exit_code, "no process was started here yet" in told.output) == (1, True)
    told = run(cli, ["server", "status", str(toy.folder.path)])
    assert told.exit_code == 1
    assert "invited" in told.output
    assert run(cli, ["server", "stop", str(toy.folder.path)]).output.strip() == "it was not running"
