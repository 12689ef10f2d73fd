"""A hospital enrols in a consortium: it makes its keys, pins the coordinator, and writes down its public keys for it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import SECP384R1, EllipticCurvePrivateKey, generate_private_key
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_ssh_private_key,
)
from oncofed.client.consortium import COORDINATOR, FOLDER, pinned_coordinator, pinned_roster
from oncofed.client.data.site import SiteFolder
from oncofed.client.kit import read_files
from oncofed.client.members import Identity
from oncofed.common.certificates import check_valid
from oncofed.common.enrolment import (
    CA_FILE,
    KIT_FILE,
    Enrolment,
    Kit,
    consortium_fingerprint,
    same_fingerprint,
)
from oncofed.common.files import replacing, write_secret, write_text
from oncofed.common.wire import package_version

NODE_KEY, NODE_PUBLIC = "node.key", "node.pub"
FORMER = "former-keys"
KEYS = ("identity.key", "identity.pub", NODE_KEY, NODE_PUBLIC)


@dataclass(frozen=True)
class Enrolled:
    """What an enrolment has done: the file to send back, and the two fingerprints to compare."""

    kit: Kit
    enrolment: Enrolment
    file: Path
    consortium_fingerprint: str
    notes: tuple[str, ...]


def enrol(kit_at: Path, folder: Path, work: Path | None = None, fingerprint: str = "") -> Enrolled:
    """Take a start-up kit in. With the same kit again nothing changes.

    `fingerprint` is the consortium's, as the coordinator reads it out. Raises `ValueError`, before anything is written, where
    the kit is not what the coordinator signed, is for another site, or comes from another coordinator than the site has pinned.
    """
    files = read_files(kit_at)
    kit = Kit.of(files, str(kit_at))
    check_valid(files[CA_FILE], f"{kit_at}: {CA_FILE}", "ask the coordinator for a new kit")
    ours = consortium_fingerprint(kit.consortium, kit.coordinator, files[CA_FILE])
    if fingerprint and not same_fingerprint(fingerprint, ours):
        raise ValueError(
            f"the kit's fingerprint is {ours}, the coordinator's {fingerprint}: somebody else made this kit, or it is an old one; do not use "
            "it, and ask the coordinator for it again"
        )
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; make the site's folder first (docs/site.md)")
    notes = _check_site(folder, kit)
    coordinator = _coordinator(folder, kit)
    work = work or folder / ".oncofed"
    if kit.new_keys and not _installed(folder, files):
        _put_aside(work, kit)
    identity, node = Identity.of(work, kit.member), _node_key(work, kit.member)
    public = node.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    enrolment = Enrolment(
        consortium=kit.consortium,
        name=kit.member,
        identity=identity.public.hex(),
        node_key=public,
        version=package_version(),
    ).signed(kit.token, identity.private, node)
    _install(folder, files)
    if coordinator != pinned_coordinator(folder):
        write_text(folder / COORDINATOR, coordinator + "\n", durable=True)
    file = folder / FOLDER / f"enrolment-{kit.member}.json"
    enrolment.write(file)
    if kit.version != package_version():
        notes += (
            f"the coordinator has oncofed {kit.version}, here is {package_version()}; a study wants one version at all",
        )
    return Enrolled(kit, enrolment, file, ours, notes)


def _check_site(folder: Path, kit: Kit) -> tuple[str, ...]:
    """The kit is for the site that lies here."""
    if not (folder / "site.toml").exists():
        return (f'there is no site.toml yet; write one with name = "{kit.member}"',)
    name = SiteFolder.open(folder).name
    if name != kit.member:
        raise ValueError(
            f'the kit is for "{kit.member}", {folder / "site.toml"} says name = "{name}"; correct the name there, or ask the coordinator for '
            "a kit of this name"
        )
    return ()


def _coordinator(folder: Path, kit: Kit) -> str:
    """The key to pin: the kit's, or a later one of the same coordinator that the site's roster led to."""
    pinned = pinned_coordinator(folder)
    if not pinned or pinned == kit.coordinator:
        return kit.coordinator
    roster = pinned_roster(folder, kit.member)
    if roster and roster.consortium == kit.consortium and roster.trusted_by(kit.coordinator):
        return pinned
    raise ValueError(
        f"{folder} has pinned the coordinator {pinned[:16]}, the kit of '{kit.consortium}' comes from {kit.coordinator[:16]}; if the coordinator "
        f"has a new key, take its roster in first (oncofed site roster); a site of another consortium wants a folder of its own"
    )


def _installed(folder: Path, files: dict[str, bytes]) -> bool:
    """Whether this very kit was taken in before."""
    file = folder / FOLDER / KIT_FILE
    return file.exists() and file.read_bytes() == files[KIT_FILE]


def _install(folder: Path, files: dict[str, bytes]) -> None:
    """The kit's files, kit.toml last: where it is, all are."""
    for name in sorted(files, key=lambda n: n == KIT_FILE):
        target = folder / FOLDER / name
        if name == KIT_FILE:  # it holds the token
            write_secret(target, files[name], lasting=True)
            continue
        with replacing(target) as temporary:
            temporary.write_bytes(files[name])
            temporary.chmod(0o755 if name.endswith(".sh") else 0o644)


def _node_key(work: Path, site: str) -> EllipticCurvePrivateKey:
    """The key that Flower asks this hospital's node for; made at first use."""
    file = work / NODE_KEY
    if not file.exists():
        private = generate_private_key(SECP384R1())
        write_secret(file, private.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()), lasting=True)
    try:
        key = load_ssh_private_key(file.read_bytes(), None)
        if not isinstance(key, EllipticCurvePrivateKey) or not isinstance(key.curve, SECP384R1):
            raise ValueError
    except (ValueError, UnsupportedAlgorithm):
        raise ValueError(
            f"site {site}: {file} is no OpenSSH key of ECDSA P-384; restore it, or remove it, enrol again, and tell the coordinator"
        ) from None
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    write_text(work / NODE_PUBLIC, f"{public}\n")
    return key


def _put_aside(work: Path, kit: Kit) -> None:
    """Move the keys that a new enrolment replaces into a folder of their own; killed at any point, the next call goes on."""
    aside = work / FORMER / hashlib.sha256(kit.token.encode()).hexdigest()[:16]
    if not (aside / "complete").exists():
        for name in KEYS:
            if (work / name).exists():
                write_secret(aside / name, (work / name).read_bytes(), lasting=True)
        write_text(aside / "complete", "", durable=True)
    for name in KEYS:  # a key that was made since is another, and stays
        if (
            (work / name).exists()
            and (aside / name).exists()
            and (work / name).read_bytes() == (aside / name).read_bytes()
        ):
            (work / name).unlink()
