"""The pieces of a sum under masks: shares of secrets, streams of masks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oncofed.common import masks, shamir


@settings(max_examples=40, deadline=None)
@given(data=st.data(), secret=st.binary(min_size=32, max_size=32), shares=st.integers(1, 12))
def test_any_threshold_of_shares_gives_the_secret(data: st.DataObject, secret: bytes, shares: int) -> None:
    threshold = data.draw(st.integers(1, shares))
    parts = shamir.split(secret, shares, threshold)
    holders = data.draw(st.sets(st.integers(0, shares - 1), min_size=threshold, max_size=shares))
    weights = shamir.weights_at_zero(sorted(holders))
    assert shamir.combine(dict(enumerate(parts)), weights) == secret


@settings(max_examples=20, deadline=None)
@given(secret=st.binary(min_size=32, max_size=32), other=st.binary(min_size=32, max_size=32))
def test_fewer_shares_fit_any_secret(secret: bytes, other: bytes) -> None:
    """With t - 1 shares there is a last one for every secret: they say nothing."""
    parts = shamir.split(secret, 4, 3)
    weights = shamir.weights_at_zero([0, 1, 2])
    known = sum(int.from_bytes(parts[k], "big") * weights[k] for k in (0, 1))
    last = (int.from_bytes(other, "big") - known) * pow(weights[2], -1, shamir.PRIME) % shamir.PRIME
    fits = {0: parts[0], 1: parts[1], 2: last.to_bytes(shamir.SHARE_BYTES, "big")}
    assert shamir.combine(fits, weights) == other


@pytest.mark.parametrize(("shares", "threshold", "secret"), [(3, 4, b"x"), (3, 0, b"x"), (3, 2, bytes(33))])
def test_a_sharing_that_cannot_be_is_refused(shares: int, threshold: int, secret: bytes) -> None:
    with pytest.raises(ValueError, match="wanted a threshold"):
        shamir.split(secret, shares, threshold)


def test_masks_are_those_of_chacha20_and_cancel() -> None:
    """The first words of RFC 8439's stream of key 0 (appendix A.1, vector 1), and a mask taken away again."""
    words = np.zeros(150_000, dtype=np.uint64)
    masks.add_mask(words, bytes(32))
    assert words[:2].tobytes().hex() == "76b8e0ada0f13d90405d6ae55386bd28"
    masks.add_mask(words, bytes(32), -1)
    assert not words.any()
