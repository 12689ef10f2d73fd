"""Study: the typed description of one experiment, read from a TOML file or from Flower's flat run config.

Every party holds the same text: the server sends it with each message, and a site checks it against its own policy.
"""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

ENCODER_SIZES: dict[str, dict[str, int]] = {
    "tiny": {"width": 16, "latent": 8, "experts": 4, "top_k": 2, "attention_experts": 3, "attention_top_k": 2},
    "small": {"width": 256, "latent": 64, "experts": 8, "top_k": 2, "attention_experts": 4, "attention_top_k": 2},
    "paper": {"width": 1024, "latent": 256, "experts": 15, "top_k": 6, "attention_experts": 4, "attention_top_k": 2},
}
"""Gene-MOE's sizes (gene_moe.md, 1.5); `tiny` is for tests."""


class Section(BaseModel):
    """A table of the study file: unknown keys are refused, values cannot change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class Model(Section):
    """Which model, at which size; a number given here overrides the size's own."""

    name: Literal["gene_moe"] = "gene_moe"
    size: Literal["tiny", "small", "paper"] = Field("small", description="width 16, 256, 1024; experts 4, 8, 15")
    width: int = Field(0, ge=0, description="0: the size's own")
    latent: int = Field(0, ge=0, description="0: the size's own")
    experts: int = Field(0, ge=0, description="0: the size's own")
    top_k: int = Field(0, ge=0, description="experts for a patient, at least 2; 0: the size's own")
    attention_experts: int = Field(-1, ge=-1, description="-1: the size's own, 0: no attention experts")
    attention_top_k: int = Field(0, ge=0, description="0: the size's own")
    dropout: float = Field(0.1, ge=0, lt=1, description="of the hidden layer")
    input_dropout: float = Field(0.0, ge=0, lt=1, description="share of genes hidden from the model in a training step")
    gate_noise: bool = Field(True, description="noisy top-k gating in training")
    gate_sees_cancer: bool = Field(True, description="one row of gate logits a cancer type")
    shared_expert: bool = Field(True, description="an expert that every patient passes, beside the routed ones")
    first_layer_scale: float = Field(
        0.001,
        ge=0,
        description="factor on the first layer's initial weights; near 0, risks start at 0 and learn like a ridge",
    )
    dispatch: Literal["routed", "dense"] = Field("routed", description="dense: all experts, for per-sample gradients")
    expert_dtype: Literal["float32", "bfloat16"] = Field("float32", description="bfloat16: for experts, on a GPU")

    def encoder(self) -> dict[str, int]:
        """The encoder's numbers after overrides; raises where top-k exceeds the experts or leaves the gate without a gradient."""
        size = dict(ENCODER_SIZES[self.size])
        for key in size:
            value = getattr(self, key)
            if value > 0 or (key == "attention_experts" and value == 0):
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


class Task(Section):
    """What is learned."""

    kind: Literal["survival"] = "survival"
    loss: Literal["piecewise_exponential", "cox"] = Field(
        "piecewise_exponential", description="one baseline a cancer type; cox is stratified by cancer type"
    )
    intervals: int = Field(20, ge=1, le=70, description="intervals of the agreed event-time grid")


class Panel(Section):
    """Which genes: those that enough sites hold, or an ordered list in a file at the coordinator (one name a line)."""

    file: str = ""
    min_site_share: float = Field(
        1.0, gt=0, le=1, description="a gene enters when at least this share of the sites hold it"
    )


class Training(Section):
    """Rounds, and what a site does in each."""

    rounds: int = Field(15, ge=1, description="of training, in each fold")
    local_steps: int = Field(4, ge=1, description="optimiser steps a site makes in a round")
    batch_size: int = Field(32, ge=0, description="patients in a step; 0: all of the site's")
    optimizer: Literal["sgd", "adam"] = Field("sgd", description="of a site; made anew each round")
    learning_rate: float = Field(0.002, gt=0, description="for some 1,500 genes; fewer genes take more")
    schedule: Literal["constant", "cosine"] = Field("constant", description="of the learning rate over the rounds")
    weight_decay: float = Field(1.0, ge=0, description="L2 in sgd, decoupled in adam; baselines are spared")
    balance: float = Field(0.01, ge=0, description="coefficient of the load-balance loss")
    prox_mu: float = Field(0.0, ge=0, description="FedProx: pull towards the round's starting weights")
    clip_norm: float = Field(20.0, ge=0, description="clip the gradient of a step; 0: off")
    evaluate_every: int = Field(
        5, ge=0, description="score the held-out fold every so many rounds for the curve; 0: only at the end"
    )


class Aggregation(Section):
    """The server's rule: theta_b += eta * sum_i n_ib delta_ib / (sum_i n_ib + tau), block by block."""

    rule: Literal["evidence", "fedavg"] = Field("evidence", description="fedavg: all blocks by a site's patients")
    optimizer: Literal["sgd", "momentum", "adam", "yogi"] = Field("sgd", description="of the server, by block")
    learning_rate: float = Field(1.0, gt=0, description="eta; adam and yogi want about 0.01")
    momentum: float = Field(0.9, ge=0, lt=1, description="of momentum, adam (beta 1) and yogi (beta 1)")
    second_momentum: float = Field(0.99, ge=0, lt=1, description="beta 2 of adam and yogi")
    adaptivity: float = Field(1e-3, gt=0, description="tau of FedAdam and FedYogi (Reddi et al. 2021)")
    tau: float = Field(0.0, ge=0, description="prior evidence that slows blocks with few patients")
    min_sites: int = Field(2, ge=1, description="a round with fewer good replies stops the study")


class Splits(Section):
    """Patient-level cross-validation, stratified by cancer type and event, dealt at each site from the seed."""

    folds: int = Field(5, ge=2, description="of the cross-validation")
    only: tuple[int, ...] = Field((), description="run only these folds; empty: all")
    refit: bool = Field(False, description="after the folds, train once more on all patients: the model to publish")

    @model_validator(mode="before")
    @classmethod
    def _text(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("only"), str):
            data = data | {"only": [int(f) for f in data["only"].split(",") if f.strip()]}
        return data

    @model_validator(mode="after")
    def _inside(self) -> Splits:
        if any(not 0 <= f < self.folds for f in self.only):
            raise ValueError(f"splits.only = {self.only} must lie between 0 and {self.folds - 1}")
        return self


class Runtime(Section):
    """How long to wait, on what to compute, where to write. Paths are the coordinator's own."""

    out: str = Field("out", description="folder for results, models, checkpoints")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, mps")
    threads: int = Field(0, ge=0, description="torch threads at a site; 0: torch's own choice")
    wait_sites_s: float = Field(300.0, gt=0, description="deadline for min_sites to come online")
    round_timeout_s: float = Field(
        3600.0, gt=0, description="a site that has not answered by then is left out of the round"
    )
    resume: bool = Field(False, description="continue after the last checkpointed round")


class Study(Section):
    """One experiment. `Study.from_toml` and `Study.from_run_config` are the two ways to read one."""

    name: str = Field("oncofed", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", description="names the predictions")
    seed: int = Field(0, ge=0, description="of folds, first weights and every site's noise and batches")
    cancers: tuple[str, ...] = Field((), description="cancer types to study; empty: all that the sites hold")
    model: Model = Model()
    task: Task = Task()
    panel: Panel = Panel()
    training: Training = Training()
    aggregation: Aggregation = Aggregation()
    splits: Splits = Splits()
    runtime: Runtime = Runtime()

    @model_validator(mode="before")
    @classmethod
    def _text(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("cancers"), str):
            data = data | {"cancers": [c.strip() for c in data["cancers"].split(",") if c.strip()]}
        return data

    @classmethod
    def parse(cls, data: Mapping[str, Any], source: str) -> Study:
        """Validate nested data; every problem is listed with its key, the value seen and, for a typo, the nearest name."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise ValueError(f"{source}:\n" + "\n".join(_explain(e) for e in error.errors())) from None

    @classmethod
    def from_toml(cls, path: Path, overrides: Mapping[str, Any] | None = None) -> Study:
        """Read a TOML file; `overrides` are dotted keys that win over it."""
        try:
            data = tomllib.loads(path.read_text())
        except OSError as error:
            raise ValueError(
                f"{path}: the study file cannot be read ({error.strerror}); name an existing TOML file"
            ) from None
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"{path}: not valid TOML: {error}") from None
        return cls.parse(merge(data, overrides or {}), str(path))

    @classmethod
    def from_run_config(cls, config: Mapping[str, Any]) -> Study:
        """Read Flower's flat run config (dotted keys; hyphens and underscores are the same; lists as comma-separated text)."""
        flat = {k.replace("-", "_"): v for k, v in config.items() if k not in RUN_KEYS}
        return cls.parse(merge({}, flat), "run config")

    @classmethod
    def from_json(cls, text: str) -> Study:
        return cls.parse(json.loads(text), "study in the message")

    def changed(self, **dotted: Any) -> Study:
        """A validated copy with dotted keys replaced, written with `__` for the dot: `changed(training__rounds=3)`."""
        flat = {k.replace("__", "."): v for k, v in dotted.items()}
        return Study.parse(merge(self.model_dump(), flat), f"study {self.name}")

    def run_config(self) -> dict[str, bool | int | float | str]:
        """The study as Flower's flat run config."""
        flat: dict[str, bool | int | float | str] = {}
        for key, value in _flatten(self.model_dump()):
            flat[key] = ",".join(map(str, value)) if isinstance(value, list | tuple) else value
        return flat


RUN_KEYS = ("study", "sites")
"""Run-config keys that are not part of the study: a study file to read, and the folder of simulated sites."""


def merge(data: Mapping[str, Any], dotted: Mapping[str, Any]) -> dict[str, Any]:
    """A nested copy of `data` with dotted keys set."""
    out: dict[str, Any] = {k: merge(v, {}) if isinstance(v, Mapping) else v for k, v in data.items()}
    for key, value in dotted.items():
        *path, last = key.split(".")
        table = out
        for part in path:
            inner = table.setdefault(part, {})
            if not isinstance(inner, dict):
                raise ValueError(f"{key}: {part} is a value, not a table")
            table = inner
        table[last] = value
    return out


def _flatten(data: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for key, value in data.items():
        rows += _flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(prefix + key, value)]
    return rows


def _valid_keys() -> list[str]:
    return [key for key, _ in _flatten(Study().model_dump())]


def _explain(error: Any) -> str:
    key = ".".join(str(p) for p in error["loc"])
    if error["type"] != "extra_forbidden":
        return f"  {key or 'study'} = {error['input']!r}: {error['msg'].removeprefix('Value error, ')}"
    names = _valid_keys() + sorted({k.split(".")[0] for k in _valid_keys()})
    table, _, last = key.rpartition(".")
    near = [k for k in names if k.rpartition(".")[2] == last]  # the right name in the wrong table
    near = near or difflib.get_close_matches(key, [k for k in names if k.rpartition(".")[0] == table], 1, 0.6)
    near = near or difflib.get_close_matches(key, names, 1, 0.0)
    return f"  {key}: unknown key; did you mean {near[0]}?"
