"""Per-patient gradients of the project's own layers for Opacus: their norms without ever writing them down (ghost clipping).

Opacus hooks every layer that has parameters and hands over what went in (`seen`) and the gradient of what came out (`grad`). A norm
sampler gives each parameter's gradient norm by patient `[B]`, in closed form; a grad sampler the gradients themselves
`[B, ...]`, for tests, for Opacus' hooks mode and where a parameter is small or used twice. Importing this module registers them.
Shapes: B patients, G inputs, D outputs, E experts, C cancer types, H heads, K intervals; N pairs of patient and expert.
A patient passes an expert at most once, so the gradients of a stack are outer products in different places, and norms add up.
"""

from __future__ import annotations

import torch
from oncofed.common.models.heads import Covariates, LinearRisk, SurvivalHead
from oncofed.common.models.layers import AttentionExperts, ExpertLayer, NoisyTopKGate
from oncofed.common.models.path_gptomic import FusionHead
from oncofed.common.models.t_gem import EPSILON, GeneNorm, GeneScale, HeadMix
from opacus.grad_sample import register_grad_sampler, register_norm_sampler
from torch import Tensor, nn

Samples = dict[nn.Parameter, Tensor]
Seen = list[Tensor]


def _squares(x: Tensor) -> Tensor:
    """Squared norm of each row."""
    return x.flatten(1).square().sum(1)


def _by_patient(values_N: Tensor, patient_N: Tensor, patients: int) -> Tensor:
    return values_N.new_zeros(patients).index_add(0, patient_N, values_N)


def _in_rows(rows: Tensor, values: Tensor, count: int) -> Tensor:
    """Each patient's `values[b]` at row `rows[b]` of a stack of `count`: `[B, count, ...]`."""
    out = values.new_zeros(len(values), count, *values.shape[1:])
    out[torch.arange(len(values), device=values.device), rows] = values
    return out


def _at_pairs(values_N: Tensor, patient_N: Tensor, expert_N: Tensor, patients: int, experts: int) -> Tensor:
    """`[N, ...]` -> `[B, E, ...]`."""
    out = values_N.new_zeros(patients, experts, *values_N.shape[1:])
    out[patient_N, expert_N] = values_N
    return out


def _trained(samples: dict[nn.Parameter | None, Tensor]) -> Samples:
    return {p: value for p, value in samples.items() if p is not None and p.requires_grad}


def _times(x_NG: Tensor, stack: Tensor, expert_N: Tensor) -> Tensor:
    """x_n W_e(n) of rows that lie sorted by expert."""
    counts = torch.bincount(expert_N, minlength=len(stack)).tolist()
    return torch.cat([x @ w.to(x.dtype) for x, w in zip(x_NG.split(counts), stack.unbind(0), strict=True)])


def of_patients(layer: nn.Module, seen: Seen, value_B: Tensor) -> tuple[Tensor, Tensor]:
    """A number of each patient, shaped to multiply what came out of a layer, and where it is 0: rows of experts are pairs, of all others
    patients."""
    if isinstance(layer, ExpertLayer):
        value = value_B[seen[1]][:, None]
    elif isinstance(layer, AttentionExperts):
        value = value_B[seen[1]][None, :, None]
    else:
        value = value_B.reshape(-1, *([1] * (_rank(layer) - 1)))
    return value, value == 0


def _rank(layer: nn.Module) -> int:
    """Dimensions of what comes out of a layer."""
    return {LinearRisk: 1, GeneScale: 3}.get(type(layer), 2)


# -- stacked experts ---------------------------------------------------------------------------------------------------


@register_norm_sampler(ExpertLayer)
def expert_norms(layer: ExpertLayer, seen: Seen, grad_ND: Tensor) -> Samples:
    """|x_n|^2 |d_n|^2 for a weight, |d_n|^2 for a bias; adapters are two products, x A and (x A) B."""
    x_BG, patient_N, expert_N = seen
    n = len(x_BG)
    size_N, d_N = _squares(x_BG)[patient_N], _squares(grad_ND)
    squares: dict[nn.Parameter | None, Tensor] = {layer.weight: size_N * d_N, layer.bias: d_N}
    if layer.adapter_in is not None and layer.adapter_out is not None:
        low_NR = _times(x_BG[patient_N], layer.adapter_in, expert_N)
        back_NR = _times(grad_ND, layer.adapter_out.transpose(1, 2), expert_N)
        squares |= {layer.adapter_in: size_N * _squares(back_NR), layer.adapter_out: _squares(low_NR) * d_N}
    return {p: _by_patient(s_N, patient_N, n).sqrt() for p, s_N in _trained(squares).items()}


@register_grad_sampler(ExpertLayer)
def expert_gradients(layer: ExpertLayer, seen: Seen, grad_ND: Tensor) -> Samples:
    x_BG, patient_N, expert_N = seen
    at = patient_N, expert_N, len(x_BG), len(layer.weight)
    x_NG = x_BG[patient_N]
    out: dict[nn.Parameter | None, Tensor] = {}
    if layer.weight.requires_grad:
        out[layer.weight] = _at_pairs(x_NG[:, :, None] * grad_ND[:, None], *at)
    out[layer.bias] = _at_pairs(grad_ND, *at)
    if layer.adapter_in is not None and layer.adapter_out is not None:
        low_NR = _times(x_NG, layer.adapter_in, expert_N)
        back_NR = _times(grad_ND, layer.adapter_out.transpose(1, 2), expert_N)
        out[layer.adapter_in] = _at_pairs(x_NG[:, :, None] * back_NR[:, None], *at)
        out[layer.adapter_out] = _at_pairs(low_NR[:, :, None] * grad_ND[:, None], *at)
    return _trained(out)


@register_norm_sampler(AttentionExperts)
def attention_norms(layer: AttentionExperts, seen: Seen, grad_3ND: Tensor) -> Samples:
    h_BD, patient_N, _ = seen
    size_N = _squares(h_BD)[patient_N]
    parts = zip((layer.query, layer.key, layer.value), grad_3ND.unbind(0), strict=True)
    norms = {p: _by_patient(size_N * _squares(g), patient_N, len(h_BD)).sqrt() for p, g in parts}
    return _trained(norms)  # type: ignore[arg-type]


@register_grad_sampler(AttentionExperts)
def attention_gradients(layer: AttentionExperts, seen: Seen, grad_3ND: Tensor) -> Samples:
    h_BD, patient_N, expert_N = seen
    at = patient_N, expert_N, len(h_BD), len(layer.query)
    h_ND = h_BD[patient_N]
    parts = zip((layer.query, layer.key, layer.value), grad_3ND.unbind(0), strict=True)
    return _trained({p: _at_pairs(h_ND[:, :, None] * g[:, None], *at) for p, g in parts})


# -- gate and heads ----------------------------------------------------------------------------------------------------


def _gate_parts(
    gate: NoisyTopKGate, seen: Seen, grad: Tensor
) -> tuple[Tensor, Tensor, list[tuple[nn.Parameter, Tensor]]]:
    """Normalised input, gradient of the clean logits, and of each product its weight and the gradient behind it."""
    experts = gate.weight.shape[1]
    with torch.no_grad():
        x_BG = gate.norm(seen[0].to(gate.weight.dtype)).to(grad.dtype)
    products = [(gate.weight, grad[:, :experts])]
    if gate.noise is not None:
        products.append((gate.noise, grad[:, experts:]))
    return x_BG, grad[:, :experts], products


@register_norm_sampler(NoisyTopKGate)
def gate_norms(gate: NoisyTopKGate, seen: Seen, grad: Tensor) -> Samples:
    x_BG, clean_BE, products = _gate_parts(gate, seen, grad)
    size_B = _squares(x_BG)
    norms: dict[nn.Parameter | None, Tensor] = {p: (size_B * _squares(g)).sqrt() for p, g in products}
    norms[gate.cancer] = _squares(clean_BE).sqrt()
    return _trained(norms)


@register_grad_sampler(NoisyTopKGate)
def gate_gradients(gate: NoisyTopKGate, seen: Seen, grad: Tensor) -> Samples:
    x_BG, clean_BE, products = _gate_parts(gate, seen, grad)
    out: dict[nn.Parameter | None, Tensor] = {p: x_BG[:, :, None] * g[:, None] for p, g in products}
    if gate.cancer is not None:
        out[gate.cancer] = _in_rows(seen[1], clean_BE, len(gate.cancer))
    return _trained(out)


def _risk_gradients(head: LinearRisk, z_BZ: Tensor, cancer_B: Tensor, d_B: Tensor) -> dict[nn.Parameter | None, Tensor]:
    shared_BZ = z_BZ * d_B[:, None]
    out: dict[nn.Parameter | None, Tensor] = {head.shared: shared_BZ}
    if head.own is not None:
        out[head.own] = _in_rows(cancer_B, head.ratio * shared_BZ, len(head.own))
    return out


def _risk_norms(head: LinearRisk, z_BZ: Tensor, d_B: Tensor) -> dict[nn.Parameter | None, Tensor]:
    norm_B = _squares(z_BZ).sqrt() * d_B.abs()
    return {head.shared: norm_B, head.own: head.ratio * norm_B}


@register_norm_sampler(LinearRisk)
def risk_norms(head: LinearRisk, seen: Seen, grad_B: Tensor) -> Samples:
    return _trained(_risk_norms(head, seen[0], grad_B))


@register_grad_sampler(LinearRisk)
def risk_gradients(head: LinearRisk, seen: Seen, grad_B: Tensor) -> Samples:
    return _trained(_risk_gradients(head, seen[0], seen[1], grad_B))


@register_norm_sampler(SurvivalHead)
def survival_norms(head: SurvivalHead, seen: Seen, grad: Tensor) -> Samples:
    norms = _risk_norms(head, seen[0], grad[:, 0])
    return _trained(norms | {head.log_baseline: _squares(grad[:, 1:]).sqrt()})


@register_grad_sampler(SurvivalHead)
def survival_gradients(head: SurvivalHead, seen: Seen, grad: Tensor) -> Samples:
    z_BZ, cancer_B = seen[:2]
    out = _risk_gradients(head, z_BZ, cancer_B, grad[:, 0])
    return _trained(out | {head.log_baseline: _in_rows(cancer_B, grad[:, 1:], len(head.log_baseline))})


@register_norm_sampler(FusionHead)
def fusion_norms(head: FusionHead, seen: Seen, grad_BK: Tensor) -> Samples:
    return _trained({head.log_baseline: _squares(grad_BK).sqrt()})


@register_grad_sampler(FusionHead)
def fusion_gradients(head: FusionHead, seen: Seen, grad_BK: Tensor) -> Samples:
    return _trained({head.log_baseline: _in_rows(seen[0], grad_BK, len(head.log_baseline))})


@register_norm_sampler(Covariates)
def covariate_norms(layer: Covariates, seen: Seen, grad_BO: Tensor) -> Samples:
    norm_B = (_squares(seen[0]) * _squares(grad_BO)).sqrt()
    return _trained({layer.shared: norm_B, layer.own: norm_B})


@register_grad_sampler(Covariates)
def covariate_gradients(layer: Covariates, seen: Seen, grad_BO: Tensor) -> Samples:
    v_BV, cancer_B = seen
    outer = v_BV[:, :, None] * grad_BO[:, None]
    out: dict[nn.Parameter | None, Tensor] = {layer.shared: outer}
    if layer.own is not None:
        out[layer.own] = _in_rows(cancer_B, outer, len(layer.own))
    return _trained(out)


# -- scale layers of T-GEM ---------------------------------------------------------------------------------------------


@register_norm_sampler(GeneScale)
def scale_norms(layer: GeneScale, seen: Seen, grad_BHG: Tensor) -> Samples:
    """sum_g x_g^2 sum_h d_hg^2: a weight sees one gene alone."""
    return _trained({layer.weight: (seen[0].square() * grad_BHG.square().sum(1)).sum(1).sqrt()})


@register_grad_sampler(GeneScale)
def scale_gradients(layer: GeneScale, seen: Seen, grad_BHG: Tensor) -> Samples:
    return _trained({layer.weight: seen[0][:, None] * grad_BHG})


@register_norm_sampler(HeadMix)
def mix_norms(layer: HeadMix, seen: Seen, grad_BG: Tensor) -> Samples:
    return {p: value.norm(dim=1) for p, value in mix_gradients(layer, seen, grad_BG).items()}


@register_grad_sampler(HeadMix)
def mix_gradients(layer: HeadMix, seen: Seen, grad_BG: Tensor) -> Samples:
    return _trained({layer.weight: torch.einsum("bhg,bg->bh", seen[0], grad_BG)})


# No norm sampler on purpose: one norm may serve all layers of T-GEM, and then a patient's gradients add up before their norm.
@register_grad_sampler(GeneNorm)
def gene_norm_gradients(layer: GeneNorm, seen: Seen, grad_BG: Tensor) -> Samples:
    u_BG = seen[0]
    centred = u_BG - u_BG.mean(-1, keepdim=True)
    sd = (centred.square().sum(-1, keepdim=True) / (u_BG.shape[-1] - 1)).clamp(min=1e-30).sqrt()
    return _trained({layer.weight: grad_BG * centred / (sd + EPSILON), layer.bias: grad_BG})
