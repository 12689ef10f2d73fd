"""Shamir's sharing of a secret: any `threshold` of the shares give it back, fewer say nothing of it (Shamir 1979).

Whole numbers modulo the Mersenne prime 2^521 - 1, which holds a key of 256 bits. Share k is the value at k + 1 of a polynomial
whose other coefficients come from the operating system.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence

PRIME = 2**521 - 1
SHARE_BYTES = 66
"""Of one share, big-endian."""

MOST_SECRET = 32
"""Bytes of the longest secret."""


def split(secret: bytes, shares: int, threshold: int) -> list[bytes]:
    """The shares of a secret of at most 32 bytes, in the order of their holders."""
    if len(secret) > MOST_SECRET or not 1 <= threshold <= shares:
        raise ValueError(
            f"{threshold} of {shares} shares of {len(secret)} bytes: wanted a threshold from 1 to the shares, and at most {MOST_SECRET} bytes"
        )
    coefficients = [int.from_bytes(secret, "big"), *(secrets.randbelow(PRIME) for _ in range(threshold - 1))]
    out = []
    for x in range(1, shares + 1):
        y = 0
        for c in reversed(coefficients):
            y = (y * x + c) % PRIME
        out.append(y.to_bytes(SHARE_BYTES, "big"))
    return out


def weights_at_zero(holders: Sequence[int]) -> dict[int, int]:
    """What each holder's share counts in the secret (Lagrange), by the holder's number from 0: the same for all secrets."""
    points = {k: k + 1 for k in holders}
    out = {}
    for k, x in points.items():
        above, below = 1, 1
        for j, other in points.items():
            if j != k:
                above, below = above * other % PRIME, below * (other - x) % PRIME
        out[k] = above * pow(below, -1, PRIME) % PRIME
    return out


def combine(shares: Mapping[int, bytes], weights: Mapping[int, int], length: int = MOST_SECRET) -> bytes:
    """The secret of `length` bytes from shares by holder; raises `ValueError` where they give none, as altered ones do."""
    total = sum(int.from_bytes(shares[k], "big") * w for k, w in weights.items()) % PRIME
    if total >> (8 * length):
        raise ValueError(f"the shares give no secret of {length} bytes; one of them was altered, or too few came")
    return total.to_bytes(length, "big")
