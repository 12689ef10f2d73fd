"""Fixed point: numbers as 64-bit integers, whose sums depend on no order and wrap round nowhere.

A value x enters as rint(x * 2^bits). What does not fit is refused by name: nothing is clipped.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from oncofed.common.blocks import EVIDENCE, Sum

LIMIT = 2.0**62
"""No sum over all sites may reach it: half of what 64 bits with a sign hold."""

MOST_BITS = 52
"""Fractional bits that a sum may ask for: float64 has no more."""

_CHUNK = 1 << 15


class TooLarge(ValueError):
    """A sum that would leave the range of the fixed point."""


def peak_of(value: np.ndarray) -> float:
    """Largest magnitude; NaN or infinity where one is in the array. By chunks, so that memory is read once."""
    flat, peak = value.reshape(-1), np.float64(0.0)
    for at in range(0, flat.size, _CHUNK):
        part = flat[at : at + _CHUNK]
        peak = np.maximum(peak, np.maximum(part.max(), -part.min()))
    return float(peak)


def check_reach(peaks: Mapping[str, float], bits: int, sites: int, source: str) -> None:
    """Raise `TooLarge` where `sites` sums with these largest magnitudes could leave the range together."""
    for name, peak in peaks.items():
        if sites * (peak * 2.0**bits + 1.0) >= LIMIT:
            raise TooLarge(
                f"{source}: '{name}' reaches {peak:g}, too large for a sum over {sites} sites with {bits} fractional bits (limit "
                f"{LIMIT / 2.0**bits / sites:g} for each); training has diverged or the data are not scaled"
            )


def to_integers(one: Sum, bits: int, source: str) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Named arrays as int64 of the same shapes, and their largest magnitudes.

    Raises `ValueError` naming `source` and the array on NaN, infinity or evidence below zero, `TooLarge` where one alone leaves the range.
    """
    if isinstance(bits, bool) or not isinstance(bits, int) or not 0 <= bits <= MOST_BITS:
        raise ValueError(f"{source}: a sum with {bits!r} fractional bits; wanted a whole number from 0 to {MOST_BITS}")
    peaks = {}
    for name, value in one.items():
        if value.dtype.kind != "f":
            raise ValueError(f"{source}: '{name}' has dtype {value.dtype}, wanted floating point")
        peaks[name] = peak_of(value)
        if not np.isfinite(peaks[name]):
            raise ValueError(f"{source}: '{name}' holds values that are not finite")
    if EVIDENCE in one and (one[EVIDENCE] < 0).any():
        raise ValueError(f"{source}: evidence below zero")
    check_reach(peaks, bits, 1, source)
    return {n: np.rint(v.astype(np.float64) * 2.0**bits).astype(np.int64) for n, v in one.items()}, peaks


def from_integers(total: Mapping[str, np.ndarray], bits: int) -> Sum:
    """A total as float64."""
    return {name: np.ldexp(value.astype(np.float64), -bits) for name, value in total.items()}
