"""What the federation is compared with: the same model on pooled data, at each site alone, and a ridge Cox on pooled data.

Only a researcher who holds every site's folder can run these; all of them use the federation's own folds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from oncofed.client.data.cohort import Cohort, cohort_key, open_cohort
from oncofed.client.data.site import SiteFolder, list_sites
from oncofed.client.device import choose_device
from oncofed.client.train import Batch, train_locally
from oncofed.common.metrics import mean_within_cancer, pair_counts
from oncofed.common.models.build import build_model, set_weights
from oncofed.common.panel import GenePanel
from oncofed.common.splits import deal_folds, seed_from
from oncofed.common.study import Study
from oncofed.common.survival import TimeGrid, coarsen, cox_loss, event_table, initial_log_baseline
from oncofed.server.aggregate import mean_by_block
from oncofed.server.fold import scaling_from
from oncofed.server.strategy import EvidenceStrategy

RIDGE_PENALTIES = tuple(float(p) for p in np.geomspace(0.3, 100.0, 8))

Advance = Callable[[], None]


@dataclass(frozen=True)
class Pool:
    """All sites' cohorts side by side, with the federation's panel and cancer types."""

    cohorts: dict[str, Cohort]
    panel: GenePanel
    cancers: tuple[str, ...]

    @classmethod
    def open(cls, sites: Path, study: Study, panel: GenePanel, cancers: tuple[str, ...], members: set[str]) -> Pool:
        """The cohorts of `members`, the sites that scored their held-out patients in the federation."""
        cohorts = {}
        for folder in list_sites(sites):
            site = SiteFolder.open(folder)
            if site.name not in members:
                continue
            key = cohort_key(site, panel, cancers, study.splits.folds, study.seed)
            cohorts[site.name] = open_cohort(key, site, folder / ".oncofed", panel, cancers)
        return cls(cohorts, panel, cancers)

    @property
    def all(self) -> Cohort:
        return Cohort.concatenate(list(self.cohorts.values()))

    @property
    def site(self) -> np.ndarray:
        return np.repeat(list(self.cohorts), [len(c) for c in self.cohorts.values()])


def predict_pooled(pool: Pool, study: Study, fold: int, advance: Advance) -> pd.DataFrame:
    """The study's model on all patients in one place: each step sees as many patients as a step of all sites together."""
    sites = len(pool.cohorts)
    t = study.training
    pooled = study.changed(training__batch_size=t.batch_size * sites) if t.batch_size else study
    cohort = pool.all
    risk = _train(pool, pooled, cohort, cohort.fold != fold, fold, "pooled", advance)
    return _table(pool, fold, cohort, risk, pool.site)


def predict_local(pool: Pool, study: Study, fold: int, advance: Advance) -> pd.DataFrame:
    """The study's model at each site alone. Risks are put on the scale of the site's training patients, so that
    patients of different sites can be ranked together at all."""
    parts = []
    for name, cohort in pool.cohorts.items():
        rows = cohort.fold != fold
        risk = _train(pool, study, cohort, rows, fold, name, lambda: None)
        sd = risk[rows].std()
        risk = (risk - risk[rows].mean()) / (sd if sd > 0 else 1.0)
        parts.append(_table(pool, fold, cohort, risk, np.repeat(name, len(cohort))))
        advance()
    return pd.concat(parts, ignore_index=True)


def predict_ridge(pool: Pool, study: Study, fold: int, advance: Advance) -> pd.DataFrame:
    """Ridge Cox on pooled data, stratified by cancer type; the penalty is chosen by 4 inner folds of the training patients."""
    cohort = pool.all
    rows = cohort.fold != fold
    x = _standardise(cohort, rows)
    inner = np.full(len(cohort), -1)
    train = cohort.select(rows)
    inner[rows] = deal_folds(
        train.patient, train.cancer, train.event, folds=4, seed=seed_from(study.seed, "ridge"), site="pooled"
    )
    score = np.zeros(len(RIDGE_PENALTIES))
    for k in range(4):
        fit, check = rows & (inner != k), rows & (inner == k)
        for i, beta in enumerate(ridge_path(x[fit], cohort.select(fit), RIDGE_PENALTIES)):
            score[i] += _within_cancer(x[check] @ beta, cohort.select(check), len(pool.cancers))
        advance()
    best = RIDGE_PENALTIES[int(score.argmax())]
    beta = next(ridge_path(x[rows], cohort.select(rows), (best,)))
    return _table(pool, fold, cohort, x @ beta, pool.site).assign(penalty=best)


def ridge_path(x: np.ndarray, cohort: Cohort, penalties: tuple[float, ...]):  # type: ignore[no-untyped-def]
    """Coefficients minimising the stratified partial likelihood (mean over events, Efron) + penalty/2 * |beta|^2.

    The problem is convex: L-BFGS in float64 on torchsurv's likelihood reaches the optimum (a test holds it against
    lifelines). Yields one `[G]` array a penalty; each starts from the one before.
    """
    x_t, event = torch.from_numpy(x), torch.from_numpy(cohort.event.astype(bool))
    time_t, strata = (
        torch.from_numpy(np.array(cohort.time, dtype=np.float64)),
        torch.from_numpy(np.array(cohort.cancer)),
    )
    beta = torch.zeros(x.shape[1], dtype=torch.float64, requires_grad=True)
    for penalty in penalties:
        optimizer = torch.optim.LBFGS(
            [beta], max_iter=500, tolerance_grad=1e-7, tolerance_change=1e-12, line_search_fn="strong_wolfe"
        )

        def objective() -> torch.Tensor:
            optimizer.zero_grad()  # noqa: B023 - called before the loop goes on
            loss = cox_loss(x_t @ beta, time_t, event, strata)
            loss = loss + 0.5 * penalty * beta.square().sum()  # noqa: B023
            loss.backward()
            return loss

        optimizer.step(objective)
        yield beta.detach().numpy().copy()


def _train(
    pool: Pool, study: Study, cohort: Cohort, rows: np.ndarray, fold: int, name: str, advance: Advance
) -> np.ndarray:
    """Risks `[N]` of a whole cohort after training on its `rows`: a federation of one site, without the messages."""
    train = cohort.select(rows)
    device = choose_device(study.runtime.device)
    events, exposure = event_table(train.time, train.event, train.cancer, len(pool.cancers))
    grid = TimeGrid.from_events(events.sum(0), study.task.intervals)
    scaling = scaling_from(train.gene_sums())
    model = build_model(study, genes=len(pool.panel), cancers=pool.cancers, intervals=len(grid), fold=fold).to(device)
    with torch.no_grad():
        model.log_baseline.copy_(torch.from_numpy(initial_log_baseline(coarsen(events, grid), coarsen(exposure, grid))))
    weights = {n: p.detach().cpu().numpy().copy() for n, p in model.named_parameters()}
    strategy = EvidenceStrategy(study.aggregation, model.blocks(), weights, model.mixtures())
    batch = Batch.of(train, scaling["mean"], scaling["sd"], grid, device)
    for round_ in range(1, study.training.rounds + 1):
        seed = seed_from(study.seed, "train", fold, round_, name)
        total, _ = train_locally(model, strategy.weights, batch, study, round_=round_, seed=seed, load=strategy.load)
        strategy.step(*mean_by_block(total, strategy.blocks, study.aggregation.tau))
        advance()
    set_weights(model, strategy.weights)
    model.eval()
    with torch.no_grad():
        whole = Batch.of(cohort, scaling["mean"], scaling["sd"], grid, device)
        return model(whole.x_BG, whole.cancer_B).risk.double().cpu().numpy()


def _standardise(cohort: Cohort, rows: np.ndarray) -> np.ndarray:
    x = np.asarray(cohort.x_NG, dtype=np.float64)
    mean, sd = np.nanmean(x[rows], axis=0), np.nanstd(x[rows], axis=0)
    return np.nan_to_num((x - mean) / np.where(sd < 1e-3, 1.0, sd))


def _within_cancer(risk: np.ndarray, cohort: Cohort, cancers: int) -> float:
    counts = [
        pair_counts(risk[cohort.cancer == c], cohort.time[cohort.cancer == c], cohort.event[cohort.cancer == c])
        for c in range(cancers)
    ]
    return mean_within_cancer(*np.array(counts).T)


def _table(pool: Pool, fold: int, cohort: Cohort, risk: np.ndarray, site: np.ndarray) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "patient": cohort.patient,
            "site": site,
            "cancer_type": np.array(pool.cancers)[cohort.cancer],
            "time_months": cohort.time,
            "event": cohort.event,
            "fold": fold,
            "split": np.where(cohort.fold == fold, "test", "train"),
            "risk": risk,
        }
    )
