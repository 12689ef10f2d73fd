"""The release gate: canaries in the study's own private steps, and the least epsilon that the noise around them shows.

A canary is a patient whose clipped gradient is one unit vector: C in one number of one parameter. Half of them, by a coin each,
are in. They go into the clipped sum before the product covers it, and are read in what the site releases (released.py), so that
both ends lie outside of the product's noise. The score of a canary is the sum over steps of what its number shows less the clean
sum, which the attacker of a worst case knows: N(in T C, T s^2 C^2) for T steps of noise s C. Without that subtraction an audit
missed noise ten times too small (privacy.md, 6.1). What is left besides canaries must be the promised noise (residuals.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from oncofed.common.privacy.accounting import gaussian_epsilon
from oncofed.deploy.audit.released import release
from oncofed.deploy.audit.residuals import bent, odd_deviations, odd_samples, repeated, uncovered
from oncofed.deploy.audit.setting import Setting
from scipy.stats import binom, norm

CANARIES, LEAST = 900, 8
"""Canaries of a run at most, and at least."""

SCORES, RUNS = 1800, 4
"""Canary scores wanted in all; where a run has fewer, the rounds are asked anew, up to so many times."""

STEPS = 50
"""Steps of a run at most, in whole rounds, and one round at least; the claim is that of as many."""

LEVEL, GATE = 0.95, 1.0 - 1e-5
"""Confidence of the bound that is reported, and of each test that fails a release."""

TESTS = 6
"""Tests that may fail an honest release by chance: canaries, deviations, single numbers, repetition, shape and samples."""

GUESSED = 6
"""One in so many canaries is guessed to be in, as many to be out: fixed beforehand, as the one-run bound wants it."""


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


def audit_canaries(setting: Setting, seed: int) -> dict[str, Any]:
    """Ask a site for the study's first rounds, with canaries; `passed` is False where the answers show more than is claimed.

    `quiet_parameters` and `loud_parameters` have less noise than is claimed, and more; `wrong` says in words what else does not fit.
    """
    local = setting.study.training.local_steps
    rounds = max(1, min(setting.study.training.rounds, STEPS // local))
    steps, clip, delta = rounds * local, setting.study.privacy.clip, setting.promise.delta
    named = {name: p.numel() for name, p in setting.model.named_parameters() if p.requires_grad}
    numbers = sum(named.values())
    m = min(CANARIES, numbers // 2)
    if m < LEAST:
        raise ValueError(
            f"the study trains {numbers} numbers, which hold no {LEAST} canaries; leave 'canary' out of --checks"
        )
    assert setting.site is not None
    draw, scores, ins, noises, patients, wrong = np.random.default_rng(seed), [], [], [], [], []
    rounding = np.zeros(numbers)
    for _ in range(min(RUNS, -(-SCORES // m))):
        place, inside = draw.permutation(numbers)[:m], draw.random(m) < 0.5
        found = release(setting, rounds, place, inside, clip)
        wrong += found.odd
        if not len(found.residual):
            continue
        scores.append(found.residual[:, place].sum(0))
        ins.append(inside)
        noise = found.residual
        noise[:, place] -= found.present
        noises.append(noise / setting.promise.deviation)
        patients += found.patients
        rounding = np.maximum(rounding, found.rounding / setting.promise.deviation)
    noise, chance, names = np.concatenate(noises) if noises else np.zeros((0, numbers)), 1 - GATE, list(named)
    quiet, loud = odd_deviations(noise, list(named.values()), rounding, chance)
    if not len(noise) or not (~np.isnan(noise)).any():
        wrong.append("no noisy sum could be read from the site's answers")
    few = uncovered(noise, chance)
    if few:
        wrong.append(f"{few} single numbers have next to no noise")
    again = repeated(noise, chance, draw)
    wrong += [again] if again else []
    if bent(noise, chance, draw):
        wrong.append("the noise is not Gaussian with the deviation that is claimed")
    samples: dict[str, Any] = {}
    if patients:
        odd, samples = odd_samples(patients, setting.site.patients, setting.study.privacy.sample_rate, chance)
        wrong += odd
    shown = [~np.isnan(score) for score in scores]
    flat = np.concatenate([s[k] for s, k in zip(scores, shown, strict=True)] or [np.zeros(0)])
    where = np.concatenate([i[k] for i, k in zip(ins, shown, strict=True)] or [np.zeros(0, dtype=bool)])
    usual, strict = gaussian_bound(flat, where, LEVEL), gaussian_bound(flat, where, GATE)
    claimed, least = setting.epsilon(steps), _epsilon(strict.low, delta)
    first = shown[0] if shown else np.zeros(0, dtype=bool)
    one_run = one_run_epsilon(scores[0][first], ins[0][first], delta) if first.sum() >= LEAST else 0.0
    spread = math.sqrt(float(np.nanmean(np.square(noise)))) if (~np.isnan(noise)).any() else 0.0
    return {
        "steps": steps,
        "canaries": m,
        "draws": len(scores),
        "local_steps": local,
        "deviation": {"claimed": setting.promise.deviation, "found": spread * setting.promise.deviation},
        "quiet_parameters": [names[i] for i in quiet],
        "loud_parameters": [names[i] for i in loud],
        "sampled": samples,
        "wrong": sorted(set(wrong)),
        "epsilon": claimed,
        "delta": delta,
        "mu": {"value": usual.mu, "low": usual.low},
        "epsilon_lower": _epsilon(usual.low, delta),
        "epsilon_lower_gate": least,
        "epsilon_lower_one_run": one_run,
        "level": LEVEL,
        "false_alarm": TESTS * chance,
        "alarm": one_run > claimed,
        "passed": least <= claimed and not quiet and not loud and not wrong,
    }


def _epsilon(mu: float, delta: float) -> float:
    return gaussian_epsilon(mu, delta) if math.isfinite(mu) else math.inf
