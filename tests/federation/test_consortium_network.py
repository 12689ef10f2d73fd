"""A consortium whose parties are machines of their own, as far as the network goes: addresses, cables, and cables that are cut."""

from __future__ import annotations

import ipaddress
import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import tomli_w
from cryptography import x509
from oncofed.client.data.site import SiteFolder, list_sites
from oncofed.common import wire
from oncofed.common.study import Study
from oncofed.deploy.sites.synth import SynthSettings, write_consortium
from toy_deployment import SERVER, Consortium, answered, asked, events, without_nginx
from toy_network import Network, without_namespaces
from toy_processes import answering, until
from toy_undisturbed import undisturbed, weights

WITHOUT = without_nginx() or without_namespaces()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.rehearsal,
    pytest.mark.skipif(bool(WITHOUT), reason=WITHOUT or "all of it is there"),
]

SITES = ["Aachen", "Bergen", "Coimbra"]
CUT = "Bergen"
SHORT_S, LONG_S = 20.0, 60.0
ROUNDS, LOCAL_STEPS = 20, 100


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    with Network([SERVER, *SITES]) as made:
        yield made


@pytest.fixture(scope="module")
def apart(network: Network, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Consortium]:
    root = tmp_path_factory.mktemp("apart")
    write_consortium(root / "sites", SynthSettings(sites=3, patients=150, genes=60, cancers=3, genes_per_program=8))
    folders = list_sites(root / "sites")
    assert [SiteFolder.open(f).name for f in folders] == SITES
    made = Consortium(root, folders, network.address(SERVER), {m: network.within(m) for m in network.machines})
    try:
        made.start_all()
        yield made
    finally:
        made.stop_all()


def test_who_can_be_reached_where(apart: Consortium, network: Network) -> None:
    """The edge on the server's address and nothing else anywhere; its certificate is for that address."""
    certificate = x509.load_pem_x509_certificate((apart.folder.path / "server.crt").read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert ipaddress.ip_address(network.address(SERVER)) in names.get_values_for_type(x509.IPAddress)
    own = ("127.", "[::1]", "[::ffff:127.")
    beyond = {m: {a for a in network.listeners(m) if not a.startswith(own)} for m in network.machines}
    assert beyond == {SERVER: {f"{network.address(SERVER)}:{apart.port}"}} | {site: set() for site in SITES}
    ahead = apart.run("site", "preflight", apart.sites[CUT], "--no-data", at=CUT)
    assert ahead.returncode == 0, ahead.stdout
    network.cut(CUT)
    try:
        without = apart.run("site", "preflight", apart.sites[CUT], "--no-data", at=CUT)
    finally:
        network.mend(CUT)
    assert without.returncode == 1
    assert f"{network.address(SERVER)}:{apart.port}" in without.stdout


def computing(here: Consortium, name: str, out: Path, round_: int) -> None:
    """Wait until a hospital's node computes its answer to a round."""
    session = int(here.node(name).services["node"]["process"])
    since = until(lambda: answered(out, round_ - 1, name), pause_s=0.02)
    until(lambda: answering(session, since), pause_s=0.02)


def test_a_cable_that_is_cut_in_a_round(apart: Consortium, network: Network, tmp_path: Path) -> None:
    """For 20 s in round 2, which costs nothing; for 60 s in round 3, which costs the hospital that round and those until it is back."""
    here, out = apart, tmp_path / "out"
    study = Study().changed(
        model__size="tiny",
        training__rounds=ROUNDS,
        training__local_steps=LOCAL_STEPS,
        training__evaluate_every=0,
        aggregation__min_sites=2,
        aggregation__optimizer="momentum",
        splits__only=[0],
        panel__powers=False,
        analysis__experts=False,
        evaluation__tables=False,
        runtime__threads=1,
        runtime__round_timeout_s=300.0,
        runtime__roster=str(here.folder.path / "roster.json"),
    )
    file = tmp_path / "study.toml"
    file.write_text(tomli_w.dumps(study.model_dump(mode="json")))
    before = here.node(CUT).services["node"]
    here.coordinator("study", "run", file, "--out", out)
    try:
        computing(here, CUT, out, 2)
        network.cut(CUT)
        time.sleep(SHORT_S)
        assert not asked(out, 3), "the round does not wait for the hospital"
        network.mend(CUT)
        computing(here, CUT, out, 3)
        network.cut(CUT)
        begin = time.monotonic()
        until(lambda: any(e["event"] == "left_out" for e in events(out)), 120.0)
        time.sleep(max(0.0, LONG_S - (time.monotonic() - begin)))
    finally:
        network.mend(CUT)
    until(lambda: events(out)[-1]["event"] in ("finished", "failed"), 900.0, 1.0)
    results = json.loads((out / "results.json").read_text())
    assert "finished" in results, here.last_words()
    took_part = {p["round"]: p["took_part"] for p in results["folds"][0]["curve"]}
    assert took_part[1] == took_part[2] == SITES
    missed = [round_ for round_, there in took_part.items() if CUT not in there]
    assert missed == list(range(3, 3 + len(missed))), "it is away once"
    assert 1 <= len(missed) < ROUNDS - 2, "it comes back"
    assert {(x["site"], x["round"]) for x in results["left_out"] if x["kind"] == wire.TRAIN} == {(CUT, 3)}
    missing = {(CUT, round_) for round_ in missed}
    alone = undisturbed(
        study.changed(runtime__roster=""), list(here.sites.values()), tmp_path / "same", missing, simulated=False
    )
    assert weights(out) == alone
    # the node has come through both by itself
    here.until_online(*SITES)
    after = here.node(CUT).services["node"]
    assert (after["process"], after["starts"]) == (before["process"], before["starts"])
