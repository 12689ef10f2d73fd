"""How well a study's models do, over all folds and hospitals, from the sums of tables alone.

A score is the mean over folds; a fold's models are its own. Intervals are Poisson bootstraps of the summed counts
(common/evaluation/bootstrap.py). Shapes: F folds, C cancer types, R risk bins, T time bins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from oncofed.common.classical.life_table import Cells, curves, life_tables
from oncofed.common.classical.log_rank import log_rank
from oncofed.common.evaluation.bootstrap import interval, redraw
from oncofed.common.evaluation.calibration import calibration, halves
from oncofed.common.evaluation.concordance import (
    by_score,
    comparable,
    concordance,
    concordance_bounds,
    uno_concordance,
)
from oncofed.common.evaluation.scores import auc, integrated_brier
from oncofed.common.evaluation.table import events_and_leaving
from oncofed.common.metrics import mean_known, ratio
from oncofed.common.splits import seed_from
from oncofed.common.study import Study
from oncofed.server.evaluation import FoldTable

DRAWS, SITE_DRAWS = 1000, 200
"""Bootstrap draws of the scores, and of a hospital's own."""

Statistic = Callable[[np.ndarray], np.ndarray]


def summarise(study: Study, cancers: Sequence[str], tables: Sequence[FoldTable]) -> dict[str, Any]:
    """All of it as plain numbers for `results.json`; None for what is unknown."""
    pooled = Pooled(study, tuple(cancers), tuple(tables))
    return {
        "epsilon": study.evaluation.epsilon,
        "folds": len(tables),
        "sites": sorted(set().union(*(t.sites for t in tables))),
        "c_index": pooled.c_index(),
        "within_sites": pooled.within_sites(),
        "mixed": pooled.mixed(),
        "by_cancer": pooled.by_cancer(),
        "horizons": pooled.horizons(),
        "by_site": pooled.by_site(),
        "risk_groups": pooled.risk_groups(),
    }


class Pooled:
    """The tables of all folds, and what is computed of them."""

    def __init__(self, study: Study, cancers: tuple[str, ...], tables: tuple[FoldTable, ...]) -> None:
        self.study, self.cancers, self.tables = study, cancers, tables
        self.counts = np.stack([t.counts for t in tables])  # [F, C, 2, R, T]
        self.survival = np.stack([t.survival for t in tables])  # [F, C, R, T - 1]
        self.null = np.stack([t.null for t in tables])  # [F, C, 1, T - 1]
        self.pairs = np.stack([t.pairs for t in tables])  # [F, 2, C]

    def _interval(self, statistic: Statistic, *parts: object, draws: int = DRAWS) -> dict[str, Any]:
        """Point and limits of a statistic of `counts [draws, F, C, 2, R, T]`, each as plain numbers."""
        return self._limits(statistic, self.counts, draws, max(len(t.sites) for t in self.tables), *parts)

    def _limits(
        self, statistic: Statistic, counts: np.ndarray, draws: int, noises: int, *parts: object
    ) -> dict[str, Any]:
        rng = np.random.default_rng(seed_from(self.study.seed, "pooled evaluation", *parts))
        epsilon = self.study.evaluation.epsilon / 2  # the other half is spent on pairs within the site
        found = interval(statistic, counts, rng, draws=draws, epsilon=epsilon, noises=noises, bounds=(0.0, 1.0))
        return dict(zip(("value", "low", "high"), map(_plain, found), strict=True))

    def _with_mean(self, by_cancer: Statistic, *parts: object, draws: int = DRAWS) -> dict[str, Any]:
        """Value and limits of the mean over cancer types, and after it of each type, on the same draws."""

        def statistic(h: np.ndarray) -> np.ndarray:
            each = by_cancer(h)
            return np.concatenate([mean_known(each, axis=1)[:, None], each], axis=1)

        return self._interval(statistic, *parts, draws=draws)

    def _until(self, month: float) -> list[int]:
        """Time bins up to a horizon, in each fold."""
        return [int(np.flatnonzero(np.isclose(t.time_edges, month))[0]) + 1 for t in self.tables]

    # -- scores --------------------------------------------------------------------------------------------------------

    def _within(self, h: np.ndarray) -> np.ndarray:
        """C-index of each cancer type `[draws, C]`, mean over folds; of a type that noise drowns it is unknown."""
        return np.where(self.told, mean_known(concordance(h), axis=1), np.nan)

    @cached_property
    def _scored(self) -> dict[str, Any]:
        """C-index: of the mean over cancer types, and after it of each type."""
        return self._with_mean(self._within, "c_index")

    @cached_property
    def told(self) -> np.ndarray:
        """Cancer types `[C]` whose number of comparable pairs is beyond what noise alone would make of none, three deviations."""
        epsilon = self.study.evaluation.epsilon / 2
        if not epsilon:
            return np.ones(len(self.cancers), dtype=bool)
        sites = [len(t.sites) for t in self.tables]
        # of a table with nobody in it: events and those who leave are sums of cells' noise
        rng = np.random.default_rng(seed_from(self.study.seed, "noise alone"))
        nobody = np.stack(
            [redraw(np.zeros_like(self.counts[0]), 100, rng, epsilon=epsilon, noises=n) for n in sites], axis=1
        )
        reach = 3 * comparable(nobody).sum(1).std(0)
        return np.asarray(comparable(self.counts).sum(0) > reach)

    def c_index(self) -> dict[str, Any]:
        """Mean over cancer types of the C-index within each over all hospitals, and the certified bounds of counts without noise."""
        out = {k: v[0] for k, v in self._scored.items()}
        if not self.study.evaluation.epsilon:
            low, high = (mean_known(mean_known(v, axis=0)) for v in self._bounds())
            out |= {"bounds": [float(low), float(high)]}
        return out | {"drowned": [name for name, known in zip(self.cancers, self.told, strict=True) if not known]}

    def _bounds(self) -> tuple[np.ndarray, np.ndarray]:
        known = ~np.isnan(concordance(self.counts))
        low, high = concordance_bounds(self.counts)
        return np.where(known, low, np.nan), np.where(known, high, np.nan)

    def within_sites(self) -> dict[str, Any]:
        """The same of pairs within one hospital alone: another quantity, where hospitals' patients or scores differ."""
        by_cancer = np.where(self.told, mean_known(ratio(self.pairs[:, 0], self.pairs.sum(1)), axis=0), np.nan)
        return {
            "value": _plain(mean_known(by_cancer)),
            "by_cancer": dict(zip(self.cancers, _plain(by_cancer), strict=True)),
        }

    def mixed(self) -> dict[str, Any]:
        """The C-index over patients of all cancer types mixed, by predicted survival at the last horizon."""
        month = self.study.evaluation.horizons[-1]
        at = self._until(month)

        def statistic(h: np.ndarray) -> np.ndarray:
            folds = [
                concordance(by_score(h[:, f], -s[..., u - 1]))
                for f, (s, u) in enumerate(zip(self.survival, at, strict=True))
            ]
            return mean_known(np.stack(folds, 1), axis=1)

        return self._interval(statistic, "mixed", draws=SITE_DRAWS) | {"month": month}

    def by_cancer(self) -> dict[str, Any]:
        """Of each cancer type: patients, events, C-index with interval and bounds, Uno's C, and the Brier score over time."""
        found = {k: v[1:] for k, v in self._scored.items()}
        last = self.study.evaluation.horizons[-1]
        until = self._until(last)
        folds = range(len(self.tables))
        uno = mean_known(np.stack([uno_concordance(self.counts[f], until[f]) for f in folds]), axis=0)
        low, high = (mean_known(v, axis=0) for v in self._bounds())
        own, null = (
            mean_known(
                np.stack([integrated_brier(self.counts[f], s[f], self.tables[f].time_edges, until[f]) for f in folds]),
                axis=0,
            )
            for s in (self.survival, self.null)
        )
        patients, events = self.counts.sum((0, 2, 3, 4)), self.counts[:, :, 1].sum((0, 2, 3))
        return {
            name: {
                "patients": float(patients[c]),
                "events": float(events[c]),
                "c_index": {k: found[k][c] for k in ("value", "low", "high")},
                "bounds": None if self.study.evaluation.epsilon else _plain(np.array([low[c], high[c]])),
                "uno": _plain(uno[c]) if self.told[c] else None,
                "brier": _plain(own[c]) if self.told[c] else None,
                "brier_null": _plain(null[c]) if self.told[c] else None,
            }
            for c, name in enumerate(self.cancers)
        }

    def horizons(self) -> list[dict[str, Any]]:
        """At each horizon: AUC with interval by cancer type and their mean, and calibration over all cancer types."""
        out = []
        for month in self.study.evaluation.horizons:
            until = self._until(month)

            def by_cancer(h: np.ndarray, until: list[int] = until) -> np.ndarray:
                each = mean_known(np.stack([auc(h[:, f], u) for f, u in enumerate(until)], 1), axis=1)
                return np.where(self.told, each, np.nan)

            found = self._with_mean(by_cancer, "auc", month, draws=SITE_DRAWS)
            edges, counts = self._pieces
            stop = int(np.searchsorted(edges, month - 1e-9)) + 1
            at = np.stack([s[..., u - 1] for s, u in zip(self.survival, until, strict=True)])  # [F, C, R]
            held = calibration(counts, at.swapaxes(0, 1).reshape(len(self.cancers), -1), stop)
            out.append(
                {
                    "month": month,
                    "auc": {k: v[0] for k, v in found.items()},
                    "auc_by_cancer": {
                        name: {k: v[1 + c] for k, v in found.items()} for c, name in enumerate(self.cancers)
                    },
                    "calibration": {k: _plain(v) for k, v in vars(held).items()},
                }
            )
        return out

    # -- hospitals and groups ------------------------------------------------------------------------------------------

    def by_site(self) -> list[dict[str, Any]]:
        """Each hospital: patients, events, pairs, and the C-index of pairs within it and a cancer type, with an interval."""
        out = []
        for site in sorted(set().union(*(t.sites for t in self.tables))):
            mine = [t.sites[site] for t in self.tables if t.sites.get(site)]
            if not mine:  # the server has seen the total alone
                continue
            counts = np.stack([s["table"] for s in mine])  # [F, C, 2, R, T]
            twice = np.stack([s["pairs"] for s in mine])  # [F, 2, C]
            pairs = twice.sum(1) / 2
            weight = np.maximum(pairs, 0.0)
            value = ratio(twice[:, 0].sum(), twice.sum())
            known = weight.sum((0, 1)) > 0

            def statistic(h: np.ndarray, weight: np.ndarray = weight) -> np.ndarray:
                c = concordance(h)
                w = np.where(np.isnan(c), 0.0, weight)
                return ratio((np.nan_to_num(c) * w).sum((1, 2)), w.sum((1, 2)))

            point = _plain(value)
            limits: dict[str, Any] = {"low": None, "high": None}
            # with noise its table has far more of it than its pairs
            if known and point is not None and not self.study.evaluation.epsilon:
                found = self._limits(statistic, _coarse(counts), SITE_DRAWS, 1, site)
                if None not in found.values():
                    # the table is coarse, the pairs are exact: its interval goes to their point
                    limits = {k: float(np.clip(found[k] + point - found["value"], 0, 1)) for k in limits}
            out.append(
                {
                    "site": site,
                    "patients": float(counts.sum()),
                    "events": float(counts[:, :, 1].sum()),
                    "pairs": float(pairs.sum()),
                    "c_index": {"value": point, **limits},
                }
            )
        return out

    @cached_property
    def _pieces(self) -> tuple[np.ndarray, np.ndarray]:
        """Edges `[U - 1]` of the pieces that the time bins of all folds cut, and the counts `[C, 2, F * R, U]` of all folds on them.

        Counts are spread evenly over the pieces of their bin, as the actuarial estimate takes them to lie.
        """
        edges = np.unique(np.concatenate([t.time_edges for t in self.tables]))
        edges = edges[edges <= min(t.time_edges[-1] for t in self.tables)]
        on = np.stack([_spread(t.time_edges, edges) for t in self.tables])
        counts = np.einsum("fcert,ftu->cefru", self.counts, on)
        return edges, counts.reshape(*counts.shape[:2], -1, counts.shape[-1])

    def risk_groups(self) -> dict[str, Any]:
        """Survival of patients below and above their cancer type's median risk in training, and the log-rank test by cancer type and fold.

        Folds have time bins of their own. The test takes each fold as strata with its own bins, the curves are of all on common pieces.
        """
        owner = halves(self.counts.shape[-2])
        events, leaving = map(np.stack, zip(*(events_and_leaving(t.counts, owner) for t in self.tables), strict=True))
        names = ["low risk", "high risk"]
        strata = {k: v.reshape(-1, *v.shape[2:]) for k, v in (("events", events), ("leaving", leaving))}
        test = log_rank(strata, Cells.grid([0.0, *self.tables[0].time_edges]), names).as_dict()
        edges, counts = self._pieces
        events, leaving = events_and_leaving(counts, np.tile(owner, len(self.tables)))
        sums = {"patients": leaving.sum(-1), "events": events, "leaving": leaving}
        tables = life_tables(sums, Cells.grid([0.0, *edges]), names)
        return {"curves": curves(tables), "logrank": test}


def _spread(own: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Share `[T, U]` of each time bin of `own` edges `[T - 1]` in each piece between `edges` `[U - 1]`; the last of both have no end."""
    starts = np.append(0.0, own[:-1])
    below = np.clip((edges - starts[:, None]) / np.diff(own, prepend=0.0)[:, None], 0.0, 1.0)
    return np.diff(np.vstack([below, np.zeros(len(edges))]), axis=1, prepend=0.0, append=1.0)


def _coarse(counts: np.ndarray) -> np.ndarray:
    """Pairs of risk bins, and of time bins, taken together while there are more than 16: a hospital's own interval needs no finer ones."""
    for axis in (-2, -1):
        while counts.shape[axis] > 16 and counts.shape[axis] % 2 == 0:
            pairs = (*counts.shape[:axis], counts.shape[axis] // 2, 2, *counts.shape[axis:][1:])
            counts = counts.reshape(pairs).sum(axis)
    return counts


def _plain(value: Any) -> Any:
    array = np.asarray(value, dtype=np.float64)
    if array.ndim == 0:
        return float(array) if np.isfinite(array) else None
    return [_plain(v) for v in array]
