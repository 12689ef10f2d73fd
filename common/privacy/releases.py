"""What a study lets out about one patient (or one hospital), and the noise that keeps it within the study's epsilon.

Noise is fixed once for the whole study: choosing it round by round spends 8.4 where 1 was promised, in 50 rounds. Both sides
compute the same list; the coordinator finds the one free number, the scale, and every site checks what it comes to.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from oncofed.common.privacy.accounting import Mechanism, epsilon_of, noise_for
from oncofed.common.study import Study

TRAINING, STATISTICS, EVIDENCE, EVALUATION = "training", "statistics", "evidence", "evaluation"

TOLERANCE = 1e-6
"""Relative, on a study's epsilon."""


def folds_of(study: Study) -> int:
    """Folds that train on a patient at most: all that are run, though each holds some out."""
    return len(study.splits.only or range(study.splits.count)) + study.splits.refit


def counts_of_evidence(study: Study) -> int:
    """Rounds of a fold in which counts of evidence leave."""
    return -(-study.training.rounds // study.privacy.evidence_every)


def releases(study: Study, scale: float) -> dict[str, Mechanism]:
    """All mechanisms of a study by name, at a scale of noise: 1 / scale is about the study's mu (Dong et al. 2022)."""
    p, folds = study.privacy, folds_of(study)
    statistics = p.statistics_share if p.statistics == "noised" else 0.0
    evidence = p.evidence_share if p.evidence == "noised" else 0.0
    steps = folds * study.training.rounds * (study.training.local_steps if p.of_patients else 1)
    rate = p.sample_rate if p.of_patients else 1.0

    def gaussian(count: int, share: float, rate: float = 1.0) -> Mechanism:
        kind = "gaussian" if rate == 1.0 else "sampled_gaussian"
        # sampling hides a patient by itself: q steps of the noise of 1
        return Mechanism(kind, scale * rate * math.sqrt(count / share), count, rate)  # type: ignore[arg-type]

    out = {TRAINING: gaussian(steps, 1.0 - statistics - evidence, rate)}
    if statistics:
        out[STATISTICS] = gaussian(folds, statistics)
    if evidence:
        out[EVIDENCE] = gaussian(folds * counts_of_evidence(study), evidence)
    if study.evaluation.epsilon:
        out[EVALUATION] = Mechanism("pure", study.evaluation.epsilon / 2, 2 * folds)
    return out


@dataclass(frozen=True)
class Promise:
    """A study's releases at the scale that meets its epsilon."""

    scale: float
    mechanisms: dict[str, Mechanism]
    epsilon: float
    delta: float

    @property
    def deviation(self) -> float:
        """Noise of a training step over its sensitivity."""
        return self.mechanisms[TRAINING].noise


@functools.lru_cache(maxsize=64)
def promise_of(study: Study) -> Promise:
    """The least noise that keeps a study within its epsilon; raises `ValueError` where no noise does."""
    p = study.privacy
    scale = noise_for(p.epsilon, p.delta, lambda x: list(releases(study, x).values()))
    mechanisms = releases(study, scale)
    return Promise(scale, mechanisms, epsilon_of(list(mechanisms.values()), p.delta), p.delta)


@functools.lru_cache(maxsize=256)
def kept(study: Study, scale: float) -> Promise:
    """The releases at a scale that somebody else chose; raises `ValueError` where they come to more than the study says."""
    p, mechanisms = study.privacy, releases(study, scale)
    epsilon = epsilon_of(list(mechanisms.values()), p.delta)
    if epsilon > p.epsilon * (1 + TOLERANCE):
        raise ValueError(
            f"noise of scale {scale:g} comes to epsilon {epsilon:.3f}, the study promises {p.epsilon:g} at delta {p.delta:g}"
        )
    return Promise(scale, mechanisms, epsilon, p.delta)
