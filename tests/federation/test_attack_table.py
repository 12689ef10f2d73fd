"""The attack table against a hospital's real node, behind a real edge: each attack is refused and logged, and the node goes on."""

from __future__ import annotations

import os
import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP384R1, generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from flwr.app import ArrayRecord, RecordDict
from oncofed.client import bundle_store
from oncofed.client.data.site import list_sites
from oncofed.client.privacy.ledger import Ledger
from oncofed.client.release_log import ReleaseLog
from oncofed.common import wire
from oncofed.common.files import write_secret, write_text
from oncofed.common.plan import Plan
from oncofed.common.privacy.releases import promise_of
from oncofed.common.signed_study import sign, with_signature
from oncofed.common.study import Study
from oncofed.deploy.consortium.certificates import Pair, make_authority, make_server
from oncofed.deploy.consortium.members import rotate_server
from oncofed.deploy.loopback import wait
from oncofed.deploy.services.processes import Child, flower_environment, free_port
from oncofed.deploy.sites.synth import SynthSettings, write_consortium
from oncofed.server.inquiry import greeting
from toy_deployment import SERVER, Consortium, called, without_nginx
from toy_hostile import QUESTION, hostile_bundle, hostile_package, odd_array, put_to_a_node, submitted
from toy_processes import until

WITHOUT = without_nginx()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(WITHOUT), reason=WITHOUT or "nginx is there")]

EDGES = (0.0, 12.0, 24.0, 60.0)
POLICY = """
coordinators = ["pinned"]
approved_code = true
exact_times = false
max_epsilon = 3.0
max_incoming_mb = 2.0
"""


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Consortium]:
    """One hospital at work that approved the bundle, and a coordinator whose own server is of another make."""
    root = tmp_path_factory.mktemp("attacked")
    write_consortium(root / "sites", SynthSettings(sites=2, patients=120, genes=60, cancers=3, genes_per_program=8))
    server = {SERVER: ["env", f"PYTHONPATH={hostile_package(root / 'package')}"]}
    made = Consortium(root, list_sites(root / "sites")[:1], within=server)
    (site,) = made.sites.values()
    (site / "policy.toml").write_text(POLICY)
    made.approve_bundle()
    try:
        made.start_all()
        yield made
    finally:
        made.stop_all()
        made.unlock()


@pytest.fixture(scope="module", autouse=True)
def at_first(here: Consortium) -> dict[str, Any]:
    """The node before anybody attacks it."""
    return here.node(name_of(here)).services["node"]


def name_of(here: Consortium) -> str:
    (name,) = here.sites
    return name


def site_of(here: Consortium) -> Path:
    return here.sites[name_of(here)]


def log_of(here: Consortium) -> list[dict[str, Any]]:
    return ReleaseLog(site_of(here) / ".oncofed" / "release-log.jsonl", name_of(here)).read()


# -- questions ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """A question, and words of the refusal; without words it is answered."""

    kind: str
    content: RecordDict
    words: str = ""


class Coordinator:
    """Makes questions, signed with the consortium's own key."""

    def __init__(self, private: bytes) -> None:
        self.private = private

    def signed(self, asked: Any) -> Any:
        return with_signature(asked, sign(asked, self.private))

    def study(self, **keys: Any) -> Study:
        private = {
            "privacy__unit": "patient",
            "panel__scale_by": "patient",
            "task__time_edges": (0, 12, 24, 60),
            "privacy__epsilon": 2.0,
            "privacy__statistics": "noised",
        }
        return Study().changed(**({"name": "lung"} | private | keys))

    def asks(self, study: Study, kind: str = wire.HELLO, words: str = "", **config: Any) -> Asked:
        return Asked(kind, wire.request({**greeting(study), **QUESTION, **config}), words)

    def plan(self, plan: Plan, words: str) -> Asked:
        told = {"plan_json": plan.model_dump_json(exclude={"out", "roster", "signature"}), "signature": plan.signature}
        return Asked(wire.ANALYSE, wire.request({**told, "step": "greeting", "round": 1, "levels": []}), words)

    def with_arrays(self, arrays: ArrayRecord, words: str) -> Asked:
        asked = self.asks(self.signed(self.study()), wire.STATISTICS, words)
        asked.content["arrays"] = arrays
        return asked

    def without_ask(self) -> Asked:
        asked = self.asks(self.signed(self.study()), words="the message has no part 'ask'")
        del asked.content["ask"]
        return asked

    def statistics(self, words: str = "", **config: Any) -> Asked:
        study = self.signed(self.study())
        noise = {"edges": list(EDGES), "noise_scale": promise_of(study).scale}
        return self.asks(study, wire.STATISTICS, words, **(noise | config))


Making = Callable[[Coordinator], Asked]
LARGE = np.random.default_rng(0).normal(size=600_000).astype(np.float32)
QUESTIONS: dict[str, Making] = {
    "nothing amiss": lambda c: c.asks(c.signed(c.study())),
    "more epsilon than was signed": lambda c: c.asks(
        c.signed(c.study()).changed(privacy__epsilon=2.9), words="signed by none of the coordinators"
    ),
    "more epsilon than is allowed": lambda c: c.asks(
        c.signed(c.study(privacy__epsilon=7.0)), words="its policy allows 3 (max_epsilon"
    ),
    "no signature": lambda c: c.asks(c.study(), words="is not signed"),
    "the times of single patients": lambda c: c.plan(
        c.signed(Plan(kind="km", times="exact")), "its policy does not (exact_times)"
    ),
    "outputs of single patients": lambda c: c.asks(
        c.signed(c.study()), "query.predictions", "does not know 'query.predictions'"
    ),
    "a lower minimum count": lambda c: c.asks(c.study(), words="min_cell: unknown key", study_json='{"min_cell": 1}'),
    "an oversized message": lambda c: c.with_arrays(
        wire.pack_arrays({"weights/x": LARGE}), "MB, its policy reads 2 (max_incoming_mb"
    ),
    "an array that claims more than it holds": lambda c: c.with_arrays(
        odd_array("F32", (2**31, 2**31), b""), "of float32 wants"
    ),
    "a message without its record": lambda c: c.without_ask(),
    "a path in the study's name": lambda c: c.asks(
        c.study(), words="not valid here", study_json='{"name": "../../../etc/cron.d/x"}'
    ),
    "a path for a panel's hash": lambda c: c.statistics("is no panel hash", panel_hash="../../../../etc/passwd"),
    "noise": lambda c: c.statistics(),
    "the same question again": lambda c: c.statistics(),
    "still nothing amiss": lambda c: c.asks(c.signed(c.study())),
}


@pytest.fixture(scope="module")
def answers(here: Consortium, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Asked, dict[str, Any]]]:
    """All questions of a run, and what the node said to each."""
    made = {name: make(Coordinator(here.folder.private)) for name, make in QUESTIONS.items()}
    asked = [(a.kind, a.content) for a in made.values()]
    out = tmp_path_factory.mktemp("asked") / "out"
    said = put_to_a_node(asked, here.server.flower_home, out, here.server.state / "logs")
    return dict(zip(made, zip(made.values(), said, strict=True), strict=True))


@pytest.mark.parametrize("name", QUESTIONS)
def test_a_question(here: Consortium, answers: dict[str, tuple[Asked, dict[str, Any]]], name: str) -> None:
    asked, said = answers[name]
    assert "error" not in said, said
    assert asked.words in str(said.get("refusal", ""))
    assert bool(asked.words) == ("refusal" in said), said
    if asked.words:
        assert any((e["kind"], e.get("refusal")) == (asked.kind, said["refusal"]) for e in log_of(here))


def test_a_question_that_is_replayed_is_paid_and_told_once(
    here: Consortium, answers: dict[str, tuple[Asked, dict[str, Any]]]
) -> None:
    assert "refusal" not in answers["the same question again"][1]
    told = {e["kind"]: e for e in log_of(here) if "statistics" in e["kind"] and "refusal" not in e}
    first, again = told[wire.STATISTICS], told["statistics again"]
    assert first["sha256"] == again["sha256"]
    (study,) = Ledger(site_of(here) / ".oncofed" / "ledger.jsonl", name_of(here), 8.0).studies()
    assert (study.releases, study.unsettled) == (1, 0)


# -- bundles ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [{}, {"bomb.py": 200_000_000}], ids=["code", "a zip bomb"])
def test_a_bundle_that_nobody_approved(here: Consortium, tmp_path: Path, more: dict[str, int]) -> None:
    """It is refused by its hash before a byte of it is unpacked."""
    bundle = hostile_bundle(tmp_path / "evil", f"1.0.{len(more)}", more=more)
    before = unpacked(here)
    wait(
        submitted(bundle, here.server.flower_home),
        home=here.server.flower_home,
        timeout_s=300,
        logs=here.server.state / "logs",
    )
    text = (bundle / "said.json").read_text()
    assert "nobody here approved the Flower bundle" in text
    assert not (bundle / "mark").exists()
    assert unpacked(here) == before
    assert "nobody here approved the Flower bundle" in here.log(name_of(here)) + str(log_of(here))


def unpacked(here: Consortium) -> set[str]:
    apps = site_of(here) / ".oncofed" / "flower" / bundle_store.APPS
    return {str(f.relative_to(apps)) for f in apps.rglob("*")}


# -- the line -----------------------------------------------------------------------------------------------------------


def test_a_stranger_s_node(here: Consortium, tmp_path: Path) -> None:
    """Neither without a key nor with one that the coordinator never registered."""
    key = tmp_path / "stranger"
    pem = generate_private_key(SECP384R1()).private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    key.write_bytes(pem)
    command: list[object] = ["flower-supernode", "--superlink", f"127.0.0.1:{here.port}"]
    command += ["--root-certificates", here.folder.path / "ca.crt", "--port", free_port()]
    for more in ([], ["--auth-supernode-private-key", key]):
        with (tmp_path / "log").open("w+b") as log:
            node = Child([*command, *more], folder=tmp_path, environment=flower_environment(tmp_path / "h"), output=log)
            try:
                assert node.process.wait(180) == 1
            finally:
                node.kill()
            log.seek(0)
            assert b"Exit Code: 305" in log.read()


def test_what_was_said_on_the_line_and_is_said_again(here: Consortium) -> None:
    """Of TLS a copy is worth nothing: the same bytes in another connection reach nobody."""
    edge_log = here.server.state / "logs" / "edge.log"

    def heard() -> int:
        return edge_log.read_text().count('"GET /v1/control/replayed')

    before, context = heard(), ssl.create_default_context(cafile=str(here.folder.path / "ca.crt"))
    incoming, outgoing, said = ssl.MemoryBIO(), ssl.MemoryBIO(), b""
    tls = context.wrap_bio(incoming, outgoing, server_hostname="127.0.0.1")
    with socket.create_connection(("127.0.0.1", here.port), 20) as line:

        def pumped(step: Callable[[], Any]) -> Any:
            nonlocal said
            while True:
                try:
                    done = step()
                except ssl.SSLWantReadError:
                    done = None
                out = outgoing.read()
                said += out
                line.sendall(out)
                if done is not None:
                    return done
                incoming.write(line.recv(65536))

        pumped(lambda: tls.do_handshake() or True)
        pumped(lambda: tls.write(b"GET /v1/control/replayed HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"))
        assert b" 403 " in pumped(lambda: tls.read(4096))
    until(lambda: heard() == before + 1, 20.0)
    with socket.create_connection(("127.0.0.1", here.port), 20) as line, suppress(ConnectionError):
        line.sendall(said)
        answer = b""
        while more := line.recv(65536):
            answer += more
        assert b"403" not in answer
    assert here.run("server", "status", here.folder.path).returncode == 0
    assert heard() == before + 1


# -- afterwards ---------------------------------------------------------------------------------------------------------


def test_after_all_of_it_the_node_is_the_same_and_its_log_holds(here: Consortium, at_first: dict[str, Any]) -> None:
    here.until_online(name_of(here))
    node = here.node(name_of(here)).services["node"]
    assert [node[k] for k in ("process", "starts")] == [at_first[k] for k in ("process", "starts")]
    os.kill(node["process"], 0)
    assert "verified" in called("site", "log", site_of(here), "--verify")


# -- another server -------------------------------------------------------------------------------------------------------


def expired(here: Consortium) -> Pair:
    return make_server(here.folder.authority, "Toy", here.address, -0.01)  # type: ignore[arg-type]


def of_another_authority(here: Consortium) -> Pair:
    return make_server(make_authority("Toy", 400), "Toy", here.address, 390)


def serves(here: Consortium, certificate: str) -> bool:
    with suppress(OSError):  # it is being started again
        return ssl.get_server_certificate(("127.0.0.1", here.port)) == certificate
    return False


def test_certificates_that_are_none_of_ours(here: Consortium, tmp_path: Path) -> None:
    """The node says nothing to such a server, preflight says why, and it is there again when the server is itself."""
    name = name_of(here)
    assert here.nodes()[name] == "online"
    for pair, words in ((expired, "ended on"), (of_another_authority, "authority")):
        key, certificate = pair(here)
        write_secret(here.folder.path / "server.key", key, lasting=True)
        write_text(here.folder.path / "server.crt", certificate.decode(), durable=True)
        until(partial(serves, here, certificate.decode()), 60.0)
        ahead = here.run("site", "preflight", site_of(here), "--no-data")
        assert ahead.returncode == 1
        assert words in " ".join(ahead.stdout.split())
    until(lambda: here.nodes()[name] == "offline", 200.0)
    rotate_server(here.folder)
    here.until_online(name)
    assert here.run("site", "preflight", site_of(here), "--no-data").returncode == 0
    asked = QUESTIONS["nothing amiss"](Coordinator(here.folder.private))
    home, logs = here.server.flower_home, here.server.state / "logs"
    (said,) = put_to_a_node([(asked.kind, asked.content)], home, tmp_path / "out", logs)
    assert (said["site"], "refusal" in said) == (name, False)
