"""The gate, the experts and scalar-token attention."""

from __future__ import annotations

import pytest
import torch
from oncofed.common.models.layers import (
    AttentionExperts,
    ExpertLayer,
    NoisyTopKGate,
    balance_penalty,
    dropout,
    scalar_token_attention,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_gates_are_sparse_and_sum_to_one() -> None:
    gate = NoisyTopKGate(12, 6, 2)
    g, clean = gate.route(torch.randn(30, 12), torch.zeros(30, dtype=torch.long), generator())
    assert g.shape == clean.shape == (30, 6)
    assert ((g > 0).sum(1) == 2).all()
    torch.testing.assert_close(g.sum(1), torch.ones(30))


def test_gate_routes_by_input_not_to_the_same_experts() -> None:
    torch.manual_seed(0)
    gate = NoisyTopKGate(12, 6, 2)
    g, _ = gate.route(torch.randn(200, 12), torch.zeros(200, dtype=torch.long), None)
    assert (g.sum(0) > 0).sum() >= 5  # the original's zero, unregistered gate sends everybody to the same experts


def test_gate_noise_comes_from_the_generator_only() -> None:
    gate = NoisyTopKGate(12, 6, 2)
    x, c = torch.randn(9, 12), torch.zeros(9, dtype=torch.long)
    torch.manual_seed(1)
    a = gate.route(x, c, generator(5))[0]
    torch.manual_seed(2)
    torch.testing.assert_close(a, gate.route(x, c, generator(5))[0], rtol=0, atol=0)
    assert not torch.equal(a, gate.route(x, c, generator(6))[0])
    torch.testing.assert_close(gate.route(x, c, None)[0], gate.route(x, c, None)[0], rtol=0, atol=0)


def test_cancer_type_can_decide_the_route() -> None:
    gate = NoisyTopKGate(12, 4, 1, cancers=2)
    with torch.no_grad():
        gate.cancer.copy_(torch.tensor([[9.0, 0, 0, 0], [0, 0, 0, 9.0]]))
    g, _ = gate.route(torch.randn(10, 12), torch.tensor([0, 1] * 5), None)
    assert g.argmax(1).tolist() == [0, 3] * 5


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("seed", [None, 3])
def test_an_expert_switched_off_gets_nothing_and_the_others_share_everything(k: int, seed: int | None) -> None:
    gate = NoisyTopKGate(12, 4, k, cancers=2)
    x, c = torch.randn(50, 12), torch.arange(50) % 2
    draw = [None if seed is None else generator(seed) for _ in range(2)]
    whole, clean = gate.route(x, c, draw[0])
    g, clean_off = gate.route(x, c, draw[1], off=2)
    assert (g[:, 2] == 0).all()
    assert ((g > 0).sum(1) == min(k, 3)).all()  # the next best takes its place, where there is one
    torch.testing.assert_close(g.sum(1), torch.ones(50))
    torch.testing.assert_close(clean, clean_off, rtol=0, atol=0)  # what explains the gate does not change
    untouched = whole[:, 2] == 0
    torch.testing.assert_close(g[untouched], whole[untouched], rtol=0, atol=0)
    assert (whole[:, 2] > 0).any()


def test_experts_are_dealt_to_cancers_so_that_all_are_used_and_no_two_cancers_share_all() -> None:
    gate = NoisyTopKGate(12, 8, 2, cancers=8, prior=3.0)
    rows = gate.cancer.detach()
    assert ((rows == 3.0).sum(1) == 2).all()
    assert ((rows == 0.0).sum(1) == 6).all()
    assert (rows.sum(0) > 0).all()
    assert len({tuple(row) for row in rows.tolist()}) == 8
    assert (NoisyTopKGate(12, 8, 2, cancers=3).cancer == 0).all()


def sparse_gates(b: int, e: int, k: int) -> torch.Tensor:
    top, index = torch.randn(b, e, dtype=torch.float64).topk(k, dim=1)
    return torch.zeros(b, e, dtype=torch.float64).scatter(1, index, torch.softmax(top, 1))


@pytest.mark.parametrize(("experts", "k", "unused"), [(5, 2, None), (4, 1, 2), (3, 3, None)])
@pytest.mark.parametrize("kind", ["expert", "adapted", "attention"])
def test_routed_and_dense_dispatch_agree(kind: str, experts: int, k: int, unused: int | None) -> None:
    torch.manual_seed(0)
    rank = 3 if kind == "adapted" else 0
    layer = (AttentionExperts(experts, 7) if kind == "attention" else ExpertLayer(experts, 7, 7, rank=rank)).double()
    if rank:
        torch.nn.init.normal_(layer.adapter_out)
    x = torch.randn(17, 7, dtype=torch.float64)
    gate = sparse_gates(17, experts, k)
    if unused is not None:
        gate[:, unused] = 0.0
    gate.requires_grad_()
    grads = []
    outputs = []
    for dense in (True, False):
        layer.zero_grad()
        gate.grad = None
        y = layer.mix(x, gate, dense=dense)
        y.square().sum().backward()
        outputs.append(y.detach())
        grads.append([p.grad.clone() for p in layer.parameters()])
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if kind == "attention" else {"rtol": 1e-10, "atol": 1e-12}
    torch.testing.assert_close(outputs[0], outputs[1], **tolerance)
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, **tolerance)
    if unused is not None:
        assert all((g[unused] == 0).all() for g in grads[1])


def test_experts_merge_linearly() -> None:
    layer = ExpertLayer(3, 4, 5)
    x = torch.randn(6, 4)
    alone = torch.stack([layer.mix(x, torch.eye(3)[e].expand(6, 3)) for e in range(3)])
    g = torch.softmax(torch.randn(6, 3), 1)
    torch.testing.assert_close(layer.mix(x, g), torch.einsum("be,ebd->bd", g, alone))
    torch.testing.assert_close(alone[1], torch.tanh(x @ layer.weight[1] + layer.bias[1]))


def test_adapters_begin_as_the_identity_and_then_add_a_low_rank_to_the_weights() -> None:
    plain, adapted = ExpertLayer(3, 6, 5), ExpertLayer(3, 6, 5, rank=2)
    x, g = torch.randn(8, 6), sparse_gates(8, 3, 2).float()
    with torch.no_grad():
        adapted.weight.copy_(plain.weight)
        adapted.bias.normal_()
        plain.bias.copy_(adapted.bias)
        torch.testing.assert_close(adapted.mix(x, g), plain.mix(x, g), rtol=0, atol=0)
        adapted.adapter_out.normal_()
        assert not torch.allclose(adapted.mix(x, g), plain.mix(x, g))
        plain.weight += adapted.adapter_in @ adapted.adapter_out
    torch.testing.assert_close(adapted.mix(x, g), plain.mix(x, g), rtol=1e-5, atol=1e-6)


def test_attention_equals_its_definition() -> None:
    q, k, v = torch.randn(3, 4, 11).unbind(0)
    direct = torch.einsum("bij,bj->bi", torch.softmax(q[:, :, None] * k[:, None, :], -1), v)
    torch.testing.assert_close(scalar_token_attention(q, k, v), direct, rtol=1e-5, atol=1e-6)


def test_attention_stays_in_float32_under_bfloat16() -> None:
    q = torch.randn(2, 8).bfloat16()
    assert scalar_token_attention(q, q, q).dtype == torch.float32


def test_dropout_needs_a_generator_and_keeps_the_mean() -> None:
    x = torch.ones(200, 500)
    assert dropout(x, 0.4, None) is x
    y = dropout(x, 0.4, generator())
    assert abs(float(y.mean()) - 1.0) < 0.01
    assert abs(float((y == 0).float().mean()) - 0.4) < 0.01


def test_balance_penalty_is_separable_and_prefers_idle_experts() -> None:
    clean, load = torch.randn(8, 4), torch.tensor([0.7, 0.1, 0.1, 0.1])
    whole = balance_penalty(clean, load)
    torch.testing.assert_close(whole[3:4], balance_penalty(clean[3:4], load))
    busy, idle = torch.tensor([[9.0, 0, 0, 0]]), torch.tensor([[0, 9.0, 0, 0]])
    assert balance_penalty(busy, load) > balance_penalty(idle, load)
    even = torch.full((4,), 0.25)
    torch.testing.assert_close(balance_penalty(clean, even), torch.ones(8))
