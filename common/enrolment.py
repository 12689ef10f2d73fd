"""How a hospital becomes a member: the start-up kit that its coordinator sends, and the enrolment that comes back with public keys.

The kit's token never travels back: an enrolment proves that its maker has it, and that proof is for these keys alone.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, EllipticCurvePrivateKey, EllipticCurvePublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, load_ssh_public_key
from oncofed.common import signing
from oncofed.common.consortium import check_name, plain_node_key, told
from oncofed.common.files import write_text
from oncofed.common.section import Section
from pydantic import Field, ValidationError, field_validator

KIT_FILE, CA_FILE = "kit.toml", "ca.crt"
TOKEN_BYTES = 32
VERSION = r"^[0-9A-Za-z.+ -]{1,40}$"
"""It is printed at the other party's terminal."""

LARGEST = 100_000
"""Bytes of an enrolment file, far beyond any."""


class Kit(Section):
    """kit.toml: whom to dial, whom to trust, and the token that admits a hospital once. The coordinator signs it with the kit's files."""

    consortium: str
    member: str
    address: str
    port: int = Field(ge=1, le=65535)
    coordinator: str
    """Ed25519 public key, 64 hex digits."""
    token: str
    new_keys: bool = False
    """The hospital makes new keys even if it has some: its old ones are lost or known to others."""
    version: str = Field(pattern=VERSION)
    """Of oncofed, at the coordinator."""
    files: dict[str, str]
    """SHA-256 of every other file of the kit, by name."""
    signature: str = ""

    @field_validator("consortium", "member")
    @classmethod
    def _safe(cls, name: str) -> str:
        return check_name(name)

    @field_validator("coordinator", "token")
    @classmethod
    def _hex(cls, text: str) -> str:
        if not signing.is_public(text):
            raise ValueError("wanted 64 hex digits")
        return text

    def text(self, private: bytes) -> str:
        """kit.toml, signed by the coordinator."""
        said = self._said()
        return tomli_w.dumps(said | {"signature": signing.sign(private, signing.KIT, said)})

    def _said(self) -> dict[str, Any]:
        return self.model_dump(mode="json", exclude={"signature"})

    @classmethod
    def of(cls, files: Mapping[str, bytes], where: str) -> Kit:
        """The kit that these files make up; raises `ValueError` where one is missing, of another kit, or altered."""
        if KIT_FILE not in files or CA_FILE not in files:
            raise ValueError(
                f"{where} is no start-up kit: it has no {KIT_FILE} or no {CA_FILE}; ask the coordinator for it again"
            )
        try:
            kit = cls.model_validate(tomllib.loads(files[KIT_FILE].decode()))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{where}: {KIT_FILE} is no TOML ({error}); ask the coordinator for the kit again"
            ) from None
        except ValidationError as error:
            raise ValueError(f"{where}: {KIT_FILE}: {told(error)}; ask the coordinator for the kit again") from None
        found = digests(files)
        wrong = sorted(n for n in found.keys() | kit.files.keys() if found.get(n) != kit.files.get(n))
        if wrong or not signing.verify(kit.coordinator, signing.KIT, kit._said(), kit.signature):
            raise ValueError(
                f"{where}: {', '.join(wrong[:3]) or KIT_FILE} is not as the coordinator signed it; take the kit as it came, or ask for it again"
            )
        return kit


def digests(files: Mapping[str, bytes]) -> dict[str, str]:
    """SHA-256 by name of a kit's files but kit.toml."""
    return {n: hashlib.sha256(content).hexdigest() for n, content in sorted(files.items()) if n != KIT_FILE}


def consortium_fingerprint(consortium: str, coordinator: str, authority: bytes) -> str:
    """What coordinator and hospital compare by telephone: the key that signs, and the certificate (PEM) that TLS trusts."""
    certificate = x509.load_pem_x509_certificate(authority).public_bytes(Encoding.DER)
    return signing.fingerprint([consortium, coordinator, hashlib.sha256(certificate).hexdigest()])


def member_fingerprint(name: str, identity: str, node_key: str) -> str:
    """The same of a hospital's two public keys."""
    return signing.fingerprint([name, identity, node_key])


def same_fingerprint(one: str, other: str) -> bool:
    """Whether two people read the same, however it is spaced."""
    return "".join(one.lower().split()) == "".join(other.lower().split())


def token_key(token: str) -> str:
    """What the coordinator keeps of a token: a digest, which proofs are held against."""
    return hashlib.sha256(b"oncofed token\0" + token.encode()).hexdigest()


class Enrolment(Section):
    """A hospital's public keys, signed by both of them, with the proof that its maker has the kit's token."""

    consortium: str
    name: str
    identity: str
    node_key: str
    version: str = Field(pattern=VERSION)
    proof: str = ""
    signature: str = ""
    """By the identity."""
    node_signature: str = ""
    """By the node's key: nobody enrols a key that another one has."""

    @property
    def fingerprint(self) -> str:
        return member_fingerprint(self.name, self.identity, self.node_key)

    @property
    def _said(self) -> dict[str, Any]:
        return self.model_dump(mode="json", include={"consortium", "name", "identity", "node_key", "version"})

    def signed(self, token: str, identity: bytes, node: EllipticCurvePrivateKey) -> Enrolment:
        """With the proof and both signatures, by the private halves."""
        with_proof = self.model_copy(update={"proof": self._proof(token_key(token))})
        text = with_proof._text()
        return with_proof.model_copy(
            update={
                "signature": signing.sign(identity, signing.ENROLMENT, text),
                "node_signature": node.sign(_node_text(text), ECDSA(SHA256())).hex(),
            }
        )

    def check_signatures(self) -> None:
        """Raises `ValueError` where one of the two keys did not sign."""
        text = self._text()
        key = load_ssh_public_key(self.node_key.encode())
        if not isinstance(key, EllipticCurvePublicKey):  # `node_key` was validated
            raise TypeError(type(key).__name__)
        try:
            key.verify(bytes.fromhex(self.node_signature), _node_text(text), ECDSA(SHA256()))
            node = True
        except (InvalidSignature, ValueError):
            node = False
        for holds, which in (
            (signing.verify(self.identity, signing.ENROLMENT, text, self.signature), "identity"),
            (node, "node key"),
        ):
            if not holds:
                raise ValueError(
                    f"the enrolment of '{self.name}' is not signed by its {which}: it was altered, or its maker does not have the key; ask "
                    "the hospital for it again"
                )

    def proves(self, kept: str) -> bool:
        """Whether its maker has the token of which the coordinator keeps `kept`."""
        return hmac.compare_digest(self._proof(kept).encode(), self.proof.encode())

    def _proof(self, key: str) -> str:
        return hmac.digest(bytes.fromhex(key), signing.canonical(["oncofed proof", self._said]), "sha256").hex()

    def _text(self) -> dict[str, Any]:
        return self._said | {"proof": self.proof}

    @field_validator("consortium", "name")
    @classmethod
    def _safe(cls, name: str) -> str:
        return check_name(name)

    @field_validator("identity")
    @classmethod
    def _identity(cls, text: str) -> str:
        if not signing.is_public(text):
            raise ValueError("wanted 64 hex digits")
        return text

    @field_validator("node_key")
    @classmethod
    def _node_key(cls, text: str) -> str:
        return plain_node_key(text)

    def write(self, file: Path) -> None:
        write_text(file, json.dumps(self.model_dump(mode="json"), indent=1, sort_keys=True, ensure_ascii=False) + "\n")

    @classmethod
    def read(cls, file: Path) -> Enrolment:
        """Raises `ValueError` where the file is no enrolment, or a signature does not hold."""
        try:
            if file.stat().st_size > LARGEST:
                raise ValueError(f"{file} is larger than any enrolment; ask the hospital for its enrolment-NAME.json")
            enrolment = cls.model_validate(json.loads(file.read_text()))
        except FileNotFoundError:
            raise ValueError(f"{file} is not there; name the enrolment-NAME.json that the hospital sent") from None
        except ValidationError as error:
            raise ValueError(f"{file}: {told(error)}; ask the hospital for its enrolment again") from None
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
            raise ValueError(f"{file} is no enrolment; name the enrolment-NAME.json that the hospital sent") from None
        enrolment.check_signatures()
        return enrolment


def _node_text(text: dict[str, Any]) -> bytes:
    return signing.canonical([signing.ENROLMENT, "node", text])
