"""Signatures of the consortium: what is signed, for what purpose, with Ed25519 (RFC 8032); and fingerprints that two people compare."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

KEY_BYTES = 32
ROSTER = "oncofed roster"
STUDY = "oncofed study"
SUCCESSION = "oncofed succession"
KIT = "oncofed kit"
ENROLMENT = "oncofed enrolment"
"""Purposes: a signature for one is none for another, so that nothing signed can be passed off as something else."""

_GROUPS = 6


def canonical(value: Any) -> bytes:
    """The bytes of a JSON value, the same everywhere: sorted keys, no blanks, UTF-8. Raises `ValueError` on NaN and infinity."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def new_private() -> bytes:
    """A fresh Ed25519 key, 32 bytes."""
    return Ed25519PrivateKey.generate().private_bytes_raw()


def public_of(private: bytes) -> str:
    """The public half, 64 hex digits."""
    return Ed25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw().hex()


def sign(private: bytes, purpose: str, value: Any) -> str:
    """The signature of a JSON value for one purpose, 128 hex digits."""
    return Ed25519PrivateKey.from_private_bytes(private).sign(_bound(purpose, value)).hex()


def verify(public: str, purpose: str, value: Any, signature: str) -> bool:
    """Whether the owner of `public` (hex) signed this value for this purpose; malformed keys and signatures are false, too."""
    try:
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(public))
        key.verify(bytes.fromhex(signature), _bound(purpose, value))
    except (InvalidSignature, ValueError, TypeError):
        return False
    return True


def is_public(text: str) -> bool:
    """Whether this is an Ed25519 public key as 64 lower-case hex digits."""
    return len(text) == 2 * KEY_BYTES and set(text) <= set("0123456789abcdef")


def fingerprint(value: Any) -> str:
    """96 bits of a JSON value's SHA-256 in six groups of four hex digits: short enough to be read out on the telephone."""
    digits = hashlib.sha256(b"oncofed fingerprint\0" + canonical(value)).hexdigest()
    return " ".join(digits[4 * i : 4 * i + 4] for i in range(_GROUPS))


def _bound(purpose: str, value: Any) -> bytes:
    return canonical([purpose, value])
