"""What noisy releases have cost this hospital's patients: written down before data are touched, and never above the budget."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from operator import index
from pathlib import Path
from typing import Any

from oncofed.client.chain_file import Chain, Entry, Words
from oncofed.common.errors import Refusal
from oncofed.common.privacy.accounting import Mechanism, epsilon_of, merged

ROUNDING = 1e-6
"""Relative: a plan whose noise was chosen to cost exactly what is allowed must not fail by a rounding."""

WORDS = Words(
    "ledger",
    "nobody knows what is spent, so nothing with noise leaves",
    "put ledger.jsonl and ledger.head back from a backup made after the last release; without one, count the releases in "
    "release-log.jsonl, move both files away, and lower epsilon_budget in policy.toml by what they cost",
    "was written by an older version of oncofed, which added epsilons up and kept no hashes; the site's engineer must add up the epsilons of "
    "its lines, move the file away, and lower epsilon_budget in policy.toml by the sum",
)


@dataclass(frozen=True)
class Statement:
    """What one study cost, at the ledger's delta; `unsettled` of its `releases` count in full, as a crash left them."""

    study: str
    epsilon: float
    releases: int
    unsettled: int
    first: str
    last: str
    mechanisms: dict[str, tuple[Mechanism, ...]]  # by purpose, equal ones taken together


@dataclass
class _Release:
    """One reservation, and how much of it was used once it is settled."""

    study: str
    purpose: str
    time: str
    mechanisms: tuple[Mechanism, ...]
    used: tuple[int, ...] | None = None

    @property
    def live(self) -> tuple[Mechanism, ...]:
        if self.used is None:
            return self.mechanisms
        return tuple(replace(m, count=n) for m, n in zip(self.mechanisms, self.used, strict=True))


@dataclass(frozen=True)
class Ledger:
    """All releases of a site with noise, in a file that outlives messages and processes and may be used by several at once.

    A release is reserved before data are touched and settled after; one that was never settled counts in full. Costs are
    composed by `epsilon_of` at `delta`, and what would exceed `budget` raises `Refusal`. So does a ledger that was tampered with.
    """

    file: Path
    site: str
    budget: float
    delta: float = 1e-5
    _chain: Chain = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_chain", Chain(self.file, self.site, WORDS))

    def reserve(
        self,
        id: str,
        study: str,
        purpose: str,
        mechanisms: Sequence[Mechanism],
        *,
        cap: tuple[float, float] | None = None,
    ) -> None:
        """Book a release before it happens; raises `Refusal`, and books nothing, where the budget or the study's promise does not hold it.

        An id holds once, for a repeated release is a new one. `cap` is the study's own (epsilon, delta), for all its
        releases together.
        """
        wanted = tuple(mechanisms)
        if not merged(wanted):
            raise ValueError(
                f"'{purpose}' names no mechanism with noise; what leaves without any is not for the ledger"
            )
        with self._chain.writing() as lines:
            releases = self._releases(lines.entries)
            if id in releases:
                raise Refusal(
                    f"site {self.site}: the release '{id}' is in its ledger already; releasing it again would be another release, which needs "
                    "an id of its own"
                )
            if cap is not None:
                self._check_cap(releases.values(), study, purpose, wanted, cap)
            spent = _live(releases.values())
            total = epsilon_of((*spent, *wanted), self.delta)
            if total > self.budget * (1 + ROUNDING):
                raise Refusal(
                    f"site {self.site}: with '{purpose}' of study '{study}' noisy releases would come to epsilon {total:.4g} at delta "
                    f"{self.delta:g}; {epsilon_of(spent, self.delta):.4g} of the budget of {self.budget:g} is spent (epsilon_budget in "
                    "policy.toml). Ask for a smaller epsilon, which is more noise, or for fewer releases"
                )
            entry: Entry = {"op": "reserve", "id": id, "study": study, "purpose": purpose, "time": _now()}
            entry["mechanisms"] = [m.to_json() for m in wanted]
            lines.append(entry | ({} if cap is None else {"cap": [float(c) for c in cap]}))

    def settle(self, id: str, counts: Sequence[int] | None = None) -> None:
        """Say how much of a reservation was used, mechanism by mechanism, never more than reserved; all of it without `counts`.

        Holds once. Only what never came to be may go uncounted: what was drawn and thrown away was still drawn.
        """
        with self._chain.writing() as lines:
            release = self._releases(lines.entries).get(id)
            if release is None or release.used is not None:
                why = "was never reserved" if release is None else "is settled already"
                raise Refusal(f"site {self.site}: the release '{id}' {why}; reserve each release once, then settle it")
            reserved = [m.count for m in release.mechanisms]
            used = reserved if counts is None else [index(n) for n in counts]
            if len(used) != len(reserved) or any(not 0 <= n <= m for n, m in zip(used, reserved, strict=True)):
                raise Refusal(
                    f"site {self.site}: the release '{id}' is settled for counts {used}, reserved were {reserved}; settle for as many "
                    "numbers, each no larger, and reserve what goes beyond as another release"
                )
            lines.append({"op": "settle", "id": id, "counts": used, "time": _now()})

    def charge(
        self, study: str, purpose: str, mechanisms: Sequence[Mechanism], *, cap: tuple[float, float] | None = None
    ) -> None:
        """Reserve under an id of its own and settle at once: for a release of which no answer is kept."""
        id = f"charge/{uuid.uuid4()}"
        self.reserve(id, study, purpose, mechanisms, cap=cap)
        self.settle(id)

    def spent(self, delta: float | None = None, study: str | None = None) -> float:
        """Epsilon of all releases so far, or of one study's, at the ledger's delta or another."""
        releases = self._releases(self._chain.read()).values()
        return epsilon_of(
            _live(r for r in releases if study is None or r.study == study), self.delta if delta is None else delta
        )

    def studies(self) -> list[Statement]:
        """What each study cost, in the order of their first releases."""
        found: dict[str, list[_Release]] = {}
        for release in self._releases(self._chain.read()).values():
            found.setdefault(release.study, []).append(release)
        return [self._statement(study, releases) for study, releases in found.items()]

    def verify(self) -> None:
        """Raise `Refusal` where a line was changed, removed or put elsewhere, or cannot be understood."""
        self._releases(self._chain.read())

    def _statement(self, study: str, releases: Sequence[_Release]) -> Statement:
        purposes: dict[str, list[Mechanism]] = {}
        for r in releases:
            purposes.setdefault(r.purpose, []).extend(r.live)
        return Statement(
            study=study,
            epsilon=epsilon_of(_live(releases), self.delta),
            releases=len(releases),
            unsettled=sum(r.used is None for r in releases),
            first=releases[0].time,
            last=releases[-1].time,
            mechanisms={purpose: merged(parts) for purpose, parts in purposes.items()},
        )

    def _check_cap(
        self,
        releases: Iterable[_Release],
        study: str,
        purpose: str,
        wanted: tuple[Mechanism, ...],
        cap: tuple[float, float],
    ) -> None:
        epsilon, delta = cap
        spent = _live(r for r in releases if r.study == study)
        total = epsilon_of((*spent, *wanted), delta)
        if total > epsilon * (1 + ROUNDING):
            raise Refusal(
                f"site {self.site}: with '{purpose}' study '{study}' would come to epsilon {total:.4g} at delta {delta:g} here, and it promised "
                f"{epsilon:g}; {epsilon_of(spent, delta):.4g} is spent. Plan fewer releases or more noise, or start another study"
            )

    def _releases(self, entries: Iterable[Entry]) -> dict[str, _Release]:
        """By id, in the order in which they were reserved."""
        found: dict[str, _Release] = {}
        for number, entry in enumerate(entries, start=1):
            try:
                _take(found, entry)
            except (KeyError, TypeError, ValueError):
                raise Refusal(
                    f"site {self.site}: line {number} of its ledger {self.file.name} says '{entry.get('op')}' in a way that this version of "
                    "oncofed does not know, so nobody knows what is spent; the site's engineer must install the version that wrote it"
                ) from None
        return found


def ledger_of(folder: Path, work: Path) -> Path:
    """The ledger of a site: beside its patients, whichever work folders its nodes have, for a budget is theirs.

    Only where the site's folder cannot be written to does it lie in the work folder, and then a site has one node.
    """
    own = folder / ".oncofed"
    beside = own if own.exists() else folder
    return (own if os.access(beside, os.W_OK) else work) / "ledger.jsonl"


def _take(found: dict[str, _Release], entry: dict[str, Any]) -> None:
    """Add one line to the releases; raises `KeyError`, `TypeError` or `ValueError` where it makes no sense."""
    op = entry["op"]
    if op == "reserve":
        if entry["id"] in found:
            raise ValueError("reserved twice")
        mechanisms = tuple(Mechanism.from_json(m) for m in entry["mechanisms"])
        found[entry["id"]] = _Release(entry["study"], entry["purpose"], entry["time"], mechanisms)
    elif op == "settle":
        release, used = found[entry["id"]], tuple(entry["counts"])
        most = [m.count for m in release.mechanisms]
        if release.used is not None or any(not 0 <= n <= m for n, m in zip(used, most, strict=True)):
            raise ValueError("settled twice, or for more than was reserved")
        release.used = used
    elif op != "dropped":
        raise ValueError("another kind of line")


def _live(releases: Iterable[_Release]) -> tuple[Mechanism, ...]:
    """Everything that counts, equal mechanisms taken together."""
    return merged([m for r in releases for m in r.live])


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
