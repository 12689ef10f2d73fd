"""Arrays in one piece: what was packed comes out, to the last bit and without a copy, and nothing else is read as arrays."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from oncofed.common.errors import Refusal
from oncofed.common.packing import KINDS, MOST_AXES, pack, unpack
from oncofed.common.wire import pack_arrays
from safetensors.numpy import load, save
from toy_hostile import piece

ARRAYS = st.dictionaries(
    st.text(max_size=8),
    st.sampled_from(list(KINDS.values())).flatmap(
        lambda k: hnp.arrays(k, hnp.array_shapes(min_dims=0, min_side=0, max_dims=3))
    ),
    max_size=6,
)


@given(arrays=ARRAYS)
def test_what_was_packed_comes_out_in_its_order(arrays: dict[str, np.ndarray]) -> None:
    data = pack(arrays)
    out = unpack(data)
    assert list(out) == list(arrays)
    for name, value in arrays.items():
        assert (out[name].dtype, out[name].shape) == (value.dtype, value.shape)
        assert out[name].tobytes() == value.tobytes()
        assert out[name].flags.aligned
        assert not out[name].flags.writeable
        assert value.size == 0 or np.shares_memory(out[name], np.frombuffer(data, np.uint8))


@given(arrays=ARRAYS)
def test_the_layout_is_that_of_safetensors(arrays: dict[str, np.ndarray]) -> None:
    theirs, back = load(pack(arrays)), unpack(save(arrays))
    assert theirs.keys() == back.keys() == arrays.keys()
    for name, value in arrays.items():
        assert theirs[name].tobytes() == back[name].tobytes() == value.tobytes()
        assert theirs[name].shape == back[name].shape == value.shape


def test_the_other_order_of_bytes_and_views_are_packed_as_numbers() -> None:
    big, part = np.arange(6, dtype=">f4").reshape(2, 3), np.arange(12)[::-2]
    out = unpack(pack({"big": big, "part": part}))
    np.testing.assert_array_equal(out["big"], big)
    np.testing.assert_array_equal(out["part"], part)


def test_flower_moves_one_piece() -> None:
    assert list(pack_arrays({str(i): np.zeros(3) for i in range(50)})) == ["sum"]


@pytest.mark.parametrize(
    "value", [np.array([object()]), np.array(["a"]), np.zeros(1, complex), np.zeros(1, np.longdouble)]
)
def test_what_is_no_plain_number_is_not_packed(value: np.ndarray) -> None:
    with pytest.raises(TypeError, match=r"array .a. has dtype .*; only plain numbers travel"):
        pack({"a": value})


ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "end within their header"),
        (b"\xff" * 8, "end within their header"),
        (piece({"a": ONE})[:20], "end within their header"),
        (piece(b"\xff{}"), "is no JSON"),
        (piece(b"[" * 100_000), "is no JSON"),
        (piece(b'{"a": 1, "a": 2}'), "is no JSON"),
        (piece([]), "names none"),
        (piece({"a": None}), "without dtype, shape and place"),
        (piece({"a": ONE | {"more": 1}}, bytes(8)), "without dtype, shape and place"),
        (piece({"a": ONE | {"dtype": "object"}}, bytes(8)), "dtype 'object', which is none"),
        (piece({"a": ONE | {"dtype": ["F32"]}}, bytes(8)), "which is none"),
        (piece({"a": ONE | {"shape": [-2]}}, bytes(8)), "which is none"),
        (piece({"a": ONE | {"shape": [2.0]}}, bytes(8)), "which is none"),
        (piece({"a": ONE | {"shape": [True] * 2}}, bytes(8)), "which is none"),
        (piece({"a": ONE | {"shape": [1] * (MOST_AXES + 1)}}, bytes(4)), "which is none"),
        (piece({"a": ONE | {"data_offsets": [0]}}, bytes(8)), "which is none"),
        (piece({"a": ONE | {"data_offsets": [-4, 4]}}, bytes(8)), "which is none"),
        (
            piece({"a": ONE | {"data_offsets": [8, 0]}}, bytes(8)),
            r"holds -8 bytes, its shape \(2,\) of float32 wants 8",
        ),
        (piece({"a": ONE | {"shape": [2**31, 2**31, 4]}}, bytes(8)), "of float32 wants 73786976294838206464"),
        (piece({"a": ONE}, bytes(7)), "ends at byte 8, the message has 7"),
        (piece({"a": ONE}, bytes(9)), "overlap, or leave bytes between"),
        (piece({"a": ONE, "b": ONE}, bytes(8)), "overlap, or leave bytes between"),
        (piece({"a": ONE | {"data_offsets": [4, 12]}}, bytes(12)), "overlap, or leave bytes between"),
    ],
)
def test_what_holds_no_arrays_is_refused(data: bytes, reason: str) -> None:
    with pytest.raises(Refusal, match=reason):
        unpack(data)


@given(arrays=ARRAYS, at=st.integers(0, 10_000), byte=st.integers(1, 255))
def test_a_changed_byte_gives_arrays_or_a_refusal(arrays: dict[str, np.ndarray], at: int, byte: int) -> None:
    data = bytearray(pack(arrays))
    data[at % len(data)] ^= byte
    try:
        out = unpack(bytes(data))
    except Refusal:
        return
    assert all(value.dtype.kind in "fiub" for value in out.values())
