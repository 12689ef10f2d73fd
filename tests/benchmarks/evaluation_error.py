"""Errors of the evaluation table against scikit-survival and against exact counts, printed as tables. Not a test."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from oncofed.common.evaluation.bootstrap import interval
from oncofed.common.evaluation.concordance import concordance, concordance_bounds, uno_concordance
from oncofed.common.evaluation.scores import auc, brier, integrated_brier, predicted_survival
from oncofed.common.metrics import concordance_index, pair_counts
from oncofed.common.survival import survival_curve
from rich.console import Console
from rich.table import Table
from sksurv.metrics import brier_score, concordance_index_ipcw, cumulative_dynamic_auc

sys.path.insert(0, str(Path(__file__).parents[1]))
from survival_cohorts import COHORTS, Cohort, cohort, simulated

console = Console(width=140)
SIZES = ((8, 8), (16, 16), (32, 32), (64, 32), (64, 64))


def exact_brier(c: Cohort, horizon: float, points: int = 600) -> float:
    """Mean Brier score from 0 to the horizon by scikit-survival on a fine grid; before the first patient leaves by hand."""
    times = np.linspace(0, horizon, points)
    early, late = times[times < c.time.min()], times[(times >= c.time.min()) & (times < c.time.max())]
    first = ((1 - survival_curve(c.log_baseline, c.grid, c.risk, early)) ** 2).mean(0)
    scores = brier_score(c.truth, c.truth, survival_curve(c.log_baseline, c.grid, c.risk, late), late)[1]
    return float(np.trapezoid(np.concatenate([first, scores]), times) / horizon)


def without_noise() -> None:
    """Errors of C, Uno's C, AUC(t), Brier and its mean, 8 x 8 to 64 x 64 cells, on training and on held-out halves."""
    for held_out in (False, True):
        table = Table(
            "cohort",
            "n",
            "R x T",
            "C",
            "bounds",
            "Uno to 60",
            "AUC",
            "Brier",
            "mean Brier to 60",
            title=f"error, held out: {held_out}",
        )
        for name in COHORTS:
            c = cohort(name, held_out).some(4000)
            exact = concordance_index(c.risk, c.time, c.event)
            for R, T in SIZES:
                t = c.table(R, T)
                h, until = t.counts[0], t.until(60.0)
                s = predicted_survival(t.mean_risk, c.log_baseline[None], c.grid, t.time_edges)[0]
                low, high = concordance_bounds(h)
                uno = concordance_index_ipcw(c.truth, c.truth, c.risk, tau=60.0, tied_tol=0)[0]
                hs = np.array([12.0, 24.0, 36.0, 60.0])
                aucs = cumulative_dynamic_auc(c.truth, c.truth, c.risk, hs, tied_tol=0)[0]
                briers = brier_score(c.truth, c.truth, survival_curve(c.log_baseline, c.grid, c.risk, hs), hs)[1]
                places = [t.until(x) for x in hs]
                ours = np.array([auc(h, k) for k in places]), brier(h, s)[[k - 1 for k in places]]
                table.add_row(
                    name,
                    str(len(c.risk)),
                    f"{R} x {T}",
                    f"{concordance(h) - exact:+.4f}",
                    f"{low - exact:+.3f} {high - exact:+.3f}",
                    f"{uno_concordance(h, until) - uno:+.4f}",
                    f"{np.abs(ours[0] - aucs).max():.4f}",
                    f"{np.abs(ours[1] - briers).max():.4f}",
                    f"{integrated_brier(h, s, t.time_edges, until) - exact_brier(c, 60.0):+.5f}",
                )
        console.print(table)


def splits(repeats: int = 20) -> None:
    """Root mean square error of C over random halves for training: how much of the above is luck."""
    table = Table("cohort", *(f"{R} x {T}" for R, T in SIZES), title="RMSE of C over held-out halves (mean error)")
    for name in COHORTS:
        errors = []
        for seed in range(repeats):
            c = cohort(name, True, seed).some(1500)
            exact = concordance_index(c.risk, c.time, c.event)
            errors.append([concordance(c.table(R, T).counts[0]) - exact for R, T in SIZES])
        e = np.array(errors)
        table.add_row(name, *(f"{r:.4f} ({m:+.4f})" for r, m in zip(np.sqrt((e**2).mean(0)), e.mean(0), strict=True)))
    console.print(table)


def noise(repeats: int = 400) -> None:
    """RMSE of C at epsilon = 1, of one table and of pair counts within sites."""
    rng = np.random.default_rng(0)
    cohorts = {
        "GBSG2 686": cohort("gbsg2"),
        "sim 1000": simulated(1000),
        "FLChain 1000": cohort("flchain").some(1000),
        "sim 5000": simulated(5000),
        "FLChain 5000": cohort("flchain").some(5000),
    }
    table = Table("", *cohorts, title="RMSE of C at epsilon = 1")
    for size in (8, 16, 32):
        for noises in (1, 5):
            row = []
            for c in cohorts.values():
                h, exact = c.noisy_table(size, size, noises).counts[0], concordance_index(c.risk, c.time, c.event)
                values = concordance(h + two_sided(rng, (repeats, *h.shape), 1.0, noises))
                row.append(f"{np.sqrt(np.nanmean((values - exact) ** 2)):.4f}")
            table.add_row(f"{size} x {size}, {noises} noise(s)", *row)
    for noises in (1, 5):
        table.add_row(
            f"pair counts of 5 sites, {noises} noise(s)",
            *(f"{stratified(c, rng, noises):.4f}" for c in cohorts.values()),
        )
    console.print(table)


def two_sided(rng: np.random.Generator, shape: tuple[int, ...], scale: float, noises: int = 1) -> np.ndarray:
    """The sum of `noises` two-sided geometric noises."""
    p = -np.expm1(-1.0 / scale)
    return (rng.geometric(p, (noises, *shape)) - rng.geometric(p, (noises, *shape))).sum(0).astype(float)


def stratified(c: Cohort, rng: np.random.Generator, noises: int, sites: int = 5, repeats: int = 4000) -> float:
    """RMSE at epsilon = 1 of C from pairs within sites: twice the concordant ones and twice the rest, whole numbers."""
    parts = np.array_split(rng.permutation(len(c.risk)), sites)
    concordant, pairs = np.array([pair_counts(c.risk[s], c.time[s], c.event[s]) for s in parts]).sum(0)
    scale = 2.0 * max(map(len, parts))  # a patient is in fewer pairs than their site has patients
    a, b = np.array([[2 * concordant], [2 * (pairs - concordant)]]) + two_sided(rng, (2, repeats), scale, noises)
    return float(np.sqrt(((a / (a + b) - concordant / pairs) ** 2).mean()))


def coverage(repeats: int = 300) -> None:
    """How often the interval at 95 % holds the C of the population, with and without noise, on edges of other patients."""
    big, trained = simulated(8000, 99), simulated(1000, 100)
    truth = concordance_index(big.risk, big.time, big.event)
    table = Table("n", "R x T", "epsilon", "noises", "coverage", "median width", title="95 % intervals of C")
    for n in (60, 200, 500):
        for size, epsilon, noises in ((32, 0.0, 1), (8, 0.0, 1), (8, 1.0, 1), (8, 0.5, 1), (8, 1.0, 5)):
            rng = np.random.default_rng(1)
            held, widths = 0, []
            for seed in range(repeats):
                one = simulated(n, seed)
                c = replace(trained, risk=one.risk, time=one.time, event=one.event)
                h = (c.noisy_table(size, size, noises, epsilon) if epsilon else c.table(size, size, ())).counts[0]
                h = h + two_sided(rng, h.shape, 1 / epsilon, noises) if epsilon else h
                _, low, high = interval(
                    concordance, h, rng, draws=300, epsilon=epsilon, noises=noises, bounds=(0.0, 1.0)
                )
                held += int(low <= truth <= high)
                widths.append(float(high - low))
            row = (
                f"{size} x {size}",
                f"{epsilon:g}",
                str(noises),
                f"{held / repeats:.3f}",
                f"{np.nanmedian(widths):.3f}",
            )
            table.add_row(str(n), *row)
    console.print(table)


if __name__ == "__main__":
    for part in sys.argv[1:] or ("without_noise", "splits", "noise", "coverage"):
        {"without_noise": without_noise, "splits": splits, "noise": noise, "coverage": coverage}[part]()
