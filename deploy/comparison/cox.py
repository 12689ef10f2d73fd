"""The classical model that hospitals could fit together: Cox regression on the study's clinical covariates, by cancer type.

The sums are those of `oncofed analyse cox` (common/classical), of each site's training patients, with exact times.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
from oncofed.common.blocks import Sum
from oncofed.common.classical.cox import fit_cox
from oncofed.common.classical.risk_sets import exact_cells, leaving_sums
from oncofed.common.covariates import input_names
from oncofed.common.study import Study
from oncofed.deploy.comparison.reference import Pool, frame_of, prediction_table

RIDGE = 1e-3
"""On standardised covariates and a patient's likelihood: next to none, but a level that a fold lacks stays at 0."""


def predict_cox(pool: Pool, study: Study, fold: int, advance: Callable[[], None]) -> pd.DataFrame:
    """Risks after a fit on the fold's training patients, site by site; an unknown covariate is taken as the mean."""
    cohort, split = pool.all, pool.split(study, fold)
    lens = frame_of(study.changed(panel__powers=False), cohort.select(split != "test"), len(pool.cancers), pool.beside)
    x = lens.covariate_inputs(cohort.v_NV).astype(np.float64)
    train = split != "test"
    times = np.unique(cohort.time[train & (cohort.event == 1)])
    cell = exact_cells(cohort.time, cohort.event * train, times)
    sites = [train & (pool.site == name) for name in pool.cohorts]

    def ask(beta: np.ndarray) -> Sum:
        parts = [
            leaving_sums(
                x[rows],
                cell[rows],
                cohort.event[rows],
                cohort.cancer[rows],
                beta,
                len(pool.cancers),
                len(times),
                "efron",
            )
            for rows in sites
        ]
        return {name: sum(p[name] for p in parts) for name in parts[0]}  # type: ignore[misc]

    names = input_names(study.panel.covariates)
    fit = fit_cox(ask, names, penalty_P=np.full(len(names), RIDGE))
    advance()
    return prediction_table(pool, study, fold, cohort, x @ fit.beta_P, pool.site)
