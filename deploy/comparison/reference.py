"""What the federation is compared with: the same model on pooled data, and at each site alone (ridge.py: classical models).

Only a researcher who holds every site's folder can run these; all of them use the federation's own folds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from oncofed.client.batch import Batch, Lens
from oncofed.client.data.cohort import Cohort, cohort_key, open_cohort, with_modalities
from oncofed.client.data.site import SiteFolder, list_sites
from oncofed.client.device import choose_device
from oncofed.client.folds import in_site_folds, split_names
from oncofed.client.objectives import measured_objective
from oncofed.client.scale import lens_of
from oncofed.client.score import class_columns
from oncofed.client.train import train_locally
from oncofed.common.blocks import Sum
from oncofed.common.modalities import NO_BESIDE, RNA, Beside
from oncofed.common.models.autoencoder import GeneAutoencoder
from oncofed.common.models.build import Model, Sizes, begin_from, build_model, set_weights, transfer
from oncofed.common.panel import GenePanel
from oncofed.common.saved import SavedModel
from oncofed.common.scaling import Scaling, groups, moments, power_moments
from oncofed.common.splits import deal_folds, seed_from
from oncofed.common.study import PRETRAIN, TRAIN, Study
from oncofed.common.survival import event_table, initial_baseline
from oncofed.common.tables import table_widths
from oncofed.server.statistics import covariate_scale, grid_of
from oncofed.server.strategy import EvidenceStrategy

Advance = Callable[[], None]

INNER = 4
"""Inner folds of the training patients by which a classical model chooses its penalty."""


@dataclass(frozen=True)
class Pool:
    """All sites' cohorts side by side, with the federation's panel and cancer types."""

    cohorts: dict[str, Cohort]
    panel: GenePanel
    cancers: tuple[str, ...]
    beside: Beside = NO_BESIDE

    @classmethod
    def open(
        cls,
        sites: Path,
        study: Study,
        panel: GenePanel,
        cancers: tuple[str, ...],
        members: set[str],
        beside: Beside = NO_BESIDE,
    ) -> Pool:
        """The cohorts of `members`, the sites that scored their held-out patients in the federation."""
        cohorts = {}
        for folder in list_sites(sites):
            site = SiteFolder.open(folder)
            if site.name not in members:
                continue
            key = cohort_key(site, study, panel, cancers, beside)
            cohort = open_cohort(key, site, folder / ".oncofed", panel)
            cohorts[site.name] = in_site_folds(with_modalities(cohort, study), study, site.name)
        return cls(cohorts, panel, cancers, beside)

    @property
    def all(self) -> Cohort:
        return Cohort.concatenate(list(self.cohorts.values()))

    @property
    def site(self) -> np.ndarray:
        return np.repeat(list(self.cohorts), [len(c) for c in self.cohorts.values()])

    def split(self, study: Study, fold: int) -> np.ndarray:
        """`train`, `validation` or `test` for each patient of `all`, as the sites split them."""
        return np.concatenate([split_names(c, study, fold, name) for name, c in self.cohorts.items()])


def predict_pooled(pool: Pool, study: Study, fold: int, advance: Advance) -> pd.DataFrame:
    """The study's model on all patients in one place: each step sees as many patients as a step of all sites together."""
    sites = len(pool.cohorts)
    t = study.training
    pooled = study.changed(training__batch_size=t.batch_size * sites) if t.batch_size else study
    cohort = pool.all
    score = _train(pool, pooled, cohort, pool.split(study, fold), fold, "pooled", advance)
    return prediction_table(pool, study, fold, cohort, score, pool.site)


def predict_local(pool: Pool, study: Study, fold: int, advance: Advance) -> pd.DataFrame:
    """The study's model at each site alone. Risks are put on the scale of the site's training patients, so that
    patients of different sites can be ranked together at all; scores of cancer types need no such thing."""
    parts = []
    for name, cohort in pool.cohorts.items():
        split = split_names(cohort, study, fold, name)
        rows = split == "train"
        score = _train(pool, study, cohort, split, fold, name, lambda: None)
        if study.task.kind == "survival":
            sd = score[rows].std()
            score = (score - score[rows].mean()) / (sd if sd > 0 else 1.0)
        parts.append(prediction_table(pool, study, fold, cohort, score, np.repeat(name, len(cohort))))
        advance()
    return pd.concat(parts, ignore_index=True)


def inner_folds(cohort: Cohort, train: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """An inner fold `[N]` for each patient that `train` marks, by which a classical model chooses its penalty; -1 for others."""
    chosen = cohort.select(train)
    inner = np.full(len(cohort), -1)
    inner[train] = deal_folds(chosen.patient, chosen.cancer, chosen.event, folds=folds, seed=seed, site="pooled")
    return inner


def frame_of(
    study: Study, train: Cohort, cancers: int, beside: Beside = NO_BESIDE, start: SavedModel | None = None
) -> Lens:
    """What the federation's statistics phase makes of its sums, from patients in one place, or of the model it starts from."""
    if start is not None:
        return lens_of(study, beside, start.scales, start.covariates, start.grid)
    count = cancers if study.scale_by_cancer else 1
    group, scales = groups(train.cancer, count > 1), {}
    for m in table_widths(study, beside, train.x_NG.shape[1]):
        scales[m] = Scaling.from_moments(moments(train.table(m), group, count))
        if study.ranked and m == RNA:
            scales[m] = Scaling.none(train.x_NG.shape[1])
        elif study.panel.powers:
            scales[m] = scales[m].with_powers(power_moments(train.table(m), group, scales[m]))
    sums = moments(train.v_NV, np.zeros(len(train), dtype=np.int64), 1)
    scale = covariate_scale({f"covariate_{k}": v[0] for k, v in sums.items()})
    events, _ = event_table(train.time, train.event, train.cancer, cancers)
    grid = grid_of(study.task, events)
    return lens_of(study, beside, scales, (scale["covariate_mean"], scale["covariate_sd"]), grid)


def _train(
    pool: Pool, study: Study, cohort: Cohort, split: np.ndarray, fold: int, name: str, advance: Advance
) -> np.ndarray:
    """Scores `[N]` or `[N, classes]` of a whole cohort after training on it: a federation of one site, without the messages."""
    train, cancers = cohort.select(split == "train"), len(pool.cancers)
    device = choose_device(study.runtime.device)
    start = SavedModel.read(Path(study.training.start)) if study.training.start else None
    lens = frame_of(study, train, cancers, pool.beside, start)
    events, exposure = event_table(train.time, train.event, train.cancer, cancers)
    baseline = initial_baseline(study.task.loss, events, exposure, lens.grid).astype(np.float32)
    sizes = Sizes(len(pool.panel), pool.cancers, len(lens.grid), train.v_NV.shape[1], pool.beside)
    batch = Batch.of(train, lens, device)
    patience, aside = study.training.patience, cohort.select(split == "validation")
    validation = Batch.of(aside, lens, device) if patience and len(aside) else None
    pretrained: Sum = {}
    for phase in study.phases:
        if phase == PRETRAIN and study.multimodal and not train.has(RNA).any():
            continue
        model = build_model(study, sizes, phase=phase, fold=fold).to(device)
        strategy = EvidenceStrategy.of(study.aggregation, model)
        if start is not None:
            strategy.weights = begin_from(strategy.weights, start.weights)
        elif "head.log_baseline" in strategy.weights:
            strategy.weights["head.log_baseline"] = baseline
        if pretrained:
            strategy.weights = transfer(strategy.weights, pretrained)
        best, best_loss, waited = dict(strategy.weights), np.inf, 0
        for round_ in range(1, study.steps(phase).rounds + 1):
            seed = seed_from(study.seed, phase, fold, round_, name)
            total, _ = train_locally(
                model,
                strategy.weights,
                batch if phase == TRAIN else _with_expression(batch),
                study,
                phase=phase,
                round_=round_,
                seed=seed,
                load=strategy.load,
                branches=strategy.branches,
                classes=np.bincount(train.cancer, minlength=cancers),
            )
            strategy.take(total)
            advance()
            if phase == PRETRAIN or validation is None or round_ % study.training.evaluate_every:
                continue
            loss = _loss(study, model, strategy.weights, validation)
            best, best_loss, waited = (
                (dict(strategy.weights), loss, 0) if loss <= best_loss else (best, best_loss, waited + 1)
            )
            if waited >= patience:
                break
        strategy.settle()
        pretrained = strategy.weights
        if phase == TRAIN:
            set_weights(model, best if best_loss < np.inf else strategy.weights)
    model.eval()
    assert not isinstance(model, GeneAutoencoder)
    with torch.no_grad():
        return Batch.of(cohort, lens, device).through(model).score.double().cpu().numpy()


def _with_expression(batch: Batch) -> Batch:
    rows = torch.nonzero(batch.has[RNA]).squeeze(1)
    return batch if len(rows) == len(batch) else batch.select(rows)


def _loss(study: Study, model: Model, weights: Sum, batch: Batch) -> float:
    assert not isinstance(model, GeneAutoencoder)
    set_weights(model, weights)
    model.eval()
    with torch.no_grad():
        return float(measured_objective(study).losses(batch.through(model), batch).mean())


def prediction_table(
    pool: Pool, study: Study, fold: int, cohort: Cohort, score: np.ndarray, site: np.ndarray
) -> pd.DataFrame:
    """Predictions as the sites write them in a simulation: of risks `[N]`, or of class logits `[N, C]`."""
    columns = {"patient": cohort.patient, "site": site, "cancer_type": np.array(pool.cancers)[cohort.cancer]}
    columns |= {"fold": np.full(len(cohort), fold), "split": np.where(cohort.fold == fold, "test", "train")}
    if study.task.kind == "classification":
        return pd.DataFrame(columns | class_columns(score, pool.cancers))
    return pd.DataFrame(columns | {"time_months": cohort.time, "event": cohort.event, "risk": score})
