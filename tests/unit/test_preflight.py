"""Preflight against real servers on loopback, each with one thing wrong, and against a site with one thing wrong."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest
from oncofed.client.consortium import accept_roster
from oncofed.client.data.site import SiteFolder, list_sites
from oncofed.client.enrol import enrol
from oncofed.deploy.cli import cli
from oncofed.deploy.consortium.certificates import make_authority
from oncofed.deploy.consortium.folder import Folder, init
from oncofed.deploy.consortium.members import admit, revoke
from oncofed.deploy.preflight import machine, network
from oncofed.deploy.preflight.findings import Check
from oncofed.deploy.preflight.network import Target, network_checks
from oncofed.deploy.preflight.run import Preflight, preflight
from oncofed.deploy.services.processes import free_port
from toy_edges import certificate, standing_in
from typer.testing import CliRunner


@pytest.fixture(autouse=True)
def _direct(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a proxy of the machine's would do is a test of its own."""
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


@dataclass
class Place:
    """A coordinator's folder, an enrolled site, and where its edge should be."""

    coordinator: Folder
    site: Path
    port: int
    scratch: Path

    @property
    def authority(self) -> tuple[bytes, bytes]:
        return self.coordinator.authority

    def look(self, data: bool = False) -> Preflight:
        return preflight(self.site, data=data)

    def seen(self, name: str) -> Check:
        return next(c for c in self.look().checks if c.name == name)


@pytest.fixture
def place(tmp_path: Path, consortium: Path) -> Place:
    site = tmp_path / "site"
    shutil.copytree(list_sites(consortium)[0], site, ignore=shutil.ignore_patterns(".oncofed"))
    name, port = SiteFolder.open(site).name, free_port()
    settings = tmp_path / "consortium.toml"
    settings.write_text(f'name = "Toy"\naddress = "127.0.0.1"\nport = {port}\nmembers = ["{name}"]\n')
    folder = init(settings, tmp_path / "coordinator")
    admit(folder, enrol(folder.path / "kits" / f"{name}.zip", site).file)
    accept_roster(site, folder.path / "roster.json")
    return Place(folder, site, port, tmp_path / "scratch")


def levels(report: Preflight) -> dict[str, str]:
    return {c.name: c.level for c in report.checks}


def test_all_is_well(place: Place) -> None:
    with standing_in(place.port, place.scratch, certificate(place.authority, ends_days=100)):
        report = place.look(data=True)
    told = levels(report)
    assert {n for n, level in told.items() if level != "ok"} <= {"policy", "GPU"}, report.checks
    assert told.keys() >= {
        "name",
        "port",
        "TLS",
        "certificate",
        "clock",
        "server",
        "node key",
        "roster",
        "disk",
        "data",
    }
    assert report.ok
    assert not report.firewall


def test_a_closed_port(place: Place) -> None:
    report = place.look()
    told = levels(report)
    assert told["port"] == "fail"
    assert not told.keys() & {"TLS", "clock", "server"}, "what comes after was not looked at"
    assert told["roster"] == "ok", "what does not need the network was"
    for said in ("outbound", "127.0.0.1", f"TCP port {place.port}", "not be intercepted", "HTTPS", "no inbound"):
        assert said in report.firewall


def test_a_port_that_drops(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(*_: object) -> None:
        raise TimeoutError("timed out")

    monkeypatch.setattr(network.socket, "create_connection", silent)
    found = place.seen("port")
    assert (found.level, "a firewall drops it" in found.remedy) == ("fail", True)


def test_a_name_that_is_not_found() -> None:
    (found,) = network_checks(Target("no-such-host.invalid", 9443, ""))
    assert (found.name, found.level) == ("name", "fail")


def test_tls_that_is_opened_on_the_way(place: Place) -> None:
    other = make_authority("Hospital Inspection", 30)
    with standing_in(place.port, place.scratch, certificate(other)):
        report = place.look()
    found = next(c for c in report.checks if c.name == "TLS")
    assert found.level == "fail"
    assert "'Hospital Inspection CA'" in found.seen
    assert "'Toy CA'" in found.seen
    assert report.firewall


def test_an_expired_certificate(place: Place) -> None:
    with standing_in(place.port, place.scratch, certificate(place.authority, begins_days=-9, ends_days=-2)):
        found = place.seen("TLS")
    assert found.level == "fail"
    assert "certificate ended on" in found.seen
    assert "rotate server" in found.remedy


def test_an_expired_certificate_that_is_our_clocks_fault(place: Place) -> None:
    """Three days ago by the server's clock it was good."""
    shown = certificate(place.authority, begins_days=-9, ends_days=-2)
    with standing_in(place.port, place.scratch, shown, clock_s=-3 * 86400):
        found = place.seen("TLS")
    assert found.level == "fail"
    assert "clock is 72 h ahead of" in found.seen


def test_another_name(place: Place) -> None:
    with standing_in(place.port, place.scratch, certificate(place.authority, "other.example.org")):
        found = place.seen("TLS")
    assert found.level == "fail"
    assert "for other.example.org, not for 127.0.0.1" in found.seen


def test_a_server_without_tls(place: Place) -> None:
    with standing_in(place.port, place.scratch, None):
        found = place.seen("TLS")
    assert found.level == "fail"
    assert "no TLS" in found.seen


@pytest.mark.parametrize(
    ("ahead", "level"), [(0, "ok"), (2, "ok"), (8, "fail"), (-100, "ok"), (-400, "fail"), (7200, "fail")]
)
def test_the_clock(place: Place, ahead: float, level: str) -> None:
    """Of this machine against the server's, in seconds: Flower takes no signature from the future."""
    with standing_in(place.port, place.scratch, certificate(place.authority), clock_s=-ahead):
        found = place.seen("clock")
    assert found.level == level, found
    if level == "fail":
        assert ("ahead of" if ahead > 0 else "behind") in found.seen


def test_a_certificate_that_ends_soon_and_a_server_that_is_down(place: Place) -> None:
    with standing_in(place.port, place.scratch, certificate(place.authority, ends_days=9), status=502, date=False):
        told = levels(report := place.look())
    assert (told["certificate"], told["server"], told["clock"]) == ("warn", "warn", "warn")
    assert report.ok, "the node may be started: it waits"


def test_a_proxy_is_named_without_its_password(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", f"http://user:secret@127.0.0.1:{free_port()}")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    report = place.look()
    told = next(c for c in report.checks if c.name == "proxy")
    assert told.level == "warn"
    assert "secret" not in str(report)
    assert levels(report)["port"] == "fail"
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    assert "proxy" not in levels(place.look())


def test_keys_that_others_read_or_that_are_missing(place: Place) -> None:
    key = place.site / ".oncofed" / "node.key"
    key.chmod(0o644)
    found = place.seen("node key")
    assert (found.level, found.remedy) == ("fail", f"chmod 600 {key}")
    key.unlink()
    assert place.seen("node key").level == "fail"


def test_a_member_that_was_revoked_or_has_another_key(place: Place) -> None:
    name = SiteFolder.open(place.site).name
    revoke(place.coordinator, name)
    accept_roster(place.site, place.coordinator.path / "roster.json")
    assert "is revoked" in place.seen("roster").seen
    (place.site / "roster.json").unlink()
    assert place.seen("roster").level == "warn"


def test_another_work_folder_has_another_key(place: Place) -> None:
    other = place.scratch / "work"
    name = SiteFolder.open(place.site).name
    enrol(place.coordinator.path / "kits" / f"{name}.zip", place.site, other)
    found = next(c for c in preflight(place.site, other, data=False).checks if c.name == "roster")
    assert (found.level, "another node key" in found.seen) == ("fail", True)


def test_a_full_disk(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(place.site)
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: usage._replace(free=200_000_000))
    assert place.seen("disk").level == "fail"
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: usage._replace(free=5_000_000_000))
    assert place.seen("disk").level == "warn"


def test_faults_of_the_data_are_counted_and_no_patient_is_named(place: Place) -> None:
    file = place.site / "clinical.csv"
    table = pd.read_csv(file)
    table = pd.concat([table, table.iloc[[0]]]).astype({"time": object})
    table.iloc[3, table.columns.get_loc("time")] = "Jane Doe"
    table.to_csv(file, index=False)
    (place.site / "policy.toml").write_text('min_patients = "Jane Doe"\n')
    answer = CliRunner().invoke(cli, ["site", "preflight", str(place.site)])
    assert answer.exit_code == 1
    report = place.look(data=True)
    assert levels(report)["data"] == "fail"
    assert levels(report)["policy"] == "fail"
    assert next(c for c in report.checks if c.name == "data").seen.split()[0] >= "2"
    for text in (answer.output, str(report)):
        assert "Jane" not in text
        assert not [p for p in table["patient"].astype(str) if p in text]


def test_a_site_that_has_not_enrolled(consortium: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    shutil.copytree(list_sites(consortium)[0], site)
    report = preflight(site, data=False)
    assert levels(report)["enrolment"] == "fail"
    assert "oncofed site enrol" in next(c for c in report.checks if c.name == "enrolment").seen


def test_the_command_ends_with_the_verdict(place: Place) -> None:
    run = CliRunner().invoke
    with standing_in(place.port, place.scratch, certificate(place.authority, ends_days=100)):
        good = run(cli, ["site", "preflight", str(place.site), "--no-data"])
    assert (good.exit_code, "ready to start" in good.output) == (0, True)
    bad = run(cli, ["site", "preflight", str(place.site), "--no-data"])
    assert bad.exit_code == 1
    assert "For the firewall team" in bad.output
