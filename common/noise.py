"""Noise that nobody can draw again: Gaussian numbers and coin flips from ChaCha20, keyed by the operating system.

No seed enters, so a study's `seed` cannot make it known (a test starts two processes with one seed). What noise covers is put on a
lattice first and stays there: floating-point numbers would tell, by which of them can occur, what lies below the noise
(Mironov 2012). Truncation towards zero makes no patient's share longer, so a clipped norm stays one.
"""

from __future__ import annotations

import math
import os

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from torch import Tensor

LEVELS = 2.0**30
"""Steps of the lattice in one sensitivity."""

_CHUNK = 1 << 16
"""Numbers at once: few enough that they stay in a processor's cache."""

_ZEROS = bytes(8 * _CHUNK)


class SecureNoise:
    """One stream of random numbers; every object has a key of its own."""

    def __init__(self) -> None:
        self._stream = Cipher(algorithms.ChaCha20(os.urandom(32), bytes(16)), mode=None).encryptor()
        self._bytes = bytearray(8 * _CHUNK + 63)
        self._words = torch.from_numpy(np.frombuffer(self._bytes, dtype="<i8", count=_CHUNK))

    def uniform(self, count: int) -> Tensor:
        """Numbers in (0, 1] with 53 bits, float64 `[count]`."""
        out = torch.empty(count, dtype=torch.float64)
        for at in range(0, count, _CHUNK):
            part = out[at : at + _CHUNK]
            self._stream.update_into(memoryview(_ZEROS)[: 8 * len(part)], self._bytes)
            part.copy_(self._words[: len(part)]).mul_(2.0**-64).add_(0.5)
        return out.clamp_(min=2.0**-54)

    def normal(self, count: int) -> Tensor:
        """Standard normal numbers by Box and Muller, float64 `[count]`; 53 bits reach 8.57 deviations."""
        half = (count + 1) // 2
        both = self.uniform(2 * half)
        radius, angle = both[:half].log_().mul_(-2.0).sqrt_(), both[half:].mul_(2.0 * math.pi)
        out = torch.empty(2 * half, dtype=torch.float64)
        torch.cos(angle, out=out[:half]).mul_(radius)
        torch.sin(angle, out=out[half:]).mul_(radius)
        return out[:count]

    def covered(self, total: Tensor, *, sensitivity: float, deviation: float) -> Tensor:
        """A sum of numbers, each patient's share of norm `sensitivity` at most, with noise of `deviation` times that; float64.

        Both lie on a lattice of `LEVELS` steps in a sensitivity, and whole numbers are added: rounded Gaussian noise at so many
        steps differs from a discrete Gaussian by less than 1e-15 a number. With a deviation of 0 nothing is added.
        """
        unit = sensitivity / LEVELS
        flat = total.detach().reshape(-1)
        out = torch.empty(flat.numel(), dtype=torch.float64)
        for at in range(0, flat.numel(), _CHUNK):
            part = out[at : at + _CHUNK]
            part.copy_(flat[at : at + _CHUNK]).mul_(1.0 / unit).trunc_()
            if deviation:
                part += self.normal(part.numel()).mul_(deviation * LEVELS).round_()
            part.mul_(unit)
        return out.reshape(total.shape).to(total.device)

    def seed(self) -> int:
        """A seed that nobody knows, for random numbers that need no secrecy of their own."""
        self.uniform(1)
        return int(self._words[0]) & (2**63 - 1)

    def chosen(self, count: int, rate: float) -> Tensor:
        """Rows of a Poisson sample: each of `count` by itself with probability `rate`."""
        return torch.nonzero(self.uniform(count) <= rate).squeeze(1)
