"""The server's one accumulator: sums are added as they arrive, in fixed point, so their order cannot matter.

Floating-point addition depends on the order of replies in the last bits; 64-bit integer addition does not. A value x
enters as rint(x * 2**bits). What does not fit is refused by name: nothing is clipped.

The integer is read off a float64: x + 1.5 * 2**(52 - bits) has its last bit at 2**-bits, so the addition rounds x as rint would, and the
bits of the result are those of the constant plus rint(x * 2**bits). Integers wrap round, so the constants are taken off at the end. It holds
for x below 2**(51 - bits), some 2,000 in a training sum; a chunk with a larger one is multiplied, rounded and converted.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
from oncofed.common.blocks import EVIDENCE, Blocks, Sum
from oncofed.common.fixed_point import LIMIT, TooLarge, from_integers, peak_of
from oncofed.common.sum_coding import FINER

UPDATE_BITS, STATISTICS_BITS = 40, 30
"""Resolution 1e-12 for training sums (up to 4.6e6 in total), 1e-9 for statistics (up to 4.7e9)."""

_CHUNK = 1 << 16
"""Numbers that are worked on at once: they stay in a core's cache from the first look to the sum."""
_SPAN = 1 << 20
"""Numbers that a thread takes at once; numpy lets go of the interpreter, so threads help. Smaller sums go without."""

Span = tuple[str, int]


class Accumulator:
    """Adds named arrays of fixed shapes. Memory: 8 bytes a number in all, however many sums are added.

    A `fine` one takes what is left below the last bit into a second integer, 50 bits further down: sums of whatever size
    are as exact as float64 can tell.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], bits: int = UPDATE_BITS, *, fine: bool = False) -> None:
        self.bits = bits
        self.count = 0
        self._total = {name: np.full(shape, 0, dtype=np.int64) for name, shape in shapes.items()}  # in memory now
        self._rest = {name: np.zeros(shape, dtype=np.int64) for name, shape in shapes.items()} if fine else {}
        # The sum of the largest magnitudes bounds every partial total, so overflow is seen before it happens.
        self._reach = dict.fromkeys(shapes, 0.0)
        self._constant = np.float64(1.5 * 2.0 ** (52 - bits))
        # How often the constant's bits are in each chunk of a total.
        self._constants = {name: np.zeros(-(-total.size // _CHUNK), np.int64) for name, total in self._total.items()}

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
        self._check_form(one, source)
        peaks = {name: peak_of(value) for name, value in one.items()}
        for name, peak in peaks.items():
            if not np.isfinite(peak):
                raise ValueError(f"{source}: '{name}' holds values that are not finite")
        return peaks

    def add(self, one: Sum, source: str = "sum") -> None:
        """Add one site's sum in one pass over it; on an error nothing has been added."""
        self._check_form(one, source)
        flat = {name: value.reshape(-1) for name, value in one.items()}
        spans = [(name, at) for name, value in flat.items() for at in range(0, value.size, _SPAN)]
        went = _each(partial(self._add_span, flat), spans)
        if not all(
            ended == min(at + _SPAN, flat[name].size) for (name, at), (_, ended) in zip(spans, went, strict=True)
        ):
            # integers: what was added is taken away again to the last bit
            for (name, at), (_, ended) in zip(spans, went, strict=True):
                for here in range(at, ended, _CHUNK):
                    self._step(name, flat[name][here : min(here + _CHUNK, ended)], here, np.subtract)
            self.check(one, source)
            raise AssertionError("a sum that was stopped passes the check")
        peaks = dict.fromkeys(flat, 0.0)
        for (name, _), (peak, _) in zip(spans, went, strict=True):
            peaks[name] = max(peaks[name], peak)
        for name, peak in peaks.items():
            self._reach[name] += peak * 2.0**self.bits + 1.0
        self.count += 1

    def _check_form(self, one: Sum, source: str) -> None:
        if one.keys() != self._total.keys():
            raise ValueError(
                f"{source}: the sum has other arrays than the model: {sorted(one.keys() ^ self._total.keys())[:5]}"
            )
        for name, value in one.items():
            if value.dtype.kind != "f":
                raise ValueError(f"{source}: '{name}' has dtype {value.dtype}, wanted floating point")
            if value.shape != self._total[name].shape:
                raise ValueError(f"{source}: '{name}' has shape {value.shape}, wanted {self._total[name].shape}")
        if EVIDENCE in one and (one[EVIDENCE] < 0).any():
            raise ValueError(f"{source}: evidence below zero")

    def _add_span(self, flat: Sum, span: Span) -> tuple[float, int]:
        """Add a span chunk by chunk; returns its peak and where it ended: before a chunk that does not fit."""
        name, begin = span
        total, buffer = self._total[name].reshape(-1), np.empty(_CHUNK)
        peak, end, small = 0.0, min(begin + _SPAN, total.size), 0.0 if self._rest else 2.0 ** (51 - self.bits)
        for at in range(begin, end, _CHUNK):
            chunk = flat[name][at : min(at + _CHUNK, end)]
            here = float(np.maximum(chunk.max(), -chunk.min()))
            if not self._reach[name] + here * 2.0**self.bits < LIMIT:  # also where it is NaN
                return peak, at
            peak = max(peak, here)
            if here < small:
                part, there = buffer[: chunk.size], total[at : at + chunk.size]
                np.copyto(part, chunk)
                np.add(part, self._constant, out=part)
                np.add(there, part.view(np.int64), out=there)
                self._constants[name][at // _CHUNK] += 1
            else:
                self._step(name, chunk, at, np.add)
        return peak, end

    def _step(self, name: str, chunk: np.ndarray, at: int, enter: np.ufunc) -> None:
        """Add a chunk of any size to the total, or take it away; float32 times a power of two is exact, and rint of it too."""
        there, kind = slice(at, at + chunk.size), np.float32 if chunk.dtype == np.float32 else np.float64
        scaled = np.multiply(chunk, 2.0**self.bits, dtype=kind)
        rounded, total = np.rint(scaled), self._total[name].reshape(-1)[there]
        enter(total, rounded.astype(np.int64), out=total)
        if self._rest:
            rest = self._rest[name].reshape(-1)[there]
            finer = (scaled - rounded).astype(np.float64) * 2.0**FINER
            enter(rest, np.rint(finer).astype(np.int64), out=rest)

    def total(self) -> Sum:
        """The sum as float64."""
        bits = self._constant.view(np.int64)
        for name, counts in self._constants.items():
            flat = self._total[name].reshape(-1)
            for i in np.flatnonzero(counts):
                there = flat[i * _CHUNK : (i + 1) * _CHUNK]
                np.subtract(there, np.multiply(counts[i : i + 1], bits), out=there)  # arrays: they wrap in silence
            counts[:] = 0
        total = from_integers(self._total, self.bits)
        for name, rest in self._rest.items():
            total[name] = total[name] + np.ldexp(rest.astype(np.float64), -self.bits - FINER)
        return total


def _each(work: Callable[[Span], tuple[float, int]], spans: list[Span]) -> list[tuple[float, int]]:
    """The work on all spans, by as many threads as there are cores where there is enough for them."""
    cores = min(os.cpu_count() or 1, len(spans))
    if cores < 2:
        return [work(span) for span in spans]
    with ThreadPoolExecutor(cores) as pool:
        return list(pool.map(work, spans))


def mean_by_block(total: Sum, blocks: Blocks, tau: float) -> tuple[Sum, np.ndarray]:
    """sum_i n_ib delta_ib / (sum_i n_ib + tau) by parameter, 0 where a block has no evidence, and the evidence `[blocks]`."""
    evidence = total[EVIDENCE]
    inverse = np.divide(1.0, evidence + tau, out=np.zeros_like(evidence), where=evidence > 0)
    mean = {name: value * blocks.spread(inverse, name, value.ndim) for name, value in total.items() if name != EVIDENCE}
    return mean, evidence
