"""How the numbers of a sum become whole numbers that add up under masks, and what their total says.

`plain`: rint(x * 2^bits). `fine`: what is left below the last bit as a second number, 50 bits further down, as in the server's
accumulator of classical analyses. `exact`: all 2,098 bits of a float64 in words of 32, so that the total is rounded once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from oncofed.common.blocks import Sum
from oncofed.common.fixed_point import check_reach, from_integers, to_integers

Form = Literal["plain", "fine", "exact"]

FINER = 50
"""Bits from the last one of a number to the last one of its rest."""

ANALYSIS_BITS = 20
"""Of sums of a classical analysis: up to 4.4e12 in total."""

_LOWEST = 1074
"""A float64 is a whole number of 2^-1074."""
_WORD = 32
_WORDS = -(-(1024 + _LOWEST) // _WORD)

Integers = dict[str, np.ndarray]


@dataclass(frozen=True)
class SumCoding:
    """One way to write sums; `fine` and `exact` ones have an axis of parts before the others."""

    bits: int
    form: Form = "plain"

    def shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Of the whole numbers, from the shapes of the sums."""
        parts: tuple[int, ...] = {"plain": (), "fine": (2,), "exact": (_WORDS,)}[self.form]
        return {name: (*parts, *shape) for name, shape in shapes.items()}

    def integers(self, one: Sum, source: str) -> tuple[Integers, dict[str, float]]:
        """A site's sum as int64, and its largest magnitudes; raises `ValueError` naming `source` and array, as `to_integers`."""
        if self.form == "exact":
            for name, value in one.items():
                if value.dtype.kind != "f" or not np.isfinite(value).all():
                    raise ValueError(f"{source}: '{name}' holds values that are not finite numbers")
            return {n: _exact(value.astype(np.float64)) for n, value in one.items()}, dict.fromkeys(one, 0.0)
        whole, peaks = to_integers(one, self.bits, source)
        if self.form == "fine":
            whole = {name: np.stack([value, self._rest(one[name], value)]) for name, value in whole.items()}
        return whole, peaks

    def _rest(self, value: np.ndarray, whole: np.ndarray) -> np.ndarray:
        scaled = value.astype(np.float64) * 2.0**self.bits
        # of numbers beyond 2^53 nothing is left
        return np.rint((scaled - whole.astype(np.float64)) * 2.0**FINER).astype(np.int64)

    def check_reach(self, peaks: Mapping[str, float], sites: int, source: str) -> None:
        """Raise `TooLarge` where so many sums of these magnitudes could leave the range."""
        if self.form != "exact":  # its words hold 2^31 sites
            check_reach(peaks, self.bits, sites, source)

    def total(self, integers: Mapping[str, np.ndarray]) -> Sum:
        """What a total says, float64."""
        if self.form == "exact":
            return {name: _rounded(value) for name, value in integers.items()}
        if self.form == "plain":
            return from_integers(integers, self.bits)
        high = from_integers({name: value[0] for name, value in integers.items()}, self.bits)
        low = from_integers({name: value[1] for name, value in integers.items()}, self.bits + FINER)
        return {name: value + low[name] for name, value in high.items()}


def _exact(value: np.ndarray) -> np.ndarray:
    """Float64 `[...]` as words `[_WORDS, ...]` of 32 bits, the lowest first, each with the number's sign."""
    out = np.zeros((_WORDS, value.size), dtype=np.int64)
    for column, x in enumerate(value.ravel().tolist()):
        above, below = abs(x).as_integer_ratio()  # below is a power of two, up to 2^1074
        number, sign = above << (_LOWEST - (below.bit_length() - 1)), -1 if x < 0 else 1
        for word in range(_WORDS):
            out[word, column] = sign * (number & (2**_WORD - 1))
            number >>= _WORD
            if not number:
                break
    return out.reshape(_WORDS, *value.shape)


def _rounded(words: np.ndarray) -> np.ndarray:
    """The float64 nearest to each exact total; infinity beyond the largest."""
    flat, out = words.reshape(_WORDS, -1), np.empty(words[0].size)
    for column in range(out.size):
        number = sum(int(word) << (_WORD * i) for i, word in enumerate(flat[:, column]))
        try:
            out[column] = number / (1 << _LOWEST)  # a quotient of whole numbers is rounded once
        except OverflowError:
            out[column] = np.inf if number > 0 else -np.inf
    return out.reshape(words.shape[1:])
