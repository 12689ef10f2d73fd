"""The coordinator's folder: made once, whole or not at all; every later change passes through it, one at a time."""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from oncofed.common import signing
from oncofed.common.consortium import ConsortiumFile, RosterMember, SignedRoster, now
from oncofed.common.enrolment import consortium_fingerprint
from oncofed.common.files import write_secret, write_text
from oncofed.deploy.consortium.certificates import Pair, make_authority, make_server
from oncofed.deploy.consortium.invitations import Invitations
from oncofed.deploy.consortium.kits import write_kit

SETTINGS, ROSTER, INVITATIONS, KITS = "consortium.toml", "roster.json", "invitations.json", "kits"
CA_KEY, CA = "ca.key", "ca.crt"
SERVER_KEY, SERVER = "server.key", "server.crt"
COORDINATOR_KEY, COORDINATOR = "coordinator.key", "coordinator.pub"
NEXT_KEY = "coordinator.key.next"
"""There while the signing key changes."""
SUPEREXEC = "superexec.secret"


@dataclass(frozen=True)
class Folder:
    """A coordinator's folder that is there."""

    path: Path

    @classmethod
    def open(cls, path: Path) -> Folder:
        missing = [n for n in (SETTINGS, COORDINATOR_KEY, COORDINATOR, CA, ROSTER) if not (path / n).exists()]
        if missing:
            raise ValueError(
                f"{path} is no coordinator's folder: it has no {', '.join(missing)}; make one with oncofed consortium init, or restore the "
                "files from a backup"
            )
        return cls(path)

    @property
    def settings(self) -> ConsortiumFile:
        settings, name = ConsortiumFile.read(self.path / SETTINGS), self.roster.consortium
        if settings.name != name:
            raise ValueError(
                f'{self.path / SETTINGS} says name = "{settings.name}", the roster is of "{name}"; a consortium keeps its name'
            )
        return settings

    @property
    def authority(self) -> Pair:
        return (self.path / CA_KEY).read_bytes(), (self.path / CA).read_bytes()

    @property
    def private(self) -> bytes:
        """The coordinator's signing key."""
        try:
            private = bytes.fromhex((self.path / COORDINATOR_KEY).read_text().strip())
            signing.public_of(private)
        except ValueError:
            raise ValueError(
                f"{self.path / COORDINATOR_KEY} is no key of 64 hex digits; restore it from a backup"
            ) from None
        return private

    @property
    def roster(self) -> SignedRoster:
        return SignedRoster.read(self.path / ROSTER, (self.path / COORDINATOR).read_text().strip())

    @property
    def invitations(self) -> Invitations:
        return Invitations(self.path / INVITATIONS)

    @property
    def fingerprint(self) -> str:
        """What a hospital reads out when it enrols."""
        roster = self.roster
        return consortium_fingerprint(roster.consortium, roster.coordinator, (self.path / CA).read_bytes())

    def write_roster(self, roster: SignedRoster, members: dict[str, RosterMember]) -> SignedRoster:
        """The roster with other members, under the next serial."""
        data = roster.model_dump() | {
            "members": {name: m.model_dump() for name, m in members.items()},
            "serial": roster.serial + 1,
            "issued": now(),
        }
        new = SignedRoster.model_validate(data)
        new.write(self.path / ROSTER, self.private)
        return new

    def invite(self, name: str, *, new_keys: bool = False) -> Path:
        """A kit with a new token, which the old one's gives way to; the zip."""
        settings = self.settings
        token = self.invitations.invite(name, settings.invitation_days)
        return write_kit(
            self.path / KITS,
            settings,
            name,
            token=token,
            authority=(self.path / CA).read_bytes(),
            private=self.private,
            new_keys=new_keys,
        )

    @contextmanager
    def changing(self) -> Iterator[None]:
        """No other command changes the folder meanwhile."""
        with (self.path / ".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"another command is changing {self.path}; try again when it has ended") from None
            self.settle()
            yield

    def settle(self) -> None:
        """Bring a change of the signing key to its end, which may have been killed: the key that signed the roster is the one."""
        following, public = self.path / NEXT_KEY, self.roster.coordinator
        if following.exists():
            if signing.public_of(bytes.fromhex(following.read_text())) == public:
                os.replace(following, self.path / COORDINATOR_KEY)
            else:
                following.unlink()
        if (self.path / COORDINATOR).read_text().strip() != public:
            write_text(self.path / COORDINATOR, public + "\n", durable=True)


def init(settings_at: Path, target: Path) -> Folder:
    """Make the folder with its keys, certificates, first roster, and a kit for each member; refuses one that is there."""
    settings = ConsortiumFile.read(settings_at)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(
            f"{target} is there already and stays as it is: new keys would lock every member out. For a new member oncofed consortium add, for "
            "new keys oncofed consortium rotate, for another consortium another folder"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    making = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))  # for its owner alone
    try:
        _fill(making, settings, settings_at)
        os.replace(making, target)
    except BaseException:
        shutil.rmtree(making, ignore_errors=True)
        raise
    return Folder.open(target)


def _fill(path: Path, settings: ConsortiumFile, settings_at: Path) -> None:
    ca_key, ca = make_authority(settings.name, settings.ca_days)
    server_key, server = make_server((ca_key, ca), settings.name, settings.address, settings.server_days)
    private = signing.new_private()
    for name, secret in (
        (CA_KEY, ca_key),
        (SERVER_KEY, server_key),
        (COORDINATOR_KEY, private.hex().encode()),
        (SUPEREXEC, secrets.token_hex(32).encode()),
    ):
        write_secret(path / name, secret, lasting=True)
    write_text(path / CA, ca.decode(), durable=True)
    write_text(path / SERVER, server.decode(), durable=True)
    write_text(path / COORDINATOR, signing.public_of(private) + "\n", durable=True)
    write_text(path / SETTINGS, settings_at.read_text())
    SignedRoster(
        consortium=settings.name,
        serial=1,
        issued=now(),
        coordinator=signing.public_of(private),
        members={name: RosterMember(since=now()) for name in settings.members},
    ).write(path / ROSTER, private)
    (path / KITS).mkdir(mode=0o700)
    folder = Folder(path)
    for name in settings.members:
        folder.invite(name)
