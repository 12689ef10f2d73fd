"""From a study to a model: the one place that knows which model a phase of a study names."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from oncofed.common.modalities import ALTERATIONS, NO_BESIDE, PATHOLOGY, RNA, Beside
from oncofed.common.models.autoencoder import GeneAutoencoder
from oncofed.common.models.branches import AlterationEncoder, TileEncoder
from oncofed.common.models.gene_moe import FIRST_LAYER, Encoder, EncoderSettings, GeneMOE
from oncofed.common.models.heads import ClassHead, LinearRisk, SurvivalHead
from oncofed.common.models.path_gptomic import JOINT, Branch, FusionHead, PathGPTOmic, latent_of
from oncofed.common.models.t_gem import TGEM, AttentionLayer, GeneNorm
from oncofed.common.splits import seed_from
from oncofed.common.study import PRETRAIN, TRAIN, Study

LEARNS = ("head.", "joint.")
"""Parameters that learn beside a frozen encoder."""

Predictor = GeneMOE | PathGPTOmic | TGEM
"""A model that scores patients."""

Model = Predictor | GeneAutoencoder


@dataclass(frozen=True)
class Sizes:
    """What a model's shape depends on beside the study: it is agreed when the federation has met."""

    genes: int
    cancers: tuple[str, ...]
    intervals: int
    covariates: int = 0
    beside: Beside = NO_BESIDE

    @property
    def expression(self) -> int:
        """Numbers of a patient's expression as the model sees it: genes, or an embedding of them."""
        return self.beside.embedding_width or self.genes


def build_model(study: Study, sizes: Sizes, *, phase: str = TRAIN, fold: int = 0) -> Model:
    """The model of a phase with its first weights, which depend on the study's seed and the fold alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_from(study.seed, "weights", fold))
        return _build(study, sizes, phase)


def build_empty(study: Study, sizes: Sizes, device: torch.device, *, phase: str = TRAIN) -> Model:
    """The model with memory but no values, for weights that come by message: drawing them would cost more than a step."""
    with torch.device("meta"):
        model = _build(study, sizes, phase)
    return model.to_empty(device=device)


def _build(study: Study, sizes: Sizes, phase: str) -> Model:
    model = _model(study, sizes, phase)
    if phase == TRAIN and study.training.baselines == "frozen":
        for name, p in model.named_parameters():
            p.requires_grad_(p.requires_grad and name != "head.log_baseline")
    if phase == TRAIN and study.training.encoder == "frozen":
        assert not isinstance(model, GeneAutoencoder)
        model.still = True
        for name, p in model.named_parameters():
            p.requires_grad_(p.requires_grad and name.startswith(LEARNS))
    return model


def _model(study: Study, sizes: Sizes, phase: str) -> Model:
    if study.model.name == "t_gem":
        return _t_gem(study, sizes)
    encoder = _encoder(study, sizes, adapters=phase == TRAIN and study.training.first_layer == "adapters")
    if phase == PRETRAIN:
        return GeneAutoencoder(encoder, sizes.expression, sizes.cancers, critic=study.pretraining.critic)
    if study.training.first_layer in ("frozen", "adapters"):
        for name, p in encoder.named_parameters():
            p.requires_grad_(name not in FIRST_LAYER)
    if study.multimodal:
        return _path_gptomic(study, sizes, encoder)
    # A pre-trained encoder has features already: the head starts at 0, so that risks do.
    head = _head(study, sizes, encoder.settings.latent, scale=0.0 if study.pretraining.rounds else 1.0)
    return GeneMOE(encoder, head, sizes.cancers)


def _head(study: Study, sizes: Sizes, latent: int, *, scale: float) -> SurvivalHead | ClassHead:
    """The head of a model whose features are `latent` numbers; `scale` is a factor on its first weights."""
    if study.task.kind == "classification":
        return ClassHead(latent=latent, classes=len(sizes.cancers), covariates=sizes.covariates, scale=scale)
    return SurvivalHead(
        latent=latent,
        cancers=len(sizes.cancers),
        intervals=baseline_numbers(study, sizes),
        own=study.model.cancer_head,
        covariates=sizes.covariates,
        scale=scale,
    )


def baseline_numbers(study: Study, sizes: Sizes) -> int:
    """Numbers of a cancer type's baseline: one an interval, or a Weibull's two."""
    return 2 if study.task.loss == "weibull" else sizes.intervals


def _t_gem(study: Study, sizes: Sizes) -> TGEM:
    m, genes = study.model, sizes.genes
    if m.layers and genes < 3:
        raise ValueError(f"model.name = 't_gem' attends between genes and the panel has {genes}; take 3 or more")
    layers = [AttentionLayer(genes, m.heads, head_mix=m.head_mix, to_self=m.self_attention) for _ in range(m.layers)]
    norms = [GeneNorm(genes, m.branch_scale) for _ in range(min(1, m.layers) if m.shared_norm else m.layers)]
    head = _head(study, sizes, genes, scale=m.first_layer_scale)
    return TGEM(layers, norms, head, sizes.cancers, activation=m.activation, dropout=m.dropout)


def _path_gptomic(study: Study, sizes: Sizes, encoder: Encoder) -> PathGPTOmic:
    f, m, cancers = study.fusion, study.model, len(sizes.cancers)
    size = m.encoder()
    branches: dict[str, Branch] = {}
    if PATHOLOGY in study.modalities:
        if not sizes.beside.image_width:
            raise ValueError(
                "fusion.modalities asks for pathology, which no site has; give the sites pathology tables or slide features, "
                "or set fusion.modalities = ['rna']"
            )
        if sizes.beside.image_kind == "bag":
            tiles = TileEncoder(sizes.beside.image_width, size["width"], size["latent"], dropout=m.dropout)
            with torch.no_grad():
                tiles.latent.weight.mul_(m.first_layer_scale)  # as in the other encoders: risks start at 0
            branches[PATHOLOGY] = tiles
        else:
            plain = study.changed(model__experts=0, model__attention_experts=0)
            branches[PATHOLOGY] = _encoder(plain, sizes, inputs=sizes.beside.image_width)
    if ALTERATIONS in study.modalities:
        if not sizes.beside.alterations:
            raise ValueError(
                "fusion.modalities asks for alterations, which no site has; give the sites alterations.csv, or leave it out"
            )
        branches[ALTERATIONS] = AlterationEncoder(len(sizes.beside.alterations), dropout=m.dropout)
    rna = encoder if RNA in study.modalities else None
    latents = ({RNA: latent_of(rna)} if rna is not None else {}) | {k: latent_of(v) for k, v in branches.items()}
    joint = torch.nn.Linear(sum(latents.values()), size["latent"]) if f.kind == "concat" else None
    own = m.cancer_head
    scale = {n: 0.0 if n == ALTERATIONS or (n == RNA and study.pretraining.rounds) else 1.0 for n in latents}
    heads = {JOINT: size["latent"]} if joint is not None else latents
    risks = {n: LinearRisk(z, cancers=cancers, own=own, scale=scale.get(n, 1.0)) for n, z in heads.items()}
    head = FusionHead(risks, cancers=cancers, intervals=baseline_numbers(study, sizes), covariates=sizes.covariates)
    return PathGPTOmic(rna, branches, joint, head, sizes.cancers, modality_dropout=f.modality_dropout)


def _encoder(study: Study, sizes: Sizes, *, adapters: bool = False, inputs: int = 0) -> Encoder:
    """Gene-MOE's encoder of expression, or of `inputs` other numbers."""
    m = study.model
    sees_cancer = m.gate_sees_cancer and study.task.kind != "classification"
    settings = EncoderSettings(
        **m.encoder(),
        dropout=m.dropout,
        input_dropout=m.input_dropout,
        gate_noise=m.gate_noise,
        shared_expert=m.shared_expert,
        # A phase of reconstruction needs features at once; outcomes are learned best from zero risk (gene_moe.md 1.5).
        first_layer_scale=1.0 if study.pretraining.rounds and not inputs else m.first_layer_scale,
        adapter_rank=study.training.adapter_rank if adapters else 0,
        dispatch=m.dispatch,
        expert_dtype=m.expert_dtype,
        cancers=len(sizes.cancers) if sees_cancer else 0,
        gate_prior=m.gate_prior,
        expert_scale=m.expert_scale if m.shared_expert else 1.0,
    )
    return Encoder(inputs or sizes.expression, settings)


def transfer(weights: dict[str, np.ndarray], pretrained: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """First weights of training with the encoder's replaced by the pre-trained ones; adapters keep theirs.

    Raises `ValueError` where the pre-trained encoder is of another shape.
    """
    encoder = {n: v for n, v in pretrained.items() if n.startswith("encoder.")}
    odd = [n for n, v in encoder.items() if n not in weights or weights[n].shape != v.shape]
    if odd or not encoder:
        raise ValueError(
            f"the pre-trained encoder does not fit the model (parameters {odd[:3]}); pre-train again with the study's model"
        )
    return weights | encoder


def begin_from(weights: dict[str, np.ndarray], saved: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """First weights of training with those of a saved model; of the head those that fit, and adapters begin anew.

    Raises `ValueError` where the saved encoder is of another shape.
    """
    own = {n: v for n, v in weights.items() if n not in saved or saved[n].shape != v.shape}
    odd = [n for n in own if not n.startswith(LEARNS) and ".adapter_" not in n]
    if odd:
        raise ValueError(
            f"training.start: the saved model does not fit the study's (parameters {odd[:3]}); take over its [model] table"
        )
    return {n: own.get(n, saved.get(n, v)) for n, v in weights.items()}


def get_weights(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """Parameters by name, float32, as views where the device allows. Models here hold no other state."""
    return {name: p.detach().cpu().numpy() for name, p in model.named_parameters()}


def trainable(model: torch.nn.Module) -> frozenset[str]:
    """Names of the parameters that training changes: only their changes travel back."""
    return frozenset(name for name, p in model.named_parameters() if p.requires_grad)


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
