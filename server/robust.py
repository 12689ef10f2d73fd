"""Aggregation that single bad members cannot lead astray: a bound on norms, median, trimmed mean, Krum, block by block.

All rules look at a site's change delta_b, evidence divided out, so they need to see single answers and exclude secure sums.

- norm (Sun et al. 2019, arXiv 1911.07963): a longer change is cut to the bound, then weighs by its evidence. Streams, but for the
  first round without a bound of its own. A site's word on its evidence is taken: who claims many patients leads, up to the bound.
- median, trimmed_mean (Yin et al. 2018, arXiv 1803.01498): of each number over the sites with evidence above 0, how much is not asked.
- krum (Blanchard et al. 2017, NeurIPS): the one change whose nearest others are nearest to it, in each block.

The last three hold all answers until the round ends: sites x model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from oncofed.common.blocks import EVIDENCE, Blocks, Sum
from oncofed.common.exchange import Aggregation
from oncofed.server.aggregate import Accumulator

LONGEST = 2.0
"""The data-driven bound, in lower medians of the norms of the round before: of two sites the shorter one's."""

FAR = 3.0
"""A site is named whose distance from the result is more than so many lower medians of all sites' distances."""


class Collector(Protocol):
    """What a round's answers are put into, one by one; `total` is a training sum like any other."""

    @property
    def count(self) -> int: ...

    def add(self, one: Sum, source: str) -> None: ...

    def total(self) -> Sum: ...


@dataclass(frozen=True)
class Odd:
    """A site whose change of a block was cut, or was far from the others': `size` beside the `bound` that it passed."""

    site: str
    block: int
    size: float
    bound: float


def lower_median(values: np.ndarray) -> float:
    """The middle of some numbers, of two middle ones the smaller: half of them and no more may be beyond it."""
    return float(np.sort(values)[(len(values) - 1) // 2])


def suspects(share: float, sites: int) -> int:
    """How many of some sites a rule reckons to be bad: the share of them rounded up, but less than half."""
    return min(math.ceil(share * sites - 1e-9), (sites - 1) // 2)


def norms_of(one: Sum, blocks: Blocks) -> np.ndarray:
    """Norm of a site's change by block `[blocks]`, NaN where nobody stands behind a block."""
    at = {name: i for i, name in enumerate(blocks.names)}
    square = np.zeros(len(blocks.names))
    for name, value in one.items():
        if name in blocks.owners:
            for block, row in _rows(value, name, blocks):
                square[at[block]] += float(np.vdot(row.astype(np.float64), row.astype(np.float64)))
    evidence = one[EVIDENCE]
    return np.divide(np.sqrt(square), evidence, out=np.full(len(square), np.nan), where=evidence > 0)


class Bounded:
    """Cuts each site's change of a block to `bounds [blocks]` and adds it; without bounds it waits for all, and takes theirs.

    A block that no site stood behind before has no bound (NaN): it waits for one, and its change counts from the next round on.
    """

    def __init__(self, inner: Accumulator, blocks: Blocks, bounds: np.ndarray | None) -> None:
        self.inner, self.blocks, self.bounds = inner, blocks, bounds
        self.norms: dict[str, np.ndarray] = {}
        self.odd: list[Odd] = []
        self._held: dict[str, Sum] = {}

    @property
    def count(self) -> int:
        return self.inner.count + len(self._held)

    def add(self, one: Sum, source: str) -> None:
        """Cut and add one site's sum, or hold it; on an error nothing has been added."""
        self.inner.peaks(one, source)
        norms = norms_of(one, self.blocks)
        if self.bounds is None:
            self.inner.check(one, source)
            self._held[source] = one
        else:
            self._add_cut(one, norms, self.bounds, source)
        self.norms[source] = norms

    def total(self) -> Sum:
        if self._held:
            self.bounds = self.next_bounds()
        for source in sorted(self._held):
            one = self._held.pop(source)
            assert self.bounds is not None
            try:
                self._add_cut(one, self.norms[source], self.bounds, source)
            except ValueError:  # evidence without measure: together they leave the range of the sum
                self.odd.append(Odd(source, -1, math.inf, math.inf))
        return self.inner.total()

    def next_bounds(self) -> np.ndarray:
        """Of each block twice the lower median of this round's norms; where no site stood behind it, the bound that it had."""
        known = np.array([self.norms[s] for s in sorted(self.norms)])
        before = np.full(len(self.blocks.names), np.nan) if self.bounds is None else self.bounds
        return np.array(
            [
                LONGEST * lower_median(column[~np.isnan(column)]) if (~np.isnan(column)).any() else old
                for column, old in zip(known.T, before, strict=True)
            ]
        )

    def _add_cut(self, one: Sum, norms: np.ndarray, bounds: np.ndarray, source: str) -> None:
        factor = np.ones_like(bounds)
        np.divide(bounds, norms, out=factor, where=norms > bounds)
        factor[np.isnan(bounds)] = 0.0
        if (factor < 1.0).any():
            one = {
                name: np.where(np.isnan(bounds), 0.0, value)
                if name == EVIDENCE
                else value * self.blocks.spread(factor, name, value.ndim).astype(np.float32)
                if name in self.blocks.owners
                else value
                for name, value in one.items()
            }
        self.inner.add(one, source)
        self.odd += [Odd(source, int(b), float(norms[b]), float(bounds[b])) for b in np.flatnonzero(norms > bounds)]


class AllAtOnce:
    """Holds the answers of a round and puts each block together by median, trimmed mean or Krum; the evidence is their sum."""

    def __init__(self, inner: Accumulator, blocks: Blocks, settings: Aggregation) -> None:
        self.inner, self.blocks, self.settings = inner, blocks, settings
        self.odd: list[Odd] = []
        self.chosen: dict[str, int] = {}
        self._held: dict[str, Sum] = {}

    @property
    def count(self) -> int:
        return len(self._held)

    def add(self, one: Sum, source: str) -> None:
        """Hold one site's sum; raises `ValueError` naming `source` on what cannot be part of a sum."""
        self.inner.check(one, source)
        self._held[source] = one

    def total(self) -> Sum:
        """Evidence, and its product with each block's robust change, so that the step is that of any sum."""
        sites = sorted(self._held)  # whatever the order of arrival
        sums = [self._held[site] for site in sites]
        evidence_SB = np.array([one[EVIDENCE] for one in sums])
        total: Sum = {}
        for name, first in sums[0].items():
            total[name] = np.zeros(first.shape)
            if name not in self.blocks.owners:  # evidence, and what was seen of the modalities
                total[name] += np.stack([one[name] for one in sums]).sum(0)
        for b, pieces in self._pieces(total).items():
            there = np.flatnonzero(evidence_SB[:, b] > 0)
            if not len(there):
                continue
            n_S1 = evidence_SB[there, b][:, None]
            parts = [
                np.stack([_rows(sums[s][name], name, self.blocks)[r][1] for s in there]) / n_S1 for name, r in pieces
            ]
            results, distance_S = self._robust(parts, [sites[s] for s in there])
            for (name, r), result in zip(pieces, results, strict=True):
                row = _rows(total[name], name, self.blocks)[r][1]
                row[...] = total[EVIDENCE][b] * result
            far = FAR * lower_median(distance_S)
            self.odd += [
                Odd(sites[s], b, float(d), far) for s, d in zip(there, distance_S, strict=True) if d > far and far > 0
            ]
        return total

    def _robust(self, parts: list[np.ndarray], sites: list[str]) -> tuple[list[np.ndarray], np.ndarray]:
        """The result of a block's parts `[sites, numbers]` each, and how far from it each site is."""
        k = suspects(self.settings.trim, len(sites))
        if self.settings.robust == "krum":
            best = krum(parts, k)
            self.chosen[sites[best]] = self.chosen.get(sites[best], 0) + 1
            results = [part[best] for part in parts]
        elif self.settings.robust == "median":
            results = [np.median(part, axis=0) for part in parts]
        else:
            results = [np.sort(part, axis=0)[k : len(part) - k].mean(0) for part in parts]
        square = sum(np.square(part - result).sum(1) for part, result in zip(parts, results, strict=True))
        return results, np.sqrt(square)

    def _pieces(self, total: Sum) -> dict[int, list[tuple[str, int]]]:
        """The parameters and rows of each block."""
        at = {name: i for i, name in enumerate(self.blocks.names)}
        pieces: dict[int, list[tuple[str, int]]] = {}
        for name, value in total.items():
            if name in self.blocks.owners:
                for r, (block, _) in enumerate(_rows(value, name, self.blocks)):
                    pieces.setdefault(at[block], []).append((name, r))
        return pieces


def krum(parts: list[np.ndarray], bad: int) -> int:
    """The site with the least sum of squared distances to its nearest n - bad - 2 others; of equals, the shortest change."""
    n = len(parts[0])
    if n == 1:
        return 0
    distance_SS = np.zeros((n, n))
    norm_S = np.zeros(n)
    for part in parts:
        square = np.square(part).sum(1)
        norm_S += square
        distance_SS += np.maximum(square[:, None] + square[None, :] - 2.0 * part @ part.T, 0.0)
    np.fill_diagonal(distance_SS, np.inf)
    score = np.sort(distance_SS, axis=1)[:, : max(1, n - bad - 2)].sum(1)
    return int(np.lexsort((norm_S, score))[0])


REASONS = {
    "norm": "its change was longer than the bound, and cut to it",
    "median": "its change was far from the median, where it counts as one of many",
    "trimmed_mean": "its change was far from the mean of the middle ones, beside which it is trimmed",
    "krum": "its change was far from the chosen one, and left out",
}
TOO_LARGE = "its evidence is too large for a sum; it was left out of the round"


@dataclass
class Guard:
    """What the rounds of a phase have shown: the next round's `bounds [blocks]`, and who was cut or left out, by site and block.

    Of each: rounds, the largest size, its bound, the first round.
    """

    bounds: np.ndarray | None = None
    odd: dict[tuple[str, str], np.ndarray] = field(default_factory=dict)
    chosen: dict[str, int] = field(default_factory=dict)
    rule: str = "none"

    def over(self, inner: Accumulator, settings: Aggregation, blocks: Blocks) -> Collector:
        """What a round's answers are put into; without a robust rule the accumulator itself."""
        self.rule = settings.robust
        if settings.robust == "none":
            return inner
        if settings.robust == "norm":
            fixed = np.full(len(blocks.names), settings.norm_bound) if settings.norm_bound else self.bounds
            return Bounded(inner, blocks, fixed)
        return AllAtOnce(inner, blocks, settings)

    def learn(self, collector: Collector, round_: int) -> None:
        """Remember what a round has shown, after its total was taken."""
        if not isinstance(collector, Bounded | AllAtOnce):
            return
        if isinstance(collector, Bounded):
            self.bounds = collector.next_bounds()
        else:
            for site, n in collector.chosen.items():
                self.chosen[site] = self.chosen.get(site, 0) + n
        for odd in sorted(collector.odd, key=lambda o: (o.site, o.block)):
            key = odd.site, collector.blocks.names[odd.block] if odd.block >= 0 else ""
            rounds, size, bound, first = self.odd.get(key, np.array([0.0, -1.0, 0.0, round_]))
            if odd.size > size:
                size, bound = odd.size, odd.bound
            self.odd[key] = np.array([rounds + 1, size, bound, first])

    def found(self) -> dict[str, Any]:
        """For the results: a row for each site and block, the most rounds first, and how often Krum chose each site's block."""
        rows: list[dict[str, Any]] = [
            {
                "site": site,
                "block": block,
                "rounds": int(rounds),
                "first_round": int(first),
                "size": float(size) if block else None,
                "bound": float(bound) if block else None,
                "reason": REASONS[self.rule] if block else TOO_LARGE,
            }
            for (site, block), (rounds, size, bound, first) in self.odd.items()
        ]
        rows.sort(key=lambda row: (-row["rounds"], row["site"], row["block"]))
        return {"rule": self.rule, "rows": rows, "chosen": dict(sorted(self.chosen.items()))}

    # -- checkpoint ----------------------------------------------------------------------------------------------------

    def state(self) -> Sum:
        """Everything as arrays; nothing where no rule is at work."""
        state = {} if self.bounds is None else {"bounds": self.bounds}
        state |= {f"odd/{site}\t{block}": value for (site, block), value in self.odd.items()}
        return state | {f"chosen/{site}": np.array([float(n)]) for site, n in self.chosen.items()}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        self.bounds = state.get("bounds")
        self.odd, self.chosen = {}, {}
        for key, value in state.items():
            kind, _, name = key.partition("/")
            if kind == "odd":
                site, _, block = name.partition("\t")
                self.odd[site, block] = value
            elif kind == "chosen":
                self.chosen[name] = int(value[0])


def _rows(value: np.ndarray, name: str, blocks: Blocks) -> list[tuple[str, np.ndarray]]:
    """A parameter's rows, flat views of its memory, and the block that owns each; a parameter of one block is one row."""
    owner = blocks.owners[name]
    owners = (owner,) if isinstance(owner, str) else owner
    return list(zip(owners, value.reshape(len(owners), -1), strict=True))
