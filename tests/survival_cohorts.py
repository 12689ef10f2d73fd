"""Four public cohorts that come with scikit-survival, with the risk and the survival that a Cox model of them predicts."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from oncofed.common.evaluation.edges import noisy_time_bins, risk_bins, time_bins
from oncofed.common.evaluation.table import RiskTimeTable, risk_time_table
from oncofed.common.survival import RISK_EDGES, TimeGrid, coarsen, event_table, initial_log_baseline
from sksurv import datasets
from sksurv.linear_model import CoxPHSurvivalAnalysis
from sksurv.util import Surv

DAYS = 365.25 / 12
COHORTS = ("breast", "gbsg2", "whas500", "flchain")
HORIZONS = (12.0, 24.0, 36.0, 60.0)


@dataclass(frozen=True, eq=False)
class Cohort:
    """Evaluated patients, the edges that the training patients give, and the model's baseline."""

    risk: np.ndarray
    time: np.ndarray
    event: np.ndarray
    risk_counts: np.ndarray
    event_counts: np.ndarray
    exposure: np.ndarray
    log_baseline: np.ndarray
    grid: TimeGrid

    @property
    def truth(self) -> np.ndarray:
        return Surv.from_arrays(self.event.astype(bool), self.time)

    def table(self, R: int = 32, T: int = 32, horizons: tuple[float, ...] = HORIZONS) -> RiskTimeTable:
        """The table on edges from the training patients."""
        edges, means = risk_bins(self.risk_counts, R)
        times = time_bins(self.event_counts, T, horizons)
        return RiskTimeTable(self.counts(edges[0], times)[None], edges, times, means)

    def noisy_table(
        self, R: int, T: int, noises: int = 1, epsilon: float = 1.0, horizons: tuple[float, ...] = ()
    ) -> RiskTimeTable:
        """The table, without noise, on edges that are made for it, from the training patients."""
        edges, means = risk_bins(self.risk_counts, R)
        n = float(len(self.risk))
        times = noisy_time_bins(
            self.event_counts,
            self.exposure,
            T,
            horizons,
            patients=n,
            risk_bins=R,
            epsilon=epsilon,
            noises=noises,
        )
        return RiskTimeTable(self.counts(edges[0], times)[None], edges, times, means)

    def counts(self, risk_edges: np.ndarray, time_edges: np.ndarray) -> np.ndarray:
        """Counts `[2, R, T]`."""
        nobody = np.zeros(len(self.risk), dtype=int)
        return risk_time_table(self.risk, self.time, self.event, nobody, np.array([risk_edges]), time_edges)[0]

    def some(self, n: int, seed: int = 0) -> Cohort:
        """`n` of the evaluated patients."""
        rows = np.random.default_rng(seed).permutation(len(self.risk))[:n]
        return replace(self, risk=self.risk[rows], time=self.time[rows], event=self.event[rows])


@cache
def cohort(name: str, held_out: bool = False, seed: int = 0) -> Cohort:
    """A cohort by name; `held_out`: trained on one half and evaluated on the other, else both on all."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        x, y = getattr(datasets, f"load_{'breast_cancer' if name == 'breast' else name}")()
    x = x.iloc[:, :6] if name == "breast" else x[["age", "sex", "kappa", "lambda"]] if name == "flchain" else x
    x = x.apply(lambda column: column.cat.codes if column.dtype.name == "category" else column).astype(float)
    x = ((x - x.mean()) / x.std()).fillna(0.0).to_numpy()
    event, time = (y[field] for field in y.dtype.names)
    event, time = event.astype(int), np.maximum(time.astype(float), 0.5) / DAYS
    order = np.random.default_rng(seed).permutation(len(time))
    train, test = (order[::2], order[1::2]) if held_out else (order, order)
    model = CoxPHSurvivalAnalysis(alpha=0.1).fit(x[train], Surv.from_arrays(event[train].astype(bool), time[train]))
    risk = (x - x[train].mean(0)) @ model.coef_
    events, seen = event_table(time[train], event[train], np.zeros(len(train), dtype=int), 1)
    grid = TimeGrid.from_events(events[0], 20)
    exposure = (grid.exposure(time[train]) * np.exp(risk[train])[:, None]).sum(0, keepdims=True)
    baseline = initial_log_baseline(coarsen(events, grid), exposure)[0]
    bins = np.bincount(np.searchsorted(RISK_EDGES, risk[train]), minlength=len(RISK_EDGES) + 1)
    return Cohort(risk[test], time[test], event[test], bins[None].astype(float), events, seen, baseline, grid)


def simulated(n: int, seed: int = 0) -> Cohort:
    """A cohort of 20 normal covariates with C near 0.73 and about 40 % censored."""
    rng = np.random.default_rng(seed)
    risk = rng.normal(size=(n, 20)) @ np.full(20, 1.2 / 20**0.5)
    lived, seen = rng.exponential(30 * np.exp(-risk)), rng.uniform(5, 90, n)
    time, event = np.minimum(lived, seen), (lived <= seen).astype(int)
    events, seen_for = event_table(time, event, np.zeros(n, dtype=int), 1)
    bins = np.bincount(np.searchsorted(RISK_EDGES, risk), minlength=len(RISK_EDGES) + 1)
    baseline = np.array([-np.log(30)])
    return Cohort(risk, time, event, bins[None].astype(float), events, seen_for, baseline, TimeGrid((0.0,)))
