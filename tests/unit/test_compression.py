"""Changes and weights in fewer bytes: bounds, unbiased rounding, zeros, error feedback, and what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oncofed.common import compression
from oncofed.common.blocks import EVIDENCE, Blocks, Sum, weigh
from oncofed.common.compression import (
    BFLOAT16,
    CHUNK,
    INT8,
    SCALE,
    SMALL,
    Coding,
    from_bfloat16,
    from_int8,
    nbytes,
    read_weights,
    round_weights,
    to_bfloat16,
    to_int8,
)
from oncofed.common.exchange import Transport
from oncofed.common.wire import pack_arrays, unpack_arrays

BLOCKS = Blocks({"w": "trunk", "experts": ("e/0", "e/1", "e/2"), "bias": "trunk", "alone": "rare", "zero": "trunk"})
SHAPES = {"w": (40, 70), "experts": (3, 20, 33), "bias": (7,), "alone": (30, 30), "zero": (), EVIDENCE: (5,)}
EVIDENCE_OF = {"trunk": 90.0, "e/0": 40.5, "e/1": 0.0, "e/2": 12.25, "rare": 0.0}


def change(seed: int, size: float = 0.01) -> Sum:
    rng = np.random.default_rng(seed)
    return {n: rng.normal(0, size, s).astype(np.float32) for n, s in SHAPES.items() if n != EVIDENCE}


def site_sum(seed: int, evidence: dict[str, float] | None = None) -> Sum:
    return weigh(change(seed), BLOCKS.vector(evidence or EVIDENCE_OF), BLOCKS)


def draws(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def through(coding: Coding, total: Sum, dropped: Sum | None = None, seed: int = 0) -> tuple[Sum, Sum]:
    """What the server reads, after the wire, and what was dropped."""
    packed, left = coding.pack(total, BLOCKS, draws(seed), dropped)
    return coding.unpack(unpack_arrays(pack_arrays(packed)), BLOCKS, SHAPES, "Mayo"), left


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([(0, 5), (1, 0), (1, 1), (1, CHUNK), (2, CHUNK + 1), (3, 2 * CHUNK - 1), (7, 3), (0, 0)]),
    st.integers(0, 2**31),
    st.sampled_from([1e-44, 1e-30, 1e-3, 1.0, 1e30, 3e38]),
)
def test_a_number_is_off_by_less_than_one_step(shape: tuple[int, int], seed: int, size: float) -> None:
    value = (draws(seed).uniform(-1, 1, shape) * size).astype(np.float32)
    whole, scale = to_int8(value, draws(seed + 1))
    assert whole.shape == shape
    assert whole.dtype == np.int8
    assert scale.shape == (shape[0], -(-shape[1] // CHUNK))
    step = np.repeat(scale, CHUNK, axis=1)[:, : shape[1]]
    assert (np.abs(from_int8(whole, scale) - value) <= step * (1 + 1e-4) + 1e-43).all()
    words = to_bfloat16(value, draws(seed + 1))
    assert words.dtype == np.uint16
    again = from_bfloat16(words)
    assert np.isfinite(again).all()
    assert (np.abs(again - value) <= np.abs(value) * 2.0**-7 + 2.0**-133).all()


@pytest.mark.parametrize("kind", ["int8", "bfloat16"])
def test_rounding_is_right_in_the_mean(kind: str) -> None:
    """A mean of n errors of at most one step is off by more than sqrt(ln(2 / p) / 2n) steps with probability p at most (Hoeffding).

    p = 1e-9 for each of 30 numbers: a false alarm in 3e7 runs, and none with these seeds.
    """
    n, p = 20_000, 1e-9
    value = draws(3).normal(0, 1, 30).astype(np.float32)
    many = np.tile(value, (n, 1))
    if kind == "int8":
        whole, scale = to_int8(many, draws(4))
        mean, step = from_int8(whole, scale).mean(0, dtype=np.float64), np.full(30, scale[0, 0])
    else:
        mean = from_bfloat16(to_bfloat16(many, draws(4))).mean(0, dtype=np.float64)
        step = np.exp2(np.floor(np.log2(np.abs(value))) - 7)
    within = step * math.sqrt(math.log(2 / p) / (2 * n))
    assert (np.abs(mean - value) <= within + 1e-6).all()
    nearest = np.rint(value / step) * step  # rounding to the nearest would not pass
    assert (np.abs(nearest - value) > within).any()


@pytest.mark.parametrize("upload", ["int8", "bfloat16"])
def test_zeros_stay_zeros(upload: str) -> None:
    value = np.zeros((3, 2000), dtype=np.float32)
    value[1, ::7] = 1e-6
    again = from_int8(*to_int8(value, draws())) if upload == "int8" else from_bfloat16(to_bfloat16(value, draws()))
    assert (again[value == 0] == 0).all()
    assert (again[1] != 0).any()


def test_the_largest_numbers_stay_finite() -> None:
    value = np.full(100, np.finfo(np.float32).max, dtype=np.float32)
    assert np.isfinite(from_bfloat16(to_bfloat16(value, draws()))).all()


def test_as_it_is_nothing_is_touched() -> None:
    everywhere = dict.fromkeys(EVIDENCE_OF, 3.0)
    total = site_sum(1, everywhere)
    packed, left = Coding().pack(total, BLOCKS, draws())
    assert not left
    assert packed.keys() == total.keys()
    assert all(packed[n] is total[n] for n in total)
    read, _ = through(Coding(), total)
    assert all(read[n].tobytes() == total[n].tobytes() for n in total)


@pytest.mark.parametrize("upload", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("only_evidence", [True, False])
def test_blocks_without_evidence_are_not_sent_and_come_out_as_zeros(upload: str, only_evidence: bool) -> None:
    coding, total = Coding(upload, only_evidence), site_sum(2)
    packed, _ = coding.pack(total, BLOCKS, draws())
    assert any(name.endswith("alone") for name in packed) != only_evidence
    experts = next(v for n, v in packed.items() if n.endswith("experts") and not n.startswith(SCALE))
    assert len(experts) == (2 if only_evidence else 3)
    read, _ = through(coding, total)
    assert {n: v.shape for n, v in read.items()} == SHAPES
    assert (read["experts"][1] == 0).all()
    assert (read["alone"] == 0).all()
    for name in total:
        step = 0.0 if upload == "float32" else np.abs(total[name]).max(initial=0.0) / 64
        np.testing.assert_allclose(read[name], total[name], rtol=0, atol=step)


def test_small_arrays_and_evidence_travel_as_they_are() -> None:
    packed, _ = Coding("int8").pack(site_sum(3), BLOCKS, draws())
    assert packed["bias"].dtype == np.float32
    assert packed["zero"].shape == ()
    assert packed[EVIDENCE].dtype == np.float64
    assert np.prod(SHAPES["bias"]) < SMALL <= np.prod(SHAPES["alone"])


def test_int8_takes_a_quarter() -> None:
    blocks = Blocks({"w": "trunk"})
    total = weigh({"w": draws().normal(size=(256, 1500)).astype(np.float32)}, np.array([9.0]), blocks)
    size = nbytes(total)
    for upload, share in (("int8", 0.252), ("bfloat16", 0.501)):
        assert nbytes(Coding(upload).pack(total, blocks, draws())[0]) / size < share


@pytest.mark.parametrize("upload", ["int8", "bfloat16"])
def test_what_was_told_adds_up_to_what_happened(upload: str) -> None:
    """Over rounds of changing evidence the sum of told changes is that of true ones, but for the last remainder."""
    coding, dropped = Coding(upload), {}
    told = {n: np.zeros(s) for n, s in SHAPES.items() if n != EVIDENCE}
    true, plain = ({n: v.copy() for n, v in told.items()} for _ in range(2))
    for round_ in range(12):
        evidence = EVIDENCE_OF | {"e/2": float(round_ % 3) * 7.5, "rare": 4.0 * (round_ % 2)}
        total, vector = site_sum(round_, evidence), BLOCKS.vector(evidence)
        read, dropped = through(coding, total, dropped, seed=round_)
        alone, _ = through(coding, total, None, seed=round_)
        for name in told:
            n = BLOCKS.spread(vector, name, told[name].ndim)
            inverse = np.divide(1.0, n, out=np.zeros_like(n), where=n > 0)
            told[name] += read[name] * inverse
            plain[name] += alone[name] * inverse
            true[name] += total[name] * inverse
    for name in ("w", "experts", "alone"):
        np.testing.assert_allclose(told[name] + dropped[name], true[name], rtol=0, atol=1e-6)
        step = 0.05 / 127 if upload == "int8" else 0.05 / 128
        assert np.abs(told[name] - true[name]).max() <= step
    # without feedback the errors of the rounds add up
    assert np.abs(plain["w"] - true["w"]).std() > 1.5 * np.abs(told["w"] - true["w"]).std()


def test_a_block_without_evidence_keeps_its_remainder() -> None:
    coding = Coding("int8")
    _, first = through(coding, site_sum(1, EVIDENCE_OF | {"rare": 5.0}))
    _, second = through(coding, site_sum(2), first)
    assert (first["alone"] != 0).any()
    np.testing.assert_array_equal(second["alone"], first["alone"])
    _, foreign = through(coding, site_sum(2), {"alone": np.ones(3, dtype=np.float32)})
    assert (foreign["alone"] == 0).all()


def test_the_same_draws_give_the_same_bytes() -> None:
    a, b, c = (Coding("int8").pack(site_sum(1), BLOCKS, draws(seed))[0] for seed in (5, 5, 6))
    assert all(a[n].tobytes() == b[n].tobytes() for n in a)
    assert a[INT8 + "w"].tobytes() != c[INT8 + "w"].tobytes()


def good(upload: str = "int8") -> Sum:
    return {n: v.copy() for n, v in Coding(upload).pack(site_sum(1), BLOCKS, draws())[0].items()}


def bad(upload: str = "int8", **changes: object) -> Sum:
    """A good answer with some arrays replaced, or, by None, taken out; `__` stands for the slash."""
    arrays = good(upload) | {n.replace("__", "/"): v for n, v in changes.items()}
    return {n: np.asarray(v) for n, v in arrays.items() if v is not None}


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        (bad(scale__w=None), r"Mayo: .*'scale/w'\] are missing, as transport.upload = 'int8'"),
        (bad(scale__w=np.full((1, 3), np.nan, dtype=np.float32)), "'scale/w' must hold finite scales"),
        (bad(scale__w=np.full((1, 3), -1, dtype=np.float32)), "'scale/w' must hold finite scales"),
        (bad(scale__w=np.ones((3, 1), dtype=np.float32)), r"'scale/w' has shape \(3, 1\), wanted \(1, 3\)"),
        (bad(scale__w=np.ones((1, 3))), "'scale/w' has dtype float64, wanted float32"),
        (bad(int8__w=np.ones((1, 2799), dtype=np.int8)), r"'int8/w' has shape \(1, 2799\), wanted \(1, 2800\)"),
        (bad(int8__w=np.ones((1, 2800), dtype=np.int64)), "'int8/w' has dtype int64, wanted int8"),
        (bad(int8__experts=np.ones((3, 660), dtype=np.int8)), r"wanted \(2, 660\)"),
        (bad(int8__alone=np.ones((1, 900), dtype=np.int8)), r"other arrays than the model: \['int8/alone'\]"),
        (bad(zip__w=np.ones(3)), r"other arrays than the model: \['zip/w'\]"),
        (good("bfloat16"), "are missing, as transport.upload = 'int8'"),
        (bad(evidence=None), "'evidence' must be 5 finite numbers"),
        (bad(evidence=np.full(5, np.inf)), "'evidence' must be 5 finite numbers"),
        (bad(evidence=np.ones((1, 5))), "'evidence' must be 5 finite numbers"),
        (bad(evidence=np.ones(5, dtype=np.int64)), "'evidence' has dtype int64, wanted floating point"),
        (bad(evidence=np.full(5, 1.0)), r"wanted \(3, 660\)"),
    ],
)
def test_what_is_not_so_coded_is_refused(arrays: Sum, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Coding("int8").unpack(arrays, BLOCKS, SHAPES, "Mayo")


def test_rows_of_another_shape_are_refused_as_they_are() -> None:
    total, _ = Coding().pack(site_sum(1), BLOCKS, draws())
    for wrong in (total["experts"][:1], total["experts"].astype(np.float64)):
        with pytest.raises(ValueError, match="Mayo: 'experts' has"):
            Coding().unpack(total | {"experts": wrong}, BLOCKS, SHAPES, "Mayo")


def test_too_large_scales_are_left_to_the_sum() -> None:
    read = Coding("int8").unpack(bad(scale__w=np.full((1, 3), 3e38, dtype=np.float32)), BLOCKS, SHAPES, "Mayo")
    assert not np.isfinite(read["w"]).all()


def test_weights_come_back_within_their_rounding() -> None:
    weights = change(1) | {"steps": np.arange(600), "double": np.ones(600)}
    coded = unpack_arrays(pack_arrays(round_weights(weights, draws())))
    assert {n for n in coded if n.startswith(BFLOAT16)} == {BFLOAT16 + n for n in ("w", "experts", "alone")}
    read = read_weights(coded)
    assert read.keys() == weights.keys()
    for name, value in weights.items():
        assert read[name].dtype == value.dtype
        np.testing.assert_allclose(read[name], value, rtol=2.0**-7, atol=0)
    same = round_weights(weights, draws())
    assert all(coded[n].tobytes() == same[n].tobytes() for n in coded)


def test_secure_sums_turn_it_all_off() -> None:
    assert Coding.of(Transport(upload="int8"), secure_sums=True) == Coding("float32", False)
    assert Coding.of(Transport(upload="int8", only_evidence=False)) == Coding("int8", False)
    assert Coding.of(Transport()) == Coding() == compression.Coding("float32", True)
