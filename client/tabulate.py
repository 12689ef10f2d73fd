"""Held-out patients as one table of risk and time, and pairs within the site: all that a pooled evaluation needs."""

from __future__ import annotations

import numpy as np
import torch
from oncofed.client.release import Answer
from oncofed.client.score import counted, groups_of, scored_model
from oncofed.client.session import Session
from oncofed.common.errors import Refusal
from oncofed.common.evaluation.table import risk_time_table
from oncofed.common.metrics import pair_table


def tabulate(session: Session) -> Answer:
    """`table [C, 2, R, T]` on the edges of the message and `pairs [3, C]` within the site: concordant, discordant, tied in risk.

    Cells of the table hold single patients: it leaves with noise, or where the site's policy has no smallest cell. With
    noise half of epsilon goes to each, and a patient changes as many pairs as her cancer type has patients at the site,
    whose number is taken as known.
    """
    epsilon, least = session.study.evaluation.epsilon, session.policy.min_cell
    if least > 1 and not epsilon:
        raise Refusal(
            f"site {session.site.name}: a table of risk and time has cells of single patients, its policy wants {least} (min_cell); "
            "set evaluation.epsilon, and noise will cover them"
        )
    cohort = session.scored_cohort() if epsilon else counted(session)
    cancers, edges = len(session.cancers), session.arrays["evaluation/risk_edges"]
    if edges.shape != (cancers, session.study.evaluation.risk_bins - 1):
        raise Refusal(f"site {session.site.name}: risk edges of shape {edges.shape} are not those of the study")
    model = scored_model(session)
    with torch.no_grad():
        risk = session.batch(cohort).through(model).risk.double().cpu().numpy() if len(cohort) else np.zeros(0)
    of = risk, np.asarray(cohort.time), np.asarray(cohort.event), np.asarray(cohort.cancer)
    table = risk_time_table(*of, edges, session.arrays["evaluation/time_edges"])
    total = {"table": table, "pairs": pair_table(*of, cancers)}
    most = max(1, int(np.bincount(cohort.cancer, minlength=cancers).max()))
    counts = {"table": 1, "pairs": most}
    return Answer({"step": f"fold {session.fold}"}, total, len(cohort), {}, 1, groups_of(cohort), counts, epsilon)
