"""How well a study's models do, over all folds and hospitals, from the sums of tables alone.

A score is the mean over folds; a fold's models are its own. Intervals are Poisson bootstraps of the summed counts
(common/evaluation/bootstrap.py). Shapes: F folds, C cancer types, R risk bins, T time bins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from oncofed.common.classical.life_table import Cells, curves, life_tables
from oncofed.common.classical.log_rank import log_rank
from oncofed.common.evaluation.bootstrap import interval
from oncofed.common.evaluation.calibration import calibration, halves
from oncofed.common.evaluation.concordance import by_score, concordance, concordance_bounds, uno_concordance
from oncofed.common.evaluation.scores import auc, integrated_brier, null_survival
from oncofed.common.evaluation.table import events_and_leaving, in_rows
from oncofed.common.metrics import mean_known, ratio
from oncofed.common.splits import seed_from
from oncofed.common.study import Study
from oncofed.server.evaluation import FoldTable

DRAWS, SITE_DRAWS = 500, 200
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
        self.pairs = np.stack([t.pairs for t in tables])  # [F, 3, C]

    def _interval(self, statistic: Statistic, *parts: object, draws: int = DRAWS) -> dict[str, Any]:
        """Point and limits of a statistic of `counts [draws, F, C, 2, R, T]`, each as plain numbers."""
        return self._limits(statistic, self.counts, draws, max(len(t.sites) for t in self.tables), *parts)

    def _limits(
        self, statistic: Statistic, counts: np.ndarray, draws: int, noises: int, *parts: object
    ) -> dict[str, Any]:
        rng = np.random.default_rng(seed_from(self.study.seed, "pooled evaluation", *parts))
        epsilon = self.study.evaluation.epsilon / 2  # the other half is spent on pairs within the site
        found = interval(statistic, counts, rng, draws=draws, epsilon=epsilon, noises=noises)
        return dict(zip(("value", "low", "high"), map(_plain, found), strict=True))

    def _until(self, month: float) -> list[int]:
        """Time bins up to a horizon, in each fold."""
        return [int(np.flatnonzero(np.isclose(t.time_edges, month))[0]) + 1 for t in self.tables]

    # -- scores --------------------------------------------------------------------------------------------------------

    def c_index(self) -> dict[str, Any]:
        """Mean over cancer types of the C-index within each over all hospitals, and the certified bounds of counts without noise."""
        out = self._interval(lambda h: mean_known(mean_known(concordance(h), axis=1), axis=1), "c_index")
        if not self.study.evaluation.epsilon:
            low, high = (mean_known(mean_known(v, axis=0)) for v in self._bounds())
            out |= {"bounds": [float(low), float(high)]}
        return out

    def _bounds(self) -> tuple[np.ndarray, np.ndarray]:
        known = ~np.isnan(concordance(self.counts))
        low, high = concordance_bounds(self.counts)
        return np.where(known, low, np.nan), np.where(known, high, np.nan)

    def within_sites(self) -> dict[str, Any]:
        """The same of pairs within one hospital alone: another quantity, where hospitals' patients or scores differ."""
        concordant, discordant, tied = np.moveaxis(self.pairs, 1, 0)
        by_cancer = mean_known(ratio(concordant + tied / 2, concordant + discordant + tied), axis=0)
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
        found = self._interval(lambda h: mean_known(concordance(h), axis=1), "by_cancer")
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
            for s in (self.survival, [null_survival(h) for h in self.counts])
        )
        patients, events = self.counts.sum((0, 2, 3, 4)), self.counts[:, :, 1].sum((0, 2, 3))
        return {
            name: {
                "patients": float(patients[c]),
                "events": float(events[c]),
                "c_index": {k: found[k][c] for k in ("value", "low", "high")},
                "bounds": None if self.study.evaluation.epsilon else _plain(np.array([low[c], high[c]])),
                "uno": _plain(uno[c]),
                "brier": _plain(own[c]),
                "brier_null": _plain(null[c]),
            }
            for c, name in enumerate(self.cancers)
        }

    def horizons(self) -> list[dict[str, Any]]:
        """At each horizon: AUC with interval by cancer type and their mean, and calibration over all cancer types."""
        out = []
        for month in self.study.evaluation.horizons:
            until = self._until(month)

            def by_cancer(h: np.ndarray, until: list[int] = until) -> np.ndarray:
                return mean_known(np.stack([auc(h[:, f], u) for f, u in enumerate(until)], 1), axis=1)

            each = self._interval(by_cancer, "auc", month, draws=SITE_DRAWS)
            mean = self._interval(lambda h, of=by_cancer: mean_known(of(h), axis=1), "auc", month, draws=SITE_DRAWS)  # type: ignore[misc]
            out.append(
                {
                    "month": month,
                    "auc": mean,
                    "auc_by_cancer": {
                        name: {k: each[k][c] for k in ("value", "low", "high")} for c, name in enumerate(self.cancers)
                    },
                    "calibration": self._calibration(until),
                }
            )
        return out

    def _calibration(self, until: list[int]) -> dict[str, Any]:
        """Groups of patients by predicted survival at a horizon, whatever their fold and cancer type.

        Folds have time bins of their own but share the horizons, so observed survival is averaged over folds by patients.
        """
        rows = [
            calibration(in_rows(t.counts, -4), in_rows(t.survival, -3), t.time_edges, u)
            for t, u in zip(self.tables, until, strict=True)
        ]
        most = max(len(r.patients) for r in rows)
        rows = [r for r in rows if len(r.patients) == most]  # a fold with fewer groups has others
        weight = np.maximum(np.stack([r.patients for r in rows]), 0.0)
        told = {}
        for k in ("predicted", "observed", "lower", "upper"):
            values = np.stack([getattr(r, k) for r in rows])  # what one fold does not know of its patients is unknown
            told[k] = ratio((np.where(weight > 0, values, 0.0) * weight).sum(0), weight.sum(0))
        # an interval of the mean of independent folds is narrower than those of the folds
        for side in ("lower", "upper"):
            told[side] = told["observed"] + (told[side] - told["observed"]) / np.sqrt(len(rows))
        return {k: _plain(v) for k, v in told.items()} | {"patients": _plain(weight.sum(0))}

    # -- hospitals and groups ------------------------------------------------------------------------------------------

    def by_site(self) -> list[dict[str, Any]]:
        """Each hospital: patients, events, pairs, and the C-index of pairs within it and a cancer type, with an interval."""
        out = []
        for site in sorted(set().union(*(t.sites for t in self.tables))):
            mine = [t.sites[site] for t in self.tables if site in t.sites]
            counts = np.stack([s["table"] for s in mine])  # [F, C, 2, R, T]
            concordant, discordant, tied = np.moveaxis(np.stack([s["pairs"] for s in mine]), 1, 0)
            pairs = concordant + discordant + tied
            weight = np.maximum(pairs, 0.0)
            value = ratio((concordant + tied / 2).sum(), pairs.sum())
            known = weight.sum((0, 1)) > 0

            def statistic(h: np.ndarray, weight: np.ndarray = weight) -> np.ndarray:
                c = concordance(h)
                w = np.where(np.isnan(c), 0.0, weight)
                return ratio((np.nan_to_num(c) * w).sum((1, 2)), w.sum((1, 2)))

            point = _plain(value)
            limits: dict[str, Any] = {"low": None, "high": None}
            if known and point is not None:
                found = self._limits(statistic, _halved(counts), SITE_DRAWS, 1, site)
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

    def risk_groups(self) -> dict[str, Any]:
        """Survival of patients below and above their cancer type's median risk in training, and the log-rank test by cancer type.

        Curves of folds are on each fold's own time bins; those of the first are used where all folds share them, else bins are
        cut at the edges that all share.
        """
        shared = self.tables[0].time_edges
        for t in self.tables[1:]:
            shared = shared[np.isclose(shared[:, None], t.time_edges[None]).any(1)]
        owner = halves(self.counts.shape[-2])
        events, leaving = np.zeros((2, len(self.cancers), 2, len(shared) + 1))
        for t in self.tables:
            bin_ = np.searchsorted(shared, np.append(t.time_edges, np.inf) - 1e-9)
            cut = np.eye(len(shared) + 1)[bin_]
            d, n = events_and_leaving(t.counts, owner)  # [C, G, T]
            events, leaving = events + d @ cut, leaving + n @ cut
        sums = {"patients": leaving.sum(-1), "events": events, "leaving": leaving}
        cells, names = Cells.grid([0.0, *shared]), ["low risk", "high risk"]
        test = log_rank(sums, cells, names).as_dict()
        return {"curves": curves(life_tables(sums, cells, names)), "logrank": test}


def _halved(counts: np.ndarray) -> np.ndarray:
    """Pairs of risk bins and of time bins taken together where there are many: a hospital's own interval needs no finer ones."""
    r, t = counts.shape[-2:]
    if r < 16 or t < 16 or r % 2 or t % 2:
        return counts
    return counts.reshape(*counts.shape[:-2], r // 2, 2, t // 2, 2).sum((-3, -1))


def _plain(value: Any) -> Any:
    array = np.asarray(value, dtype=np.float64)
    if array.ndim == 0:
        return float(array) if np.isfinite(array) else None
    return [_plain(v) for v in array]
