"""What a trained model looks at and how its scores lie, as sums over a site's training patients.

Shapes: N patients, C cancer types or classes, K intervals.
"""

from __future__ import annotations

import numpy as np
import torch
from oncofed.client.attention_network import WHOLE, entropy_sums, network_sums, strength_sums
from oncofed.client.attributions import attribution_sums
from oncofed.client.data.cohort import Cohort
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
        total |= calibration_sums(risk, cohort, session.lens.grid, cancers)
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


def calibration_sums(risk: np.ndarray, cohort: Cohort, grid: TimeGrid, cancers: int) -> Sum:
    """How risks lie and what they leave to the baselines, by cancer type.

    `risk_counts [C, len(RISK_EDGES) + 1]`; `events [C, K]`; `weighted_exposure [C, K]`, months under observation times
    hazard ratio. events / weighted_exposure is the baseline hazard of highest likelihood, whatever the risks came from.
    """
    member = np.eye(cancers)[cohort.cancer].T
    bins = np.eye(len(RISK_EDGES) + 1)[np.searchsorted(RISK_EDGES, risk)]
    at = np.eye(len(grid))[grid.interval(cohort.time)] * cohort.event[:, None]
    return {
        "risk_counts": member @ bins,
        "events": member @ at,
        "weighted_exposure": member @ (np.exp(risk)[:, None] * grid.exposure(cohort.time)),
    }
