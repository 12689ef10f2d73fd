"""What a trained model looks at and how its scores lie, as sums over a site's training patients.

Shapes: N patients, C cancer types or classes, K intervals.
"""

from __future__ import annotations

import numpy as np
import torch
from oncofed.client.attention_network import WHOLE, entropy_sums, network_sums, strength_sums
from oncofed.client.attributions import attribution_sums
from oncofed.client.data.cohort import Cohort
from oncofed.client.disclosure import spread_cells
from oncofed.client.release import Answer
from oncofed.client.score import scored_model
from oncofed.client.session import Session
from oncofed.common import wire
from oncofed.common.blocks import Sum
from oncofed.common.errors import Refusal
from oncofed.common.modalities import RNA
from oncofed.common.models.t_gem import TGEM
from oncofed.common.splits import seed_from
from oncofed.common.survival import RISK_EDGES, TimeGrid


def explain(session: Session) -> Answer:
    """Calibration of survival scores by cancer type and, when the study asks, attributions of genes and of attention.

    Cells of cancer types or classes with few patients are withheld at the door: one patient's attributions would be her
    expression.
    """
    if wire.NETWORK_GENES in session.arrays:
        return _network(session)
    cohort = session.training_cohort()
    model, cancers, analysis = scored_model(session), len(session.cancers), session.study.analysis
    total: Sum = {}
    cells: dict[str, np.ndarray] = {}
    if session.study.task.kind == "survival":
        batch = session.batch(cohort)
        with torch.no_grad():
            risk = batch.through(model).risk.double().cpu().numpy()
        total |= calibration_sums(risk, cohort, session.lens.grid, cancers, session.policy.min_cell)
        cells |= dict.fromkeys(total, np.bincount(cohort.cancer, minlength=cancers))
    if not (analysis.attributions or analysis.attention or analysis.network_genes):
        return Answer({}, total, len(cohort), cells, numbers=5)
    some = _some(session, cohort)
    batch = session.batch(some)
    if analysis.attributions:
        total |= attribution_sums(model, batch, cancers, analysis.steps)
    if analysis.attention:
        assert isinstance(model, TGEM)
        total |= entropy_sums(model, batch, cancers)
    if analysis.network_genes:
        assert isinstance(model, TGEM)
        total |= strength_sums(model, batch, cancers, analysis.steps)
    by_cancer = np.bincount(some.cancer, minlength=cancers)
    cells |= {name: by_cancer for name in total if name not in cells and not name.startswith("gate/")}
    return Answer({}, total, len(cohort), cells, numbers=5)


def _some(session: Session, cohort: Cohort) -> Cohort:
    """The patients with expression who are attributed: a draw of the fold's own, the same for every question."""
    most = session.study.analysis.patients  # in the seed: draws of 50 and of 51 must not differ by one patient
    rng = np.random.default_rng(seed_from(session.study.seed, "explain", most, session.fold, session.site.name))
    known = np.flatnonzero(cohort.has(RNA))
    return cohort.select(np.sort(rng.permutation(known)[:most]))


def _network(session: Session) -> Answer:
    """Attention between the genes that the server names for each class."""
    genes, analysis, panel = session.arrays[wire.NETWORK_GENES], session.study.analysis, len(session.panel)
    k = min(analysis.network_genes, panel)
    if genes.shape != (len(session.cancers), k) or not ((genes >= 0) & (genes < panel)).all():
        raise Refusal(
            f"site {session.site.name}: {wire.NETWORK_GENES} of shape {genes.shape} are no {k} genes of a panel of {panel} for each of "
            f"{len(session.cancers)} classes"
        )
    some, model = _some(session, session.training_cohort()), scored_model(session)
    assert isinstance(model, TGEM)
    rng = np.random.default_rng(seed_from(session.study.seed, "permuted labels", session.fold, session.site.name))
    total = network_sums(model, session.batch(some), genes, analysis.steps, analysis.network_draws, rng)
    cells = {}
    for name in total:
        draw = name.rpartition("-")[2]
        cells[name] = total[f"network/null-patients-{draw}" if draw.isdigit() else "network/patients"].astype(np.int64)
    for name in ("network/covered", "network/total"):
        cells[name] = np.minimum(cells[name], WHOLE)
    # the draws are so many sums over the same patients, who are known to be so many that they cannot be solved for
    return Answer({}, total, len(some), cells, numbers=1 + analysis.network_draws)


def calibration_sums(risk: np.ndarray, cohort: Cohort, grid: TimeGrid, cancers: int, least: int = 1) -> Sum:
    """How risks lie and what they leave to the baselines, by cancer type.

    `risk_counts [C, len(RISK_EDGES) + 1]`; `events [C, K]`; `weighted_exposure [C, K]`, months under observation times
    hazard ratio. events / weighted_exposure is the baseline hazard of highest likelihood, whatever the risks came from.
    With a smallest cell, bins of risk and intervals of time are taken together until `least` patients share them, and the
    patients of such a run have its mean hazard ratio. Raises `Refusal` where a few outweigh the rest of a run.
    """
    member = np.eye(cancers)[cohort.cancer].T
    bin_, at = np.searchsorted(RISK_EDGES, risk), grid.interval(cohort.time)
    weight, exposure = np.exp(risk), grid.exposure(cohort.time)
    if least > 1:
        names = np.asarray(cohort.patient)
        bin_ = spread_cells(bin_, np.zeros(len(risk)), cohort.cancer, names, least).cell
        # three times as many share a run of intervals, as hazard ratios differ and half of `least` must be worth it
        runs = spread_cells(at, cohort.event, cohort.cancer, names, 3 * least)
        size, whole = np.bincount(runs.run), np.bincount(runs.run, weight)
        if (runs.worth(weight) < np.minimum(least, size) / 2).any():
            raise Refusal(
                f"hazard ratios under which fewer than {least / 2:g} patients outweigh the others of a run of intervals"
            )
        weight, at = (whole / size)[runs.run], runs.cell
        starts = np.asarray(grid.starts)
        middle = np.append((starts[1:] + starts[:-1]) / 2, cohort.time.max(initial=starts[-1]))
        # of the last interval, which has no end, the run's mean follow-up beyond its start
        beyond = np.clip(cohort.time - starts[-1], 0.0, None)
        last = starts[-1] + np.bincount(runs.run, beyond) / size
        exposure = grid.exposure(np.where(at == len(grid) - 1, last[runs.run], middle[at]))
    return {
        "risk_counts": member @ np.eye(len(RISK_EDGES) + 1)[bin_],
        "events": member @ (np.eye(len(grid))[at] * cohort.event[:, None]),
        "weighted_exposure": member @ (weight[:, None] * exposure),
    }
