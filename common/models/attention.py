"""Attention between scalar tokens: each of D numbers of a patient asks all others, with a scalar query, key and value.

    o_i = sum_j softmax_j(q_i k_j) v_j                                          (t_gem.md, section 1)

A query's row is one function of one number: o(q) = N(q) / Z(q), N(q) = sum_j exp(q k_j) v_j, Z(q) = sum_j exp(q k_j). Both
are entire functions, so a Chebyshev interpolation in q (Trefethen 2013, ch. 4 and 8) takes M of D queries, M some ten to
forty, and gives the others to rounding: D M steps in the place of D^2, and as much less memory. Where scores are too far
apart for that in double precision, rows are computed directly, a few queries at a time, and again in the backward pass.
Each patient attends within itself only. Nothing here has parameters, so per-sample gradients of what has some go round it by
hooks; it cannot be traced by functorch, as the number of points depends on the data. Shapes: `[..., D]` throughout.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as functional
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

SelfAttention = Literal["before", "after", "keep"]
"""Whether token i attends to itself: its weight is taken out before the softmax (rows sum to 1), after it, or kept."""

REACH = 9.0
"""Largest max|q| * max|k| (keys centred) of the interpolation: what is left of Z without a token that takes nearly all of it
is exp(-2 REACH) of Z at least, and double precision must hold that to 1e-7."""

WIDEST = 0.05
"""Least half-width of the interval of queries: a narrower one would divide rounding errors by it."""

PRECISION = 1e-11
CHUNK = 2**22
"""Scores that the direct form holds at once."""


def scalar_token_attention(q: Tensor, k: Tensor, v: Tensor, *, to_self: SelfAttention = "keep") -> Tensor:
    """`o [..., D]`, in float32 at least: bfloat16 destroys the branch (t_gem.md, fact 7)."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    if not q.numel():
        return torch.zeros_like(q, dtype=dtype)
    with torch.autocast(q.device.type, enabled=False):
        near = _near(q, k)
        if near.all():
            return _series(q, k, v, to_self)[0].to(dtype)
        if not near.any():
            return _directly(q.to(dtype), k.to(dtype), v.to(dtype), to_self)
        # one patient far out must not take the others with her
        order = torch.cat([torch.nonzero(near.flatten()), torch.nonzero(~near.flatten())]).squeeze(1)
        few = int(near.sum())
        a, b, c = (t.reshape(-1, t.shape[-1])[order] for t in (q, k, v))
        close = _series(a[:few], b[:few], c[:few], to_self)[0]
        far = _directly(a[few:].to(dtype), b[few:].to(dtype), c[few:].to(dtype), to_self)
        both = torch.cat([close.to(dtype), far])
        return both[torch.argsort(order)].reshape(q.shape)


def _directly(q: Tensor, k: Tensor, v: Tensor, to_self: SelfAttention) -> Tensor:
    if to_self == "keep":  # all rows as heads of one batch: of other shapes the kernel writes down all pairs
        a, b, c = (t.reshape(1, -1, t.shape[-1], 1) for t in (q, k, v))
        return functional.scaled_dot_product_attention(a, b, c, scale=1.0).reshape(q.shape)
    return direct_attention(q, k, v, to_self=to_self)


def log_partition(q: Tensor, k: Tensor, *, to_self: SelfAttention = "keep") -> Tensor:
    """log Z `[..., D]` of each query: its weights are A_ij = exp(q_i k_j) / Z_i. Double precision."""
    return _partition(q, k, to_self)[0]


def attention_entropy(q: Tensor, k: Tensor, *, to_self: SelfAttention = "keep") -> Tensor:
    """Entropy `[..., D]` in nats of each query's weights, -sum_j A_ij ln A_ij = ln Z - q_i sum_j A_ij k_j; at most ln D.

    `after` leaves rows that do not sum to 1; as its authors do, their entropy is that of the softmax with the token itself.
    """
    log_z, mean_k = _partition(q, k, to_self)
    return log_z - q.double() * mean_k


def _partition(q: Tensor, k: Tensor, to_self: SelfAttention) -> tuple[Tensor, Tensor]:
    """log Z and the mean key under the weights, both `[..., D]`; `after` takes nothing out of the softmax."""
    to_self = "keep" if to_self == "after" else to_self
    q, k = q.double(), k.double()
    if bool(_near(q, k).all()):
        mean_k, log_z = _series(q, k, None, to_self, log_z=True)
        return log_z, mean_k
    log_z_parts, mean_parts = [], []
    for i in _chunks(q):
        scores = _scores(q[..., i, None], k, i, to_self)
        log_z_parts.append(torch.logsumexp(scores, dim=-1))
        mean_parts.append((torch.softmax(scores, dim=-1) * k[..., None, :]).sum(-1))
    return torch.cat(log_z_parts, dim=-1), torch.cat(mean_parts, dim=-1)


def direct_attention(q: Tensor, k: Tensor, v: Tensor, *, to_self: SelfAttention = "keep") -> Tensor:
    """The same from all D^2 scores, some queries at a time, which are computed anew in the backward pass."""
    rows: list[Tensor] = []
    for i in _chunks(q):
        part = q[..., i, None]
        several = torch.is_grad_enabled() and len(i) < q.shape[-1]
        rows.append(
            checkpoint(_row, part, k, v, i, to_self, use_reentrant=False) if several else _row(part, k, v, i, to_self)
        )
    return torch.cat(rows, dim=-1)


def attention_weights(q: Tensor, k: Tensor, *, to_self: SelfAttention = "keep") -> Tensor:
    """All weights `A [..., D, D]`, queries in rows."""
    everyone = torch.arange(q.shape[-1], device=q.device)
    weights = torch.softmax(_scores(q[..., None], k, everyone, to_self), dim=-1)
    return weights * (1 - torch.eye(len(everyone), device=q.device, dtype=q.dtype)) if to_self == "after" else weights


def _row(q: Tensor, k: Tensor, v: Tensor, i: Tensor, to_self: SelfAttention) -> Tensor:
    weights = torch.softmax(_scores(q, k, i, to_self), dim=-1)
    o = (weights * v[..., None, :]).sum(-1)
    if to_self == "after":
        o = o - weights.gather(-1, i.expand(weights.shape[:-1])[..., None]).squeeze(-1) * v[..., i]
    return o


def _scores(q: Tensor, k: Tensor, i: Tensor, to_self: SelfAttention) -> Tensor:
    """Scores `[..., len(i), D]` of queries `i`, their own entry -inf where it is taken out before the softmax."""
    scores = q * k[..., None, :]
    if to_self == "before":
        own = torch.zeros(len(i), k.shape[-1], dtype=torch.bool, device=k.device).scatter(1, i[:, None], True)
        scores = scores.masked_fill(own, -math.inf)
    return scores


def _chunks(q: Tensor) -> Iterator[Tensor]:
    size = max(1, CHUNK // max(1, q.numel()))
    yield from torch.arange(q.shape[-1], device=q.device).split(size)


# -- interpolation -------------------------------------------------------------------------------------------------------


def _near(q: Tensor, k: Tensor) -> Tensor:
    """Whose scores are close enough together, booleans `[...]`; a device without double precision goes the direct way."""
    with torch.no_grad():
        half_k = (k.amax(-1) - k.amin(-1)) / 2
        near = (q.abs().amax(-1) + WIDEST) * half_k <= REACH
        return near & (q.device.type != "mps") & (q.shape[-1] > 1)


def _series(
    q: Tensor, k: Tensor, values: Tensor | None, to_self: SelfAttention, *, log_z: bool = False
) -> tuple[Tensor, Tensor]:
    """The weighted mean of `values` (without any, of the keys) in double precision and, with `log_z`, the logarithm of Z.

    The factor exp(q * middle of the keys) is common to N and Z: taken out, Z is at least 1 and at most D exp(REACH).
    """
    q, k = q.double(), k.double()
    v = k if values is None else values.double()
    shift = ((k.amin(-1, keepdim=True) + k.amax(-1, keepdim=True)) / 2).detach()
    k = k - shift
    n, z = _Interpolated.apply(q, k, v)
    if to_self == "before":
        own = torch.exp(q * k)
        z, n = z - own, n - own * v
    o = n / z
    if to_self == "after":
        o = o - torch.exp(q * k) / z * v
    return o, z.log() + q * shift if log_z else z


class _Interpolated(torch.autograd.Function):
    """N(q_i) = sum_j exp(q_i k_j) v_j and Z(q_i) = sum_j exp(q_i k_j) `[..., D]` of double-precision q, k, v.

    exp(q_i k_j) = sum_m P_im exp(x_m k_j) with Chebyshev points x_m in the interval of the queries, so both directions are
    products with P `[D, M]` and with the kernel at the points `[M, D]`; so are the derivatives, whose sums over j hold k_j.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        low, high = q.amin(-1, keepdim=True), q.amax(-1, keepdim=True)
        middle, half = (low + high) / 2, ((high - low) / 2).clamp(min=WIDEST)
        m = _nodes(float((half * k.abs().amax(-1, keepdim=True)).max()), k.shape[-1])
        angle = (torch.arange(m, device=q.device, dtype=torch.float64) + 0.5) * (math.pi / m)
        # values at the points -> coefficients of T_0 ... T_{m-1}: the discrete cosine transform
        to_coefficients_MM = torch.cos(torch.arange(m, device=q.device)[:, None] * angle) * (2.0 / m)
        to_coefficients_MM[0] /= 2
        x = middle + half * torch.cos(angle)
        kernel = torch.exp_(x[..., None] * k[..., None, :])
        polynomials = to_coefficients_MM.t() @ _chebyshev((q - middle) / half, m)
        at_points = kernel @ torch.stack([v, torch.ones_like(v), k * v, k], dim=-1)
        n, z, dn, dz = (polynomials.transpose(-1, -2) @ at_points).unbind(-1)
        ctx.save_for_backward(x, v, kernel, polynomials, dn, dz)
        return n, z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_n: Tensor, grad_z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, v, kernel, polynomials, dn, dz = ctx.saved_tensors
        pull_n, pull_z = (polynomials @ torch.stack([grad_n, grad_z], dim=-1)).unbind(-1)
        pulls = torch.stack([pull_n, x * pull_n, x * pull_z], dim=-1)
        grad_v, grad_kv, grad_k = (kernel.transpose(-1, -2) @ pulls).unbind(-1)
        return grad_n * dn + grad_z * dz, grad_kv * v + grad_k, grad_v


def _nodes(reach: float, tokens: int) -> int:
    """Points that bring the error below PRECISION: of exp(reach t) it is about (reach / 2)^M / M!, for each token."""
    m, term = 2, tokens * (reach / 2) ** 2 / 2
    while term > PRECISION:
        m += 1
        term *= reach / 2 / m
    return m + 2


def _chebyshev(t: Tensor, m: int) -> Tensor:
    """T_0(t) ... T_{m-1}(t), `[..., m, D]`."""
    out = t.new_empty(*t.shape[:-1], m, t.shape[-1])
    out[..., 0, :], out[..., 1, :] = 1.0, t
    for n in range(2, m):
        torch.mul(t, out[..., n - 1, :], out=out[..., n, :]).mul_(2).sub_(out[..., n - 2, :])
    return out
