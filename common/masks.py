"""The cryptography of a secure sum: agreed keys, masks, sealed shares, signatures; primitives of the `cryptography` package alone.

X25519 (RFC 7748), HKDF with SHA-256 (RFC 5869), ChaCha20 (RFC 8439) for masks, ChaCha20-Poly1305 for shares, Ed25519 (RFC 8032).
Masks are words of 64 bits, added and taken away modulo 2^64. The protocol is that of Bonawitz et al. (2017).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

LEAST_MEMBERS = 3
"""Of two, each would know the other's sum from the total."""

KEY_BYTES = 32
_TAG = "oncofed secure sum 1"
_NONCE = 12
_CHUNK = 1 << 16
_ZEROS = bytes(8 * _CHUNK)


@dataclass(frozen=True)
class Member:
    """A site in a sum: its lasting identity, its two fresh public keys, and the identity's signature over them."""

    identity: bytes
    channel: bytes
    mask: bytes
    signature: bytes


Members = Mapping[str, Member]
"""By site's name; a member's number is its place among the sorted names."""


def threshold_of(members: int, asked: int = 0) -> int:
    """How many members must be there at every step; 0: floor(2n/3) + 1. Raises `ValueError` where two halves could both reach it."""
    least = members // 2 + 1
    if not asked:
        return max(least, 2 * members // 3 + 1)
    if not least <= asked <= members:
        raise ValueError(
            f"privacy.secure_threshold = {asked} for {members} sites must lie between {least} and {members}, else the server could ask "
            "one half for what it must not have beside the other's; set it to 0 for floor(2n/3) + 1"
        )
    return asked


def context_of(question: str, members: Members) -> bytes:
    """What all keys of a sum are bound to: the question and everybody's keys. Members who were told otherwise agree on nothing."""
    keys = [[n, m.identity.hex(), m.channel.hex(), m.mask.hex()] for n, m in sorted(members.items())]
    return hashlib.sha256(json.dumps([_TAG, question, keys]).encode()).digest()


def signed_text(question: str, site: str, channel: bytes, mask: bytes) -> bytes:
    """What an identity signs. The question's digest covers study, fold, phase, round, kind and every number that was sent."""
    return json.dumps([_TAG, "keys", question, site, channel.hex(), mask.hex()]).encode()


def is_signed(member: Member, question: str, site: str) -> bool:
    """Whether a member's identity signed its keys for this question."""
    try:
        text = signed_text(question, site, member.channel, member.mask)
        Ed25519PublicKey.from_public_bytes(member.identity).verify(member.signature, text)
    except (InvalidSignature, ValueError):
        return False
    return True


def new_private_key() -> bytes:
    """A fresh X25519 key."""
    return X25519PrivateKey.generate().private_bytes_raw()


def public_key(private: bytes) -> bytes:
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def identity_of(private: bytes) -> bytes:
    """The public half of an Ed25519 identity."""
    return Ed25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def new_identity() -> bytes:
    return Ed25519PrivateKey.generate().private_bytes_raw()


def sign(private: bytes, text: bytes) -> bytes:
    return Ed25519PrivateKey.from_private_bytes(private).sign(text)


def _agreed(private: bytes, public: bytes, context: bytes, *purpose: str) -> bytes:
    """The key of 256 bits that two parties share for one purpose; raises `ValueError` on a public key that is none."""
    shared = X25519PrivateKey.from_private_bytes(private).exchange(X25519PublicKey.from_public_bytes(public))
    info = json.dumps([_TAG, *purpose]).encode()
    return HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=context, info=info).derive(shared)


def pair_seed(private: bytes, public: bytes, context: bytes) -> bytes:
    """The seed of the mask that two members share."""
    return _agreed(private, public, context, "mask")


def pair_sign(mine: str, other: str) -> int:
    """Whether a member adds the mask of a pair, or takes it away: in the sum of both it is gone."""
    return 1 if mine < other else -1


def add_mask(words: np.ndarray, seed: bytes, sign_: int = 1) -> None:
    """Add to uint64 `words [d]` the ChaCha20 stream of `seed`, or take it away, in place and modulo 2^64.

    A seed belongs to one sum and one pair, so the nonce is 0.
    """
    stream = Cipher(algorithms.ChaCha20(seed, bytes(16)), mode=None).encryptor()
    buffer = bytearray(8 * _CHUNK + 63)
    for at in range(0, words.size, _CHUNK):
        part = words[at : at + _CHUNK]
        stream.update_into(memoryview(_ZEROS)[: 8 * part.size], buffer)
        mask = np.frombuffer(buffer, dtype="<u8", count=part.size)
        (np.add if sign_ > 0 else np.subtract)(part, mask, out=part)


def commitment(seed: bytes, context: bytes, site: str) -> bytes:
    """What a member says of its own seed beforehand: it hides 256 random bits, and another seed does not fit."""
    return hashlib.sha256(json.dumps([_TAG, "seed", context.hex(), site, seed.hex()]).encode()).digest()


def seal(text: bytes, private: bytes, public: bytes, context: bytes, sender: str, recipient: str) -> bytes:
    """Encrypt for one member of one sum; who sends and who receives is bound in."""
    nonce = os.urandom(_NONCE)
    key = _agreed(private, public, context, "share", sender, recipient)
    return nonce + ChaCha20Poly1305(key).encrypt(nonce, text, context)


def unseal(sealed: bytes, private: bytes, public: bytes, context: bytes, sender: str, recipient: str) -> bytes:
    """The inverse of `seal`; raises `ValueError` where it was altered or is for somebody else."""
    key = _agreed(private, public, context, "share", sender, recipient)
    try:
        return ChaCha20Poly1305(key).decrypt(sealed[:_NONCE], sealed[_NONCE:], context)
    except InvalidTag:
        raise ValueError(f"what {sender} has sealed for {recipient} does not open") from None


def flatten(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """Arrays of 64-bit integers as one vector of words, by sorted name; a copy."""
    parts = [arrays[name].reshape(-1).view(np.uint64) for name in sorted(arrays)]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.uint64)


def unflatten(
    words: np.ndarray, shapes: Mapping[str, tuple[int, ...]], dtype: type = np.uint64
) -> dict[str, np.ndarray]:
    """The inverse of `flatten`."""
    out: dict[str, np.ndarray] = {}
    at = 0
    for name in sorted(shapes):
        size = int(np.prod(shapes[name], dtype=np.int64))
        out[name] = words[at : at + size].view(dtype).reshape(shapes[name])
        at += size
    return out
