"""What the attention between genes does in a trained T-GEM: how focused each head is, and which gene speaks through which.

The attention attribution of query gene i and key gene j in one layer (t_gem.md, section 4.3) is

    Attr_ij = (A_ij - A0_ij) * integral_0^1 dF(A0 + t (A - A0)) / dA_ij dt = (A_ij - A0_ij) * g_i * v_j,

summed over heads, with A0 uniform (the attention at input 0), F the log-probability of the class, v the layer's values and
g_i the integral of dF/do_i on the straight path of the heads' outputs o from A0 v to A v: F sees A through o alone. So the
integral costs G numbers and not G^2, and Attr adds up to F(A) - F(A0). Shapes: B patients, L layers, H heads, G genes,
C classes, K genes of a network.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from oncofed.client.attributions import of_class
from oncofed.client.batch import Batch
from oncofed.common.blocks import Sum
from oncofed.common.models.attention import (
    SelfAttention,
    attention_entropy,
    attention_weights,
    log_partition,
    scalar_token_attention,
)
from oncofed.common.models.inputs import Inputs
from oncofed.common.models.t_gem import TGEM, Seen
from torch import Tensor

OTHERS = 20
"""Patients of other classes, at most, in a permuted network of a class; half of them all where they are fewer than twice as
many, so that draws differ."""

CHUNK = 16
"""Patients whose paths are held at once."""

WHOLE = 12
"""Patients of a class at most whose whole G x G attribution is looked at, to say how much of it the network's genes hold."""


@dataclass(frozen=True)
class Path:
    """One layer of some patients: what it did, the integrated gradients `g [B, H, G]` of its heads' outputs, and how far
    their sum is from the change of the score that it explains: `error` and `change` `[B]`."""

    seen: Seen
    g: Tensor
    error: Tensor
    change: Tensor


def entropy_sums(model: TGEM, batch: Batch, classes: int) -> Sum:
    """`attention/entropy [C, L, H]`, the sum over patients of the mean over genes, and `attention/patients [C]`."""
    layers = model.attention
    total = torch.zeros(classes, len(layers), len(layers[0].mix.weight), dtype=torch.float64)
    with torch.no_grad():
        for part in _parts(batch):
            for n, (layer, seen) in enumerate(zip(layers, model.trace(part.inputs()), strict=True)):
                mean_BH = attention_entropy(seen.q, seen.k, to_self=layer.to_self).mean(-1)
                total[:, n].index_add_(0, part.cancer_B.cpu(), mean_BH.double().cpu())
    return {"attention/entropy": total.numpy(), "attention/patients": _count(batch.cancer_B, classes)}


def strength_sums(model: TGEM, batch: Batch, classes: int, steps: int) -> Sum:
    """`network/strength [C, 2, G]`: each gene's attribution as a query and as a key, layers together, summed by class.

    Genes of a network are chosen by them: all pairs of a pathway panel would be millions of numbers a class.
    """
    total = torch.zeros(classes, 2, batch.x_BG.shape[1], dtype=torch.float64)
    for part in _parts(batch):
        for n, path in enumerate(paths(model, part, part.cancer_B, steps)):
            s, to_self = path.seen, model.attention[n].to_self
            as_query = (path.g * (s.o - uniform(s.v, to_self))).sum(1)
            v = s.v.detach().requires_grad_()
            with torch.enable_grad():
                o = scalar_token_attention(s.q, s.k, v, to_self=to_self) - uniform(v, to_self)
                (pull,) = torch.autograd.grad((path.g * o).sum(), v)
            both = torch.stack([as_query, (v.detach() * pull).sum(1)], dim=1)
            total.index_add_(0, part.cancer_B.cpu(), both.double().cpu())
    return {"network/strength": total.numpy(), "network/patients": _count(batch.cancer_B, classes)}


def network_sums(
    model: TGEM, batch: Batch, genes_CK: np.ndarray, steps: int, draws: int, rng: np.random.Generator
) -> Sum:
    """Attributions between the genes of each class's network, and the same of patients of other classes.

    `network/edges [C, L, K, K]` (queries in rows) over the patients of a class, `network/patients [C]`; for draw d
    `network/null-d [C, L, K, K]` and `network/null-patients-d [C]`: of some patients of other classes, drawn at random, as if
    they were of the class.
    `network/error` and `network/change [C, L]` say how exact the attributions are, `network/covered` and `network/total [C]`
    how much of all of them lies between the network's genes.
    """
    classes, layers = len(genes_CK), len(model.attention)
    genes = torch.tensor(genes_CK).to(batch.x_BG.device)
    k = genes.shape[1]
    total: Sum = {"network/patients": _count(batch.cancer_B, classes)}
    total |= {f"network/{name}": np.zeros((classes, layers)) for name in ("error", "change")}
    total |= {f"network/{name}": np.zeros(classes) for name in ("covered", "total")}
    everybody = torch.arange(len(batch), device=batch.cancer_B.device)
    asked = {"edges": (everybody, batch.cancer_B)}
    for d in range(draws):
        asked[f"null-{d}"] = _others(batch.cancer_B, classes, rng)
        total[f"network/null-patients-{d}"] = _count(asked[f"null-{d}"][1], classes)
    for name, (who, aims) in asked.items():
        edges = np.zeros((classes, layers, k, k))
        for rows, aim_B in zip(who.split(CHUNK), aims.split(CHUNK), strict=True) if len(who) else ():
            for n, path in enumerate(paths(model, batch.select(rows), aim_B, steps)):
                to_self = model.attention[n].to_self
                for c in torch.unique(aim_B).tolist():
                    mine = torch.nonzero(aim_B == c).squeeze(1)
                    edges[c, n] += between(path, mine, genes[c], to_self).sum(0).cpu().numpy()
                    if name == "edges":
                        total["network/error"][c, n] += float(path.error[mine].sum())
                        total["network/change"][c, n] += float(path.change[mine].abs().sum())
        total[f"network/{name}"] = edges
    for c in np.unique(batch.cancer_B.cpu().numpy()):
        some = batch.select(torch.nonzero(batch.cancer_B == c).squeeze(1)[:WHOLE])
        covered, everything = _coverage(model, some, genes[c], steps)
        total["network/covered"][c], total["network/total"][c] = covered, everything
    return total


def _others(class_B: Tensor, classes: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Rows of patients, and for each the class that is not hers which she is attributed towards."""
    label = class_B.cpu().numpy()
    rows, aims = [], []
    for c in range(classes):
        others = rng.permutation(np.flatnonzero(label != c))
        rows.append(others[: min(OTHERS, len(others) // 2)])
        aims.append(np.full(len(rows[-1]), c))
    return tuple(torch.from_numpy(np.concatenate(x)).to(class_B.device) for x in (rows, aims))  # type: ignore[return-value]


def paths(model: TGEM, batch: Batch, class_B: Tensor, steps: int) -> Iterator[Path]:
    """Each layer in turn: the gradients of the class's log-probability along the path from uniform attention.

    `model.score_from` lets what follows the layer respond. Gauss-Legendre quadrature with `steps` points.
    """
    inputs = batch.inputs()
    point, weight = np.polynomial.legendre.leggauss(steps)
    with torch.no_grad():
        trace = model.trace(inputs)
    for n, seen in enumerate(trace):
        start = uniform(seen.v, model.attention[n].to_self)
        g = torch.zeros_like(seen.o)
        for t, w in zip((point + 1) / 2, weight / 2, strict=True):
            o = (start + float(t) * (seen.o - start)).requires_grad_()
            with torch.enable_grad():
                value = of_class(model.score_from(n, seen.x, o, inputs), class_B).sum()
                (gradient,) = torch.autograd.grad(value, o)
            g += float(w) * gradient
        with torch.no_grad():
            end, begin = (_value(model, n, seen, o, inputs, class_B) for o in (seen.o, start))
        change = end - begin
        explained = (g * (seen.o - start)).sum((1, 2))
        yield Path(seen, g, (change - explained).abs(), change)


def between(path: Path, rows: Tensor, genes_K: Tensor, to_self: SelfAttention) -> Tensor:
    """Attributions `[rows, K, K]` between some genes, queries in rows, summed over heads."""
    s = path.seen
    q, k, v, g = (t[rows][..., genes_K].double() for t in (s.q, s.k, s.v, path.g))
    log_z = log_partition(s.q[rows], s.k[rows], to_self=to_self)[..., genes_K]
    weight = torch.exp(q[..., None] * k[..., None, :] - log_z[..., None])
    if to_self != "keep":
        weight = weight * (1 - torch.eye(len(genes_K), device=weight.device, dtype=weight.dtype))
    gain = (weight - _uniform_weight(s.q.shape[-1], len(genes_K), to_self, weight)) * g[..., None] * v[..., None, :]
    return gain.sum(1)


def uniform(v: Tensor, to_self: SelfAttention) -> Tensor:
    """What heads give when each gene attends to all others alike: `[B, H, G]`."""
    n = v.shape[-1]
    if to_self == "keep":
        return v.mean(-1, keepdim=True).expand_as(v)
    return (v.sum(-1, keepdim=True) - v) / (n if to_self == "after" else n - 1)


def _uniform_weight(genes: int, k: int, to_self: SelfAttention, like: Tensor) -> Tensor:
    eye = torch.eye(k, device=like.device, dtype=like.dtype)
    return {"keep": torch.ones_like(eye) / genes, "after": (1 - eye) / genes, "before": (1 - eye) / (genes - 1)}[
        to_self
    ]


def _value(model: TGEM, n: int, seen: Seen, o: Tensor, inputs: Inputs, class_B: Tensor) -> Tensor:
    return of_class(model.score_from(n, seen.x, o, inputs), class_B)


def _coverage(model: TGEM, batch: Batch, genes_K: Tensor, steps: int) -> tuple[float, float]:
    """Sum of |attribution| between the network's genes, and between all genes, over layers."""
    covered = everything = 0.0
    everyone = torch.arange(len(batch), device=genes_K.device)
    for n, path in enumerate(paths(model, batch, batch.cancer_B, steps)):
        s, to_self = path.seen, model.attention[n].to_self
        covered += float(between(path, everyone, genes_K, to_self).abs().sum())
        for b in range(len(batch)):
            whole = torch.zeros(s.q.shape[-1], s.q.shape[-1], device=s.q.device)
            for h in range(s.q.shape[1]):
                weight = attention_weights(s.q[b, h], s.k[b, h], to_self=to_self)
                base = _uniform_weight(len(weight), len(weight), to_self, weight)
                whole += (weight - base) * path.g[b, h][:, None] * s.v[b, h]
            everything += float(whole.abs().sum())
    return covered, everything


def _parts(batch: Batch) -> Iterator[Batch]:
    for rows in torch.arange(len(batch), device=batch.cancer_B.device).split(CHUNK) if len(batch) else ():
        yield batch.select(rows)


def _count(class_B: Tensor, classes: int) -> np.ndarray:
    return torch.bincount(class_B, minlength=classes).double().cpu().numpy()
