"""The SuperLink's list of nodes follows the roster; what Flower does with the commands is a test of real processes."""

from __future__ import annotations

import sqlite3
import threading
import time
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_public_key
from oncofed.deploy.consortium.members import admit, revoke, rotate_member
from oncofed.deploy.engine import nodes_of
from oncofed.deploy.services import admission
from oncofed.deploy.services.admission import Admission, openssh
from oncofed.deploy.services.coordinator import Server
from oncofed.deploy.services.running import members_seen
from toy_consortium import Toy


class Link:
    """Stands in for SuperLink and `flwr supernode`: the same table, the same rule that no key is taken twice."""

    def __init__(self, database: Path) -> None:
        self.database, self.asked, self.next = database, [], 2**63 + 11  # above what SQLite holds without a sign
        database.parent.mkdir(parents=True, exist_ok=True)
        with self.connect() as link:
            link.execute(
                "CREATE TABLE node (node_id INTEGER, public_key BLOB UNIQUE, status TEXT, online_until REAL, last_activated_at TEXT)"
            )

    def connect(self) -> sqlite3.Connection:
        return sqlite3.connect(self.database)

    def __call__(self, _home: Path, *words: object) -> dict[str, object]:
        with self.connect() as link:
            if words[1] == "register":
                text = Path(str(words[2])).read_bytes()
                pem = load_ssh_public_key(text).public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
                self.next += 1
                link.execute("INSERT INTO node VALUES (?, ?, 'registered', NULL, NULL)", (self.next - 2**64, pem))
                self.asked.append(f"register {words[4]}")
            else:
                number = int(str(words[2]))
                changed = link.execute(
                    "UPDATE node SET status = 'unregistered' WHERE node_id = ? AND status != 'unregistered'",
                    (number - 2**64,),
                )
                assert changed.rowcount == 1
                self.asked.append("unregister")
        return {}


class Place:
    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.toy = Toy.make(root)
        self.server = Server.open(self.toy.folder.path)
        self.link, self.said = Link(self.server.database), list[str]()
        monkeypatch.setattr(admission, "flwr", self.link)
        self.admission = self.made()

    def made(self) -> Admission:
        home = self.server.flower_home
        return Admission(self.toy.folder.path, self.server.database, home, lambda: True, self.said.append)

    def nodes(self) -> dict[str, str]:
        return {m.name: m.node for m in members_seen(self.server)}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    return Place(tmp_path, monkeypatch)


def test_active_members_are_let_in_once(place: Place) -> None:
    place.admission.bring()
    assert place.link.asked == [], "who is only invited has no key"
    for name in ("Aachen", "St. Bergen"):
        place.toy.admit(name)
    for _ in range(2):
        place.admission.bring()
    assert place.link.asked == ["register Aachen", "register St. Bergen"]
    place.made().bring()  # the server was started anew
    assert len(place.link.asked) == 2
    keys = {openssh(n) for n in nodes_of(place.server.database)}
    assert keys == {m.node_key for m in place.toy.folder.roster.active.values()}
    assert place.nodes() == {"Aachen": "never seen", "St. Bergen": "never seen", "Cork-2": "-"}


def test_who_is_revoked_is_let_out_and_a_new_key_in(place: Place) -> None:
    for name in ("Aachen", "St. Bergen"):
        place.toy.admit(name)
    place.admission.bring()
    revoke(place.toy.folder, "Aachen")
    rotate_member(place.toy.folder, "St. Bergen")
    admit(place.toy.folder, place.toy.enrol("St. Bergen").file)
    place.link.asked.clear()
    place.admission.bring()
    assert sorted(place.link.asked) == ["register St. Bergen", "unregister", "unregister"]
    assert [n.status for n in nodes_of(place.server.database)].count("unregistered") == 2
    assert place.nodes() == {"Aachen": "-", "St. Bergen": "never seen", "Cork-2": "-"}
    assert any(line.startswith("Aachen: no node of this key is let in any more") for line in place.said)


def test_a_key_that_comes_back_is_said_once(place: Place) -> None:
    """Flower keeps the keys of those it unregistered and takes none twice."""
    place.toy.admit("Aachen")
    place.admission.bring()
    before = place.toy.folder.roster
    revoke(place.toy.folder, "Aachen")
    place.admission.bring()
    place.toy.folder.write_roster(place.toy.folder.roster, dict(before.members))
    for _ in range(2):
        place.admission.bring()
    assert [line for line in place.said if "rotate member" in line] == place.said[-1:]
    assert place.nodes()["Aachen"] == "key revoked for good"


def test_a_roster_that_was_altered_changes_nothing(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.toy.admit("Aachen")
    place.admission.bring()
    file = place.toy.roster_file
    file.write_text(file.read_text().replace('"active"', '"revoked"'))
    monkeypatch.setattr(admission, "POLL_S", 0.02)
    stop = threading.Event()
    thread = threading.Thread(target=place.admission.keep, args=(stop,))
    thread.start()
    end = time.monotonic() + 5
    while not any("signature" in line for line in place.said):
        assert time.monotonic() < end
        time.sleep(0.02)
    time.sleep(0.2)
    stop.set()
    thread.join()
    assert sum("signature" in line for line in place.said) == 1, "what goes wrong is said once"
    assert place.link.asked == ["register Aachen"]


def test_status_of_nodes(place: Place) -> None:
    for name in ("Aachen", "St. Bergen"):
        place.toy.admit(name)
    assert place.nodes()["Aachen"] == "not let in yet"
    place.admission.bring()
    first, second = (n.identifier - 2**64 for n in nodes_of(place.server.database))
    with place.link.connect() as link:
        link.execute(
            "UPDATE node SET status = 'online', last_activated_at = 'x', online_until = ? WHERE node_id = ?",
            (time.time() + 30, first),
        )
        link.execute(
            "UPDATE node SET status = 'online', last_activated_at = 'x', online_until = ? WHERE node_id = ?",
            (1e9, second),
        )
    seen = {m.name: (m.node, m.last_seen) for m in members_seen(place.server)}
    assert seen["Aachen"] == ("online", "now")
    assert seen["St. Bergen"] == ("offline", "2001-09-09 01:46:40 UTC"), (
        "its heartbeat has stopped, whatever the table says"
    )
