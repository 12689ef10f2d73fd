"""The rule theta_b += eta * sum n_ib delta_ib / (sum n_ib + tau), block by block."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oncofed.common.blocks import EVIDENCE, Blocks, Sum, weigh
from oncofed.common.study import Aggregation
from oncofed.server.aggregate import Accumulator, mean_by_block
from oncofed.server.optimizer import ServerOptimizer

BLOCKS = Blocks({"w": "trunk", "experts": ("e/0", "e/1", "e/2")})
SHAPES = {"w": (4,), "experts": (3, 2, 5), EVIDENCE: (4,)}


def site_sum(seed: int, evidence: dict[str, float] | None = None, scale: float = 1.0) -> tuple[Sum, Sum, np.ndarray]:
    rng = np.random.default_rng(seed)
    delta = {
        "w": rng.normal(0, scale, (4,)).astype(np.float32),
        "experts": rng.normal(0, scale, (3, 2, 5)).astype(np.float32),
    }
    given_ = evidence or {
        "trunk": float(rng.integers(1, 300)),
        **{f"e/{i}": float(rng.uniform(0, 200)) for i in range(3)},
    }
    vector = BLOCKS.vector(given_)
    return weigh(delta, vector, BLOCKS), delta, vector


def combine(sums: list[Sum], tau: float = 0.0) -> tuple[Sum, np.ndarray]:
    accumulator = Accumulator(SHAPES)
    for one in sums:
        accumulator.add(one)
    return mean_by_block(accumulator.total(), BLOCKS, tau)


def test_equals_fedavg_when_routing_is_uniform() -> None:
    patients = [120.0, 40.0, 7.0]
    # every site routes alike: each expert carries the same share of its patients
    sites = [site_sum(i, {"trunk": n, "e/0": n * 0.5, "e/1": n * 0.3, "e/2": n * 0.2}) for i, n in enumerate(patients)]
    mean, _ = combine([s for s, _, _ in sites])
    for name in ("w", "experts"):
        fedavg = np.average([d[name] for _, d, _ in sites], axis=0, weights=patients)
        np.testing.assert_allclose(mean[name], fedavg, rtol=0, atol=1e-6)


def test_each_block_is_weighted_by_its_own_evidence() -> None:
    a, da, _ = site_sum(1, {"trunk": 10, "e/0": 1, "e/1": 9, "e/2": 0})
    b, db, _ = site_sum(2, {"trunk": 30, "e/0": 3, "e/1": 1, "e/2": 0})
    mean, evidence = combine([a, b])
    np.testing.assert_allclose(mean["w"], (10 * da["w"] + 30 * db["w"]) / 40, atol=1e-6)
    np.testing.assert_allclose(mean["experts"][0], (1 * da["experts"][0] + 3 * db["experts"][0]) / 4, atol=1e-6)
    np.testing.assert_allclose(mean["experts"][1], (9 * da["experts"][1] + 1 * db["experts"][1]) / 10, atol=1e-6)
    assert (mean["experts"][2] == 0).all()
    assert evidence.tolist() == [40, 4, 10, 0]


def test_tau_slows_blocks_with_little_evidence() -> None:
    a, da, _ = site_sum(1, {"trunk": 90, "e/0": 10, "e/1": 10, "e/2": 10})
    mean, _ = combine([a], tau=10.0)
    np.testing.assert_allclose(mean["w"], 0.9 * da["w"], atol=1e-6)
    np.testing.assert_allclose(mean["experts"][0], 0.5 * da["experts"][0], atol=1e-6)


@pytest.mark.parametrize("kind", ["sgd", "momentum", "adam", "yogi"])
def test_unused_expert_and_its_momentum_stay_untouched(kind: str) -> None:
    optimizer = ServerOptimizer(Aggregation(optimizer=kind, learning_rate=0.7), BLOCKS)
    rng = np.random.default_rng(0)
    weights: Sum = {
        "w": rng.normal(size=4).astype(np.float32),
        "experts": rng.normal(size=(3, 2, 5)).astype(np.float32),
    }
    weights = optimizer.step(weights, *combine([site_sum(1)[0]]))  # every block has momentum now
    before = {name: {k: v.copy() for k, v in parts.items()} for name, parts in optimizer.state.items()}
    after = optimizer.step(weights, *combine([site_sum(2, {"trunk": 10, "e/0": 5, "e/1": 0, "e/2": 5})[0]]))
    np.testing.assert_array_equal(after["experts"][1], weights["experts"][1])
    assert (after["experts"][0] != weights["experts"][0]).all()
    assert (after["w"] != weights["w"]).all()
    for name, parts in before.items():
        for part, value in parts.items():
            now = optimizer.state[name][part]
            if name == "experts":
                np.testing.assert_array_equal(now[1], value[1])
                assert (now[0] != value[0]).any()


def test_server_adam_follows_reddi_et_al() -> None:
    s = Aggregation(optimizer="adam", learning_rate=0.1, momentum=0.9, second_momentum=0.99, adaptivity=1e-3)
    optimizer = ServerOptimizer(s, Blocks({"w": "trunk"}))
    theta = np.array([1.0], dtype=np.float32)
    for delta in (0.3, -0.2, 0.5):
        theta = optimizer.step({"w": theta}, {"w": np.array([delta])}, np.array([1.0]))["w"]
    total, m, v = 1.0, 0.0, 1e-6
    for delta in (0.3, -0.2, 0.5):
        m, v = 0.9 * m + 0.1 * delta, 0.99 * v + 0.01 * delta**2
        total += 0.1 * m / (np.sqrt(v) + 1e-3)
    np.testing.assert_allclose(theta, total, rtol=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 2**31), min_size=2, max_size=7, unique=True),
    st.randoms(),
    st.sampled_from([1e-9, 1e-3, 1.0, 1e3]),
)
def test_order_of_arrival_cannot_matter(seeds: list[int], random, scale: float) -> None:  # type: ignore[no-untyped-def]
    sums = [site_sum(s, scale=scale)[0] for s in seeds]
    shuffled = sums[:]
    random.shuffle(shuffled)
    (first, ev1), (second, ev2) = combine(sums), combine(shuffled)
    for name in first:
        assert first[name].tobytes() == second[name].tobytes()
    assert ev1.tobytes() == ev2.tobytes()


def test_floating_point_would_depend_on_the_order() -> None:
    """The property above is not free: the same sums in float32 do differ."""
    sums = [site_sum(s)[0]["experts"] for s in range(4)]
    totals = {sum(p[1:], start=p[0]).tobytes() for p in itertools.permutations(sums)}
    assert len(totals) > 1


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=20))
def test_fixed_point_keeps_the_sum(values: list[float]) -> None:
    accumulator = Accumulator({"x": ()})
    for v in values:
        accumulator.add({"x": np.array(v)})
    assert (
        abs(float(accumulator.total()["x"]) - np.sum(np.array(values, dtype=np.float64)))
        <= len(values) * 2.0**-41 + 1e-9
    )


def test_overflow_is_refused_by_name_and_adds_nothing() -> None:
    accumulator = Accumulator({"x": (2,)}, bits=40)
    accumulator.add({"x": np.array([3e6, 1.0])}, "first")
    with pytest.raises(ValueError, match=r"Mayo: 'x' reaches 2e\+06, too large"):
        accumulator.add({"x": np.array([1.0, -2e6])}, "Mayo")
    assert accumulator.total()["x"].tolist() == [3e6, 1.0]
    assert accumulator.count == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])
@pytest.mark.parametrize("fine", [False, True])
@pytest.mark.parametrize("at", [0, 1_500_000, -1])
def test_a_large_sum_that_fails_late_leaves_nothing_behind(at: int, fine: bool, bad: float) -> None:
    """Threads have added most of it by then."""
    shapes = {"small": (3,), "x": (1201, 1999)}
    rng = np.random.default_rng(0)
    good = {name: rng.normal(0, 100, shape).astype(np.float32) for name, shape in shapes.items()}
    accumulator, alone = Accumulator(shapes, fine=fine), Accumulator(shapes, fine=fine)
    accumulator.add(good)
    alone.add(good)
    wrong = {name: value * 3 for name, value in good.items()}
    wrong["x"].reshape(-1)[at] = bad
    with pytest.raises(ValueError, match="Mayo: 'x'"):
        accumulator.add(wrong, "Mayo")
    for name, value in alone.total().items():
        assert accumulator.total()[name].tobytes() == value.tobytes()
    accumulator.add(good)
    alone.add(good)
    assert (accumulator.total()["x"] == alone.total()["x"]).all()
    assert accumulator.count == 2
    exact = np.rint(good["x"].astype(np.float64) * 2.0**40) * 2.0**-39
    np.testing.assert_allclose(accumulator.total()["x"], exact, rtol=0, atol=0 if not fine else 2.0**-40)


def as_integers(value: np.ndarray, bits: int) -> list[int]:
    """rint(x * 2^bits) in Python's whole numbers, halves to even."""
    return [round(Fraction(float(x)) * 2**bits) for x in value]


@pytest.mark.parametrize("bits", [20, 30, 40, 52])
@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("fine", [False, True])
def test_every_number_enters_as_the_nearest_whole_number_of_steps(bits: int, kind: type, fine: bool) -> None:
    """Halves, either side of them, the least numbers, and both sides of the size from which chunks are converted."""
    step, edge = 2.0**-bits, 2.0 ** (51 - bits)
    halves = (np.arange(-9, 10) + 0.5) * step
    with np.errstate(over="ignore"):
        edges = [edge, float(np.nextafter(kind(edge), kind(0))), edge - step, edge / 2 + step / 2, edge * 3]
        value = np.array([*halves, *halves * 1.001, 5e-324, 1e-45, *edges, *(-e for e in edges), 0.0])
        value = value.astype(kind).astype(np.float64)
    value = value[np.isfinite(value) & (np.abs(value) * 2.0**bits < 2.0**58)].astype(kind)
    for one in (value[np.abs(value.astype(np.float64)) < edge], value):  # below that size, and beyond it
        accumulator = Accumulator({"x": one.shape}, bits, fine=fine)
        for _ in range(3):
            accumulator.add({"x": one})
        told, exact = accumulator.total()["x"], np.array([3.0 * k * step for k in as_integers(one, bits)])
        np.testing.assert_allclose(
            told,
            3.0 * one.astype(np.float64) if fine else exact,
            rtol=2.0**-52,
            atol=0 if not fine else 2.0 ** (-bits - 49),
        )


@pytest.mark.parametrize("large", [1.0, 3e3, 1e5])
def test_chunks_that_are_read_off_and_chunks_that_are_converted_add_up_in_any_order(large: float) -> None:
    shapes = {"x": (3 * 65_536 + 17,)}
    sums = [{"x": np.random.default_rng(s).normal(0, 3, shapes["x"]).astype(np.float32)} for s in range(4)]
    sums[1]["x"][70_000] = sums[3]["x"][-1] = large
    totals = []
    for order in itertools.permutations(sums):
        accumulator = Accumulator(shapes)
        for one in order:
            accumulator.add(one)
        totals.append(accumulator.total()["x"])
        assert accumulator.total()["x"].tobytes() == totals[0].tobytes()
    exact = np.sum([np.rint(one["x"].astype(np.float64) * 2.0**40) for one in sums], axis=0) * 2.0**-40
    np.testing.assert_array_equal(totals[0], exact)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"x": np.array([np.nan, 0.0])}, "not finite"),
        ({"x": np.array([np.inf, 0.0])}, "not finite"),
        ({"x": np.array([-np.inf, 0.0])}, "not finite"),
        ({"x": np.zeros(3)}, r"shape \(3,\), wanted \(2,\)"),
        ({"y": np.zeros(2)}, "other arrays"),
    ],
)
def test_bad_sums_are_refused(bad: Sum, words: str) -> None:
    accumulator = Accumulator({"x": (2,)})
    with pytest.raises(ValueError, match=words):
        accumulator.add(bad, "Mayo")
    assert accumulator.count == 0


def test_negative_evidence_is_refused() -> None:
    accumulator = Accumulator({EVIDENCE: (1,)})
    with pytest.raises(ValueError, match="evidence below zero"):
        accumulator.add({EVIDENCE: np.array([-1.0])}, "Mayo")


def test_evidence_must_name_every_block() -> None:
    with pytest.raises(ValueError, match="missing for blocks"):
        BLOCKS.vector({"trunk": 1.0})
    with pytest.raises(ValueError, match="finite and >= 0"):
        BLOCKS.vector({"trunk": -1.0, "e/0": 0, "e/1": 0, "e/2": 0})
