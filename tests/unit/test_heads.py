"""Heads: one that all cancer types share, one of each cancer's own beside it, and the classes'."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from oncofed.client.batch import Batch
from oncofed.client.train import train_locally
from oncofed.common.blocks import EVIDENCE
from oncofed.common.models.build import Sizes, build_model, get_weights
from oncofed.common.models.gene_moe import GeneMOE
from oncofed.common.models.heads import BY_CANCER, ClassHead, SurvivalHead
from oncofed.common.models.inputs import Inputs
from oncofed.common.study import Study

CANCERS = ("BRCA", "LUAD", "STAD")
GENES = 20
WIDE = {"model__width": 1024, "model__latent": 1024, "model__experts": 0, "model__attention_experts": 0}


def study(**keys: object) -> Study:
    """One full-batch gradient step on the mean loss, without noise."""
    base = {
        "model__size": "tiny",
        "model__dropout": 0.0,
        "model__gate_noise": False,
        "training__batch_size": 0,
        "training__local_steps": 1,
        "training__balance": 0.0,
        "training__clip_norm": 0.0,
        "training__weight_decay": 0.0,
        "training__learning_rate": 0.01,
    }
    return Study().changed(**(base | keys))


def build(s: Study, covariates: int = 0) -> GeneMOE:
    m = build_model(s, Sizes(GENES, CANCERS, 1, covariates))
    assert isinstance(m, GeneMOE)
    return m


def patients(n: int = 90, cancers: tuple[int, ...] = (0, 1, 2), covariates: int = 0) -> Batch:
    """Patients in one interval of follow-up; a third has no event."""
    rng = np.random.default_rng(0)
    time = torch.tensor(rng.exponential(10, n) + 0.1, dtype=torch.float32)
    return Batch(
        x_BG=torch.randn(n, GENES),
        v_BV=torch.randn(n, covariates),
        cancer_B=torch.tensor(cancers)[torch.arange(n) % len(cancers)],
        time_B=time,
        event_B=torch.tensor((rng.random(n) < 0.67).astype(np.float32)),
        exposure_BK=time[:, None],
        interval_B=torch.zeros(n, dtype=torch.long),
    )


def step(m: GeneMOE, batch: Batch, s: Study, weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    load = {group: np.full(n, 1.0 / n) for group, n in m.mixtures().items()}
    return train_locally(m, weights, batch, s, round_=1, seed=0, load=load)[0]


def most_likely_baseline(batch: Batch) -> np.ndarray:
    """Log of events over months by cancer type: with it the residuals of each cancer sum to 0."""
    events, months = (np.bincount(batch.cancer_B, weights=a, minlength=3) for a in (batch.event_B, batch.time_B))
    return np.log(events / months)[:, None].astype(np.float32)


@pytest.mark.parametrize("own", [0.0, 0.5, 2.0])
def test_a_step_from_near_zero_is_a_step_of_the_ridge_kernel(own: float) -> None:
    """d risk_i = -rate * sum_j (1 + own [c_i = c_j]) |w|^2 x_i.x_j r_j / n, with martingale residuals r (heads.py).

    In expectation over first weights: the wider the model, the closer.
    """
    s = study(model__cancer_head=own, aggregation__rule="fedavg", **WIDE)
    m, batch = build(s), patients()
    weights = {n: v.copy() for n, v in get_weights(m).items()}
    weights["head.log_baseline"] = most_likely_baseline(batch)
    with torch.no_grad():
        before = batch.through(m).risk.numpy()
    step(m, batch, s, weights)
    with torch.no_grad():
        change = batch.through(m).risk.numpy() - before
    x, cancer = batch.x_BG.numpy().astype(float), batch.cancer_B.numpy()
    hazard = np.exp(weights["head.log_baseline"][cancer, 0])
    residual = hazard * batch.time_B.numpy() - batch.event_B.numpy()
    # through the latent layer the norms are those of L'w; all are known before the step
    latent = weights["encoder.latent.weight"].astype(float)
    size = float(np.square(latent.T @ weights["head.shared"]).sum())
    products = -s.training.learning_rate * size * (x @ x.T) / len(x)
    shared, mine = products @ residual, ((cancer[:, None] == cancer[None]) * products) @ residual
    assert np.corrcoef(change, shared + own * mine)[0, 1] > 0.99
    share, ratio = np.linalg.lstsq(np.stack([shared, mine], axis=1), change, rcond=None)[0]
    assert share == pytest.approx(1.0, abs=0.15)
    assert ratio == pytest.approx(own, abs=0.15)


def test_own_of_zero_is_one_head_for_all() -> None:
    m = build(study(model__cancer_head=0.0))
    assert "head.own" not in dict(m.named_parameters())
    head = m.head
    z, v = torch.randn(6, 8), torch.zeros(6, 0)
    torch.testing.assert_close(head(z, torch.zeros(6, dtype=torch.long), v), head(z, torch.arange(6) % 3, v))
    torch.testing.assert_close(head.read(z, torch.arange(6) % 3, v)[0], z @ head.shared)


def test_the_own_head_is_weighed_by_the_root_of_its_ratio() -> None:
    head = SurvivalHead(latent=8, cancers=3, intervals=2, own=4.0, covariates=1, scale=1.0)
    z, v, cancer = torch.randn(6, 8), torch.randn(6, 1), torch.arange(6) % 3
    with torch.no_grad():
        head.covariates.shared.fill_(0.5)
    expected = z @ head.shared + 2.0 * (z * head.own[cancer]).sum(1) + 0.5 * v[:, 0]
    risk, baseline = head.read(z, cancer, v)
    torch.testing.assert_close(risk, expected)
    torch.testing.assert_close(baseline, head.log_baseline[cancer])


def test_rows_of_a_cancer_belong_to_its_block() -> None:
    owners = build(study(), covariates=2).blocks().owners
    assert {name for name, owner in owners.items() if name.startswith("head.") and owner != "trunk"} == {
        f"head.{name}" for name in BY_CANCER
    }
    for name in BY_CANCER:
        assert owners[f"head.{name}"] == tuple(f"cancer/{c}" for c in CANCERS)
    assert owners["head.shared"] == owners["head.covariates.shared"] == "trunk"


def test_a_cancer_without_patients_at_a_site_is_left_alone_there() -> None:
    s = study()
    m, batch = build(s, covariates=2), patients(cancers=(0, 2), covariates=2)
    total = step(m, batch, s, {n: v.copy() for n, v in get_weights(m).items()})
    names = list(m.blocks().names)
    evidence = {c: total[EVIDENCE][names.index(f"cancer/{c}")] for c in CANCERS}
    assert evidence == {"BRCA": 45.0, "LUAD": 0.0, "STAD": 45.0}
    for name in BY_CANCER:
        moved = np.abs(total[f"head.{name}"]).reshape(3, -1).max(1)
        assert moved[0] > 0, name
        assert moved[1] == 0, name
        assert moved[2] > 0, name


def test_after_pretraining_the_head_begins_at_zero_and_all_risks_with_it() -> None:
    batch = patients()
    fresh, prepared = build(study()), build(study(pretraining__rounds=1))
    assert (batch.through(fresh).risk != 0).any()
    assert (batch.through(prepared).risk == 0).all()


def test_the_class_head_does_not_see_the_cancer_type() -> None:
    head = ClassHead(latent=8, classes=3, covariates=2, scale=1.0)
    z, v = torch.randn(6, 8), torch.randn(6, 2)
    with torch.no_grad():
        head.covariates.shared.normal_()
    logits = head(z, torch.zeros(6, dtype=torch.long), v)
    torch.testing.assert_close(logits, head(z, torch.arange(6) % 3, v), rtol=0, atol=0)
    torch.testing.assert_close(logits, head.linear(z) + v @ head.covariates.shared)
    assert {n for n, _ in head.named_parameters()} == {"linear.weight", "linear.bias", "covariates.shared"}


def test_a_classifying_model_has_no_way_to_the_answer() -> None:
    """Neither the gate nor the head may depend on the cancer type that is to be told."""
    m = build(study(task__kind="classification"), covariates=1)
    x, v = torch.randn(9, GENES), torch.randn(9, 1)
    score = m(Inputs(x, torch.zeros(9, dtype=torch.long), v)).score
    assert score.shape == (9, 3)
    torch.testing.assert_close(score, m(Inputs(x, torch.arange(9) % 3, v)).score, rtol=0, atol=0)
    assert set(m.blocks().owners.values()) - {"trunk"} == {
        tuple(f"expert/{e}" for e in range(4)),
        tuple(f"attention/{e}" for e in range(3)),
        ("class/BRCA", "class/LUAD", "class/STAD"),
    }
