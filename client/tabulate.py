"""Held-out patients as one table of risk and time, and pairs within the site: all that a pooled evaluation needs."""

from __future__ import annotations

import numpy as np
import torch
from oncofed.client.release import Answer
from oncofed.client.score import counted, groups_of, scored_model, write_predictions
from oncofed.client.session import Session
from oncofed.common.errors import Refusal
from oncofed.common.evaluation.table import risk_time_table
from oncofed.common.metrics import pair_table
from oncofed.common.splits import seed_from

MOST_BINS = 256
FARTHEST = 1e6
"""Risks that are not finite count as this far out."""


def tabulate(session: Session) -> Answer:
    """`table [C, 2, R, T]` on the edges of the message and `pairs [2, C]` within the site (common/metrics.py, `pair_table`).

    Cells of the table hold single patients: it leaves with noise, or where the site's policy has no smallest cell. With
    noise half of epsilon goes to each; the number of the site's patients of a cancer type is taken as known, or under privacy of
    patients that of all its patients, rounded.
    """
    epsilon, least = session.study.evaluation.epsilon, session.policy.min_cell
    if session.study.privacy.on and not epsilon:
        raise Refusal(
            f"site {session.site.name}: the study promises privacy.unit = '{session.study.privacy.unit}', so its table of risk and time needs "
            "noise (evaluation.epsilon)"
        )
    if least > 1 and not epsilon:
        raise Refusal(
            f"site {session.site.name}: a table of risk and time has cells of single patients, its policy wants {least} (min_cell); "
            "set evaluation.epsilon, and noise will cover them"
        )
    cohort = session.scored_cohort() if epsilon else counted(session)
    cancers, edges = len(session.cancers), session.arrays["evaluation/risk_edges"]
    times = session.arrays["evaluation/time_edges"]
    if edges.ndim != 2 or len(edges) != cancers or edges.shape[1] >= MOST_BINS or not 0 < times.size < MOST_BINS:
        raise Refusal(
            f"site {session.site.name}: edges of risk {edges.shape} and time {times.shape} are none for {cancers} cancer types"
        )
    model = scored_model(session)
    if epsilon:  # else the hospital's own file is that of the final evaluation, which was asked before
        write_predictions(session, model)
    public = session.study.privacy.of_patients
    bound = session.held.patients if public else 0
    if public and len(cohort) > bound:  # what one patient can change of the pairs must not rest on who is here
        cohort = cohort.select(np.sort(np.argsort([seed_from("table", p) for p in cohort.patient])[:bound]))
    with torch.no_grad():
        risk = session.batch(cohort).through(model).risk.double().cpu().numpy() if len(cohort) else np.zeros(0)
    # an answer that fails would tell of whom the weights of the message make it fail
    risk = np.nan_to_num(risk, nan=0.0, posinf=FARTHEST, neginf=-FARTHEST)
    of = risk, np.asarray(cohort.time), np.asarray(cohort.event), np.asarray(cohort.cancer)
    table = risk_time_table(*of, edges, times)
    total = {"table": table, "pairs": pair_table(*of, cancers)}
    most = bound if public else max(1, int(np.bincount(cohort.cancer, minlength=cancers).max()))
    counts = {"table": 1, "pairs": 2 * most}
    return Answer(
        {"step": f"fold {session.fold}"}, total, len(cohort), groups=groups_of(cohort), counts=counts, epsilon=epsilon
    )
