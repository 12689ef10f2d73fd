"""Scalar-token attention: the interpolated form is the direct one, whatever the queries, keys and values."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from oncofed.common.models import attention
from oncofed.common.models.attention import (
    SelfAttention,
    attention_entropy,
    attention_weights,
    direct_attention,
    log_partition,
    scalar_token_attention,
)
from torch import Tensor

WAYS: tuple[SelfAttention, ...] = ("before", "after", "keep")


def textbook(q: Tensor, k: Tensor, v: Tensor, to_self: SelfAttention) -> Tensor:
    """The O(D^2) form as the paper's code has it, in double precision."""
    score = q.double()[..., :, None] * k.double()[..., None, :]
    diagonal = torch.eye(q.shape[-1], dtype=torch.bool)
    if to_self == "before":
        score = score.masked_fill(diagonal, -math.inf)
    weight = torch.softmax(score, dim=-1)
    if to_self == "after":
        weight = weight.masked_fill(diagonal, 0.0)
    return (weight * v.double()[..., None, :]).sum(-1)


def draw(scale: float, *shape: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(*shape, generator=generator) for _ in range(3))
    return q * scale, k * scale, v


@pytest.mark.parametrize("to_self", WAYS)
@pytest.mark.parametrize("scale", [1e-3, 0.03, 0.3, 0.6, 1.5])
def test_equals_the_direct_form_in_float32(scale: float, to_self: SelfAttention) -> None:
    q, k, v = draw(scale, 2, 3, 300)
    wanted = textbook(q, k, v, to_self)
    np.testing.assert_allclose(scalar_token_attention(q, k, v, to_self=to_self), wanted, atol=1e-6, rtol=1e-6)
    np.testing.assert_allclose(direct_attention(q, k, v, to_self=to_self), wanted, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("to_self", WAYS)
@pytest.mark.parametrize("scale", [0.03, 0.6, 1.5])
def test_gradients_equal_those_of_the_direct_form(scale: float, to_self: SelfAttention) -> None:
    inputs = [t.requires_grad_() for t in draw(scale, 2, 2, 60)]
    out = scalar_token_attention(*inputs, to_self=to_self)
    towards = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    got = torch.autograd.grad((out * towards).sum(), inputs)
    wanted = torch.autograd.grad((textbook(*inputs, to_self) * towards).sum(), inputs)
    for mine, theirs in zip(got, wanted, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5 * float(theirs.abs().max()), rtol=1e-4)


def test_both_forms_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    direct, series = attention.direct_attention, attention._series
    monkeypatch.setattr(attention, "direct_attention", lambda *a, **k: called.append("direct") or direct(*a, **k))
    monkeypatch.setattr(attention, "_series", lambda *a, **k: called.append("series") or series(*a, **k))
    scalar_token_attention(*draw(0.1, 1, 50), to_self="before")
    scalar_token_attention(*draw(5.0, 1, 50), to_self="before")
    assert called == ["series", "direct"]


@pytest.mark.parametrize("to_self", WAYS)
def test_one_patient_far_out_is_alone_in_the_direct_form(
    monkeypatch: pytest.MonkeyPatch, to_self: SelfAttention
) -> None:
    q, k, v = (t.requires_grad_() for t in draw(0.1, 4, 2, 50))
    with torch.no_grad():
        q[2, 1] *= 200.0
    seen: list[tuple[int, ...]] = []
    directly = attention._directly
    monkeypatch.setattr(attention, "_directly", lambda q, *rest: seen.append(tuple(q.shape)) or directly(q, *rest))
    out = scalar_token_attention(q, k, v, to_self=to_self)
    assert seen == [(1, 50)]
    wanted = textbook(q, k, v, to_self)
    np.testing.assert_allclose(out.detach(), wanted.detach(), atol=1e-6, rtol=1e-5)
    got = torch.autograd.grad(out.square().sum(), (q, k, v))
    for mine, theirs in zip(got, torch.autograd.grad(wanted.square().sum(), (q, k, v)), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5 * float(theirs.abs().max()), rtol=1e-3)


def test_nobody_attends_to_nothing() -> None:
    empty = torch.zeros(0, 3, 7)
    assert scalar_token_attention(empty, empty, empty).shape == (0, 3, 7)


numbers = st.floats(-4, 4, width=32)


@settings(max_examples=150, deadline=None)
@given(st.integers(2, 9).flatmap(lambda d: arrays(np.float32, (3, 2, d), elements=numbers)), st.sampled_from(WAYS))
def test_any_numbers(qkv: np.ndarray, to_self: SelfAttention) -> None:
    q, k, v = map(torch.from_numpy, qkv)
    np.testing.assert_allclose(
        scalar_token_attention(q, k, v, to_self=to_self), textbook(q, k, v, to_self), atol=2e-5, rtol=1e-5
    )


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 9).flatmap(lambda d: arrays(np.float32, (2, 2, d), elements=numbers)), st.sampled_from(WAYS))
def test_entropy_and_partition_of_any_numbers(qk: np.ndarray, to_self: SelfAttention) -> None:
    q, k = map(torch.from_numpy, qk)
    weight = attention_weights(q.double(), k.double(), to_self="keep" if to_self == "after" else to_self)
    wanted = -torch.special.xlogy(weight, weight).sum(-1)
    np.testing.assert_allclose(attention_entropy(q, k, to_self=to_self), wanted, atol=1e-6)
    assert (wanted <= math.log(q.shape[-1]) + 1e-9).all()
    z = log_partition(q, k, to_self=to_self)
    by_hand = torch.exp(q.double()[..., None] * k.double()[..., None, :] - z[..., None])
    np.testing.assert_allclose(by_hand.masked_fill(weight == 0, 0.0), weight, atol=1e-6)


def test_patients_do_not_meet() -> None:
    q, k, v = draw(0.5, 4, 2, 40)
    together = scalar_token_attention(q, k, v, to_self="before")
    alone = torch.cat([scalar_token_attention(*(t[i : i + 1] for t in (q, k, v)), to_self="before") for i in range(4)])
    np.testing.assert_allclose(together, alone, atol=1e-7)


def test_low_precision_never_reaches_the_scores() -> None:
    q, k, v = draw(0.2, 2, 100)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = scalar_token_attention(q, k, v)
    assert out.dtype == torch.float32
    np.testing.assert_allclose(out, textbook(q, k, v, "keep"), atol=1e-6)
    assert scalar_token_attention(*(t.double() for t in (q, k, v))).dtype == torch.float64


def test_one_token_and_equal_tokens() -> None:
    one = torch.ones(3, 1)
    np.testing.assert_allclose(scalar_token_attention(one, one, one * 2), 2 * one)
    equal = torch.full((2, 7), 0.5, requires_grad=True)
    out = scalar_token_attention(equal, equal, equal, to_self="before")
    np.testing.assert_allclose(out.detach(), equal.detach(), atol=1e-7)
    out.sum().backward()
    assert equal.grad is not None
    assert torch.isfinite(equal.grad).all()


def test_memory_and_time_grow_with_genes_and_not_with_their_square() -> None:
    """The largest tensor of the whole graph holds far fewer numbers than G^2 scores a head."""
    genes, sizes = 1700, []

    class Watch(torch.autograd.graph.saved_tensors_hooks):
        def __init__(self) -> None:
            super().__init__(lambda t: sizes.append(t.numel()) or t, lambda t: t)

    with Watch():
        inputs = [t.requires_grad_() for t in draw(0.17, 2, 5, genes)]
        scalar_token_attention(*inputs, to_self="before").sum().backward()
    assert max(sizes) < 2 * 5 * genes * 40 < 2 * 5 * genes**2 / 40
