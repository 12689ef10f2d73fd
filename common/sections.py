"""The tables of a study file: what each key means, its default, and which values go together."""

from __future__ import annotations

from typing import Any, Literal

from oncofed.common.covariates import parse_covariates
from oncofed.common.modalities import MODALITIES, PATHOLOGY, RNA
from oncofed.common.section import Section, split_text
from pydantic import Field, model_validator

ENCODER_SIZES: dict[str, dict[str, int]] = {
    "tiny": {"width": 16, "latent": 8, "experts": 4, "top_k": 2, "attention_experts": 3, "attention_top_k": 2},
    "small": {"width": 256, "latent": 128, "experts": 8, "top_k": 2, "attention_experts": 4, "attention_top_k": 2},
    "paper": {"width": 1024, "latent": 256, "experts": 15, "top_k": 6, "attention_experts": 4, "attention_top_k": 2},
}
"""Gene-MOE's sizes (gene_moe.md, 1.5); `tiny` is for tests."""


class Model(Section):
    """Which model, at which size; a number given here overrides the size's own."""

    name: Literal["gene_moe", "path_gptomic", "t_gem"] = Field(
        "gene_moe",
        description="path_gptomic: RNA beside pathology; its RNA encoder is Gene-MOE's, with the keys below; t_gem: "
        "attention between genes",
    )
    size: Literal["tiny", "small", "paper"] = Field("small", description="width 16, 256, 1024; experts 4, 8, 15")
    width: int = Field(0, ge=0, description="0: the size's own")
    latent: int = Field(0, ge=0, description="0: the size's own")
    experts: int = Field(-1, ge=-1, description="-1: the size's own, 0: none, a plain perceptron")
    top_k: int = Field(0, ge=0, description="experts for a patient, at least 2; 0: the size's own")
    attention_experts: int = Field(-1, ge=-1, description="-1: the size's own, 0: no attention experts")
    attention_top_k: int = Field(0, ge=0, description="0: the size's own")
    dropout: float = Field(0.1, ge=0, lt=1, description="of the hidden layer")
    input_dropout: float = Field(0.0, ge=0, lt=1, description="share of genes hidden from the model in a training step")
    gate_noise: bool = Field(True, description="noisy top-k gating in training")
    gate_sees_cancer: bool = Field(
        True,
        description="one row of gate logits a cancer type; never in classification, which it would tell the answer",
    )
    gate_prior: float = Field(
        2.0,
        ge=0,
        description="lead of a cancer's own experts in those rows at first, dealt round the table; 0: all alike",
    )
    expert_scale: float = Field(
        0.3, gt=0, description="factor on the routed experts beside the shared one: how far cancers go their own way"
    )
    shared_expert: bool = Field(True, description="an expert that every patient passes, beside the routed ones")
    cancer_head: float = Field(
        2.0,
        ge=0,
        description="size of each cancer's own head beside the shared one, as a ratio of squares; 0: one head",
    )
    first_layer_scale: float = Field(
        0.001,
        ge=0,
        description="factor on the first layer's initial weights (in t_gem, which has none, the head's); near 0, scores "
        "start at 0 and learn like a ridge",
    )
    dispatch: Literal["routed", "dense"] = Field("routed", description="dense: all experts, for per-sample gradients")
    expert_dtype: Literal["float32", "bfloat16"] = Field("float32", description="bfloat16: for experts, on a GPU")
    layers: int = Field(
        3,
        ge=0,
        le=12,
        description="attention layers of t_gem; 0: none, a linear model of genes, as in logistic regression",
    )
    heads: int = Field(5, ge=1, le=64, description="attention heads of a layer of t_gem")
    self_attention: Literal["before", "after", "keep"] = Field(
        "before",
        description="a gene's attention to itself is taken out before the softmax, after it (the authors'), or kept",
    )
    head_mix: float = Field(
        0.0, ge=0, description="first weight of each head of t_gem; 0: 1 / heads (the authors' 0.001)"
    )
    branch_scale: float = Field(
        0.1,
        ge=0,
        description="first weight of t_gem's layer norm: what attention adds to a gene at first; the authors' 1",
    )
    shared_norm: bool = Field(True, description="one layer norm for all layers of t_gem, as its authors have it")
    activation: Literal["leaky_relu", "relu", "gelu", "none"] = Field(
        "leaky_relu", description="of t_gem, between the last layer and the head"
    )

    def encoder(self) -> dict[str, int]:
        """The encoder's numbers after overrides; raises where top-k exceeds the experts or leaves the gate without a gradient."""
        size = dict(ENCODER_SIZES[self.size])
        for key in size:
            value = getattr(self, key)
            if value > 0 or (key in ("experts", "attention_experts") and value == 0):
                size[key] = value
        for experts, k in (("experts", "top_k"), ("attention_experts", "attention_top_k")):
            if size[experts] > 1 and size[k] < 2:
                raise ValueError(
                    f"model.{k} = 1 leaves the gate untrained (a softmax over one expert is constant); use 2 or more"
                )
            if size[experts] and size[k] > size[experts]:
                raise ValueError(
                    f"model.{k} = {size[k]} exceeds model.{experts} = {size[experts]}; lower {k} or add experts"
                )
        return size

    @model_validator(mode="after")
    def _fits(self) -> Model:
        self.encoder()
        return self


class Fusion(Section):
    """How Path-GPTOmic joins what is known of a patient; a modality that a patient lacks is left out of the sum."""

    modalities: tuple[str, ...] = Field(
        (RNA, PATHOLOGY), description="of rna, pathology, alterations (copy numbers and mutations)"
    )
    kind: Literal["additive", "concat", "late"] = Field(
        "additive",
        description="one log hazard that is a sum over modalities; concat: a perceptron over all features; "
        "late: each modality learns alone, their log hazards are added",
    )
    rna_encoder: Literal["gene_moe", "scgpt"] = Field(
        "gene_moe", description="scgpt: of frozen scGPT embeddings, from the checkpoint that a site's site.toml names"
    )
    modulation: Literal["none", "local", "federated"] = Field(
        "local", description="slows the encoder of the modality that leads; federated: by all sites' sums of a round"
    )
    modulation_ratio: Literal["auto", "likelihood", "risk_set", "literal"] = Field(
        "auto",
        description="what is compared; auto: likelihood in piecewise_exponential, risk_set in cox; literal: eq. 5 as printed",
    )
    modulation_floor: float = Field(0.1, ge=0, le=1, description="least factor on the leading encoder's rate")
    modulation_memory: float = Field(
        0.5, ge=0, lt=1, description="weight of earlier steps of a round in the comparison"
    )
    modality_dropout: float = Field(
        0.1, ge=0, lt=1, description="share of patients who lose one of their modalities in a training step"
    )
    pathology_rate: float = Field(
        4.0, gt=0, description="factor on the rate of the pathology encoder: it has fewer inputs"
    )
    tiles: int = Field(2048, ge=0, description="at most so many tiles of a patient in a training step; 0: all")

    @model_validator(mode="before")
    @classmethod
    def _text(cls, data: Any) -> Any:
        return split_text(data, "modalities")

    @model_validator(mode="after")
    def _known(self) -> Fusion:
        odd = [m for m in self.modalities if m not in MODALITIES]
        if odd or not self.modalities or len(set(self.modalities)) < len(self.modalities):
            raise ValueError(
                f"fusion.modalities = {list(self.modalities)} must name some of {list(MODALITIES)}, each once"
            )
        return self


class Task(Section):
    """What is learned."""

    kind: Literal["survival", "classification"] = Field(
        "survival", description="classification: of the cancer type, without outcome columns"
    )
    loss: Literal["piecewise_exponential", "discrete_time", "weibull", "cox"] = Field(
        "piecewise_exponential",
        description="one baseline a cancer type, by interval of the grid, in weibull of two numbers; discrete_time sees the interval of "
        "a time alone; cox is stratified by cancer type",
    )
    intervals: int = Field(20, ge=1, le=70, description="intervals of the agreed event-time grid")
    time_edges: tuple[float, ...] = Field(
        (),
        description="months at which those intervals begin, from 0, fixed beforehand; empty: of equal events, from sums",
    )
    label: str = Field(
        "cancer_type",
        min_length=1,
        description="clinical column to classify by, such as a subtype; of the patients in `cancers`",
    )
    classes: tuple[str, ...] = Field((), description="classes to tell apart; empty: all that the sites hold")
    class_loss: Literal["cross_entropy", "focal"] = Field(
        "cross_entropy", description="focal: patients that are classified well count less (Lin et al. 2017)"
    )
    focal_gamma: float = Field(2.0, ge=0, description="of the focal loss; 0: cross-entropy")
    class_prior: Literal["none", "mask", "federation", "site"] = Field(
        "federation",
        description="what training adds to the logits: mask: takes out classes that a site lacks; federation, site: log "
        "shares of the classes there, so that rare ones are not drowned (Menon et al. 2021); site masks as well",
    )
    prior_strength: float = Field(1.0, ge=0, description="factor on those log shares")
    abstain_below: float = Field(
        0.5,
        ge=0,
        lt=1,
        description="a patient whose likeliest class has less probability gets the first three, no answer",
    )

    @model_validator(mode="before")
    @classmethod
    def _text(cls, data: Any) -> Any:
        data = split_text(data, "classes", "time_edges")
        if isinstance(data, dict) and isinstance(
            data.get("classes"), list | tuple
        ):  # grades are numbers in a study file
            data = data | {"classes": [str(c) for c in data["classes"]]}
        return data

    @model_validator(mode="after")
    def _edges(self) -> Task:
        if self.time_edges and (self.time_edges[0] != 0 or list(self.time_edges) != sorted(set(self.time_edges))):
            raise ValueError(f"task.time_edges = {list(self.time_edges)} must begin at 0 and increase: 0,12,24,36,60")
        return self


class Panel(Section):
    """What the model sees of a patient, and on which scale."""

    file: str = Field(
        "",
        description="genes, one a line, or gene sets (.gmt), of which all are taken; empty: those that enough sites hold",
    )
    names: str = Field(
        "",
        description="HGNC's table of gene names: genes go by approved symbols, and every site finds them under Ensembl ids, "
        "earlier and other names; empty: names as given",
    )
    unknown: Literal["refuse", "drop"] = Field("refuse", description="genes of the panel that no site holds")
    min_site_share: float = Field(
        1.0, gt=0, le=1, description="a gene enters when at least this share of the sites hold it"
    )
    scale_by: Literal["auto", "all", "cancer", "patient"] = Field(
        "auto",
        description="whose mean and spread a gene is held against; auto: cancer in survival, all in classification; patient: its rank "
        "among the patient's genes, so that nothing is known of others",
    )
    powers: bool = Field(True, description="make genes symmetric by the most likely Yeo-Johnson power, found from sums")
    covariates: tuple[str, ...] = Field(
        (), description='clinical columns: "age" is a number, "sex=female|male" has levels, the first is the reference'
    )

    @model_validator(mode="before")
    @classmethod
    def _text(cls, data: Any) -> Any:
        return split_text(data, "covariates")

    @model_validator(mode="after")
    def _readable(self) -> Panel:
        parse_covariates(self.covariates)
        return self


class Steps(Section):
    """Rounds, and what a site does in each: what pre-training and training share."""

    rounds: int = Field(15, ge=0)
    local_steps: int = Field(4, ge=1, description="optimiser steps a site makes in a round")
    batch_size: int = Field(32, ge=0, description="patients in a step; 0: all of the site's")
    optimizer: Literal["sgd", "adam"] = Field("sgd", description="of a site; made anew each round")
    learning_rate: float = Field(0.002, gt=0)
    schedule: Literal["constant", "cosine"] = Field("constant", description="of the learning rate over the rounds")
    weight_decay: float = Field(0.0, ge=0, description="L2 in sgd, decoupled in adam; baselines are spared")
    balance: float = Field(0.01, ge=0, description="coefficient of the load-balance loss")
    prox_mu: float = Field(0.0, ge=0, description="FedProx: pull towards the round's starting weights")
    clip_norm: float = Field(20.0, ge=0, description="clip the gradient of a step; 0: off")


class Pretraining(Steps):
    """The phase before training: expression is reconstructed from the latent vector, without outcomes."""

    rounds: int = Field(0, ge=0, description="0: no pre-training")
    optimizer: Literal["sgd", "adam"] = Field("adam", description="of a site; made anew each round")
    learning_rate: float = Field(0.001, gt=0, description="of encoder and decoder, and of the critic")
    kl: float = Field(0.01, ge=0, description="coefficient of the mean KL divergence of a latent number")
    critic: bool = Field(False, description="an adversary as well (WGAN-GP): it tells expression from reconstruction")
    critic_weight: float = Field(
        0.05, gt=0, description="of the critic's verdict beside the reconstruction's error of 1"
    )
    critic_steps: int = Field(2, ge=1, description="steps of the critic before each of the others")
    gradient_penalty: float = Field(10.0, gt=0, description="of the critic (Gulrajani et al. 2017)")


class Training(Steps):
    """The supervised phase."""

    rounds: int = Field(15, ge=1, description="of training, in each fold")
    learning_rate: float = Field(0.002, gt=0, description="for some 1,500 genes; fewer genes take more")
    weight_decay: float = Field(
        1.0, ge=0, description="L2 in sgd, decoupled in adam; baselines and covariates are spared"
    )
    covariate_rate: float = Field(
        0.2, gt=0, description="learning rate of the covariates; each cancer's own coefficients take a tenth"
    )
    head_rate: float = Field(
        0.005, gt=0, description="learning rate of the head on a pre-trained encoder, where it starts at 0"
    )
    start: str = Field(
        "",
        description="a saved model that training begins from: panel, cancer types, scale, time grid and weights are its own; empty: anew",
    )
    encoder: Literal["train", "frozen"] = Field(
        "train", description="frozen: the head alone learns; for a study that starts from a model"
    )
    baselines: Literal["train", "frozen"] = Field(
        "train", description="frozen: baseline hazards stay as training began with them"
    )
    first_layer: Literal["train", "slow", "frozen", "adapters"] = Field(
        "train", description="slow: at a tenth of the rate; adapters: low-rank changes; for a pre-trained model"
    )
    adapter_rank: int = Field(8, ge=1, description="of the adapters")
    evaluate_every: int = Field(
        5,
        ge=0,
        description="score validation patients (without any: the held-out fold, only shown) every so many rounds",
    )
    patience: int = Field(
        0, ge=0, description="stop after so many scores without a better one and keep the best round; 0: off"
    )


EVERY_SITE = "all"
"""In `splits.held_out_sites`, alone: every site of the federation."""


class Splits(Section):
    """Patient-level cross-validation, stratified by cancer type and event, dealt at each site from the seed."""

    folds: int = Field(5, ge=2, description="of the cross-validation")
    validation: float = Field(
        0.0, ge=0, le=0.5, description="share of a fold's training patients kept aside to choose the round; 0: none"
    )
    held_out_sites: tuple[str, ...] = Field(
        (),
        description="instead of folds by patient: each of these sites in turn takes no part and is the test; all: every one",
    )
    only: tuple[int, ...] = Field((), description="run only these folds; empty: all")
    deal: Literal["auto", "stratified", "independent"] = Field(
        "auto",
        description="stratified by cancer type and event, or each patient by her name alone, so that who comes or goes moves nobody else; "
        "auto: independent where a patient's presence must not show",
    )
    refit: bool = Field(False, description="after the folds, train once more on all patients: the model to publish")

    @model_validator(mode="before")
    @classmethod
    def _text(cls, data: Any) -> Any:
        return split_text(data, "only", "held_out_sites")

    @model_validator(mode="after")
    def _inside(self) -> Splits:
        if EVERY_SITE in self.held_out_sites and not self.every_site:
            raise ValueError(
                f"splits.held_out_sites = {list(self.held_out_sites)}: '{EVERY_SITE}' stands alone, or name sites"
            )
        if not self.every_site and any(not 0 <= f < self.count for f in self.only):
            raise ValueError(f"splits.only = {self.only} must lie between 0 and {self.count - 1}")
        return self

    @property
    def every_site(self) -> bool:
        """Whether each site is held out in turn; the server puts their names here once they have said hello."""
        return self.held_out_sites == (EVERY_SITE,)

    @property
    def count(self) -> int:
        """How many folds there are: of patients, or one for each held-out site."""
        return len(self.held_out_sites) or self.folds


class Runtime(Section):
    """How long to wait, on what to compute, where to write. Paths are the coordinator's own."""

    out: str = Field("out", description="folder for results, models, checkpoints")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, mps")
    threads: int = Field(0, ge=0, description="torch threads at a site; 0: torch's own choice")
    wait_sites_s: float = Field(300.0, gt=0, description="deadline for min_sites to come online")
    round_timeout_s: float = Field(
        3600.0, gt=0, description="a site that has not answered by then is left out of the round"
    )
    roster: str = Field(
        "",
        description="roster.json of the coordinator's folder: nodes that are no member's by it are left out; empty: any node",
    )
    signature: str = Field(
        "",
        pattern="^([0-9a-f]{128})?$",
        description="the coordinator's, of the study (oncofed study sign); empty: unsigned",
    )
    resume: bool = Field(False, description="continue after the last checkpointed round")
    keep_checkpoints: int = Field(3, ge=1, description="checkpoints of a phase that stay: those of its last rounds")
