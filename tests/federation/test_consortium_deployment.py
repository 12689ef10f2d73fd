"""A consortium as it is deployed, on loopback: server behind its edge, three hospitals that enrolled, all under supervisors."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from oncofed.client.consortium import accept_roster
from oncofed.client.data.site import list_sites
from oncofed.common.study import Study
from oncofed.deploy.bundle import write_bundle
from oncofed.deploy.consortium.members import revoke, rotate_server
from oncofed.deploy.loopback import flwr, submit, wait
from oncofed.deploy.services.coordinator import responds
from oncofed.deploy.services.health import check
from oncofed.deploy.services.running import Running
from oncofed.deploy.sites.synth import SynthSettings, write_consortium
from toy_deployment import Consortium, without_nginx
from toy_processes import until

WITHOUT = without_nginx()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(WITHOUT), reason=WITHOUT or "nginx is there")]


@pytest.fixture(scope="module")
def consortium_at_work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Consortium]:
    root = tmp_path_factory.mktemp("deployed")
    write_consortium(root / "sites", SynthSettings(sites=3, patients=150, genes=60, cancers=3, genes_per_program=8))
    made = Consortium(root, list_sites(root / "sites"))
    try:
        made.start_all()
        yield made
    finally:
        made.stop_all()


def test_a_study_runs_through_the_edge(consortium_at_work: Consortium, tmp_path: Path) -> None:
    here, out = consortium_at_work, tmp_path / "out"
    study = Study().changed(
        model__size="tiny",
        training__rounds=1,
        training__evaluate_every=0,
        splits__only=[0],
        panel__powers=False,
        analysis__experts=False,
        evaluation__tables=False,
        aggregation__min_sites=3,
        runtime__threads=1,
        runtime__roster=str(here.folder.path / "roster.json"),
        runtime__out=str(out),
    )
    run = submit(write_bundle(tmp_path / "bundle", study.run_config()), home=here.server.flower_home)
    wait(run, home=here.server.flower_home, timeout_s=900, logs=here.server.state / "logs")
    results = json.loads((out / "results.json").read_text())
    assert results["sites"] == sorted(here.sites)
    assert [p["took_part"] for p in results["folds"][0]["curve"]] == [sorted(here.sites)]


def test_what_is_told_of_it(consortium_at_work: Consortium) -> None:
    here = consortium_at_work
    told = here.run("server", "status", here.folder.path)
    assert told.returncode == 0, told.stdout + told.stderr
    for words in (*here.sites, "link", "exec", "edge", "online", "server.crt lasts 39"):
        assert words in told.stdout
    first, site = next(iter(here.sites.items()))
    assert here.run("site", "status", site).returncode == 0
    assert {check(f"127.0.0.1:{here.health}", s) for s in ("", "ready", "link", "exec", "edge")} == {"SERVING"}
    ahead = here.run("site", "preflight", site, "--no-data")
    assert ahead.returncode == 0, ahead.stdout
    again = here.run("site", "start", site)
    assert again.returncode == 1
    assert f"process {here.node(first).process} runs this already" in " ".join(again.stderr.split())


def test_hospitals_reach_no_control_api(consortium_at_work: Consortium, tmp_path: Path) -> None:
    """Flower's own command, which starts studies and registers nodes, is turned away at the edge and taken behind it."""
    here, home = consortium_at_work, tmp_path / "home"
    home.mkdir()
    text = (here.server.flower_home / "config.toml").read_text()
    behind = here.server.settings.superlink_port
    (home / "config.toml").write_text(text.replace(f"127.0.0.1:{behind}", f"127.0.0.1:{here.port}"))
    for words in (["list"], ["supernode", "list"]):
        assert flwr(here.server.flower_home, *words)["success"]
        with pytest.raises(RuntimeError, match="403"):
            flwr(home, *words)
    assert responds(f"https://127.0.0.1:{here.port}/health", here.folder.path / "ca.crt")
    log = (here.server.state / "logs" / "edge.log").read_text()
    assert '"POST /v1/control/' in log
    assert '" 403 ' in log
    assert "/v1/fleet/pull-messages" not in log, "what passes is not worth a line"


def test_a_killed_node_comes_back(consortium_at_work: Consortium) -> None:
    """SuperLink refuses its key until the former session has ended; the supervisor tries every ten seconds."""
    here, name = consortium_at_work, "Bergen"
    log = here.sites[name] / ".oncofed" / "logs" / "supervisor.log"
    before, first = log.read_text(), here.node(name).services["node"]["process"]
    os.kill(first, signal.SIGKILL)
    until(lambda: (s := here.node(name).services["node"])["process"] not in (None, first) and s["ready"])
    here.until_online(name)
    later = log.read_text()[len(before) :].splitlines()
    assert "ended with signal 9" in later[0]
    assert any(line.endswith("(the other side does not take it yet); starts again in 10 s") for line in later)


def test_a_killed_superlink_and_a_new_certificate(consortium_at_work: Consortium) -> None:
    """Neither costs a node: SuperLink comes back with its database, and a renewed certificate is taken up without a command."""
    here = consortium_at_work

    def starts_of(part: str) -> int:
        """How often a part that is at work was started; 0 while it is not."""
        told = Running.read(here.server.status_file("server")).services[part]
        return int(told["starts"]) if told["ready"] else 0

    before = {n: here.node(n).services["node"]["starts"] for n in here.sites}
    os.kill(Running.read(here.server.status_file("server")).services["link"]["process"], signal.SIGKILL)
    until(lambda: starts_of("link") == 2)
    rotate_server(here.folder)
    until(lambda: starts_of("link") == 3 and starts_of("edge") == 2)
    until(lambda: responds(f"https://127.0.0.1:{here.port}/health", here.folder.path / "ca.crt"))
    time.sleep(10)  # nodes ask every three seconds
    assert set(here.nodes().values()) == {"online"}
    assert {n: here.node(n).services["node"]["starts"] for n in here.sites} == before


def test_a_revoked_member_is_let_out(consortium_at_work: Consortium) -> None:
    """Without a restart of the server, and the others stay."""
    here, name = consortium_at_work, "Aachen"
    revoke(here.folder, name)
    until(lambda: not here.node(name).ready)
    until(lambda: "Exit Code: 305" in here.log(name))
    assert here.nodes()[name] == "-"
    others = [n for n in here.sites if n != name]
    assert {here.nodes()[n] for n in others} == {"online"}
    assert here.run("site", "status", here.sites[name]).returncode == 1
    accept_roster(here.sites[name], here.folder.path / "roster.json")
    ahead = here.run("site", "preflight", here.sites[name], "--no-data")
    assert ahead.returncode == 1
    assert "Aachen is revoked" in " ".join(ahead.stdout.split())


def test_all_of_it_ends(consortium_at_work: Consortium) -> None:
    here = consortium_at_work
    processes = [s["process"] for n in here.sites for s in here.node(n).services.values() if s["process"]]
    processes += [s["process"] for s in Running.read(here.server.status_file("server")).services.values()]
    assert here.run("server", "stop", here.folder.path).returncode == 0
    assert "stopped" in here.run("site", "stop", here.sites["Bergen"]).stdout
    assert "it was not running" in here.run("site", "stop", here.sites["Bergen"]).stdout
    here.started["server"].wait(20)  # it tells of its end before it has ended
    here.stop_all()
    assert {name: p.returncode for name, p in here.started.items()} == dict.fromkeys(here.started, 0)
    assert [p for p in processes if Path(f"/proc/{p}").exists()] == []
