"""From kit to member: a hospital's keys stay with it, and every file on the way is held against what it claims."""

from __future__ import annotations

import json
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP384R1, EllipticCurvePrivateKey, generate_private_key
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_ssh_private_key,
    load_ssh_public_key,
)
from oncofed.client import enrol as enrolling
from oncofed.client.consortium import accept_roster, pinned_coordinator
from oncofed.client.enrol import enrol
from oncofed.client.members import Identity
from oncofed.common import signing
from oncofed.common.consortium import SignedRoster
from oncofed.common.enrolment import Enrolment
from oncofed.deploy.consortium.folder import Folder, init
from oncofed.deploy.consortium.kits import kit_files, pack
from oncofed.deploy.consortium.members import (
    add,
    admit,
    certificates,
    list_members,
    revoke,
    rotate_coordinator,
    rotate_member,
    rotate_server,
)
from toy_consortium import NAMES, Toy, write_settings

BERGEN = "St. Bergen"


@pytest.fixture
def toy(tmp_path: Path) -> Toy:
    return Toy.make(tmp_path)


def everything(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file() and f.name != ".lock"}


def statuses(toy: Toy) -> dict[str, str]:
    return {m.name: m.status for m in list_members(toy.folder)}


def edited(file: Path, target: Path, **keys: Any) -> Path:
    target.write_text(json.dumps(json.loads(file.read_text()) | keys))
    return target


# -- init --------------------------------------------------------------------------------------------------------------


def test_init_makes_what_a_coordinator_needs(toy: Toy) -> None:
    folder = toy.folder.path
    assert {f.name for f in folder.iterdir()} == {
        *("ca.key", "ca.crt", "server.key", "server.crt", "coordinator.key", "coordinator.pub", "superexec.secret"),
        *("roster.json", "consortium.toml", "invitations.json", "kits"),
    }
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for secret in ("ca.key", "server.key", "coordinator.key", "superexec.secret", "invitations.json"):
        assert stat.S_IMODE((folder / secret).stat().st_mode) == 0o600, secret
    assert {f.name for f in (folder / "kits").iterdir()} == {*NAMES, *(f"{n}.zip" for n in NAMES)}
    assert statuses(toy) == dict.fromkeys(NAMES, "invited")
    assert toy.folder.roster.serial == 1
    private = toy.folder.private.hex().encode()
    keys = [private, *((folder / k).read_bytes().splitlines()[1] for k in ("ca.key", "server.key"))]
    for name, content in everything(folder / "kits").items():
        assert not any(key in content for key in keys), name
        assert b"PRIVATE KEY" not in content
    for key in everything(folder):
        if key.endswith("kit.toml"):  # of its token the coordinator keeps a digest alone
            token = (folder / key).read_text().split('token = "')[1][:64]
            assert token not in (folder / "invitations.json").read_text()


def test_a_second_init_changes_nothing(toy: Toy) -> None:
    before = everything(toy.root)
    with pytest.raises(ValueError, match="is there already and stays as it is"):
        init(toy.root / "consortium.toml", toy.folder.path)
    assert everything(toy.root) == before


def test_an_init_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = write_settings(tmp_path / "consortium.toml")

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no room")

    monkeypatch.setattr("oncofed.deploy.consortium.folder.write_kit", fail)
    with pytest.raises(OSError, match="no room"):
        init(settings, tmp_path / "coordinator")
    assert [f.name for f in tmp_path.iterdir()] == ["consortium.toml"]
    with pytest.raises(ValueError, match=r"is no coordinator's folder: it has no consortium.toml"):
        Folder.open(tmp_path / "coordinator")


# -- enrol -------------------------------------------------------------------------------------------------------------


def test_enrolling_makes_keys_that_flower_takes(toy: Toy) -> None:
    from flwr.cli.supernode.register import try_load_public_key

    done = toy.enrol("Aachen")
    work = toy.site("Aachen") / ".oncofed"
    assert done.file == toy.site("Aachen") / "consortium" / "enrolment-Aachen.json"
    key = load_ssh_private_key((work / "node.key").read_bytes(), None)
    assert isinstance(key, EllipticCurvePrivateKey)
    assert key.curve.name == "secp384r1"
    pem = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    assert try_load_public_key(work / "node.pub") == pem
    assert load_ssh_public_key(done.enrolment.node_key.encode()).public_bytes(
        Encoding.PEM, PublicFormat.SubjectPublicKeyInfo
    ) == pem  # fmt: skip
    for secret in (work / "node.key", work / "identity.key", toy.site("Aachen") / "consortium" / "kit.toml"):
        assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    assert pinned_coordinator(toy.site("Aachen")) == toy.folder.roster.coordinator
    assert done.enrolment.identity == Identity.of(work, "Aachen").public.hex()
    assert (toy.site("Aachen") / "consortium" / "run.sh").stat().st_mode & 0o111


def test_what_travels_back_is_public(toy: Toy) -> None:
    done = toy.enrol("Aachen")
    work, sent = toy.site("Aachen") / ".oncofed", done.file.read_text()
    assert (work / "identity.key").read_text() not in sent
    assert done.kit.token not in sent
    private = load_ssh_private_key((work / "node.key").read_bytes(), None).private_numbers().private_value  # type: ignore[union-attr]
    assert f"{private:x}" not in sent
    assert "PRIVATE" not in sent


def test_enrolling_again_with_a_kit_changes_nothing(toy: Toy) -> None:
    first = toy.enrol("Aachen").enrolment
    before = everything(toy.site("Aachen"))
    again = enrol(toy.folder.path / "kits" / "Aachen", toy.site("Aachen")).enrolment  # the folder is the same kit
    same = {"signature", "node_signature"}
    assert again.model_dump(exclude=same) == first.model_dump(exclude=same)
    after = everything(toy.site("Aachen"))
    changed = {n for n in before.keys() | after.keys() if before.get(n) != after.get(n)}
    assert changed <= {"consortium/enrolment-Aachen.json"}  # ECDSA draws anew


def test_keys_go_where_the_hospital_says(toy: Toy, tmp_path: Path) -> None:
    enrol(toy.kit("Aachen"), toy.site("Aachen"), tmp_path / "work")
    assert {f.name for f in (tmp_path / "work").iterdir()} == {"node.key", "node.pub", "identity.key", "identity.pub"}
    assert not (toy.site("Aachen") / ".oncofed").exists()


def test_a_kit_for_another_site_writes_nothing(toy: Toy) -> None:
    before = everything(toy.site("Aachen"))
    with pytest.raises(ValueError, match=r'the kit is for "Cork-2", .*site.toml says name = "Aachen"'):
        enrol(toy.kit("Cork-2"), toy.site("Aachen"))
    with pytest.raises(ValueError, match=r"the kit's fingerprint is .* somebody else made this kit"):
        enrol(toy.kit("Aachen"), toy.site("Aachen"), fingerprint="0000 " * 6)
    with pytest.raises(ValueError, match="is no folder; make the site's folder first"):
        enrol(toy.kit("Aachen"), toy.root / "nowhere")
    assert everything(toy.site("Aachen")) == before
    spoken = toy.folder.fingerprint.upper().replace(" ", "")
    enrol(toy.kit("Aachen"), toy.site("Aachen"), fingerprint=spoken)


def test_both_ends_read_the_same_fingerprints(toy: Toy) -> None:
    done = toy.admit("Aachen")
    assert done.consortium_fingerprint == toy.folder.fingerprint
    assert {m.name: m.fingerprint for m in list_members(toy.folder)}["Aachen"] == done.enrolment.fingerprint


def test_a_site_belongs_to_one_consortium(toy: Toy, tmp_path: Path) -> None:
    toy.enrol("Aachen")
    other = Toy.make(tmp_path / "other", name="Glioma")
    before = everything(toy.site("Aachen"))
    with pytest.raises(ValueError, match=r"has pinned the coordinator .* the kit of 'Glioma' comes from"):
        enrol(other.kit("Aachen"), toy.site("Aachen"))
    assert everything(toy.site("Aachen")) == before


def test_a_kit_whose_authority_has_ended_is_refused(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    def ended(*_: Any) -> None:
        raise ValueError("ca.crt ended on 2020-01-01; ask the coordinator for a new kit")

    monkeypatch.setattr(enrolling, "check_valid", ended)
    with pytest.raises(ValueError, match="ended on"):
        toy.enrol("Aachen")
    assert not (toy.site("Aachen") / ".oncofed").exists()


def test_a_kit_without_a_site_description_says_what_to_write(toy: Toy) -> None:
    (toy.site("Aachen") / "site.toml").unlink()
    assert enrol(toy.kit("Aachen"), toy.root / "sites" / "Aachen").notes == (
        'there is no site.toml yet; write one with name = "Aachen"',
    )


# -- admit -------------------------------------------------------------------------------------------------------------


def test_an_admitted_hospital_is_a_member(toy: Toy) -> None:
    done = toy.admit("Aachen")
    roster = toy.folder.roster
    assert statuses(toy) == {"Aachen": "active", BERGEN: "invited", "Cork-2": "invited"}
    assert (roster.serial, list(roster.active)) == (2, ["Aachen"])
    member = roster.members["Aachen"]
    assert (member.identity, member.node_key) == (done.enrolment.identity, done.enrolment.node_key)
    assert admit(toy.folder, done.file) == (done.enrolment, False)  # the same file again
    assert toy.folder.roster == roster


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("identity", "is not signed by its identity"),
        ("node_key", "is not signed by its identity"),
        ("name", "is not signed by its identity"),
        ("consortium", "is not signed by its identity"),
        ("proof", "is not signed by its identity"),
        ("signature", "is not signed by its identity"),
        ("node_signature", "is not signed by its node key"),
    ],
)
def test_an_altered_enrolment_is_refused(toy: Toy, tmp_path: Path, key: str, message: str) -> None:
    values = {
        "identity": signing.public_of(signing.new_private()),
        "node_key": toy.enrol(BERGEN).enrolment.node_key,
        "name": BERGEN,
        "consortium": "Glioma",
        "proof": "00" * 32,
        "signature": "00" * 64,
        "node_signature": "00" * 64,
    }
    before = everything(toy.folder.path)
    bad = edited(toy.enrol("Aachen").file, tmp_path / "bad.json", **{key: values[key]})
    with pytest.raises(ValueError, match=message):
        admit(toy.folder, bad)
    assert everything(toy.folder.path) == before


@pytest.mark.parametrize("text", ["{", "[]", '{"name": "../x"}', "\xff", "[" * 90_000])
def test_what_is_no_enrolment_is_named(toy: Toy, tmp_path: Path, text: str) -> None:
    (tmp_path / "bad.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"bad.json"):
        admit(toy.folder, tmp_path / "bad.json")
    with pytest.raises(ValueError, match=r"is not there; name the enrolment-NAME.json"):
        admit(toy.folder, tmp_path / "none.json")
    (tmp_path / "bad.json").write_bytes(b" " * 200_000)
    with pytest.raises(ValueError, match="larger than any enrolment"):
        admit(toy.folder, tmp_path / "bad.json")


def forged(toy: Toy, tmp_path: Path, token: str, name: str = "Aachen", consortium: str = "Rare Sarcoma") -> Path:
    """An enrolment with keys of somebody's own."""
    identity, node = signing.new_private(), generate_private_key(SECP384R1())
    public = node.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    said = Enrolment(
        consortium=consortium, name=name, identity=signing.public_of(identity), node_key=public, version="1"
    )
    said.signed(token, identity, node).write(tmp_path / "forged.json")
    return tmp_path / "forged.json"


def test_without_the_token_nobody_enrols(toy: Toy, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="was not made with the token of its newest kit"):
        admit(toy.folder, forged(toy, tmp_path, "00" * 32))
    other = toy.enrol(BERGEN).kit.token
    with pytest.raises(ValueError, match="was not made with the token of its newest kit"):
        admit(toy.folder, forged(toy, tmp_path, other))
    with pytest.raises(ValueError, match="enrols in 'Glioma', this is 'Rare Sarcoma'"):
        admit(toy.folder, forged(toy, tmp_path, other, BERGEN, "Glioma"))
    with pytest.raises(ValueError, match=r"'Delft' is not in the roster, which has Aachen, Cork-2, St. Bergen"):
        admit(toy.folder, forged(toy, tmp_path, other, "Delft"))
    assert set(statuses(toy).values()) == {"invited"}


def test_a_token_admits_once(toy: Toy, tmp_path: Path) -> None:
    """Who has the kit too, but comes second, is refused with both fingerprints."""
    done = toy.admit("Aachen")
    with pytest.raises(ValueError, match=f"has admitted the keys {done.enrolment.fingerprint} already"):
        admit(toy.folder, forged(toy, tmp_path, done.kit.token))
    assert toy.folder.roster.members["Aachen"].identity == done.enrolment.identity


def test_a_kit_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy = Toy.make(tmp_path)
    done = toy.enrol("Aachen")
    monkeypatch.setattr("oncofed.deploy.consortium.invitations.now", lambda: "2999-01-01T00:00:00Z")
    with pytest.raises(ValueError, match="the kit of 'Aachen' could be used until 20"):
        admit(toy.folder, done.file)


def test_a_hospital_that_reads_out_another_fingerprint_is_not_admitted(toy: Toy) -> None:
    done = toy.enrol("Aachen")
    with pytest.raises(ValueError, match="the file was exchanged on its way"):
        admit(toy.folder, done.file, "0000 " * 6)
    assert admit(toy.folder, done.file, done.enrolment.fingerprint.replace(" ", ""))[1]


def test_two_hospitals_never_share_keys(toy: Toy) -> None:
    toy.admit("Aachen")
    shutil.copytree(toy.site("Aachen") / ".oncofed", toy.site(BERGEN) / ".oncofed")
    with pytest.raises(ValueError, match="has a key of 'Aachen'; each hospital has its own"):
        toy.admit(BERGEN)


def test_an_admission_that_was_cut_short_goes_on(toy: Toy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Killed between token and roster: the same keys are taken, others are not."""
    done = toy.enrol("Aachen")

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(SignedRoster, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            admit(toy.folder, done.file)
    assert statuses(toy)["Aachen"] == "invited"
    with pytest.raises(ValueError, match="has admitted the keys"):
        admit(toy.folder, forged(toy, tmp_path, done.kit.token))
    assert admit(toy.folder, done.file)[1]


def test_one_command_changes_the_folder_at_a_time(toy: Toy) -> None:
    with toy.folder.changing(), pytest.raises(ValueError, match="another command is changing"):
        add(toy.folder, "Delft")
    add(toy.folder, "Delft")


# -- add, revoke, rotate -----------------------------------------------------------------------------------------------


def test_a_member_can_come_later(toy: Toy) -> None:
    assert add(toy.folder, "Delft") == toy.kit("Delft")
    toy.admit("Delft")
    assert statuses(toy)["Delft"] == "active"
    with pytest.raises(ValueError, match="'Delft' is in the roster already"):
        add(toy.folder, "Delft")
    before = everything(toy.folder.path)
    for bad in ("../x", "delft"):
        with pytest.raises(ValueError, match=r"cannot be a file's|differ in capitals"):
            add(toy.folder, bad)
    assert everything(toy.folder.path) == before


def test_a_revoked_member_comes_back_with_new_keys_alone(toy: Toy) -> None:
    done = toy.admit("Aachen")
    assert revoke(toy.folder, "Aachen")
    assert not revoke(toy.folder, "Aachen")
    serial = toy.folder.roster.serial
    with pytest.raises(ValueError, match="nobody is invited as 'Aachen': the invitation was withdrawn"):
        admit(toy.folder, done.file)
    assert (statuses(toy)["Aachen"], toy.folder.roster.serial) == ("revoked", serial)
    rotate_member(toy.folder, "Aachen")
    new = toy.admit("Aachen")
    assert statuses(toy)["Aachen"] == "active"
    assert new.enrolment.identity != done.enrolment.identity
    assert new.enrolment.node_key != done.enrolment.node_key


def test_revoking_makes_an_unused_kit_void(toy: Toy) -> None:
    done = toy.enrol("Aachen")
    revoke(toy.folder, "Aachen")
    with pytest.raises(ValueError, match="nobody is invited as 'Aachen'"):
        admit(toy.folder, done.file)


def test_a_revoked_key_does_not_come_back(toy: Toy, tmp_path: Path) -> None:
    toy.admit("Aachen")
    revoke(toy.folder, "Aachen")
    folder, settings = toy.folder, toy.folder.settings
    token = folder.invitations.invite("Aachen", 30)
    kit = kit_files(
        settings, "Aachen", token=token, authority=folder.authority[1], private=folder.private, new_keys=False
    )
    (tmp_path / "kit.zip").write_bytes(pack(kit))
    done = enrol(tmp_path / "kit.zip", toy.site("Aachen"))
    with pytest.raises(ValueError, match="has a key of 'Aachen' that was revoked"):
        admit(toy.folder, done.file)


def test_a_member_changes_its_keys(toy: Toy) -> None:
    """The old ones count until the new ones are admitted, and are kept aside at the hospital; the old enrolment is void."""
    old, work = toy.admit("Aachen"), toy.site("Aachen") / ".oncofed"
    kept = {n: (work / n).read_bytes() for n in enrolling.KEYS}
    before = toy.folder.roster
    old_file = toy.root / "old.json"
    shutil.copyfile(old.file, old_file)
    rotate_member(toy.folder, "Aachen")
    assert toy.folder.roster == before
    new = toy.enrol("Aachen")
    again = toy.enrol("Aachen")
    assert again.enrolment.fingerprint == new.enrolment.fingerprint != old.enrolment.fingerprint
    (aside,) = (work / "former-keys").iterdir()
    assert {n: (aside / n).read_bytes() for n in kept} == kept
    assert stat.S_IMODE((aside / "node.key").stat().st_mode) == 0o600
    with pytest.raises(ValueError, match="was not made with the token of its newest kit"):
        admit(toy.folder, old_file)
    assert admit(toy.folder, new.file)[1]
    member = toy.folder.roster.members["Aachen"]
    assert (member.status, member.identity) == ("active", new.enrolment.identity)


@pytest.mark.parametrize("at", range(8))
def test_changing_keys_can_be_killed_anywhere(toy: Toy, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    old, work = toy.admit("Aachen"), toy.site("Aachen") / ".oncofed"
    kept = {n: (work / n).read_bytes() for n in enrolling.KEYS}
    rotate_member(toy.folder, "Aachen")
    calls = [0]

    def dying(real: Any) -> Any:
        def call(*args: Any, **keys: Any) -> Any:
            calls[0] += 1
            if calls[0] > at:
                raise KeyboardInterrupt
            return real(*args, **keys)

        return call

    with monkeypatch.context() as patch:
        for name in ("write_secret", "write_text"):
            patch.setattr(enrolling, name, dying(getattr(enrolling, name)))
        with pytest.raises(KeyboardInterrupt):
            toy.enrol("Aachen")
    new = toy.admit("Aachen")
    assert new.enrolment.identity != old.enrolment.identity
    assert new.enrolment.node_key != old.enrolment.node_key
    (aside,) = (work / "former-keys").iterdir()
    assert {n: (aside / n).read_bytes() for n in kept} == kept


def test_the_server_certificate_is_renewed_for_the_address_in_the_settings(toy: Toy) -> None:
    folder = toy.folder.path
    before = everything(folder)
    text = (folder / "consortium.toml").read_text()
    (folder / "consortium.toml").write_text(text.replace("fl.example.org", "new.example.org") + "server_days = 20\n")
    assert certificates(toy.folder)["server.crt"] > 300
    rotate_server(toy.folder)
    assert 19 < certificates(toy.folder)["server.crt"] < 21
    after = everything(folder)
    changed = {n for n in before if before[n] != after[n]}
    assert changed == {"server.key", "server.crt", "consortium.toml"}
    assert b"PRIVATE" in after["server.key"]
    assert stat.S_IMODE((folder / "server.key").stat().st_mode) == 0o600


def test_a_consortium_keeps_its_name(toy: Toy) -> None:
    file = toy.folder.path / "consortium.toml"
    file.write_text(file.read_text().replace("Rare Sarcoma", "Glioma"))
    for change in (lambda: rotate_member(toy.folder, "Aachen"), lambda: rotate_server(toy.folder)):
        before = everything(toy.folder.path)
        with pytest.raises(ValueError, match='says name = "Glioma", the roster is of "Rare Sarcoma"'):
            change()
        assert everything(toy.folder.path) == before


def test_what_a_hospital_says_of_itself_is_no_control_text(toy: Toy) -> None:
    with pytest.raises(ValueError, match="version"):
        Enrolment.model_validate(toy.enrol("Aachen").enrolment.model_dump() | {"version": "\x1b[2J"})


def test_hospitals_follow_a_coordinator_to_a_new_key(toy: Toy) -> None:
    """One that missed a roster in between, too; and one whose kit is older than the key."""
    toy.admit("Aachen")
    toy.hand_out("Aachen")
    toy.enrol(BERGEN)
    first = toy.folder.roster.coordinator
    rotate_coordinator(toy.folder)
    rotate_coordinator(toy.folder)
    roster = toy.folder.roster
    assert len({first, *(s.new for s in roster.successions)}) == 3
    assert roster.coordinator == signing.public_of(toy.folder.private) != first
    assert list(roster.active) == ["Aachen"]
    for name in ("Aachen", BERGEN):
        assert pinned_coordinator(toy.site(name)) == first
        toy.hand_out(name)
        assert pinned_coordinator(toy.site(name)) == roster.coordinator
    toy.admit(BERGEN)
    assert statuses(toy)[BERGEN] == "active"
    toy.hand_out("Aachen", BERGEN)
    assert stat.S_IMODE((toy.folder.path / "coordinator.key").stat().st_mode) == 0o600


@pytest.mark.parametrize("at", ["roster", "settle"])
def test_a_change_of_the_signing_key_that_was_cut_short_is_finished(
    toy: Toy, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    first = toy.folder.roster.coordinator

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    real, settled = Folder.settle, [0]

    def settle(self: Folder) -> None:
        settled[0] += 1
        if settled[0] > 1:
            raise KeyboardInterrupt
        real(self)

    with monkeypatch.context() as patch:
        patch.setattr(SignedRoster, "write", killed) if at == "roster" else patch.setattr(Folder, "settle", settle)
        with pytest.raises(KeyboardInterrupt):
            rotate_coordinator(toy.folder)
    add(toy.folder, "Delft")  # any command that changes the folder
    roster = toy.folder.roster
    assert (roster.coordinator == first) == (at == "roster")
    assert signing.public_of(toy.folder.private) == roster.coordinator
    assert (toy.folder.path / "coordinator.pub").read_text().strip() == roster.coordinator
    assert not (toy.folder.path / "coordinator.key.next").exists()


# -- the roster at a hospital ------------------------------------------------------------------------------------------


def test_an_older_roster_is_refused(toy: Toy, tmp_path: Path) -> None:
    """It could bring back who was revoked."""
    toy.admit("Aachen")
    toy.enrol(BERGEN)
    old = tmp_path / "old.json"
    shutil.copyfile(toy.roster_file, old)
    revoke(toy.folder, "Aachen")
    toy.hand_out(BERGEN)
    toy.hand_out(BERGEN)  # the same again
    held = (toy.site(BERGEN) / "roster.json").read_bytes()
    with pytest.raises(ValueError, match="has the serial 2, the roster here 3: an old roster could bring back"):
        accept_roster(toy.site(BERGEN), old)
    assert (toy.site(BERGEN) / "roster.json").read_bytes() == held


def test_a_coordinator_cannot_tell_two_hospitals_two_things_under_one_number(toy: Toy, tmp_path: Path) -> None:
    toy.enrol("Aachen")
    toy.hand_out("Aachen")
    roster = toy.folder.roster
    roster.model_copy(update={"issued": "2020-01-01T00:00:00Z"}).write(tmp_path / "r.json", toy.folder.private)
    with pytest.raises(ValueError, match="both have the serial 1"):
        accept_roster(toy.site("Aachen"), tmp_path / "r.json")
    renamed = roster.model_copy(update={"consortium": "Glioma", "serial": 9})
    renamed.write(tmp_path / "r.json", toy.folder.private)
    with pytest.raises(ValueError, match="is the roster of 'Glioma', this site's consortium is 'Rare Sarcoma'"):
        accept_roster(toy.site("Aachen"), tmp_path / "r.json")


def test_another_consortiums_roster_is_refused(toy: Toy, tmp_path: Path) -> None:
    toy.enrol("Aachen")
    other = Toy.make(tmp_path / "other", name="Glioma")
    with pytest.raises(ValueError, match="the roster of 'Glioma' is signed by the coordinator"):
        accept_roster(toy.site("Aachen"), other.roster_file)
    assert not (toy.site("Aachen") / "roster.json").exists()
    with pytest.raises(ValueError, match="pins no coordinator; enrol with its start-up kit first"):
        accept_roster(toy.site(BERGEN), toy.roster_file)
