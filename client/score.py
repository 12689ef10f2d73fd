"""A trained model at a site: held-out sums, what each expert is worth, and the site's own file of predictions."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from oncofed.client.ablation import ablation_sums
from oncofed.client.data.cohort import Cohort
from oncofed.client.disclosure import shown
from oncofed.client.objectives import measured_objective
from oncofed.client.release import Answer
from oncofed.client.session import Session
from oncofed.common.ablation import ORDER, SHARES, genes_of
from oncofed.common.blocks import Sum
from oncofed.common.errors import Refusal
from oncofed.common.files import replacing
from oncofed.common.models.autoencoder import GeneAutoencoder
from oncofed.common.models.build import Predictor, set_weights
from oncofed.common.survival import baseline_on_grid, survival_curve
from scipy.special import softmax

CURVE_MONTHS = (12.0, 36.0, 60.0)
"""Months at which a site's own file states the probability of survival."""


def evaluate(session: Session) -> Answer:
    """Sums over held-out (or validation) patients by cancer type; with `final` also routing and experts taken out."""
    if session.ask.get("own"):  # for the hospital alone: nothing leaves
        write_predictions(session, scored_model(session))
        return Answer({})
    if session.study.privacy.on:
        raise Refusal(
            f"site {session.site.name}: the study promises privacy.unit = '{session.study.privacy.unit}', so no score of patients leaves without "
            "noise (evaluation.epsilon)"
        )
    if session.study.evaluation.epsilon and not session.ask.get("validation"):
        raise Refusal(
            f"site {session.site.name}: the study evaluates with noise (evaluation.epsilon), so no score of held-out patients leaves without"
        )
    if session.ask.get("final"):
        write_predictions(session, scored_model(session))  # the hospital's own, whatever it lets show
    cohort = counted(session)
    if ORDER in session.arrays and not session.ask.get("validation"):
        return _ablate(session, cohort)
    model, objective = scored_model(session), measured_objective(session.study)
    batch, cancers = session.batch(cohort), len(session.cancers)
    with torch.no_grad():
        output = batch.through(model)
        losses = objective.losses(output, batch)
        total = objective.sums(output, losses, batch, cancers)
        if session.ask.get("final"):
            for group, share_BE in output.shares.items():
                total |= _routing(group, share_BE.double().cpu().numpy(), cohort.cancer, cancers)
            for group, experts in model.removable().items() if session.study.analysis.experts else ():
                rows = []
                for e in range(experts):
                    without = batch.through(model, off=(group, e))
                    rows.append(objective.sums(without, objective.losses(without, batch), batch, cancers))
                for key in ("loss", objective.hits):
                    total[f"without/{group}/{key}"] = np.stack([_diagonal(row[key]) for row in rows])
    return Answer({}, total, len(cohort), groups=groups_of(cohort))


def counted(session: Session) -> Cohort:
    """The scored patients whom the site's policy lets show: of a cancer type with few of them none is counted."""
    cohort, least = session.scored_cohort(), session.policy.min_cell
    kind = "validation" if session.ask.get("validation") else "held-out"
    if not len(cohort):
        raise Refusal(f"site {session.site.name}: no {kind} patient in fold {session.fold}")
    keep = shown([cohort.cancer], cohort.patient, least)
    if not keep.any():
        raise Refusal(
            f"site {session.site.name}: fewer than {least} {kind} patients of every cancer type in fold {session.fold}, its policy "
            "lets no smaller group show (min_cell)"
        )
    return cohort if keep.all() else cohort.select(keep)


def groups_of(cohort: Cohort) -> tuple[frozenset[str], ...]:
    """The patients of each cancer type, and all of them, for the site's memory of what it has shown."""
    by_cancer = [frozenset(cohort.patient[cohort.cancer == c].tolist()) for c in np.unique(cohort.cancer)]
    return (frozenset(cohort.patient.tolist()), *by_cancer)


def _ablate(session: Session, cohort: Cohort) -> Answer:
    """Held-out patients without the genes that the server ranks first for their class."""
    order, panel = session.arrays[ORDER], len(session.panel)
    wanted = (len(session.cancers), genes_of(SHARES[-1], panel))
    if order.shape != wanted or not ((order >= -1) & (order < panel)).all():
        raise Refusal(
            f"site {session.site.name}: {ORDER} of shape {order.shape} are no {wanted} genes of a panel of {panel}"
        )
    total = ablation_sums(scored_model(session), session.batch(cohort), order, panel, session.study.seed)
    return Answer({}, total, int(total["ablation/patients"].sum()), groups=groups_of(cohort))


def scored_model(session: Session) -> Predictor:
    """The model with the message's weights, ready to score."""
    model = session.model
    assert not isinstance(model, GeneAutoencoder)
    set_weights(model, session.weights)
    return model.eval()


def _routing(group: str, share_NE: np.ndarray, cancer: np.ndarray, cancers: int) -> Sum:
    """Gate mass and, of each patient's first expert, counts, both `[C, E]`."""
    member = np.eye(cancers)[cancer].T
    first = np.eye(share_NE.shape[1])[share_NE.argmax(1)] * (share_NE.sum(1) > 0)[:, None]  # some have no expression
    return {f"routing/{group}": member @ share_NE, f"first/{group}": member @ first}


def _diagonal(value: np.ndarray) -> np.ndarray:
    return np.diag(value) if value.ndim == 2 else value


@torch.no_grad()
def write_predictions(session: Session, model: Predictor) -> None:
    """Scores of the site's own patients, in a file that stays at the site."""
    c = session.cohort
    batch = session.batch(c)
    output = batch.through(model)
    score = output.score.double().cpu().numpy()
    columns = {"patient": c.patient, "cancer_type": np.array(session.cancers)[c.cancer]}
    if session.study.task.kind == "classification":
        columns |= {"split": session.split} | class_columns(score, session.cancers)
    else:
        columns |= {"time_months": c.time, "event": c.event, "split": session.split, "risk": score}
        if session.study.task.loss != "cox":  # which leaves the baselines where they were
            own = model.head.log_baseline.detach().cpu().numpy()  # type: ignore[operator]
            baseline = baseline_on_grid(session.study.task.loss, own, session.lens.grid)
            curve = np.empty((len(c), len(CURVE_MONTHS)))
            for k in np.unique(c.cancer):
                rows = c.cancer == k
                curve[rows] = survival_curve(baseline[k], session.lens.grid, score[rows], np.array(CURVE_MONTHS))
            columns |= {f"survival_{m:.0f}_months": curve[:, i] for i, m in enumerate(CURVE_MONTHS)}
        columns |= {f"risk_{m}": v.double().cpu().numpy() for m, v in output.branches.items()}
    file = session.work / "predictions" / session.study.name / f"fold-{session.fold}.csv"
    write_columns(file, columns)


def class_columns(score_NC: np.ndarray, cancers: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Of class logits: the type with the highest, and each type's probability."""
    probability = softmax(score_NC, axis=1)
    return {"predicted": np.array(cancers)[score_NC.argmax(1)]} | {
        f"p_{name}": probability[:, i] for i, name in enumerate(cancers)
    }


def write_columns(file: Path, columns: Mapping[str, np.ndarray]) -> None:
    """A CSV file, written whole or not at all; floats with all their digits."""
    lists = [[repr(v) if isinstance(v, float) else v for v in np.asarray(value).tolist()] for value in columns.values()]
    with replacing(file) as temporary, temporary.open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(columns)
        writer.writerows(zip(*lists, strict=True))
