"""A model to start a private study from, fitted on public patients alone: principal components as a frozen encoder, a ridge as head.

A patient's genes are ranked among her own (no scale of others), projected on the components of the public patients, and held at a
length of about 1, so that few gradients meet the clip. Heads are a shared and each cancer's own, at the public optimum. In
small federations this keeps more under noise than any encoder that is trained with it (docs/results/privacy.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from oncofed.client.data.cohort import Cohort
from oncofed.client.data.site import SiteFolder, list_sites
from oncofed.client.greeting import greet
from oncofed.common.blocks import Sum, under
from oncofed.common.files import write_text
from oncofed.common.models.build import Sizes, build_model, get_weights
from oncofed.common.panel import GenePanel
from oncofed.common.scaling import Scaling
from oncofed.common.splits import ALL_PATIENTS
from oncofed.common.study import Study
from oncofed.common.survival import TimeGrid, event_table, on_grid
from oncofed.deploy.comparison.reference import Pool
from oncofed.server.checkpoint import save_arrays
from scipy.optimize import minimize

LINEAR = 0.1
"""Largest usual input of the first tanh, which is then a straight line to 0.3 %."""

SMOOTHED = 0.5
"""Power of a component's deviation that is divided out: 0 leaves principal components, 1 whitens them."""

MODEL_FILE, STUDY_FILE = "model.safetensors", "study.toml"


@dataclass(frozen=True)
class Preset:
    """What the noise of an epsilon wants: clip, pull back to the start a round, learning rate."""

    epsilon: float
    clip: float
    pull: float
    learning_rate: float


PRESETS = (Preset(1.0, 0.15, 0.117, 10.0), Preset(3.0, 0.3, 0.058, 15.0), Preset(8.0, 0.4, 0.0175, 15.0))
"""Chosen on public patients and simulated ones, noise scaled to a federation of 28 hospitals and 2,500 patients."""

EDGES = (0.0, 12.0, 24.0, 36.0, 60.0)


ALWAYS = {("privacy", "epsilon"), ("privacy", "delta")}
"""Keys that a study file names even at their defaults: readers look for them."""


def preset_for(epsilon: float) -> Preset:
    """The preset of the nearest epsilon, on a logarithmic scale."""
    return min(PRESETS, key=lambda p: abs(np.log(p.epsilon / epsilon)))


def private_study(features: int, epsilon: float, delta: float, covariates: tuple[str, ...] = ()) -> Study:
    """The study that starts from such a model: a frozen encoder, heads alone learn, one fold, full batches."""
    p = preset_for(epsilon)
    return Study().changed(
        name="private",
        task__time_edges=EDGES,
        panel__scale_by="patient",
        panel__covariates=covariates,
        model__width=features,
        model__latent=features,
        model__experts=0,
        model__attention_experts=0,
        model__dropout=0.0,
        model__cancer_head=1.0,
        training__start=MODEL_FILE,
        training__encoder="frozen",
        training__baselines="frozen",
        training__rounds=50,
        training__local_steps=1,
        training__learning_rate=p.learning_rate,
        training__weight_decay=0.0,
        training__balance=0.0,
        aggregation__pull=p.pull,
        aggregation__average_last=25,
        privacy__unit="patient",
        privacy__epsilon=epsilon,
        privacy__delta=delta,
        privacy__clip=p.clip,
        splits__only=(0,),
    )


def fit_start(
    sites: Path,
    out: Path,
    *,
    features: int = 128,
    penalty: float = 1.0,
    epsilon: float = 8.0,
    delta: float = 1e-5,
    covariates: tuple[str, ...] = (),
) -> tuple[Path, Path]:
    """Fit on the public site folders below `sites`; writes a model and a study that starts from it below `out`.

    Raises `ValueError` where there are fewer patients than features.
    """
    study = private_study(features, epsilon, delta, covariates)
    opened = study.changed(
        privacy__unit="none", training__start="", training__encoder="train", training__baselines="train"
    )
    folders = [SiteFolder.open(folder) for folder in list_sites(sites)]
    hellos = [greet(site, site.path / ".oncofed", opened) for site in folders]
    cancers = tuple(sorted({str(c) for h in hellos for c in h["cancers"]}))  # type: ignore[union-attr]
    panel = GenePanel.shared([list(map(str, h["genes"])) for h in hellos], 1.0)  # type: ignore[arg-type]
    cohort = Pool.open(sites, opened, panel, cancers, {site.name for site in folders}).all
    if len(cohort) <= features:
        raise ValueError(
            f"{sites}: {len(cohort)} public patients have no {features} components; ask for fewer with --features"
        )
    families = "/".join(sorted({str(h["unit_family"]) for h in hellos}))
    arrays = _arrays(opened, cohort, panel, cancers, penalty)
    about = {
        "study": opened.model_dump(mode="json", exclude={"runtime"}),
        "panel_hash": panel.hash,
        "cancers": list(cancers),
        "fold": ALL_PATIENTS,
        "grid_months": list(EDGES),
        "genes": panel.lines,
        "unit_family": families,
        "beside": {},
    }
    model, file = out / MODEL_FILE, out / STUDY_FILE
    save_arrays(model, arrays, about)
    write_text(file, study_text(study.changed(training__start=str(model.resolve()))))
    return model, file


def study_text(study: Study) -> str:
    """A study file with the keys that differ from the defaults."""
    import tomli_w

    default = Study().model_dump(mode="json")
    tables = {
        name: {k: v for k, v in value.items() if v != default[name][k] or (name, k) in ALWAYS}
        if isinstance(value, dict)
        else value
        for name, value in study.model_dump(mode="json").items()
        if value != default[name]
    }
    return tomli_w.dumps(dict(sorted(tables.items(), key=lambda item: isinstance(item[1], dict))))


def _arrays(study: Study, cohort: Cohort, panel: GenePanel, cancers: tuple[str, ...], penalty: float) -> Sum:
    """All arrays of the saved model."""
    c, k, grid = len(cancers), study.model.latent, TimeGrid(EDGES)
    ranks = np.nan_to_num(np.asarray(cohort.x_NG, dtype=np.float64))
    mean, w_GK = components(ranks, cohort.cancer, k)
    z_NK = np.tanh((ranks - mean) @ w_GK)
    events, exposure = event_table(cohort.time, cohort.event, cohort.cancer, c, grid)
    baseline = on_grid("piecewise_exponential", events, exposure)
    v = np.asarray(cohort.v_NV, dtype=np.float64)
    centre = np.nanmean(v, axis=0) if v.size else np.zeros(v.shape[1])
    spread = np.where(np.nanstd(v, axis=0) < 1e-3, 1.0, np.nanstd(v, axis=0)) if v.size else np.ones(v.shape[1])
    v = np.nan_to_num((v - centre) / spread)
    cumulative_N = (grid.exposure(cohort.time) * np.exp(baseline[cohort.cancer])).sum(1)
    shared, own = ridge_heads(np.hstack([z_NK, v]), cohort.cancer, cohort.event, cumulative_N, c, penalty)
    weights = dict(get_weights(build_model(study, Sizes(len(panel), cancers, len(grid), v.shape[1]))))
    weights |= {
        "encoder.shared.weight": LINEAR * w_GK[None],
        "encoder.shared.bias": -LINEAR * (mean @ w_GK)[None],
        "encoder.latent.weight": np.eye(k) / LINEAR,
        "encoder.latent.bias": np.zeros(k),
        "head.shared": shared[:k],
        "head.own": own[:, :k],
        "head.log_baseline": baseline,
    }
    if v.shape[1]:
        weights |= {"head.covariates.shared": shared[k:, None], "head.covariates.own": own[:, k:, None]}
    scale = Scaling.none(len(panel)).arrays() | {"covariate_mean": centre, "covariate_sd": spread}
    return under("weights/", {n: np.asarray(w, dtype=np.float32) for n, w in weights.items()}) | scale


def components(x_NG: np.ndarray, cancer_N: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean `[G]` and projection `[G, count]` of public patients: principal components within cancer types.

    Coordinates are divided by the root of their deviation, so that later ones are heard, and all of them so that nine of ten
    patients have a length below sqrt(1/2): shared and own head together then see a length below 1.
    """
    mean = x_NG.mean(0)
    x = x_NG - mean
    within = x.copy()
    for c in np.unique(cancer_N):
        rows = cancer_N == c
        within[rows] -= x[rows].mean(0) * rows.sum() / (rows.sum() + 5.0)
    _, size, axes = np.linalg.svd(within, full_matrices=False)
    w_GK = axes[:count].T * (size[:count] / size[0]) ** -SMOOTHED
    length = np.quantile(np.linalg.norm(x @ w_GK, axis=1), 0.9)
    return mean, w_GK / (length * np.sqrt(2.0))


def ridge_heads(
    z_NK: np.ndarray, cancer_N: np.ndarray, event_N: np.ndarray, cumulative_N: np.ndarray, cancers: int, penalty: float
) -> tuple[np.ndarray, np.ndarray]:
    """Shared `[K]` and own `[C, K]` coefficients: minimum of the sum of losses + penalty / 2 * |coefficients|^2.

    Piecewise-exponential likelihood given the cumulative baseline hazard of each patient; each cancer's level is free in the fit
    and then dropped.
    """
    k = z_NK.shape[1]
    member = np.eye(cancers)[cancer_N]

    def objective(p: np.ndarray) -> tuple[float, np.ndarray]:
        shared, own, level = p[:k], p[k : k + cancers * k].reshape(cancers, k), p[-cancers:]
        eta = np.clip(z_NK @ shared + (z_NK * own[cancer_N]).sum(1) + level[cancer_N], -8.0, 8.0)
        hazard = cumulative_N * np.exp(eta)
        residual = hazard - event_N
        by_cancer = member.T @ (z_NK * residual[:, None])
        gradient = np.concatenate(
            [z_NK.T @ residual + penalty * shared, (by_cancer + penalty * own).ravel(), member.T @ residual + level]
        )
        size = penalty * (shared @ shared + np.square(own).sum()) + level @ level
        return float((hazard - event_N * eta).sum() + 0.5 * size), gradient

    fit = minimize(
        objective, np.zeros(k + cancers * k + cancers), jac=True, method="L-BFGS-B", options={"maxiter": 500}
    )
    return fit.x[:k], fit.x[k : k + cancers * k].reshape(cancers, k)
