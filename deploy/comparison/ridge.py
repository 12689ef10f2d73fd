"""The strong simple baseline: ridge Cox on pooled data, stratified by cancer type, with or without a part of each cancer's own.

Of several modalities all tables stand side by side, a patient's absent ones at the mean.

Only a researcher who holds every site's folder can run it; it meets the federation's own folds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from oncofed.client.data.cohort import Cohort
from oncofed.common.metrics import mean_within_cancer, pair_counts
from oncofed.common.splits import seed_from
from oncofed.common.study import Study
from oncofed.common.survival import cox_loss
from oncofed.deploy.comparison.reference import INNER, Pool, frame_of, inner_folds, prediction_table

PENALTIES = tuple(float(p) for p in np.geomspace(0.3, 100.0, 8))
COVARIATE_PENALTY = 0.02
"""Of the few covariates, which need next to none."""


@dataclass(frozen=True)
class Inputs:
    """Standardised genes (and what else the study sees) `[N, G]` and covariates `[N, V]` of a cohort; `own`: coefficients of each cancer's own beside shared ones."""

    x: np.ndarray
    v: np.ndarray
    cohort: Cohort
    own: bool = False

    def select(self, rows: np.ndarray) -> Inputs:
        return Inputs(self.x[rows], self.v[rows], self.cohort.select(rows), self.own)


def predict_ridge(
    pool: Pool, study: Study, fold: int, advance: Callable[[], None], *, own: bool = False, powers: bool = False
) -> pd.DataFrame:
    """Risks after a fit on the fold's training patients; the penalty is chosen by inner folds among them.

    `own` adds each cancer's own coefficients. `powers` gives the genes the federation's scale (common/scaling.py) instead of
    a plain standardisation.
    """
    cohort, cancers = pool.all, len(pool.cancers)
    rows = pool.split(study, fold) != "test"
    scaled = study if powers else study.changed(panel__scale_by="all", panel__powers=False)
    lens = frame_of(scaled, cohort.select(rows), cancers, pool.beside)
    x = np.hstack([lens.inputs(cohort, m) for m in lens.scales]).astype(np.float64)
    everyone = Inputs(x, lens.covariate_inputs(cohort.v_NV), cohort, own)
    inner = inner_folds(cohort, rows, INNER, seed_from(study.seed, "ridge"))
    score = np.zeros(len(PENALTIES))
    for k in range(INNER):
        check = np.flatnonzero(inner == k)
        scored = cohort.select(check)
        for i, predict in enumerate(
            ridge_path(everyone.select(rows & (inner != k)), cancers, PENALTIES, iterations=100)
        ):
            score[i] += within_cancer(predict(everyone.select(check)), scored, cancers)
        advance()
    best = PENALTIES[int(score.argmax())]
    predict = next(ridge_path(everyone.select(rows), cancers, (best,)))
    return prediction_table(pool, study, fold, cohort, predict(everyone), pool.site).assign(penalty=best)


def ridge_path(
    data: Inputs, cancers: int, penalties: tuple[float, ...], *, iterations: int = 500
) -> Iterator[Callable[[Inputs], np.ndarray]]:
    """Minimisers of the stratified partial likelihood (mean over events, Efron) + penalty/2 * |coefficients|^2.

    The problem is convex: L-BFGS in float64 on torchsurv's likelihood reaches the optimum (a test holds it against
    lifelines). Yields a predictor of log hazards for each penalty; each fit starts from the one before. Choosing
    a penalty takes fewer `iterations` than reporting a fit.
    """
    genes, covariates = data.x.shape[1], data.v.shape[1]

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.float64, requires_grad=True)

    shared, gamma = zeros(genes), zeros(covariates)
    beta, delta = (zeros(cancers, genes), zeros(cancers, covariates)) if data.own else (None, None)
    parameters = [p for p in (shared, gamma, beta, delta) if p is not None]

    def risk(x: torch.Tensor, v: torch.Tensor, cancer: torch.Tensor) -> torch.Tensor:
        out = x @ shared + v @ gamma
        if beta is None or delta is None:
            return out
        own = torch.zeros_like(out)
        for c in range(cancers):
            rows = torch.nonzero(cancer == c).squeeze(1)
            own = own.index_add(0, rows, x[rows] @ beta[c] + v[rows] @ delta[c])
        return out + own

    x, v, cancer = (torch.from_numpy(np.array(a)) for a in (data.x, data.v, data.cohort.cancer))
    event, time = torch.from_numpy(data.cohort.event.astype(bool)), torch.from_numpy(np.array(data.cohort.time))
    for penalty in penalties:
        optimizer = torch.optim.LBFGS(
            parameters, max_iter=iterations, tolerance_grad=1e-7, tolerance_change=1e-12, line_search_fn="strong_wolfe"
        )

        def objective(penalty: float = penalty) -> torch.Tensor:
            optimizer.zero_grad()  # noqa: B023 - called before the loop goes on
            loss = cox_loss(risk(x, v, cancer), time, event, cancer)
            for p in parameters:
                weight = COVARIATE_PENALTY if p is gamma or p is delta else penalty
                loss = loss + 0.5 * weight * p.square().sum()
            loss.backward()
            return loss

        optimizer.step(objective)

        def predict(inputs: Inputs) -> np.ndarray:
            with torch.no_grad():
                a, b, c = (torch.from_numpy(np.array(t)) for t in (inputs.x, inputs.v, inputs.cohort.cancer))
                return risk(a, b, c).numpy()

        yield predict


def within_cancer(risk: np.ndarray, cohort: Cohort, cancers: int) -> float:
    """Mean over cancer types of the C-index within each."""
    counts = [
        pair_counts(risk[cohort.cancer == c], cohort.time[cohort.cancer == c], cohort.event[cohort.cancer == c])
        for c in range(cancers)
    ]
    return mean_within_cancer(*np.array(counts).T)
