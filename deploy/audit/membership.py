"""Who was among the training patients? Attacks on the study's model, trained with its noise and without.

Models without noise are clipped all the same: a private recipe's rate is made for clipped steps, and would throw others off.

Shadow models are trained on random halves of the patients (Carlini et al. 2022, LiRA; Zarifzadeh et al. 2024, RMIA). A few of
them are targets, attacked with the others as references. Shapes: S models, N patients.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from oncofed.client.batch import CHUNK
from oncofed.client.objectives import measured_objective
from oncofed.common.blocks import Sum
from oncofed.common.models.build import set_weights
from oncofed.deploy.audit.setting import Setting, remembered
from scipy.special import logsumexp
from scipy.stats import norm, rankdata

LEAST_MODELS, TARGETS = 8, 8
"""Models at least, and those of them that are attacked."""

FIXED = 64
"""From so many models on, every patient could have variances of her own (Carlini et al. 2022); below one for all."""

FPR = 0.01
"""False alarms at which the rate of members found is told."""

LOSSES = 1e-7, 50.0
"""Losses end here: nearly certain patients, and those that noise has made impossible, tell no more."""

RESAMPLES = 200

BOUNDED = ("discrete_time",)
"""Losses of survival that are the likelihood of something discrete, so 1 at most."""

ATTACKS = ("lira", "rmia", "loss")

Advance = Callable[[], None]


@dataclass(frozen=True)
class Trained:
    """Losses `[S, N]` of every patient by every model, and who trained which `[S, N]`."""

    loss: np.ndarray
    inside: np.ndarray


def audit_membership(setting: Setting, models: int, seed: int, advance: Advance = lambda: None) -> dict[str, Any]:
    """Attack `models` models of each kind: by kind and attack AUC and the share of members found at 1 % false alarms.

    `bound` is what (epsilon, delta) of one fold's training allows at 1 %, `bound_gaussian` what no test of its noise exceeds
    (without sampling; Dong et al. 2022). `advance` is called after each model.
    """
    if models < LEAST_MODELS:
        raise ValueError(f"--models {models}: attacks need reference models, {LEAST_MODELS} at least")
    if len(setting.batch) < 2 * LEAST_MODELS:
        raise ValueError(
            f"{len(setting.batch)} training patients are too few to tell members from others; leave 'membership' out"
        )
    epsilon, delta = setting.epsilon(setting.steps), setting.promise.delta
    known = remembered(setting)
    bounded = setting.study.task.kind == "classification" or setting.study.task.loss in BOUNDED
    out: dict[str, Any] = {
        "models": models,
        "targets": min(TARGETS, models),
        "patients": len(setting.batch),
        "steps": setting.steps,
        "epsilon": epsilon,
        "delta": delta,
        "fpr": FPR,
        "bound": float(bound_of(epsilon, delta, np.array([FPR]))[0]),
        "loss_says_nothing_at_low_fpr": True,
    }
    mu = math.sqrt(setting.steps) / setting.promise.deviation
    if setting.study.privacy.sample_rate == 1.0:
        out["bound_gaussian"] = float(norm.cdf(norm.ppf(FPR) + mu))
    for kind in ("private", "plain"):
        trained = train_shadows(known, models, seed, private=kind == "private", advance=advance)
        out[kind] = attack(trained, min(TARGETS, models), bounded=bounded, seed=seed)
    low = max(out["private"][name]["tpr"]["low"] for name in ("lira", "rmia"))
    out["alarm"] = low > out["bound"]
    return out


def bound_of(epsilon: float, delta: float, fpr: np.ndarray) -> np.ndarray:
    """Most members that any attack finds at these rates of false alarms."""
    return np.minimum(1.0, np.exp(min(epsilon, 700.0)) * fpr + delta)


# -- models ------------------------------------------------------------------------------------------------------------


def train_shadows(setting: Setting, models: int, seed: int, *, private: bool, advance: Advance) -> Trained:
    """Models on random halves, each drawn by itself: were every patient in as many, the count in the others would tell."""
    n = len(setting.batch)
    draw = np.random.default_rng(seed)
    inside = np.zeros((models, n), dtype=bool)
    losses = np.zeros((models, n))
    for s in range(models):
        inside[s, draw.permutation(n)[: n // 2]] = True
        half = setting.batch.select(torch.from_numpy(np.flatnonzero(inside[s])).to(setting.batch.cancer_B.device))
        weights = setting.train(setting.private_share(half, noisy=private))
        losses[s] = _losses(setting, weights)
        advance()
    return Trained(losses, inside)


def _losses(setting: Setting, weights: Sum) -> np.ndarray:
    """Negative log-likelihood `[N]` of all patients, without noise of any kind."""
    model, batch, objective = setting.model, setting.batch, measured_objective(setting.study)
    set_weights(model, weights)
    model.eval()
    at_once = CHUNK if batch.bags is not None else setting.study.privacy.chunk
    with torch.no_grad():
        parts = [batch.select(rows) for rows in torch.arange(len(batch)).split(at_once)]
        loss_N = torch.cat([objective.losses(part.through(model), part) for part in parts])
    return np.nan_to_num(loss_N.double().cpu().numpy(), nan=LOSSES[1])


# -- attacks -----------------------------------------------------------------------------------------------------------


def attack(trained: Trained, targets: int, *, bounded: bool, seed: int) -> dict[str, Any]:
    """Scores of the attacks on the first `targets` models against the truth; patients are resampled for the intervals."""
    loss = np.clip(trained.loss, *LOSSES)
    signal = phi(loss) if bounded else -loss
    score = {name: np.zeros((targets, loss.shape[1])) for name in ATTACKS}
    for t in range(targets):
        others = np.arange(len(loss)) != t
        score["lira"][t] = lira(signal[t], signal[others], trained.inside[others])
        score["rmia"][t] = rmia(-loss[t], -loss[others], trained.inside[others])
        score["loss"][t] = -loss[t]
    inside = trained.inside[:targets]
    draw = np.random.default_rng(seed)
    rows = [draw.integers(0, loss.shape[1], loss.shape[1]) for _ in range(RESAMPLES)]
    return {name: _summary(value, inside, rows) for name, value in score.items()}


def phi(loss: np.ndarray) -> np.ndarray:
    """logit(exp(-loss)), nearly normal over models, of a likelihood that is 1 at most."""
    return -loss - np.log(-np.expm1(-loss))


def lira(signal_N: np.ndarray, reference_SN: np.ndarray, inside_SN: np.ndarray) -> np.ndarray:
    """log N(phi; mu_in, s_in) - log N(phi; mu_out, s_out) `[N]`, with one variance for all patients below 64 references.

    A patient whom all references know, or none, gets 0: they say nothing of her.
    """
    means, variances, counts = [], [], []
    for group in (inside_SN, ~inside_SN):
        n = group.sum(0)
        mean = (reference_SN * group).sum(0) / np.maximum(n, 1)
        squares = (np.square(reference_SN - mean) * group).sum(0)
        common = squares.sum() / max(float(np.maximum(n - 1, 0).sum()), 1.0)
        own = squares / np.maximum(n - 1, 1)
        means.append(mean)
        variances.append(np.maximum(own if len(reference_SN) >= FIXED else np.full(len(n), common), 1e-12))
        counts.append(n)
    value = norm.logpdf(signal_N, means[0], np.sqrt(variances[0])) - norm.logpdf(
        signal_N, means[1], np.sqrt(variances[1])
    )
    return np.where(np.minimum(*counts) > 0, value, 0.0)


def rmia(log_p_N: np.ndarray, reference_SN: np.ndarray, inside_SN: np.ndarray, gamma: float = 1.0) -> np.ndarray:
    """Share of the other patients z with [p(x) / p_ref(x)] / [p(z) / p_ref(z)] >= gamma, `[N]`.

    p_ref is the mean of references that know a patient and of those that do not, both with a half: their numbers would tell.
    """
    ratio = log_p_N - np.logaddexp(*(_log_mean(reference_SN, g) for g in (inside_SN, ~inside_SN))) + math.log(2)
    order = np.sort(ratio)
    below = np.searchsorted(order, ratio - math.log(gamma), side="right")
    return (below - (gamma <= 1.0)) / max(len(ratio) - 1, 1)


def _log_mean(log_p_SN: np.ndarray, group_SN: np.ndarray) -> np.ndarray:
    """Log of the mean over a group of models `[N]`; over all of them where the group is empty."""
    group_SN = np.where(group_SN.any(0), group_SN, True)
    return np.asarray(logsumexp(log_p_SN, axis=0, b=group_SN / group_SN.sum(0)))


def _summary(score: np.ndarray, inside: np.ndarray, resamples: list[np.ndarray]) -> dict[str, Any]:
    found = [(auc(score[:, r], inside[:, r]), found_at(score[:, r], inside[:, r], FPR)) for r in resamples]
    low, high = np.quantile(np.array(found), (0.025, 0.975), axis=0)
    values = auc(score, inside), found_at(score, inside, FPR)
    at = np.geomspace(1e-3, 1.0, 40)
    out: dict[str, Any] = {
        name: {"value": values[i], "low": float(low[i]), "high": float(high[i])}
        for i, name in enumerate(("auc", "tpr"))
    }
    return out | {"roc": {"fpr": at.tolist(), "tpr": [found_at(score, inside, f) for f in at]}}


def auc(score: np.ndarray, inside: np.ndarray) -> float:
    """Chance that a member scores higher than another patient; ties count half."""
    inside = inside.reshape(-1)
    n1, n0 = int(inside.sum()), int((~inside).sum())
    ranks = rankdata(score.reshape(-1))
    return float((ranks[inside].sum() - n1 * (n1 + 1) / 2) / (n1 * n0)) if n1 and n0 else 0.5


def found_at(score: np.ndarray, inside: np.ndarray, fpr: float) -> float:
    """Share of members above the lowest threshold that no more than `fpr` of the others exceed."""
    inside, flat = inside.reshape(-1), score.reshape(-1)
    others = np.sort(flat[~inside])[::-1]
    allowed = int(fpr * len(others))
    if allowed >= len(others):
        return 1.0
    return float((flat[inside] > others[allowed]).mean())
