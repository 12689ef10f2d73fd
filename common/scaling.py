"""Bring genes to one scale from sums alone: location, spread and, when asked, a power that makes them symmetric.

Shapes: N patients, G genes, S groups (one for all patients, or one a cancer type), P candidate powers. Two questions
to the sites: `moments` gives mean and deviation, `power_moments` of the values so standardised give the likelihood of
each candidate power (Yeo & Johnson 2000, eq. 3.1) as a function of sums over patients, so the choice is exactly the pooled one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import numpy as np
from scipy.special import boxcox1p, ndtri

POWERS = (-4.0, -2.0, 0.0, 1.0, 2.0, 4.0)
"""Candidate powers; 1 leaves values as they are."""

CLIP = 5.0
"""Standardised values beyond this many deviations are cut: powers would blow them up."""

REACH = 10.0
"""Scaled values end here, whatever a power makes of a value that was not there when it was chosen."""

MIN_SD = 1e-3
"""A gene that hardly varies keeps its scale: dividing by its deviation would blow up noise."""

MIN_PATIENTS = 20
"""A group with fewer values of a gene takes that gene's scale from all groups together."""

NUMBERS = 2 * len(POWERS) + 2
"""Sums that leave for each gene and group: fewer patients than that could be solved for."""


@dataclass(frozen=True)
class Scaling:
    """Arrays `[S, G]`, applied as ((power((x - mean) / sd) - centre) / spread); `power` is 1 throughout without a transform."""

    mean: np.ndarray
    sd: np.ndarray
    power: np.ndarray
    centre: np.ndarray
    spread: np.ndarray

    @classmethod
    def from_moments(cls, total: Mapping[str, np.ndarray]) -> Scaling:
        """Location and spread from summed `n, sum, squares [S, G]`; a gene without any value gets 0 and 1."""
        n, mean, sd = _moments(total["n"], total["sum"], total["squares"])
        all_n, all_mean, all_sd = _moments(*(total[k].sum(0, keepdims=True) for k in ("n", "sum", "squares")))
        few = n < np.minimum(MIN_PATIENTS, all_n)
        mean, sd = np.where(few, all_mean, mean), np.where(few, all_sd, sd)
        one, zero = np.ones_like(mean), np.zeros_like(mean)
        return cls(mean, np.where(sd < MIN_SD, 1.0, sd), one, zero, one)

    @classmethod
    def none(cls, width: int) -> Scaling:
        """The scale that leaves `width` numbers as they are."""
        one, zero = np.ones((1, width)), np.zeros((1, width))
        return cls(zero, one, one, zero, one)

    def with_powers(self, total: Mapping[str, np.ndarray]) -> Scaling:
        """The most likely candidate power of each gene and group from summed `power_moments`.

        Log-likelihood -n/2 log var(psi(z)) + (power - 1) sum sign(z) log(1 + |z|), with the variance at its maximum.
        """
        pooled = {k: v.sum(0, keepdims=True) for k, v in total.items()}
        mine, all_ = self._best(total), self._best(pooled)
        few = total["n"] < np.minimum(MIN_PATIENTS, pooled["n"])
        power, centre, spread = (np.where(few, a, m) for m, a in zip(mine, all_, strict=True))
        flat = spread < MIN_SD  # all powers are as likely, and the first would blow up a later patient who differs
        power, centre, spread = (np.where(flat, v, a) for v, a in ((1.0, power), (0.0, centre), (1.0, spread)))
        return Scaling(self.mean, self.sd, power, centre, spread)

    @staticmethod
    def _best(total: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        n = np.maximum(total["n"], 1.0)[:, None]
        mean = total["power_sum"] / n
        variance = np.maximum(total["power_squares"] / n - np.square(mean), 1e-12)
        powers = np.array(POWERS)[None, :, None]
        likelihood = -0.5 * total["n"][:, None] * np.log(variance) + (powers - 1.0) * total["log_jacobian"][:, None]
        best = likelihood.argmax(1)[:, None]
        take = (
            np.take_along_axis(a, best, axis=1)[:, 0] for a in (np.broadcast_to(powers, mean.shape), mean, variance)
        )
        power, centre, var = take
        return power, centre, np.sqrt(var)

    def apply(self, x_NG: np.ndarray, group_N: np.ndarray) -> np.ndarray:
        """Scaled expression, float32 `[N, G]`; a missing value becomes 0, the mean of its group."""
        out = np.zeros(x_NG.shape, dtype=np.float32)
        shaped = bool((self.power != 1.0).any())
        for s in np.unique(group_N):
            rows = group_N == s
            z = np.subtract(x_NG[rows], self.mean[s].astype(np.float32))
            z /= self.sd[s].astype(np.float32)
            if shaped:  # centre and spread come from clipped values
                np.clip(z, -CLIP, CLIP, out=z)
                for power in np.unique(self.power[s]):
                    genes = self.power[s] == power
                    z[:, genes] = _power(z[:, genes], power)
            z -= self.centre[s].astype(np.float32)
            z /= self.spread[s].astype(np.float32)
            if shaped:  # a power runs away below or above all that it was chosen for, as at a hospital of another batch
                np.clip(z, -REACH, REACH, out=z)
            out[rows] = np.nan_to_num(z, copy=False, nan=0.0)
        return out

    def arrays(self, prefix: str = "scaling/") -> dict[str, np.ndarray]:
        """Named arrays for a message or a file."""
        return {prefix + f.name: getattr(self, f.name) for f in fields(self)}

    @classmethod
    def of(cls, arrays: Mapping[str, np.ndarray], prefix: str = "scaling/") -> Scaling:
        """The inverse of `arrays`."""
        return cls(**{f.name: arrays[prefix + f.name] for f in fields(cls)})


def patient_ranks(x_NG: np.ndarray) -> np.ndarray:
    """Normal scores of each patient's numbers by rank among her own, float32 `[N, G]`; missing values stay NaN.

    Blom's scores of ranks, ties at their mean. Nothing of other patients enters, so nothing of them can leak.
    """
    from scipy.stats import rankdata  # slow to import, and a node starts a process for every message

    x = np.asarray(x_NG, dtype=np.float64)
    rank = rankdata(x, axis=1, nan_policy="omit") if x.size else x
    present = np.sum(~np.isnan(x), axis=1, keepdims=True)
    score = ndtri((rank - 0.375) / (present + 0.25))
    return score.astype(np.float32)


def groups(cancer_N: np.ndarray, by_cancer: bool) -> np.ndarray:
    """The group of each patient: its cancer type, or 0."""
    return np.asarray(cancer_N) if by_cancer else np.zeros(len(cancer_N), dtype=np.int64)


def moments(x_NG: np.ndarray, group_N: np.ndarray, count: int) -> dict[str, np.ndarray]:
    """Sums `n, sum, squares [S, G]` over present values."""
    x = np.asarray(x_NG, dtype=np.float64)
    present = ~np.isnan(x)
    filled = np.where(present, x, 0.0)
    member = np.eye(count)[group_N].T
    return {"n": member @ present, "sum": member @ filled, "squares": member @ np.square(filled)}


def power_moments(x_NG: np.ndarray, group_N: np.ndarray, scaling: Scaling) -> dict[str, np.ndarray]:
    """Sums over present values: `n, log_jacobian [S, G]` and, by candidate power, `power_sum, power_squares [S, P, G]`."""
    member = np.eye(len(scaling.mean))[group_N].T
    z = np.asarray(x_NG, dtype=np.float64)
    present = ~np.isnan(z)
    z = np.clip((z - scaling.mean[group_N]) / scaling.sd[group_N], -CLIP, CLIP)
    z = np.where(present, z, 0.0)
    psi = [np.where(present, _power(z, p), 0.0) for p in POWERS]
    return {
        "n": member @ present,
        "log_jacobian": member @ (np.sign(z) * np.log1p(np.abs(z))),
        "power_sum": np.stack([member @ y for y in psi], axis=1),
        "power_squares": np.stack([member @ np.square(y) for y in psi], axis=1),
    }


def _power(z: np.ndarray, power: float) -> np.ndarray:
    """Yeo-Johnson's transform: Box-Cox of 1 + z above 0, mirrored with 2 - power below; missing values stay missing."""
    return np.where(z >= 0, boxcox1p(np.maximum(z, 0.0), power), -boxcox1p(np.maximum(-z, 0.0), 2.0 - power))


def _moments(n: np.ndarray, total: np.ndarray, squares: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    count = np.maximum(n, 1.0)
    mean = total / count
    return n, mean, np.sqrt(np.maximum(squares / count - np.square(mean), 0.0))
