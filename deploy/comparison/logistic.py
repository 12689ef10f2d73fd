"""The strong simple baseline of classification: multinomial logistic regression with an L2 penalty on pooled data.

Only a researcher who holds every site's folder can run it; it meets the federation's own folds, on the federation's scale.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
from oncofed.common.modalities import RNA
from oncofed.common.splits import seed_from
from oncofed.common.study import Study
from oncofed.deploy.comparison.reference import INNER, Pool, frame_of, inner_folds, prediction_table
from sklearn.linear_model import LogisticRegression

STRENGTHS = tuple(float(c) for c in np.geomspace(0.001, 100_000.0, 9))
"""Candidate C, times the number of inputs: so they mean the same for 100 genes and for 50,000."""


def predict_logistic(pool: Pool, study: Study, fold: int, advance: Callable[[], None]) -> pd.DataFrame:
    """Class scores after a fit on the fold's training patients; C is the one with the least log-loss in inner folds among them."""
    cohort, cancers = pool.all, len(pool.cancers)
    rows = pool.split(study, fold) != "test"
    lens = frame_of(study, cohort.select(rows), cancers)
    x = np.hstack([lens.inputs(cohort, RNA), lens.covariate_inputs(cohort.v_NV)]).astype(np.float64)
    z = in_span(x, x[rows])
    inner = inner_folds(cohort, rows, INNER, seed_from(study.seed, "logistic"))
    loss = np.zeros(len(STRENGTHS))
    for k in range(INNER):
        fit, check = rows & (inner != k), np.flatnonzero(inner == k)
        for i, c in enumerate(STRENGTHS):
            log_p = class_scores(z[fit], cohort.cancer[fit], z[check], cancers, c / x.shape[1])
            loss[i] -= log_p[np.arange(len(check)), cohort.cancer[check]].sum()
        advance()
    best = STRENGTHS[int(loss.argmin())] / x.shape[1]
    score = class_scores(z[rows], cohort.cancer[rows], z, cancers, best)
    return prediction_table(pool, study, fold, cohort, score, pool.site).assign(strength=best)


def in_span(x_NG: np.ndarray, basis_MG: np.ndarray) -> np.ndarray:
    """Patients in coordinates of the training patients' span, at most M numbers each.

    An L2-penalised fit to training patients has its coefficients in their span, and a rotation leaves the penalty as it
    is: the solution is the same, and tens of thousands of genes become some hundred numbers.
    """
    if basis_MG.shape[1] <= len(basis_MG):
        return x_NG
    squares, turn = np.linalg.eigh(
        basis_MG @ basis_MG.T
    )  # of M x M numbers: a decomposition of M x G takes ten times as long
    known = squares > 1e-9 * squares[-1]
    return np.asarray(x_NG @ (basis_MG.T @ (turn[:, known] / np.sqrt(squares[known]))))


def class_scores(x: np.ndarray, cancer: np.ndarray, wanted: np.ndarray, cancers: int, strength: float) -> np.ndarray:
    """Log probabilities `[N, C]` for `wanted` after a fit with C = `strength`; types that `cancer` lacks get next to none."""
    model = LogisticRegression(C=strength, max_iter=5000, tol=1e-5).fit(x, cancer)
    out = np.full((len(wanted), cancers), np.log(1e-12))
    out[:, model.classes_] = np.maximum(model.predict_log_proba(wanted), np.log(1e-12))
    return out
