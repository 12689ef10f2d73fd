"""Noise that hospitals share: each adds a part, and the total under masks has all that was promised.

Of `sites` that were to add noise, `silent` may be missing in a total and `colluding` may tell what they added: the others' noise
alone must be enough, so each adds its `honest`-th part of the variance. What is released must be a sum over hospitals, and nothing but the
sum: whole numbers on one lattice, added modulo 2^64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from oncofed.common.study import Study

SHARED_BITS = 30
"""Fractional bits of such a sum, which is told in sensitivities: the lattice of the noise itself (common/noise.py), so that nothing is rounded
once noise is added."""

HORIZON = 240.0
"""Months of follow-up that count in sums with noise: what a patient can add to them must have an end."""

STATISTICS_SENSITIVITY = math.sqrt(2.0)
"""Of events and horizons of follow-up: a patient adds one event and one horizon at most."""


def share_of(deviation: float, sites: int, silent: int = 0) -> float:
    """What each of `sites` adds so that their sum has `deviation` even when `silent` of them add nothing."""
    if not 0 <= silent < sites:
        raise ValueError(f"silent = {silent} must be at least 0 and below sites = {sites}")
    return deviation / math.sqrt(sites - silent)


@dataclass(frozen=True)
class Sharing:
    """Who shares the noise of a total."""

    sites: int
    silent: int
    colluding: int

    @property
    def least(self) -> int:
        """Members that a total must have."""
        return self.sites - self.silent

    @property
    def honest(self) -> int:
        """Members of the smallest total whose noise nobody else knows: theirs alone is all that was promised."""
        return self.least - self.colluding

    def of_each(self, deviation: float) -> float:
        """What each site adds where the total must have `deviation`."""
        return share_of(deviation, self.sites, self.silent + self.colluding)

    def of_total(self, deviation: float, there: int) -> float:
        """What a total of so many members has: more than `deviation` where fewer are missing, or collude, than may."""
        return self.of_each(deviation) * math.sqrt(there)


def sharing_of(study: Study, kind: str) -> Sharing | None:
    """Who shares the noise of the answers to a kind of message; None where all of it is added at each site, as in tables of an evaluation."""
    noised = kind == "train" or (kind == "query.statistics" and study.privacy.statistics == "noised")
    return study.privacy.sharing if noised else None


UNSHARED: dict[str, Any] = {
    "privacy__noise": "own",
    "privacy__sharing_sites": 0,
    "privacy__silent_sites": 0,
    "privacy__colluding_sites": 1,
}
"""Keys of a study whose noise is not shared, as `Study.changed` takes them."""


def not_shared(study: Study) -> list[str]:
    """Everything in a study that would break the promise where its noise is shared; of one whose noise is not, keys that say nothing."""
    p = study.privacy
    sharing = p.sharing
    if sharing is None:
        if p.sharing_sites or p.silent_sites or p.colluding_sites != 1:
            return [
                "sharing_sites, silent_sites and colluding_sites are of shared noise; leave them out, or set privacy.noise = 'shared'"
            ]
        return []
    out = []
    if p.unit != "patient":
        out.append(
            f"privacy.unit = '{p.unit}': hospitals share the noise that covers a patient, and none covers anybody here; set privacy.unit = 'patient', "
            "or privacy.noise = 'own'"
        )
    if not p.secure_sum:
        out.append(
            "a hospital's own sum would leave with a part of the noise; set privacy.secure_sum = true, so that totals alone are seen"
        )
    out += _too_few(sharing, p.secure_threshold)
    if study.training.local_steps != 1:
        out.append(
            f"training.local_steps = {study.training.local_steps}: the second step of a hospital would begin where its own first one, with a part of the "
            "noise, has led, and no sum over hospitals is released in between; set it to 1 and take more rounds"
        )
    if study.training.optimizer != "sgd":
        out.append(
            f"training.optimizer = '{study.training.optimizer}' bends a hospital's gradient while it has a part of the noise; set it to 'sgd', and "
            "aggregation.optimizer = 'adam', which bends the total"
        )
    if p.evidence == "noised":
        out.append(
            "privacy.evidence = 'noised' holds each hospital's counts, with a part of the noise, against bounds of its own; set it to 'public'"
        )
    return out


def _too_few(sharing: Sharing, asked_threshold: int) -> list[str]:
    """What is wrong with the numbers of sites."""
    from oncofed.common.masks import LEAST_MEMBERS, threshold_of  # slow to import, and studies are read everywhere

    k = sharing.sites
    if not k:
        return [
            "privacy.sharing_sites = 0: each hospital's part follows from how many they are; say it, as the consortium knows it"
        ]
    if sharing.least < LEAST_MEMBERS or sharing.honest < 1:
        return [
            f"privacy.sharing_sites = {k}, silent_sites = {sharing.silent} and colluding_sites = {sharing.colluding} leave totals of {sharing.least} "
            f"hospitals with {max(0, sharing.honest)} whose noise nobody knows; wanted {LEAST_MEMBERS} and 1: lower silent_sites or colluding_sites, or "
            "use privacy.noise = 'own'"
        ]
    try:
        threshold = threshold_of(k, asked_threshold)
    except ValueError as error:
        return [str(error)]
    if sharing.colluding >= 2 * threshold - k:
        return [
            f"privacy.colluding_sites = {sharing.colluding}: where {threshold} of {k} must be there, {2 * threshold - k} could read one hospital's own sum with "
            "its part of the noise; raise privacy.secure_threshold, or lower colluding_sites"
        ]
    return []
