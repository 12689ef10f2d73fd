"""Gradient modulation: who leads, by how much the leader is slowed, and what is logged of it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oncofed.client.modulation import Modulation
from oncofed.client.train import optimizer_for, train_locally
from oncofed.common.modalities import PATHOLOGY, RNA
from oncofed.common.models.build import get_weights
from oncofed.common.modulation import (
    BRANCHES,
    COLUMNS,
    contributions,
    likelihood_lead,
    rate_factors,
    risk_set_lead,
)
from oncofed.common.survival import piecewise_exponential_loss
from oncofed.server.strategy import EvidenceStrategy
from toy_multimodal import GRID, batch, build, study


def test_rate_factors_are_those_of_the_paper() -> None:
    """k: rho 1 -> 1.00, 1.5 -> 0.54, 2 -> 0.24, 3 -> 0.04 (path_gptomic.md, 1.3); the weaker modality keeps its rate."""
    for rho, k in ((1.0, 1.0), (1.5, 0.538), (2.0, 0.238), (3.0, 0.036)):
        np.testing.assert_allclose(rate_factors(np.array([rho * 4, 4.0]), 9, 0.0), [k, 1.0], atol=1e-3)
    assert rate_factors(np.array([9.0, 1.0]), 9, 0.1).tolist() == [0.1, 1.0]
    assert rate_factors(np.array([9.0, 1.0]), 0, 0.1).tolist() == [1.0, 1.0]
    assert rate_factors(np.array([9.0]), 5, 0.1).tolist() == [1.0]
    three = rate_factors(np.array([6.0, 2.0, 2.0]), 9, 0.0)
    assert three[0] < 0.05
    assert three[1:].tolist() == [1.0, 1.0]


@given(st.integers(2, 12), st.integers(0, 500), st.booleans())
def test_risk_set_lead_is_the_share_in_ones_own_risk_set(n: int, seed: int, literal: bool) -> None:
    rng = np.random.default_rng(seed)
    risk, time = rng.normal(size=n), rng.integers(1, 6, n).astype(float)
    event, cancer = rng.integers(0, 2, n), rng.integers(0, 2, n)
    got = risk_set_lead(*(torch.from_numpy(a) for a in (risk, time, event, cancer)), literal=literal).numpy()
    for k in range(n):
        others = [j for j in range(n) if cancer[j] == cancer[k] and time[j] >= time[k]]
        share = (risk[k] if literal else np.exp(risk[k])) / np.exp(risk[others]).sum()
        assert got[k] == pytest.approx(share if event[k] and len(others) >= 2 else 0.0)


def test_nobody_leads_before_anything_is_learned() -> None:
    data = batch(200)
    zero = torch.zeros(200)
    lead = risk_set_lead(zero, data.time_B, data.event_B, data.cancer_B)
    tiny = risk_set_lead(0.01 * torch.randn(200), data.time_B, data.event_B, data.cancer_B)
    assert rate_factors(np.array([float(lead.sum()), float(tiny.sum())]), 200, 0.0).min() > 0.97

    def loss(risk: torch.Tensor) -> torch.Tensor:
        flat = torch.full((len(risk), 3), -3.0)
        return piecewise_exponential_loss(risk, flat, data.exposure_BK, data.interval_B, data.event_B)

    assert torch.equal(likelihood_lead(loss(zero), loss(zero)), torch.ones(200))


@pytest.mark.parametrize("ratio", ["likelihood", "risk_set"])
def test_the_modality_that_knows_more_leads(ratio: str) -> None:
    """Truth against noise, at the same spread: the lead is what tells them apart, in both measures."""
    rng = np.random.default_rng(0)
    n = 2000
    truth, noise = rng.normal(0, 0.7, n), rng.normal(0, 0.7, n)
    death, stop = rng.exponential(20 * np.exp(-truth)), rng.uniform(2, 40, n)
    time, event = np.minimum(death, stop), (death <= stop).astype(float)
    exposure, interval = torch.from_numpy(GRID.exposure(time)), torch.from_numpy(GRID.interval(time))
    flat, one = torch.full((n, len(GRID)), float(np.log(1 / 20))), torch.zeros(n, dtype=torch.int64)

    def lead(risk: np.ndarray) -> float:
        eta, e = torch.from_numpy(risk), torch.from_numpy(event)
        if ratio == "risk_set":
            return float(risk_set_lead(eta, torch.from_numpy(time), e, one).sum())
        losses = [piecewise_exponential_loss(r, flat, exposure, interval, e) for r in (eta, torch.zeros_like(eta))]
        return float(likelihood_lead(*losses).sum())

    factor = rate_factors(np.array([lead(truth), lead(noise)]), n, 0.0)
    assert 0.4 < factor[0] < 0.99
    assert factor[1] == 1.0


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_the_factor_slows_the_leading_encoder_and_nothing_else(optimizer: str) -> None:
    """One step with federated modulation from a round in which RNA led: rates, not gradients, so Adam is slowed too."""
    s = study(training__optimizer=optimizer, training__learning_rate=0.001)
    model, data = build(s), batch(lacks={PATHOLOGY: slice(0, 5)})
    start = {n: v.copy() for n, v in get_weights(model).items()}
    last = np.zeros((2, len(COLUMNS)))
    last[:, COLUMNS.index("pairs")], last[:, COLUMNS.index("lead")] = 30, (45.0, 30.0)
    slow = 1 - np.tanh(0.5)
    moved = {}
    for mode in ("none", "federated"):
        m = s.changed(fusion__modulation=mode)
        total, _ = train_locally(model, start, data, m, round_=1, seed=0, load={}, branches=last)
        moved[mode] = total
    for name in start:
        factor = slow if model.modality_of(name) == RNA and not name.startswith("head.") else 1.0
        np.testing.assert_allclose(moved["federated"][name], factor * moved["none"][name], rtol=2e-3, atol=2e-5)
    table = moved["federated"][BRANCHES]
    np.testing.assert_allclose(table[:, COLUMNS.index("factor")], [20 * slow, 15])
    assert table[:, COLUMNS.index("pairs")].tolist() == [15, 15]


def test_local_modulation_goes_by_its_own_steps_with_a_memory() -> None:
    s = study(fusion__modulation="local", fusion__modulation_memory=0.5, fusion__modulation_floor=0.0)
    model, data = build(s), batch(200)
    with torch.no_grad():
        model.head.risks[RNA].shared.mul_(3)
    optimizer = optimizer_for(model, s, "train", 1)
    rates = [g["lr"] for g in optimizer.param_groups]
    modulation = Modulation(s, optimizer, None, model.modalities)
    with torch.no_grad():
        output = data.through(model)
    leads = []
    for rows in (slice(0, 80), slice(80, 200)):
        part = data.select(torch.arange(200)[rows])
        one = replace(output, branches={m: v[rows] for m, v in output.branches.items()},
                      present={m: v[rows] for m, v in output.present.items()})  # fmt: skip
        leads.append(modulation._measure(model, torch.stack(list(one.branches.values()), 1), part))
        modulation.step(model, one, part)
    expected = rate_factors(0.5 * leads[0] + leads[1], 160, 0.0)
    now = {g["modality"]: g["lr"] / r for g, r in zip(optimizer.param_groups, rates, strict=True)}
    np.testing.assert_allclose([now[RNA], now[PATHOLOGY]], expected)
    assert now[None] == 1.0
    assert expected.min() < 0.999
    np.testing.assert_allclose(modulation.table[:, COLUMNS.index("lead")], leads[0] + leads[1])


def test_a_hospital_with_one_modality_is_not_modulated() -> None:
    s = study(fusion__modulation="local")
    model, data = build(s), batch(lacks={PATHOLOGY: slice(None)})
    total, _ = train_locally(model, get_weights(model), data, s, round_=1, seed=0, load={})
    table = dict(zip(COLUMNS, total[BRANCHES].T.tolist(), strict=True))
    assert table["pairs"] == [0, 0]
    assert table["factor"] == [20, 0]


def test_the_rounds_log_says_how_far_each_modality_carries_the_risk() -> None:
    rng = np.random.default_rng(0)
    risks = rng.normal(0.3, 2.0, 500), rng.normal(-1.0, 1.0, 300)
    table = np.array([[len(r), r.sum(), np.square(r).sum(), 300, 0.0, 0.8 * len(r)] for r in risks])
    said = contributions(table, (RNA, PATHOLOGY))
    for name, r in zip((RNA, PATHOLOGY), risks, strict=True):
        assert said[name]["patients"] == len(r)
        assert said[name]["deviation"] == pytest.approx(r.std())
        assert said[name]["share"] == pytest.approx(r.var() / (risks[0].var() + risks[1].var()))
        assert said[name]["factor"] == pytest.approx(0.8)
    empty = contributions(np.zeros((2, len(COLUMNS))), (RNA, PATHOLOGY))
    assert empty[RNA] == {"patients": 0.0, "deviation": 0.0, "share": 0.0, "factor": 1.0}


def test_what_the_sites_saw_is_sent_with_the_next_round_and_kept_in_a_checkpoint() -> None:
    s = study(fusion__modulation="federated")
    model, strategy = build(s), EvidenceStrategy.of(s.aggregation, build(s))
    assert not strategy.arrays()[BRANCHES].any()
    total, _ = train_locally(model, strategy.weights, batch(), s, round_=1, seed=0, load=strategy.load)
    seen = total[BRANCHES].copy()
    strategy.take(total)
    assert np.array_equal(strategy.arrays()[BRANCHES], seen)
    other = EvidenceStrategy.of(s.aggregation, build(s))
    other.restore(strategy.state())
    assert np.array_equal(other.branches, seen)
