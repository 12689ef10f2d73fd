"""Signatures bind a value and a purpose; a roster is what its coordinator signed, whole."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, SECP384R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st
from oncofed.common import signing
from oncofed.common.consortium import (
    ConsortiumFile,
    RosterMember,
    SignedRoster,
    Succession,
    check_apart,
    check_name,
    now,
    plain_node_key,
)
from pydantic import ValidationError
from toy_consortium import write_settings

COORDINATOR, FOLLOWING, STRANGER = (signing.new_private() for _ in range(3))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def node_key(curve: Any = SECP384R1) -> str:
    public = generate_private_key(curve()).public_key()
    return public.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


def member(status: str = "active") -> RosterMember:
    identity = signing.public_of(signing.new_private())
    return RosterMember(identity=identity, node_key=node_key(), status=status, since=now())


def roster(private: bytes = COORDINATOR, **keys: Any) -> SignedRoster:
    said = {"consortium": "Sarcoma", "serial": 3, "issued": now(), "coordinator": signing.public_of(private)}
    members = {"Aachen": member(), "Bergen": member("revoked"), "Cork": RosterMember(since=now())}
    return SignedRoster.model_validate(said | {"members": members} | keys)


@given(JSON)
def test_a_signature_is_for_one_value_one_purpose_and_one_key(value: Any) -> None:
    public = signing.public_of(COORDINATOR)
    signature = signing.sign(COORDINATOR, signing.ROSTER, value)
    again = json.loads(json.dumps(value))
    assert signing.verify(public, signing.ROSTER, again, signature)
    assert not signing.verify(public, signing.STUDY, value, signature)
    assert not signing.verify(public, signing.ROSTER, [value], signature)
    assert not signing.verify(signing.public_of(STRANGER), signing.ROSTER, value, signature)


def test_canonical_bytes_do_not_depend_on_how_a_value_was_written() -> None:
    assert signing.canonical({"b": [1, "ü"], "a": None}) == '{"a":null,"b":[1,"ü"]}'.encode()
    with pytest.raises(ValueError, match="JSON"):
        signing.canonical(float("nan"))


@pytest.mark.parametrize("bad", ["", "zz", "00" * 64, "é"])
def test_what_is_no_signature_or_key_does_not_verify(bad: str) -> None:
    public = signing.public_of(COORDINATOR)
    assert not signing.verify(public, signing.ROSTER, 1, bad)
    assert not signing.verify(bad, signing.ROSTER, 1, signing.sign(COORDINATOR, signing.ROSTER, 1))


def test_fingerprints_are_short_and_differ() -> None:
    one, other = signing.fingerprint(["a"]), signing.fingerprint(["b"])
    assert one != other
    assert [len(g) for g in one.split(" ")] == [4] * 6


def test_a_roster_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = roster()
    written.write(tmp_path / "roster.json", COORDINATOR)
    read = SignedRoster.read(tmp_path / "roster.json", signing.public_of(COORDINATOR))
    assert read == written
    assert list(read.active) == ["Aachen"]


def altered(file: Path, change: Any) -> None:
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d["roster"].update(serial=4),
        lambda d: d["roster"]["members"]["Bergen"].update(status="active"),
        lambda d: d["roster"]["members"].pop("Bergen"),
        lambda d: d["roster"]["members"]["Aachen"].update(identity=signing.public_of(STRANGER)),
        lambda d: d.update(signature="00" * 64),
        lambda d: d["roster"].update(coordinator=signing.public_of(STRANGER)),
    ],
)
def test_an_altered_roster_is_refused(tmp_path: Path, change: Any) -> None:
    roster().write(tmp_path / "roster.json", COORDINATOR)
    altered(tmp_path / "roster.json", change)
    with pytest.raises(ValueError, match="the signature of the roster of 'Sarcoma' does not hold"):
        SignedRoster.read(tmp_path / "roster.json", signing.public_of(COORDINATOR))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no roster"),
        ("[]", "is no roster"),
        ("[" * 90_000, "is no roster"),
        ('{"roster": {}}', "is no roster"),
        ('{"roster": {"consortium": "S"}, "signature": ""}', "serial: Field required"),
    ],
)
def test_what_is_no_roster_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "roster.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        SignedRoster.read(tmp_path / "roster.json", signing.public_of(COORDINATOR))
    with pytest.raises(ValueError, match="is not there; ask the coordinator"):
        SignedRoster.read(tmp_path / "other.json", signing.public_of(COORDINATOR))


def test_a_roster_of_another_coordinator_is_refused(tmp_path: Path) -> None:
    roster(STRANGER).write(tmp_path / "roster.json", STRANGER)
    with pytest.raises(ValueError, match="it is another consortium's, or the coordinator has a new key"):
        SignedRoster.read(tmp_path / "roster.json", signing.public_of(COORDINATOR))
    with pytest.raises(ValueError, match="not the one of the coordinator that this roster names"):
        roster(STRANGER).write(tmp_path / "roster.json", COORDINATOR)


def test_who_trusts_the_old_key_may_trust_the_new_one(tmp_path: Path) -> None:
    """Over two changes of the key, from any of the keys that were; not from a key that nobody vouches for."""
    keys = [COORDINATOR, FOLLOWING, signing.new_private()]
    chain = tuple(
        Succession.of(a, signing.public_of(b), "Sarcoma", 2 + i) for i, (a, b) in enumerate(itertools.pairwise(keys))
    )
    roster(keys[2], successions=chain).write(tmp_path / "roster.json", keys[2])
    for key in keys:
        SignedRoster.read(tmp_path / "roster.json", signing.public_of(key))
    forged = (
        Succession.of(STRANGER, signing.public_of(keys[2]), "Sarcoma", 2).model_copy(
            update={"old": signing.public_of(COORDINATOR)}
        ),
    )
    elsewhere = (Succession.of(COORDINATOR, signing.public_of(keys[2]), "Glioma", 2),)
    for bad in (forged, elsewhere, ()):
        roster(keys[2], successions=bad).write(tmp_path / "roster.json", keys[2])
        with pytest.raises(ValueError, match="the old one does not vouch for"):
            SignedRoster.read(tmp_path / "roster.json", signing.public_of(COORDINATOR))


def test_two_members_never_share_a_key() -> None:
    one = member()
    for key in ("identity", "node_key"):
        other = member().model_copy(update={key: getattr(one, key)})
        with pytest.raises(ValidationError, match=f"'A' and 'B' have one {key}"):
            roster(members={"A": one, "B": other})


def test_an_active_member_has_both_keys() -> None:
    with pytest.raises(ValidationError, match="an identity and a node key"):
        RosterMember(identity=signing.public_of(STRANGER), status="active", since=now())


def test_a_node_key_is_of_the_kind_that_flower_takes() -> None:
    key = node_key()
    assert plain_node_key(f"{key} hospital@host\n") == key
    ed = Ed25519PrivateKey.generate().public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    for bad in (node_key(SECP256R1), ed, "ecdsa-sha2-nistp384 AAAA", "", "no key"):
        with pytest.raises(ValueError, match="wanted an OpenSSH public key of ECDSA P-384"):
            plain_node_key(bad)


@given(st.text(max_size=70))
def test_a_name_that_is_taken_is_one_file_in_its_folder(name: str) -> None:
    try:
        check_name(name)
    except ValueError:
        return
    file = Path("/kits") / name
    assert file.name == name
    assert file.resolve().parent == Path("/kits")
    assert not set(name) & set("/\\:*?\"<>|\0\n\r\t$`;&'!~#%{}")
    assert name.strip() == name
    assert len(name.encode()) <= 240


@pytest.mark.parametrize("good", ["Aachen", "St. Bergen", "Tübingen 2", "a", "A_B-c.d", "东京"])
def test_names_of_hospitals_are_taken(good: str) -> None:
    assert check_name(good) == good


@pytest.mark.parametrize(
    "bad",
    [
        "",
        ".",
        "..",
        "../x",
        "a/b",
        "a\\b",
        " a",
        "a ",
        "a.",
        ".a",
        "-rf",
        "a\nb",
        "CON",
        "con.x",
        "a" * 61,
        "U\u0308x",
        "x.zip",
        "$HOME",
        "a'b",
    ],
)
def test_names_that_are_no_files_are_refused(bad: str) -> None:
    with pytest.raises(ValueError, match="cannot be a file's"):
        check_name(bad)


def test_names_that_differ_in_capitals_are_refused() -> None:
    with pytest.raises(ValueError, match="differ in capitals"):
        check_apart(["Aachen", "AACHEN"])


def test_the_settings_have_defaults(tmp_path: Path) -> None:
    settings = ConsortiumFile.read(write_settings(tmp_path / "c.toml"))
    assert (settings.port, settings.superlink_port, settings.address) == (9443, 8000, "fl.example.org")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('adress = "x"', "adress: Extra inputs are not permitted"),
        ("port = 0", r"port: .*greater than or equal to 1 \(seen: '0'\)"),
        ("superlink_port = 9443", "are both 9443"),
        ("port = ", "is no TOML"),
        ("server_days = 4000", "server_days"),
    ],
)
def test_settings_say_what_is_wrong(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConsortiumFile.read(write_settings(tmp_path / "c.toml", more=line))


@pytest.mark.parametrize("address", ["https://x.org", "x.org:443", "", "-x.org", "1.2.3", "1.2.3.400", "a b", "x..org"])
def test_an_address_is_one_to_dial(address: str) -> None:
    with pytest.raises(ValidationError, match="address"):
        ConsortiumFile(name="S", address=address, members=())


@pytest.mark.parametrize("address", ["192.0.2.7", "2001:db8::1", "localhost", "FL.Example.org"])
def test_names_and_ip_addresses_are_dialled(address: str) -> None:
    assert ConsortiumFile(name="S", address=address, members=()).address == address.lower()


def test_members_are_listed_once(tmp_path: Path) -> None:
    for names, message in ((("A", "A"), "listed twice"), (("A", "a"), "capitals"), (("../x",), "cannot be a file's")):
        with pytest.raises(ValueError, match=message):
            ConsortiumFile.read(write_settings(tmp_path / "c.toml", members=names))
