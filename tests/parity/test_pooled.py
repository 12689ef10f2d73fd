"""The federated fit equals the pooled fit where the mathematics allows it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from oncofed.client.batch import Batch, Lens
from oncofed.client.data.cohort import Cohort
from oncofed.client.train import train_locally
from oncofed.common.blocks import EVIDENCE
from oncofed.common.covariates import input_names
from oncofed.common.modalities import RNA
from oncofed.common.models.build import Sizes, build_model, get_weights, set_weights
from oncofed.common.models.gene_moe import GeneMOE
from oncofed.common.scaling import Scaling, moments
from oncofed.common.study import Study
from oncofed.common.survival import TimeGrid, piecewise_exponential_loss
from oncofed.server.aggregate import Accumulator, mean_by_block
from oncofed.server.strategy import EvidenceStrategy

GRID = TimeGrid((0.0, 6.0))
CANCERS = ("BRCA", "LUAD", "STAD")
GENES = 6


def cohort(n: int, mix: list[float], seed: int) -> Cohort:
    rng = np.random.default_rng(seed)
    x, age = rng.normal(size=(n, GENES)).astype(np.float32), rng.normal(size=(n, 1)).astype(np.float32)
    cancer = rng.choice(3, n, p=mix)
    death = rng.exponential(np.array([20.0, 10.0, 30.0])[cancer] * np.exp(-x[:, 0] - age[:, 0]))
    stop = rng.uniform(2, 40, n)
    event = (death <= stop).astype(np.int64)
    time, names = np.minimum(death, stop) + 0.05, np.arange(n).astype(str)
    return Cohort(x, age, time, event, cancer, np.zeros(n, int), names)


SITES = [cohort(70, [0.8, 0.2, 0.0], 0), cohort(40, [0.0, 0.3, 0.7], 1), cohort(25, [0.1, 0.1, 0.8], 2)]


def batch(c: Cohort, s: Study) -> Batch:
    """The cohort as it is; the age is there when the study names it."""
    zero, one, v = np.zeros((1, GENES)), np.ones((1, GENES)), len(s.panel.covariates)
    lens = Lens({RNA: Scaling(zero, one, one, zero, one)}, (np.zeros(v), np.ones(v)), GRID)
    return Batch.of(dataclasses.replace(c, v_NV=c.v_NV[:, :v]), lens, torch.device("cpu"))


def build(s: Study) -> GeneMOE:
    model = build_model(s, Sizes(GENES, CANCERS, len(GRID), len(input_names(s.panel.covariates))))
    assert isinstance(model, GeneMOE)
    return model


def study(**keys: object) -> Study:
    """Full-batch SGD, one local step, no noise: the case in which federated and pooled are one."""
    base = {
        "model__size": "tiny",
        "model__dropout": 0.0,
        "model__gate_noise": False,
        # all experts open: at a top-k boundary the last bit of a float decides the route, and no two orders of
        # summation agree on it for ever
        "model__top_k": 4,
        "model__attention_top_k": 3,
        "model__first_layer_scale": 1.0,
        "training__optimizer": "sgd",
        "training__schedule": "constant",
        "training__batch_size": 0,
        "training__local_steps": 1,
        "training__balance": 0.0,
        "training__clip_norm": 0.0,
        "training__weight_decay": 0.0,
        "training__learning_rate": 0.05,
    }
    return Study().changed(**(base | keys))


def federated(s: Study, rounds: int, cohorts: list[Cohort]) -> dict[str, np.ndarray]:
    model = build(s)
    strategy = EvidenceStrategy.of(s.aggregation, model)
    strategy.weights["head.log_baseline"][:] = -3.0
    batches = [batch(c, s) for c in cohorts]
    for r in range(1, rounds + 1):
        shapes = {n: v.shape for n, v in strategy.weights.items()} | {EVIDENCE: (len(strategy.blocks.names),)}
        accumulator = Accumulator(shapes)
        for b in batches:
            accumulator.add(train_locally(model, strategy.weights, b, s, round_=r, seed=r, load=strategy.load)[0])
        strategy.step(*mean_by_block(accumulator.total(), strategy.blocks, s.aggregation.tau))
    return strategy.weights


@pytest.mark.parametrize("rule", ["fedavg", "evidence"])
@pytest.mark.parametrize(
    "keys",
    [
        {"model__cancer_head": 0.0},
        {"model__cancer_head": 2.0, "panel__covariates": ["age"], "training__weight_decay": 0.5},
        {"model__experts": 0, "model__attention_experts": 0, "panel__covariates": ["age"]},
    ],
    ids=["one-head", "own-heads-and-covariates", "perceptron"],
)
def test_whole_model_follows_the_pooled_path(rule: str, keys: dict[str, object]) -> None:
    """One full-batch step a round: FedAvg of site means, and evidence of block means, are pooled gradient descent."""
    s = study(aggregation__rule=rule, **keys)
    a = federated(s, 15, SITES)
    b = federated(s, 15, [Cohort.concatenate(SITES)])
    moved = {n: float(np.abs(a[n] - a0).max()) for n, a0 in federated(s, 0, SITES).items()}
    for name in ("encoder.shared.weight", *(n for n in moved if n.startswith("head."))):
        assert moved[name] > 0.01, name
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=0, atol=2e-6, err_msg=name)


def pooled_fit() -> tuple[np.ndarray, np.ndarray]:
    """Maximum-likelihood coefficients and baselines on pooled data, float64 L-BFGS."""
    c = Cohort.concatenate(SITES)
    beta = torch.zeros(GENES, dtype=torch.float64, requires_grad=True)
    a = torch.full((3, 2), -3.0, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [beta, a], max_iter=1000, tolerance_grad=1e-12, tolerance_change=1e-18, line_search_fn="strong_wolfe"
    )
    parts = (torch.tensor(GRID.exposure(c.time)), torch.tensor(GRID.interval(c.time)), torch.tensor(c.event * 1.0))

    def objective() -> torch.Tensor:
        optimizer.zero_grad()
        risk = torch.tensor(c.x_NG, dtype=torch.float64) @ beta
        loss = piecewise_exponential_loss(risk, a[torch.tensor(c.cancer)], *parts).mean()
        loss.backward()
        return loss

    optimizer.step(objective)
    return beta.detach().numpy(), a.detach().numpy()


@pytest.mark.parametrize("rule", ["fedavg", "evidence"])
def test_piecewise_exponential_regression_reaches_the_pooled_maximum(rule: str) -> None:
    """Sums of gradients over sites with quite different case mix, divided by patients or by evidence: the same optimum."""
    beta, a = np.zeros(GENES), np.full((3, 2), -3.0)
    speed_beta, speed_a = np.zeros_like(beta), np.zeros_like(a)
    total = sum(len(c) for c in SITES)
    by_cancer = sum(np.bincount(c.cancer, minlength=3) for c in SITES)
    for _ in range(2500):
        shapes = {"beta": (GENES,), "baseline": (3, 2)}
        accumulator = Accumulator(shapes, bits=44)
        for c in SITES:
            b_t = torch.tensor(beta, requires_grad=True)
            a_t = torch.tensor(a, requires_grad=True)
            parts = (
                torch.tensor(GRID.exposure(c.time)),
                torch.tensor(GRID.interval(c.time)),
                torch.tensor(c.event * 1.0),
            )
            risk = torch.tensor(c.x_NG, dtype=torch.float64) @ b_t
            piecewise_exponential_loss(risk, a_t[torch.tensor(c.cancer)], *parts).sum().backward()
            assert b_t.grad is not None
            assert a_t.grad is not None
            accumulator.add({"beta": b_t.grad.numpy(), "baseline": a_t.grad.numpy()})
        g = accumulator.total()
        # the server's momentum optimiser: untouched blocks aside, plain heavy-ball descent
        speed_beta = 0.95 * speed_beta + g["beta"] / total
        speed_a = 0.95 * speed_a + g["baseline"] / (by_cancer[:, None] if rule == "evidence" else total)
        beta, a = beta - 0.3 * speed_beta, a - 0.3 * speed_a
    best_beta, best_a = pooled_fit()
    np.testing.assert_allclose(beta, best_beta, rtol=0, atol=1e-6)
    np.testing.assert_allclose(a, best_a, rtol=0, atol=1e-6)


def test_model_reaches_the_pooled_loss_by_evidence() -> None:
    """Through the product's own path: the federation's loss on all patients equals the pooled one after many rounds."""
    s = study(model__attention_experts=0, training__learning_rate=0.1)
    everybody = batch(Cohort.concatenate(SITES), s)
    losses = []
    for cohorts in (SITES, [Cohort.concatenate(SITES)]):
        model = build(s)
        set_weights(model, federated(s, 150, cohorts))
        out = everybody.through(model)
        parts = (everybody.exposure_BK, everybody.interval_B, everybody.event_B)
        losses.append(float(piecewise_exponential_loss(out.risk, out.log_baseline, *parts).mean().detach()))
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_federated_scaling_equals_pooled() -> None:
    rng = np.random.default_rng(0)
    sites = [rng.normal(7, 2, (n, 5)) for n in (3, 40, 11)]
    sites[0][:, 2] = np.nan
    accumulator = Accumulator(dict.fromkeys(("n", "sum", "squares"), (1, 5)), bits=30)
    for x in sites:
        accumulator.add(moments(x, np.zeros(len(x), dtype=int), 1))
    scaling = Scaling.from_moments(accumulator.total())
    pooled = np.concatenate(sites)
    np.testing.assert_allclose(scaling.mean[0], np.nanmean(pooled, axis=0), atol=1e-8)
    np.testing.assert_allclose(scaling.sd[0], np.nanstd(pooled, axis=0), atol=1e-7)


def test_clipping_does_not_depend_on_the_aggregation_rule() -> None:
    """The trunk's step is the same under both rules: clipping looks at the plain gradient, before blocks are rescaled."""
    steps = []
    for rule in ("fedavg", "evidence"):
        s = study(aggregation__rule=rule, training__clip_norm=0.05)
        model = build(s)
        weights = {n: v.copy() for n, v in get_weights(model).items()}
        load = {group: np.full(n, 1.0 / n) for group, n in model.mixtures().items()}
        total, _ = train_locally(model, weights, batch(SITES[0], s), s, round_=1, seed=0, load=load)
        trunk = list(model.blocks().names).index("trunk")
        steps.append(total["encoder.shared.weight"] / total[EVIDENCE][trunk])
    np.testing.assert_allclose(steps[0], steps[1], rtol=1e-6)
    assert 0 < np.linalg.norm(steps[0]) <= 0.05 * 0.05 * (1 + 1e-6)  # rate times the bound
