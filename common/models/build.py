"""From a study to a model: the one place that knows which model a study names."""

from __future__ import annotations

import numpy as np
import torch
from oncofed.common.models.gene_moe import GeneMOE
from oncofed.common.splits import seed_from
from oncofed.common.study import Study


def build_model(study: Study, *, genes: int, cancers: tuple[str, ...], intervals: int, fold: int = 0) -> GeneMOE:
    """The study's model with its first weights, which depend on the study's seed and the fold alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_from(study.seed, "weights", fold))
        return _gene_moe(study, genes, cancers, intervals)


def build_empty(study: Study, device: torch.device, *, genes: int, cancers: tuple[str, ...], intervals: int) -> GeneMOE:
    """The study's model with memory but no values, for weights that come by message: drawing them would cost more than a step."""
    with torch.device("meta"):
        model = _gene_moe(study, genes, cancers, intervals)
    return model.to_empty(device=device)


def _gene_moe(study: Study, genes: int, cancers: tuple[str, ...], intervals: int) -> GeneMOE:
    m = study.model
    return GeneMOE(
        genes=genes,
        cancers=cancers,
        intervals=intervals,
        dropout=m.dropout,
        input_dropout=m.input_dropout,
        gate_noise=m.gate_noise,
        gate_sees_cancer=m.gate_sees_cancer,
        shared_expert=m.shared_expert,
        first_layer_scale=m.first_layer_scale,
        dispatch=m.dispatch,
        expert_dtype=m.expert_dtype,
        **m.encoder(),
    )


def get_weights(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """Trainable parameters by name, float32, as views where the device allows. Models here hold no other state."""
    return {name: p.detach().cpu().numpy() for name, p in model.named_parameters()}


def set_weights(model: torch.nn.Module, weights: dict[str, np.ndarray]) -> None:
    """Copy `weights` into the model; raises on a missing, unknown or misshapen parameter."""
    own = dict(model.named_parameters())
    if own.keys() != weights.keys():
        raise ValueError(f"weights and model differ in parameters {sorted(own.keys() ^ weights.keys())[:5]}")
    with torch.no_grad():
        for name, p in own.items():
            if tuple(p.shape) != weights[name].shape:
                raise ValueError(f"parameter {name} has shape {weights[name].shape}, the model wants {tuple(p.shape)}")
            if p.device.type == "cpu":
                np.copyto(p.numpy(), weights[name])
            else:
                p.copy_(torch.from_numpy(np.array(weights[name])))
