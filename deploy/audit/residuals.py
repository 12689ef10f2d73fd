"""Whether what was added to a study's sums is the noise that it promises: its deviation, that it never comes twice, and its shape.

Each test has a chance of `chance` to fail honest noise; residuals `[steps, numbers]` are in deviations, without canaries.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import beta, binom, chi2, gamma, kstest, norm

SLACK = 0.005
"""Relative, on a deviation: a study with millions of numbers would show the rounding of single precision."""

KEPT = 20_000
"""Numbers of a step that are held against those of others."""

LONG = 2000
"""Residuals in a row from which repetition at any distance is looked for: of fewer the sums are not near enough to normal."""


def odd_deviations(
    residual: np.ndarray, sizes: Sequence[int], rounding: np.ndarray, chance: float
) -> tuple[list[int], list[int]]:
    """Parameters with too little noise and with too much, by chi-square; `rounding [numbers]` may add to it.

    A parameter of which nothing was released is neither.
    """
    quiet, loud, at = [], [], 0
    chance /= 2 * max(len(sizes), 1)
    for i, size in enumerate(sizes):
        part, coarse = residual[:, at : at + size], rounding[at : at + size]
        at += size
        known = ~np.isnan(part)
        n = int(known.sum())
        if not n:
            continue
        total = float(np.square(part[known]).sum())
        most = float((known * (1.0 + np.square(coarse))).sum()) / n
        if chi2.cdf(total / (1 - SLACK) ** 2, n) < chance:
            quiet.append(i)
        elif chi2.sf(total / ((1 + SLACK) ** 2 * most), n) < chance or not math.isfinite(total):
            loud.append(i)
    return quiet, loud


def uncovered(residual: np.ndarray, chance: float) -> int:
    """Single numbers that in all steps have next to no noise: entries that were left out of a parameter."""
    known = ~np.isnan(residual)
    largest, n = np.where(known, np.abs(residual), 0.0).max(0, initial=0.0), known.sum(0)
    # all of n honest numbers are below x with a probability of (2 Phi(x) - 1)^n
    below = np.where(n > 0, (2 * norm.cdf(largest) - 1) ** np.maximum(n, 1), 1.0)
    return int((below < chance / max(residual.shape[1], 1)).sum())


def repeated(residual: np.ndarray, chance: float, draw: np.random.Generator) -> str:
    """How steps resemble each other, in words; empty where they do not."""
    columns = np.flatnonzero(~np.isnan(residual).any(0))
    if len(columns) > KEPT:
        columns = np.sort(draw.choice(columns, KEPT, replace=False))
    r = residual[:, columns]
    steps, n = r.shape
    if n < 2 or not np.isfinite(r).all():
        return "" if n < 2 else "a released number is not finite"
    if steps > 1:
        unit = r / np.maximum(np.linalg.norm(r, axis=1, keepdims=True), 1e-300)
        cosine = np.abs((unit @ unit.T)[np.triu_indices(steps, 1)])
        if beta.sf(float(np.square(cosine).max()), 0.5, (n - 1) / 2) < chance / 3 / len(cosine):
            return f"two steps have noise that correlates by {cosine.max():.3f}"
        drift = float(np.square(r.sum(0)).sum()) / steps
        if min(chi2.cdf(drift / (1 - SLACK) ** 2, n), chi2.sf(drift / (1 + SLACK) ** 2, n)) < chance / 6:
            return f"the noise of all steps adds up to {math.sqrt(drift / n):.3f} of what independent steps do"
    flat = r.reshape(-1)
    if len(flat) >= LONG:
        size = 1 << (2 * len(flat) - 1).bit_length()
        lagged = np.fft.irfft(np.abs(np.fft.rfft(flat, size)) ** 2, size)[1 : len(flat) // 2]
        z = np.abs(lagged) / np.sqrt(len(flat) - np.arange(1, len(lagged) + 1)) / float(np.square(flat).mean())
        if norm.sf(float(z.max())) < chance / 6 / len(z):
            return f"noise comes again after {int(z.argmax()) + 1} numbers"
    return ""


def bent(residual: np.ndarray, chance: float, draw: np.random.Generator) -> bool:
    """Whether residuals are not Gaussian with the promised deviation (Kolmogorov and Smirnov)."""
    flat = residual[~np.isnan(residual)]
    flat = draw.choice(flat, 10 * KEPT, replace=False) if len(flat) > 10 * KEPT else flat
    return bool(len(flat)) and float(kstest(flat, "norm").pvalue) < chance


def odd_samples(patients: list[list[bytes]], of: int, rate: float, chance: float) -> tuple[list[str], dict[str, Any]]:
    """What is wrong with who was in the steps: each of `of` patients once at most, all of them or each by a coin at `rate`.

    Tried of Poisson samples: how many there are in all, how the steps' numbers spread, and how the patients' do.
    """
    counts = np.array([len(step) for step in patients], dtype=float)
    who = {name: i for i, name in enumerate(sorted({p for step in patients for p in step}))}
    told = {"rate": rate, "found": float(counts.mean() / of), "patients": of}
    if any(len(set(step)) < len(step) for step in patients):
        return ["a patient is more than once in a step"], told
    if len(who) > of:
        return [f"the steps have seen {len(who)} patients, {of} are to be trained on"], told
    if rate == 1.0:
        return (["a step does not have every patient"] if (counts != of).any() else []), told
    steps, total = len(patients), int(counts.sum())
    wrong = []
    if min(binom.cdf(total, of * steps, rate), binom.sf(total - 1, of * steps, rate)) < chance / 6:
        wrong.append(f"steps take {told['found']:.3f} of the patients, {rate:g} is what sampling accounts for")
    taken = np.zeros(of)
    for step in patients:
        taken[[who[p] for p in step]] += 1
    for what, k, n in (("steps take", counts, of), ("patients are in", taken, steps)):
        spread = n * rate * (1 - rate)
        dispersion = float(np.square(k - n * rate).sum() / spread)
        variance = len(k) * (2 + (1 - 6 * rate * (1 - rate)) / spread)
        law = gamma(len(k) ** 2 / variance, scale=variance / len(k))
        if min(law.cdf(dispersion), law.sf(dispersion)) < chance / 6:
            wrong.append(f"the numbers that {what} spread by {dispersion / len(k):.2f} of what a Poisson sample's do")
    return wrong, told
