"""Members come, go and change their keys; the coordinator and its server change theirs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from oncofed.common import signing
from oncofed.common.certificates import days_left
from oncofed.common.consortium import RosterMember, SignedRoster, Succession, check_name, now
from oncofed.common.enrolment import Enrolment, member_fingerprint, same_fingerprint
from oncofed.common.files import write_secret, write_text
from oncofed.deploy.consortium.certificates import make_server
from oncofed.deploy.consortium.folder import (
    CA,
    NEXT_KEY,
    ROSTER,
    SERVER,
    SERVER_KEY,
    Folder,
)


@dataclass(frozen=True)
class Listed:
    """A member as a coordinator sees it; `invited_until` is of a kit that nobody used yet."""

    name: str
    status: str
    since: str
    fingerprint: str
    invited_until: str


def list_members(folder: Folder) -> list[Listed]:
    waiting = folder.invitations.open()
    return [
        Listed(
            name,
            m.status,
            m.since,
            member_fingerprint(name, m.identity, m.node_key) if m.identity else "",
            waiting.get(name, ""),
        )
        for name, m in sorted(folder.roster.members.items())
    ]


def certificates(folder: Folder) -> dict[str, float]:
    """Days that each certificate lasts yet, by file name."""
    return {name: days_left((folder.path / name).read_bytes(), name) for name in (CA, SERVER)}


def admit(folder: Folder, file: Path, fingerprint: str = "") -> tuple[Enrolment, bool]:
    """Take a hospital's keys into the roster; whether anything changed: the same file again does not.

    `fingerprint` is what the hospital reads out. Raises `ValueError` where signatures or token do not hold; nothing changes then.
    """
    enrolment = Enrolment.read(file)
    with folder.changing():
        roster = folder.roster
        name = enrolment.name
        if enrolment.consortium != roster.consortium:
            raise ValueError(
                f"{file} enrols in '{enrolment.consortium}', this is '{roster.consortium}'; the hospital used another kit"
            )
        before = _member(roster, name)
        folder.invitations.check(enrolment)
        if fingerprint and not same_fingerprint(fingerprint, enrolment.fingerprint):
            raise ValueError(
                f"the enrolment's fingerprint is {enrolment.fingerprint}, the hospital's {fingerprint}: the file was exchanged on its way; ask "
                "for it again"
            )
        for other, m in roster.members.items():
            if other != name and (m.identity == enrolment.identity or m.node_key == enrolment.node_key):
                raise ValueError(
                    f"{file} has a key of '{other}'; each hospital has its own: the hospital enrols from another work folder"
                )
        same = (before.identity, before.node_key) == (enrolment.identity, enrolment.node_key)
        if before.status == "active" and same:
            folder.invitations.take(enrolment)
            return enrolment, False
        if before.status == "revoked" and (
            before.identity == enrolment.identity or before.node_key == enrolment.node_key
        ):
            raise ValueError(
                f"{file} has a key of '{name}' that was revoked; the hospital enrols with the newest kit, which makes new ones"
            )
        folder.invitations.take(enrolment)
        admitted = RosterMember(identity=enrolment.identity, node_key=enrolment.node_key, status="active", since=now())
        folder.write_roster(roster, roster.members | {name: admitted})
    return enrolment, True


def add(folder: Folder, name: str) -> Path:
    """Invite a new member; its kit."""
    check_name(name)
    with folder.changing():
        roster = folder.roster
        if name in roster.members:
            raise ValueError(
                f"'{name}' is in the roster already; oncofed consortium rotate member makes a new kit for it"
            )
        folder.write_roster(roster, roster.members | {name: RosterMember(since=now())})
        return folder.invite(name)


def revoke(folder: Folder, name: str) -> bool:
    """A member takes part no more and its kit is void; whether anything changed. Its keys stay in the roster, so that nobody uses them again."""
    with folder.changing():
        roster = folder.roster
        member = _member(roster, name)
        folder.invitations.withdraw(name)
        if member.status == "revoked":
            return False
        revoked = member.model_copy(update={"status": "revoked", "since": now()})
        folder.write_roster(roster, roster.members | {name: revoked})
        return True


def rotate_member(folder: Folder, name: str) -> Path:
    """A new kit, whose enrolment brings new keys; until it is admitted the roster stays as it is."""
    with folder.changing():
        member = _member(folder.roster, name)
        return folder.invite(name, new_keys=bool(member.identity))


def rotate_server(folder: Folder) -> None:
    """A new server certificate, for the address in consortium.toml, under the same authority: hospitals change nothing."""
    with folder.changing():
        settings = folder.settings
        key, certificate = make_server(folder.authority, settings.name, settings.address, settings.server_days)
        write_secret(folder.path / SERVER_KEY, key, lasting=True)
        write_text(folder.path / SERVER, certificate.decode(), durable=True)


def rotate_coordinator(folder: Folder) -> SignedRoster:
    """A new signing key; the roster holds the old key's word for it, so that hospitals can follow."""
    with folder.changing():
        roster, old = folder.roster, folder.private
        new = signing.new_private()
        public, serial = signing.public_of(new), roster.serial + 1
        succession = Succession.of(old, public, roster.consortium, serial)
        data = roster.model_dump() | {
            "serial": serial,
            "issued": now(),
            "coordinator": public,
            "successions": (*(s.model_dump() for s in roster.successions), succession.model_dump()),
        }
        followed = SignedRoster.model_validate(data)
        write_secret(folder.path / NEXT_KEY, new.hex().encode(), lasting=True)
        followed.write(folder.path / ROSTER, new)  # from here on the new key counts
        folder.settle()
        return followed


def _member(roster: SignedRoster, name: str) -> RosterMember:
    if name not in roster.members:
        raise ValueError(
            f"'{name}' is not in the roster, which has {', '.join(sorted(roster.members)) or 'nobody'}; oncofed consortium add invites it"
        )
    return roster.members[name]
