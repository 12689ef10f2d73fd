"""The server's one accumulator: sums are added as they arrive, in fixed point, so their order cannot matter.

Floating-point addition depends on the order of replies in the last bits; 64-bit integer addition does not. A value x
enters as rint(x * 2**bits). What does not fit is refused by name: nothing is clipped.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from oncofed.common.blocks import EVIDENCE, Blocks, Sum
from oncofed.common.fixed_point import LIMIT, TooLarge, from_integers, peak_of

UPDATE_BITS, STATISTICS_BITS = 40, 30
"""Resolution 1e-12 for training sums (up to 4.6e6 in total), 1e-9 for statistics (up to 4.7e9)."""

_CHUNK = 1 << 15
_FINER = 50


class Accumulator:
    """Adds named arrays of fixed shapes. Memory: 8 bytes a number in all, however many sums are added.

    A `fine` one takes what is left below the last bit into a second integer, 50 bits further down: sums of whatever size
    are as exact as float64 can tell.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], bits: int = UPDATE_BITS, *, fine: bool = False) -> None:
        self.bits = bits
        self.count = 0
        self._total = {name: np.zeros(shape, dtype=np.int64) for name, shape in shapes.items()}
        self._rest = {name: np.zeros(shape, dtype=np.int64) for name, shape in shapes.items()} if fine else {}
        # The sum of the largest magnitudes bounds every partial total, so overflow is seen before it happens.
        self._reach = dict.fromkeys(shapes, 0.0)

    def check(self, one: Sum, source: str) -> dict[str, float]:
        """`peaks`; raises `TooLarge` as well where the sum would leave the range: an overflow to come."""
        peaks = self.peaks(one, source)
        for name, peak in peaks.items():
            if self._reach[name] + peak * 2.0**self.bits >= LIMIT:
                raise TooLarge(
                    f"{source}: '{name}' reaches {peak:g}, too large for a sum with {self.bits} fractional bits "
                    f"(limit {LIMIT / 2.0**self.bits:g} over all sites); training has diverged or the data are not scaled"
                )
        return peaks

    def peaks(self, one: Sum, source: str) -> dict[str, float]:
        """Largest magnitudes by name; raises `ValueError` naming `source` on wrong names or shapes, NaN, or evidence below zero."""
        if one.keys() != self._total.keys():
            raise ValueError(
                f"{source}: the sum has other arrays than the model: {sorted(one.keys() ^ self._total.keys())[:5]}"
            )
        peaks: dict[str, float] = {}
        for name, value in one.items():
            if value.dtype.kind != "f":
                raise ValueError(f"{source}: '{name}' has dtype {value.dtype}, wanted floating point")
            if value.shape != self._total[name].shape:
                raise ValueError(f"{source}: '{name}' has shape {value.shape}, wanted {self._total[name].shape}")
            peaks[name] = peak_of(value)
            if not np.isfinite(peaks[name]):
                raise ValueError(f"{source}: '{name}' holds values that are not finite")
        if EVIDENCE in one and (one[EVIDENCE] < 0).any():
            raise ValueError(f"{source}: evidence below zero")
        return peaks

    def add(self, one: Sum, source: str = "sum") -> None:
        """Add one site's sum; on an error nothing has been added."""
        peaks = self.check(one, source)
        scale = 2.0**self.bits
        for name, value in one.items():
            total, flat = self._total[name].reshape(-1), value.reshape(-1)
            # float32 times a power of two is exact, and rint of it too: no need to widen
            buffer = np.empty(_CHUNK, dtype=np.float32 if value.dtype == np.float32 else np.float64)
            for at in range(0, flat.size, _CHUNK):
                part = buffer[: min(_CHUNK, flat.size - at)]
                np.multiply(flat[at : at + part.size], scale, out=part)
                whole = np.rint(part, out=None if self._rest else part)
                total[at : at + part.size] += whole.astype(np.int64)
                if self._rest:
                    rest = self._rest[name].reshape(-1)
                    rest[at : at + part.size] += np.rint((part - whole) * 2.0**_FINER).astype(np.int64)
            self._reach[name] += peaks[name] * scale + 1.0
        self.count += 1

    def total(self) -> Sum:
        """The sum as float64."""
        total = from_integers(self._total, self.bits)
        for name, rest in self._rest.items():
            total[name] = total[name] + np.ldexp(rest.astype(np.float64), -self.bits - _FINER)
        return total


def mean_by_block(total: Sum, blocks: Blocks, tau: float) -> tuple[Sum, np.ndarray]:
    """sum_i n_ib delta_ib / (sum_i n_ib + tau) by parameter, 0 where a block has no evidence, and the evidence `[blocks]`."""
    evidence = total[EVIDENCE]
    inverse = np.divide(1.0, evidence + tau, out=np.zeros_like(evidence), where=evidence > 0)
    mean = {name: value * blocks.spread(inverse, name, value.ndim) for name, value in total.items() if name != EVIDENCE}
    return mean, evidence
