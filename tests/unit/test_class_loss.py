"""Losses of classification: focal, priors by class, and what a site that lacks a class may say of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from oncofed.client.batch import Batch
from oncofed.client.objectives import Classification, class_log_prior
from oncofed.client.train import train_locally
from oncofed.common.blocks import EVIDENCE
from oncofed.common.models.build import Predictor, Sizes, build_model, get_weights
from oncofed.common.study import Study

GENES, CLASSES = 12, ("A", "B", "C")


def study(**keys: object) -> Study:
    base = {"model__name": "t_gem", "model__layers": 0, "model__activation": "none", "task__kind": "classification"}
    return Study().changed(**(base | keys))


def batch_of(label: list[int], seed: int = 0) -> Batch:
    n = len(label)
    x = torch.randn(n, GENES, generator=torch.Generator().manual_seed(seed))
    zeros = torch.zeros(n)
    return Batch(x, torch.zeros(n, 0), torch.tensor(label), zeros, zeros, torch.zeros(n, 1), zeros.long())


def model_of(s: Study) -> Predictor:
    return build_model(s, Sizes(GENES, CLASSES, 1))  # type: ignore[return-value]


def log_prior(kind: str, here: list[float], everywhere: list[float], strength: float = 1.0) -> torch.Tensor | None:
    s = study(task__class_prior=kind, task__prior_strength=strength)
    return class_log_prior(s, torch.tensor(here), torch.tensor(everywhere))


def test_focal_loss_is_that_of_the_paper() -> None:
    s, batch = study(task__class_loss="focal", task__focal_gamma=2.0), batch_of([0, 1, 2, 1])
    model = model_of(s)
    with torch.no_grad():
        model.head.linear.weight.normal_()  # type: ignore[union-attr, operator]
    output, loss = Classification(s.task).run(model, batch, None)
    p = torch.softmax(output.score, 1)[torch.arange(4), batch.cancer_B]
    torch.testing.assert_close(loss, (-((1 - p) ** 2) * p.log()).mean())
    plain = Classification(study(task__class_loss="focal", task__focal_gamma=0.0).task).run(model, batch, None)[1]
    torch.testing.assert_close(plain, torch.nn.functional.cross_entropy(output.score, batch.cancer_B))


def test_focal_loss_of_a_certain_patient_has_a_finite_gradient() -> None:
    s, batch = study(task__class_loss="focal", task__focal_gamma=0.5), batch_of([0])
    model = model_of(s)
    with torch.no_grad():
        model.head.linear.bias.copy_(torch.tensor([200.0, 0.0, 0.0]))  # type: ignore[union-attr, operator]
    Classification(s.task).run(model, batch, None)[1].backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_priors() -> None:
    here, everywhere = [6.0, 2.0, 0.0], [10.0, 20.0, 70.0]
    assert log_prior("none", here, everywhere) is None
    torch.testing.assert_close(log_prior("mask", here, everywhere), torch.tensor([0.0, 0.0, -torch.inf]))
    torch.testing.assert_close(log_prior("federation", here, everywhere), torch.tensor([0.1, 0.2, 0.7]).log())
    torch.testing.assert_close(log_prior("site", here, everywhere), torch.tensor([0.75, 0.25, 0.0]).log())
    torch.testing.assert_close(log_prior("site", here, everywhere, 0.5), torch.tensor([0.75, 0.25, 0.0]).log() * 0.5)
    assert class_log_prior(Study(), torch.ones(3), torch.ones(3)) is None


def test_adjusted_logits_forget_how_large_classes_are() -> None:
    """Without a gene that tells anything, the best adjusted logits are equal: shares of 0.9 and 0.1 leave no trace (Menon et al. 2021)."""
    label = [0] * 90 + [1] * 10 + [2] * 50
    batch = batch_of(label)
    batch = Batch(**{**vars(batch), "x_BG": torch.zeros(len(label), GENES)})
    bias = {}
    for kind in ("none", "federation"):
        s = study(
            task__class_prior=kind,
            training__local_steps=300,
            training__batch_size=0,
            training__learning_rate=0.5,
            training__weight_decay=0.0,
        )
        model = model_of(s)
        total, _ = train_locally(
            model, get_weights(model) | {}, batch, s, round_=1, seed=0, load={}, classes=np.bincount(label)
        )
        assert total
        bias[kind] = model.head.linear.bias.detach().numpy()  # type: ignore[union-attr]
    np.testing.assert_allclose(bias["federation"] - bias["federation"].mean(), 0.0, atol=1e-2)
    wanted = np.log(np.bincount(label))
    np.testing.assert_allclose(bias["none"] - bias["none"].mean(), wanted - wanted.mean(), atol=2e-2)


@pytest.mark.parametrize(("kind", "moves"), [("none", True), ("federation", True), ("mask", False), ("site", False)])
def test_a_site_without_a_class_says_nothing_of_it_when_it_is_masked(kind: str, moves: bool) -> None:
    s = study(
        task__class_prior=kind, training__learning_rate=0.1, training__weight_decay=0.5, model__first_layer_scale=1.0
    )
    model, batch = model_of(s), batch_of([0, 0, 0, 2, 2, 0])  # nobody has B
    total, _ = train_locally(
        model,
        {k: v.copy() for k, v in get_weights(model).items()},
        batch,
        s,
        round_=1,
        seed=0,
        load={},
        classes=np.array([4, 9, 2]),
    )
    evidence = dict(zip(model.blocks().names, total[EVIDENCE], strict=True))
    assert evidence["class/A"] == evidence["class/C"] == 6
    assert bool(evidence["class/B"] > 0) is moves
    assert bool(np.any(total["head.linear.weight"][1])) is moves
    assert np.any(total["head.linear.weight"][0])


def test_held_out_loss_is_of_plain_logits() -> None:
    s, batch = study(task__class_prior="site", task__class_loss="focal"), batch_of([0, 1, 2])
    model, objective = model_of(s), Classification(s.task, torch.tensor([0.0, -3.0, -torch.inf]))
    output = batch.through(model)
    torch.testing.assert_close(
        objective.losses(output, batch),
        torch.nn.functional.cross_entropy(output.score, batch.cancer_B, reduction="none"),
    )
