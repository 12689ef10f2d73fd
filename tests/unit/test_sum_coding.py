"""Numbers as whole numbers that add up under masks: the totals are those of the server's accumulator, or of exact arithmetic."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oncofed.common.fixed_point import TooLarge
from oncofed.common.sum_coding import ANALYSIS_BITS, SumCoding
from oncofed.server.aggregate import Accumulator

FINITE = st.floats(allow_nan=False, allow_infinity=False, min_value=-1e300, max_value=1e300)


def added(coding: SumCoding, values: list[np.ndarray]) -> np.ndarray:
    """The total of sums that were added as words modulo 2^64."""
    words = np.zeros(coding.shapes({"x": values[0].shape})["x"], dtype=np.uint64)
    for value in values:
        words += coding.integers({"x": value}, "A")[0]["x"].view(np.uint64)
    return coding.total({"x": words.view(np.int64)})["x"]


@settings(max_examples=200, deadline=None)
@given(st.lists(FINITE, min_size=1, max_size=12))
def test_an_exact_sum_is_rounded_once(values: list[float]) -> None:
    total = added(SumCoding(0, "exact"), [np.array([v, -v]) for v in values])
    assert total.tolist() == [math.fsum(values), math.fsum(-v for v in values)]


def test_an_exact_sum_holds_the_smallest_and_the_largest_numbers() -> None:
    big, small = np.finfo(np.float64).max, 5e-324
    coding = SumCoding(0, "exact")
    assert added(coding, [np.array([v]) for v in (big, small, -big)])[0] == small
    assert added(coding, [np.array([big]), np.array([big])])[0] == np.inf


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-1e9, 1e9), min_size=2, max_size=10))
def test_a_fine_sum_is_the_accumulators_to_the_last_bit(values: list[float]) -> None:
    accumulator = Accumulator({"x": (2,)}, ANALYSIS_BITS, fine=True)
    parts = [np.array([v, v / 3e7]) for v in values]
    for part in parts:
        accumulator.add({"x": part})
    assert added(SumCoding(ANALYSIS_BITS, "fine"), parts).tobytes() == accumulator.total()["x"].tobytes()


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("form", ["plain", "fine", "exact"])
def test_what_is_no_number_is_refused_by_name(form: str, value: float) -> None:
    with pytest.raises(ValueError, match="site A: 'x' holds values that are not finite"):
        SumCoding(20, form).integers({"x": np.array([value])}, "site A")  # type: ignore[arg-type]


def test_what_would_wrap_round_is_refused_by_name() -> None:
    coding = SumCoding(ANALYSIS_BITS, "fine")
    _, peaks = coding.integers({"x": np.array([1e12])}, "site A")
    coding.check_reach(peaks, 4, "site A")
    with pytest.raises(TooLarge, match=r"site A: 'x' reaches 1e\+12, too large for a sum over 5 sites"):
        coding.check_reach(peaks, 5, "site A")
    with pytest.raises(TooLarge):
        coding.integers({"x": np.array([1e13])}, "site A")
