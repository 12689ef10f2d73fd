"""The consortium: what its coordinator writes down in consortium.toml, and the signed roster that says whose key is whose."""

from __future__ import annotations

import ipaddress
import json
import re
import tomllib
import unicodedata
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Self

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import SECP384R1, EllipticCurvePublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_public_key
from oncofed.common import signing
from oncofed.common.files import write_text
from oncofed.common.section import Section
from pydantic import Field, ValidationError, field_validator, model_validator

LONGEST_NAME = 60
_LABEL = re.compile(r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)")
_DEVICES = {"con", "prn", "aux", "nul", *(f"{kind}{i}" for kind in ("com", "lpt") for i in range(1, 10))}


def check_name(name: str) -> str:
    """A name that is safe as a file's on every system; raises `ValueError` with the rule otherwise."""
    letters = all(c.isalnum() or c in " ._-" for c in name)
    fits = 0 < len(name) <= LONGEST_NAME and unicodedata.is_normalized("NFC", name)
    edges = bool(name) and name[0].isalnum() and name[-1].isalnum()
    if (
        not (letters and fits and edges)
        or name.lower().endswith(".zip")
        or name.split(".")[0].strip().lower() in _DEVICES
    ):
        raise ValueError(
            f"the name {name!r} cannot be a file's: wanted 1 to {LONGEST_NAME} letters, digits, spaces and . _ - "
            "that begin and end with a letter or a digit, and do not end in .zip"
        )
    return name


def check_apart(names: Iterable[str]) -> None:
    """Refuse two names that are one on a system which does not tell capitals apart."""
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(name.casefold(), name)
        if other != name:
            raise ValueError(
                f"the members {other!r} and {name!r} differ in capitals alone: give them names of their own"
            )


def now() -> str:
    """The time in UTC, as rosters write it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def plain_node_key(text: str) -> str:
    """A node's public key as `ecdsa-sha2-nistp384 BASE64`, without comment; raises `ValueError` on any other kind of key."""
    try:
        key = load_ssh_public_key(text.encode())
        if not isinstance(key, EllipticCurvePublicKey) or not isinstance(key.curve, SECP384R1):
            raise ValueError
    except (ValueError, UnsupportedAlgorithm):
        raise ValueError(
            f"the node key {text[:30]!r} is none that Flower takes; wanted an OpenSSH public key of ECDSA P-384, as `oncofed site enrol` makes"
        ) from None
    return key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


class ConsortiumFile(Section):
    """consortium.toml: who takes part, and where hospitals dial."""

    name: str = Field(description="of the consortium")
    address: str = Field(description="DNS name or IP address that hospitals dial")
    port: int = Field(9443, ge=1, le=65535, description="that hospitals dial")
    superlink_port: int = Field(8000, ge=1, le=65535, description="of the SuperLink, on loopback alone")
    members: tuple[str, ...] = Field(description="names of the hospitals, each as in its site.toml")
    ca_days: int = Field(3650, ge=30, le=7300, description="how long the consortium's own authority lasts")
    server_days: int = Field(397, ge=1, le=825, description="how long a server certificate lasts")
    invitation_days: int = Field(30, ge=1, le=365, description="how long the token of a start-up kit is taken")

    @field_validator("name")
    @classmethod
    def _safe(cls, name: str) -> str:
        return check_name(name)

    @field_validator("address")
    @classmethod
    def _dialled(cls, address: str) -> str:
        try:
            return str(ipaddress.ip_address(address))
        except ValueError:
            pass
        if len(address) > 253 or not all(_LABEL.fullmatch(part) for part in address.split(".")):
            raise ValueError(
                f"{address!r} is neither a DNS name nor an IP address; write it without scheme and port, as fl.example.org"
            )
        if address.rsplit(".", 1)[-1].isdigit():
            raise ValueError(f"{address!r} looks like an IP address but is none")
        return address.lower()

    @model_validator(mode="after")
    def _apart(self) -> Self:
        for name in self.members:
            check_name(name)
        twice = sorted({n for n in self.members if self.members.count(n) > 1})
        if twice:
            raise ValueError(f"the members {twice[:5]} are listed twice")
        check_apart(self.members)
        if self.port == self.superlink_port:
            raise ValueError(
                f"port and superlink_port are both {self.port}; hospitals must not reach the SuperLink itself"
            )
        return self

    @classmethod
    def read(cls, file: Path) -> ConsortiumFile:
        """Raises `ValueError` that names each wrong field, the value seen and what is wanted."""
        try:
            return cls.model_validate(tomllib.loads(file.read_text()))
        except FileNotFoundError:
            raise ValueError(f"{file} is not there; docs/consortium.md shows one") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{file} is no TOML: {error}") from None
        except ValidationError as error:
            raise ValueError(f"{file}: {told(error)}") from None


class RosterMember(Section):
    """A hospital of the consortium. `identity` signs its keys in secure sums, `node_key` is what Flower asks its node for."""

    identity: str = ""
    node_key: str = ""
    status: Literal["invited", "active", "revoked"] = "invited"
    since: str
    """When it got this status or these keys."""

    @model_validator(mode="after")
    def _keys(self) -> Self:
        if self.identity and not signing.is_public(self.identity):
            raise ValueError(f"identity {self.identity[:16]!r}: wanted 64 hex digits")
        if self.node_key and plain_node_key(self.node_key) != self.node_key:
            raise ValueError("node_key: wanted key type and base64 alone")
        if self.status == "active" and not (self.identity and self.node_key):
            raise ValueError("an active member has an identity and a node key")
        return self


class Succession(Section):
    """A coordinator's old key says that a new one follows it: whoever trusts the old may trust the new."""

    old: str
    new: str
    serial: int
    """Of the first roster under the new key."""
    signature: str = ""

    @classmethod
    def of(cls, private: bytes, new: str, consortium: str, serial: int) -> Succession:
        """Signed with the old key."""
        said = cls(old=signing.public_of(private), new=new, serial=serial)
        return said.model_copy(update={"signature": signing.sign(private, signing.SUCCESSION, said._text(consortium))})

    def holds(self, consortium: str) -> bool:
        return signing.verify(self.old, signing.SUCCESSION, self._text(consortium), self.signature)

    def _text(self, consortium: str) -> dict[str, Any]:
        return {"consortium": consortium, "old": self.old, "new": self.new, "serial": self.serial}


class SignedRoster(Section):
    """Who is a member, with which keys, by the coordinator's word. `serial` rises with every change."""

    consortium: str
    serial: int = Field(ge=1)
    issued: str
    coordinator: str
    """Ed25519 public key, 64 hex digits."""
    members: dict[str, RosterMember]
    successions: tuple[Succession, ...] = ()
    """Keys that the coordinator had before, oldest first: a hospital that pinned any of them can follow."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        check_name(self.consortium)
        for name in self.members:
            check_name(name)
        check_apart(self.members)
        for key in ("identity", "node_key"):
            owners: dict[str, str] = {}
            for name, member in self.members.items():
                value = getattr(member, key)
                if value and owners.setdefault(value, name) != name:
                    raise ValueError(f"'{owners[value]}' and '{name}' have one {key}; each hospital has its own")
        if not signing.is_public(self.coordinator):
            raise ValueError(f"coordinator {self.coordinator[:16]!r}: wanted 64 hex digits")
        return self

    @property
    def active(self) -> dict[str, RosterMember]:
        """Members that may take part, by name."""
        return {name: m for name, m in sorted(self.members.items()) if m.status == "active"}

    def trusted_by(self, pinned: str) -> bool:
        """Whether somebody who pinned this coordinator's key (hex) may trust the one that signs now."""
        key = pinned
        for s in self.successions:
            if s.old == key and s.holds(self.consortium):
                key = s.new
        return key == self.coordinator

    @classmethod
    def read(cls, file: Path, coordinator: str) -> SignedRoster:
        """The roster, where the coordinator's key (hex), or one that follows it, signed it; raises `ValueError` with the remedy."""
        try:
            data = json.loads(file.read_text())
            said, signature = data["roster"], data["signature"]
            roster = cls.model_validate(said)
        except FileNotFoundError:
            raise ValueError(f"{file} is not there; ask the coordinator for the roster") from None
        except ValidationError as error:
            raise ValueError(f"{file}: {told(error)}; ask the coordinator for the roster again") from None
        except (ValueError, KeyError, TypeError, OSError, RecursionError) as error:
            raise ValueError(
                f"{file} is no roster ({type(error).__name__}); ask the coordinator for it again"
            ) from None
        # what is verified is the text as it came, not as it was read
        if not signing.verify(roster.coordinator, signing.ROSTER, said, signature):
            raise ValueError(
                f"{file}: the signature of the roster of '{roster.consortium}' does not hold, so it was altered on its way; ask the "
                "coordinator for it again"
            )
        if not roster.trusted_by(coordinator):
            raise ValueError(
                f"{file}: the roster of '{roster.consortium}' is signed by the coordinator {roster.coordinator[:16]}, pinned is "
                f"{coordinator[:16]}: it is another consortium's, or the coordinator has a new key that the old one does not vouch for; ask "
                "the coordinator by telephone"
            )
        return roster

    def write(self, file: Path, private: bytes) -> None:
        """Sign with the coordinator's key and replace the file in one step."""
        if signing.public_of(private) != self.coordinator:
            raise ValueError(f"{file}: the key at hand is not the one of the coordinator that this roster names")
        said = self.model_dump(mode="json")
        signed = {"roster": said, "signature": signing.sign(private, signing.ROSTER, said)}
        write_text(file, json.dumps(signed, indent=1, sort_keys=True, ensure_ascii=False) + "\n", durable=True)


def told(error: ValidationError) -> str:
    """What is wrong with each field, in one line."""
    parts = []
    for e in error.errors(include_url=False):
        where = ".".join(str(p) for p in e["loc"])
        seen = "" if isinstance(e["input"], dict) else f" (seen: {str(e['input'])[:60]!r})"
        said = e["msg"].removeprefix("Value error, ")
        parts.append(f"{where}: {said}{seen}" if where else said)
    return "; ".join(parts)
