"""The release gate: canaries in the study's own private steps, and the least epsilon that the noise around them shows.

A canary is a patient whose clipped gradient is one unit vector: C in one number of one parameter, in every step. Half of them,
by a coin each, are in. They are put into the clipped sum at the last moment before the product covers it, so what is measured
is the noise that `train_privately` really adds, with the scale that it really asks for. The score of a canary is the sum over
steps of what it finds in its number less the clean sum, which the attacker of a worst case knows: N(in T C, T s^2 C^2) for T
steps of noise s C. Without that subtraction an audit missed noise ten times too small (privacy.md, 6.1).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from oncofed.common.noise import SecureNoise
from oncofed.common.privacy.accounting import gaussian_epsilon
from oncofed.deploy.audit.setting import Setting
from scipy.stats import binom, chi2, norm
from torch import Tensor

CANARIES, LEAST = 900, 8
"""Canaries of a draw at most, and at least."""

SCORES, DRAWS = 3600, 40
"""Canary scores wanted in all; where a draw has fewer, each sum is covered anew, up to so many times."""

STEPS = 50
"""Steps of an audit at most; the claim is that of as many."""

LEVEL, GATE = 0.95, 1.0 - 1e-5
"""Confidence of the bound that is reported, and of the one that fails a release."""

GUESSED = 6
"""One in so many canaries is guessed to be in, as many to be out: fixed beforehand, as the one-run bound wants it."""

Covered = Callable[[SecureNoise, Tensor, float, float], Tensor]
"""A sum with noise, from the noise's source, the sum, the sensitivity and the deviation."""


def _product_noise(noise: SecureNoise, total: Tensor, sensitivity: float, deviation: float) -> Tensor:
    return SecureNoise.covered(noise, total, sensitivity=sensitivity, deviation=deviation)


class Tapped(SecureNoise):
    """Noise that puts canaries into what it covers, and keeps their scores.

    `place [m]` are distinct numbers of all that a step covers, `numbers` of them, in the order in which it does; `inside [draws, m]`
    says which canaries are in; of them each step takes a sample at `rate`, as of patients. Each draw is a release of its own; training goes on with the first.
    """

    def __init__(
        self,
        place: np.ndarray,
        inside: np.ndarray,
        numbers: int,
        *,
        height: float,
        covered: Covered = _product_noise,
        rate: float = 1.0,
        draw: np.random.Generator | None = None,
    ) -> None:
        super().__init__()
        self._order = np.argsort(place)
        self._place, self._inside = place[self._order], inside[:, self._order]
        self._numbers, self._height, self._covered, self._at = numbers, height, covered, 0
        self._rate, self._draw = rate, draw or np.random.default_rng()
        self._now = self._inside
        self._score = np.zeros(inside.shape)
        self._squares: dict[int, tuple[float, int]] = {}

    @property
    def squares(self) -> list[tuple[float, int]]:
        """Of each parameter, in order, the sum of squares of its noise over all numbers and steps, and how many those were."""
        return [self._squares[begin] for begin in sorted(self._squares)]

    @property
    def score(self) -> np.ndarray:
        """Scores `[draws, m]` in the order of `place`; raises where a step left numbers without noise."""
        if self._at % self._numbers or not self._at:
            raise ValueError(
                f"the training steps covered {self._at} numbers, which are not whole steps of {self._numbers}: some parameter left without noise"
            )
        out = np.empty_like(self._score)
        out[:, self._order] = self._score
        return out

    @property
    def steps(self) -> int:
        """Steps that were covered."""
        return self._at // self._numbers

    def covered(self, total: Tensor, *, sensitivity: float, deviation: float) -> Tensor:
        """As `SecureNoise.covered`, of a sum that holds the canaries that are in."""
        begin = self._at % self._numbers
        if not begin and self._rate < 1.0:
            self._now = self._inside & (self._draw.random(self._inside.shape) < self._rate)
        low, high = np.searchsorted(self._place, (begin, begin + total.numel()))
        here, first = self._place[low:high] - begin, None
        clean = total.detach().reshape(-1).double().cpu().numpy()
        for draw in range(len(self._inside)) if high > low else (0,):
            held = clean.copy()
            held[here] += self._height * self._now[draw, low:high]
            given = total.new_tensor(held).reshape(total.shape)
            noisy = self._covered(self, given, sensitivity, deviation)
            found = noisy.detach().reshape(-1).double().cpu().numpy()
            self._score[draw, low:high] += found[here] - clean[here]
            if first is None:
                first, noise = noisy, found - given.reshape(-1).double().cpu().numpy()
                squares, count = self._squares.get(begin, (0.0, 0))
                self._squares[begin] = squares + float(noise @ noise), count + len(noise)
        self._at += total.numel()
        assert first is not None
        return first


@dataclass(frozen=True)
class Bound:
    """Distance of canaries that are in from those that are out, in deviations, and the least that it is at a confidence."""

    mu: float
    low: float


def gaussian_bound(score: np.ndarray, inside: np.ndarray, level: float) -> Bound:
    """What scores of canaries say of mu when noise is Gaussian: mu^ - z sqrt(1/n1 + 1/n0 + mu^2 / 2m), at least 0.

    The second term is what the pooled deviation is unsure of. Honest noise exceeds its own mu with probability 1 - `level`.
    """
    a, b = score[inside], score[~inside]
    m = len(score)
    if min(len(a), len(b)) < 2:
        return Bound(0.0, 0.0)
    sd = math.sqrt((a.var() * len(a) + b.var() * len(b)) / (m - 2))
    if sd == 0:
        mu = math.inf if a.mean() > b.mean() else 0.0
        return Bound(mu, mu)
    mu = float(a.mean() - b.mean()) / sd
    return Bound(mu, max(0.0, mu - float(norm.ppf(level)) * math.sqrt(1 / len(a) + 1 / len(b) + mu * mu / (2 * m))))


def p_value(m: int, r: int, v: int, epsilon: float, delta: float) -> float:
    """Chance of `v` right guesses of `r`, of `m` canaries, under (epsilon, delta) (Steinke et al. 2023, theorem 5.2)."""
    q = 1.0 / (1.0 + math.exp(-epsilon))
    i = np.arange(1, v + 1)
    within = np.cumsum(binom.pmf(v - i, r, q))
    worst = float((within / i).max(initial=0.0))
    return min(1.0, float(binom.sf(v - 1, r, q)) + 2.0 * m * delta * worst)


def one_run_epsilon(score: np.ndarray, inside: np.ndarray, delta: float, level: float = LEVEL) -> float:
    """The largest epsilon that the guesses of one run refute: the highest scores are guessed in, the lowest out.

    Loose by three even for Gaussian noise, and a few hundred guesses reach 5 at most: an alarm, no gate.
    """
    m, k = len(score), max(1, len(score) // GUESSED)
    order = np.argsort(-score, kind="stable")
    v = int(inside[order[:k]].sum() + (~inside[order[-k:]]).sum())
    if p_value(m, 2 * k, v, 0.0, delta) >= 1 - level:
        return 0.0
    low, high = 0.0, 60.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if p_value(m, 2 * k, v, middle, delta) < 1 - level else (low, middle)
    return low


def too_quiet(squares: list[tuple[float, int]], sd: float, level: float) -> list[int]:
    """Parameters whose noise is less than `sd`: those that honest noise is among, any of them, with a probability of 1 - `level`."""
    chance = (1 - level) / max(len(squares), 1)
    return [i for i, (ss, n) in enumerate(squares) if chi2.cdf(ss / sd**2, n) < chance]


def audit_canaries(
    setting: Setting, seed: int, covered: Covered = _product_noise, *, length: float = 1.0
) -> dict[str, Any]:
    """Run the study's private steps with canaries; `passed` is False where the noise shows more than is claimed.

    The noise has no seed, so a run is a lottery, and the gate says how much of one: noise of exactly the claim fails with a
    probability of 1e-5, as the bound that decides has a confidence of 99.999 %. Some 3,600 scores make up for
    that: noise split over five sites without a secure sum is over five standard errors beyond the gate at epsilon 1. Beside it
    stand the bound at 95 % and the one-run bound. Canaries may miss a small parameter, so the noise of each is held against the claim as
    well, at the same confidence. `length` is a canary's in clips, which clipping should hold at 1.
    """
    short = setting.shortened(STEPS)
    numbers = sum(p.numel() for p in short.model.parameters() if p.requires_grad)
    m = min(CANARIES, numbers // 2)
    if m < LEAST:
        raise ValueError(
            f"the study trains {numbers} numbers, which hold no {LEAST} canaries; leave 'canary' out of --checks"
        )
    draw = np.random.default_rng(seed)
    draws = min(DRAWS, -(-SCORES // m))
    inside = draw.random((draws, m)) < 0.5
    clip = short.study.privacy.clip
    rate, place = short.study.privacy.sample_rate, draw.permutation(numbers)[:m]
    noise = Tapped(place, inside, numbers, height=length * clip, covered=covered, rate=rate, draw=draw)
    short.train(short.private_share(short.batch, noise))
    score, steps, delta = noise.score / clip, noise.steps, short.promise.delta
    flat, where = score.reshape(-1), inside.reshape(-1)
    usual, strict = gaussian_bound(flat, where, LEVEL), gaussian_bound(flat, where, GATE)
    claimed, least = (
        short.epsilon(steps),
        gaussian_epsilon(strict.low, delta) if math.isfinite(strict.low) else math.inf,
    )
    names = [name for name, p in short.model.named_parameters() if p.requires_grad]
    squares = noise.squares
    quiet = [names[i] for i in too_quiet(squares, clip * short.promise.deviation, GATE)]
    found = math.sqrt(sum(ss for ss, _ in squares) / sum(n for _, n in squares)) / clip
    one_run = one_run_epsilon(score[0], inside[0], delta)
    return {
        "steps": steps,
        "canaries": m,
        "draws": draws,
        "deviation": {"claimed": short.promise.deviation, "found": found},
        "quiet_parameters": quiet,
        "epsilon": claimed,
        "delta": delta,
        "mu": {"value": usual.mu, "low": usual.low},
        "epsilon_lower": gaussian_epsilon(usual.low, delta) if math.isfinite(usual.low) else math.inf,
        "epsilon_lower_gate": least,
        "epsilon_lower_one_run": one_run,
        "level": LEVEL,
        "false_alarm": 2 * (1 - GATE),
        "alarm": one_run > claimed,
        "passed": least <= claimed and not quiet,
    }
