"""Attribution of attention: complete, equal to the definition on the whole matrix, summed by class, and null where it must be."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from oncofed.client.attention_network import (
    between,
    entropy_sums,
    network_sums,
    paths,
    strength_sums,
    uniform,
)
from oncofed.client.batch import Batch
from oncofed.common.models.attention import SelfAttention, attention_weights
from oncofed.common.models.build import Sizes, build_model
from oncofed.common.models.t_gem import TGEM
from oncofed.common.study import Study

WAYS: tuple[SelfAttention, ...] = ("before", "after")
GENES, CLASSES = 14, ("A", "B", "C")


def model_of(to_self: SelfAttention = "before", layers: int = 2) -> TGEM:
    study = Study().changed(
        model__name="t_gem",
        task__kind="classification",
        model__layers=layers,
        model__heads=3,
        model__self_attention=to_self,
        model__first_layer_scale=1.0,
        model__activation="gelu",
        model__branch_scale=1.0,
    )
    model = build_model(study, Sizes(GENES, CLASSES, 1))
    assert isinstance(model, TGEM)
    with torch.no_grad():  # far from uniform, as after training
        for layer in model.attention:
            for scale in (layer.query, layer.key, layer.value):
                scale.weight.mul_(3.0)
    return model.eval()


def batch_of(patients: int = 9, seed: int = 0) -> Batch:
    x = torch.randn(patients, GENES, generator=torch.Generator().manual_seed(seed))
    zeros = torch.zeros(patients)
    label = torch.arange(patients) % len(CLASSES)
    return Batch(x, torch.zeros(patients, 0), label, zeros, zeros, torch.zeros(patients, 1), zeros.long())


def by_definition(model: TGEM, batch: Batch, layer: int, steps: int) -> torch.Tensor:
    """(A - A0) * integral of dF/dA, with the whole matrix of every head as a variable: `[B, G, G]`, heads summed."""
    inputs, seen = batch.inputs(), model.trace(batch.inputs())[layer]
    to_self = model.attention[layer].to_self
    weight = attention_weights(seen.q, seen.k, to_self=to_self).detach()
    base = torch.ones(GENES, GENES) / (GENES - 1 if to_self == "before" else GENES)
    if to_self != "keep":
        base = base * (1 - torch.eye(GENES))
    point, share = np.polynomial.legendre.leggauss(steps)
    total = torch.zeros_like(weight)
    for t, w in zip((point + 1) / 2, share / 2, strict=True):
        a = (base + float(t) * (weight - base)).requires_grad_()
        logits = model.score_from(layer, seen.x.detach(), (a * seen.v.detach()[:, :, None, :]).sum(-1), inputs)
        chosen = torch.log_softmax(logits, 1).gather(1, batch.cancer_B[:, None]).sum()
        total += float(w) * torch.autograd.grad(chosen, a)[0]
    return ((weight - base) * total).sum(1)


@pytest.mark.parametrize("to_self", WAYS)
def test_equals_the_definition_on_the_whole_matrix(to_self: SelfAttention) -> None:
    model, batch = model_of(to_self), batch_of()
    everyone = torch.arange(len(batch))
    for n, path in enumerate(paths(model, batch, batch.cancer_B, 8)):
        got = between(path, everyone, torch.arange(GENES), to_self)
        np.testing.assert_allclose(got.detach(), by_definition(model, batch, n, 8), atol=2e-6, rtol=1e-4)
        some = torch.tensor([1, 4, 9])
        np.testing.assert_allclose(between(path, everyone, some, to_self), got[:, some][:, :, some], atol=1e-7)


@pytest.mark.parametrize("to_self", WAYS)
def test_attributions_add_up_to_the_change_from_uniform_attention(to_self: SelfAttention) -> None:
    model, batch = model_of(to_self), batch_of()
    for n, path in enumerate(paths(model, batch, batch.cancer_B, 128)):
        total = between(path, torch.arange(len(batch)), torch.arange(GENES), to_self).sum((1, 2))
        np.testing.assert_allclose(total, path.change, atol=2e-3 * float(path.change.abs().max()))
        assert path.change.abs().max() > 1e-2
        assert path.error.max() < 2e-3 * path.change.abs().max()
        end = torch.log_softmax(model(batch.inputs()).score, 1).gather(1, batch.cancer_B[:, None]).squeeze(1)
        o0 = uniform(path.seen.v, model.attention[n].to_self)
        begin = torch.log_softmax(model.score_from(n, path.seen.x, o0, batch.inputs()), 1)
        np.testing.assert_allclose(
            path.change, (end - begin.gather(1, batch.cancer_B[:, None]).squeeze(1)).detach(), atol=1e-5
        )


def test_strength_is_the_margin_of_all_pairs() -> None:
    model, batch = model_of(), batch_of()
    wanted = np.zeros((3, 2, GENES))
    for path in paths(model, batch, batch.cancer_B, 8):
        whole = between(path, torch.arange(len(batch)), torch.arange(GENES), "before").numpy()
        np.add.at(wanted, batch.cancer_B.numpy(), np.stack([whole.sum(2), whole.sum(1)], axis=1))
    got = strength_sums(model, batch, 3, 8)
    np.testing.assert_allclose(got["network/strength"], wanted, atol=1e-5)
    assert got["network/patients"].tolist() == [3, 3, 3]


def test_sums_of_two_halves_are_the_sum_of_all() -> None:
    """So hospitals can be added: nothing but the random labels depends on who is asked with whom."""
    model, batch = model_of(), batch_of(20)
    genes = np.tile(np.array([0, 3, 5, 8]), (3, 1))
    halves = [batch.select(torch.arange(0, 11)), batch.select(torch.arange(11, 20))]

    def sums(b: Batch) -> dict[str, np.ndarray]:
        network = network_sums(model, b, genes, 4, 2, np.random.default_rng(0))
        kept = {k: v for k, v in network.items() if "null" not in k and k not in ("network/covered", "network/total")}
        return kept | strength_sums(model, b, 3, 4) | entropy_sums(model, b, 3)

    whole, parts = sums(batch), [sums(h) for h in halves]
    for name, value in whole.items():
        np.testing.assert_allclose(value, parts[0][name] + parts[1][name], atol=1e-5, err_msg=name)


def test_null_networks_are_of_other_patients_and_differ() -> None:
    model, batch = model_of(), batch_of(24)
    genes = np.tile(np.arange(GENES), (3, 1))
    for label in ([0, 1, 2], [0, 1]):  # with two classes there is but one other class to name
        some = batch.select(torch.nonzero(batch.cancer_B < len(label)).squeeze(1))
        total = network_sums(model, some, genes, 4, 3, np.random.default_rng(1))
        counts = np.stack([total[f"network/null-patients-{d}"] for d in range(3)])
        others = [int((some.cancer_B != c).sum()) for c in range(3)]
        assert (counts == [min(20, n // 2) for n in others]).all()
        first, second = total["network/null-0"], total["network/null-1"]
        assert all(not np.allclose(first[c], second[c]) for c in range(3))


def test_a_null_network_is_the_attribution_of_others_towards_the_class() -> None:
    """Of a federation whose only other patient is one: the half of one is nobody, of two it is one of them."""
    model, batch = model_of(), batch_of(3)
    genes = np.tile(np.arange(GENES), (3, 1))
    total = network_sums(model, batch, genes, 4, 1, np.random.default_rng(0))
    assert total["network/null-patients-0"].tolist() == [1, 1, 1]
    towards_a = [
        np.stack(
            [
                between(p, torch.tensor([0]), torch.arange(GENES), "before")[0].numpy()
                for p in paths(model, batch.select(torch.tensor([i])), torch.tensor([0]), 4)
            ]
        )
        for i in (1, 2)
    ]
    assert any(np.allclose(total["network/null-0"][0], one, atol=1e-6) for one in towards_a)


def test_entropy_of_uniform_attention_is_the_logarithm_of_the_others() -> None:
    model, batch = model_of(), batch_of()
    with torch.no_grad():
        for layer in model.attention:
            layer.query.weight.zero_()
    total = entropy_sums(model, batch, 3)
    np.testing.assert_allclose(
        total["attention/entropy"] / total["attention/patients"][:, None, None], np.log(GENES - 1), atol=1e-6
    )


def test_all_genes_cover_all_attribution() -> None:
    model, batch = model_of(), batch_of()
    for genes, whole in ((np.arange(GENES), True), (np.arange(4), False)):
        total = network_sums(model, batch, np.tile(genes, (3, 1)), 4, 1, np.random.default_rng(0))
        share = total["network/covered"] / total["network/total"]
        assert np.allclose(share, 1.0, atol=1e-4) if whole else (share < 0.9).all()
