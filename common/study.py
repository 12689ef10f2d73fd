"""Study: the typed description of one experiment, read from a TOML file or from Flower's flat run config.

Every party holds the same text: the server sends it with each message, and a site checks it against its own policy.
"""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from oncofed.common.exchange import Aggregation, Transport
from oncofed.common.inspection import Analysis, Evaluation
from oncofed.common.modalities import MODALITIES, RNA
from oncofed.common.privacy.refusals import broken_by, hidden_by_masks
from oncofed.common.privacy.settings import Privacy
from oncofed.common.privacy.sharing import not_shared
from oncofed.common.section import Section, join_text, split_text
from oncofed.common.sections import (
    Fusion,
    Model,
    Panel,
    Pretraining,
    Runtime,
    Splits,
    Task,
    Training,
)
from pydantic import Field, ValidationError, model_validator

PRETRAIN, TRAIN = "pretrain", "train"
"""The phases of a study that have rounds."""


class Study(Section):
    """One experiment. `Study.from_toml` and `Study.from_run_config` are the two ways to read one."""

    name: str = Field("oncofed", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", description="names the predictions")
    seed: int = Field(0, ge=0, description="of folds, first weights and every site's noise and batches")
    cancers: tuple[str, ...] = Field((), description="cancer types to study; empty: all that the sites hold")
    model: Model = Model()
    fusion: Fusion = Fusion()
    task: Task = Task()
    panel: Panel = Panel()
    pretraining: Pretraining = Pretraining()
    training: Training = Training()
    aggregation: Aggregation = Aggregation()
    transport: Transport = Transport()
    splits: Splits = Splits()
    analysis: Analysis = Analysis()
    evaluation: Evaluation = Evaluation()
    privacy: Privacy = Privacy()
    runtime: Runtime = Runtime()

    @model_validator(mode="before")
    @classmethod
    def _text(cls, data: Any) -> Any:
        return split_text(data, "cancers")

    @model_validator(mode="after")
    def _consistent(self) -> Study:
        if self.task.kind == "classification" and self.panel.scale_by == "cancer":
            raise ValueError("panel.scale_by = 'cancer' needs the cancer type that is to be classified; use 'all'")
        if self.multimodal and self.task.kind != "survival":
            raise ValueError(
                "model.name = 'path_gptomic' predicts survival; set task.kind = 'survival', or use 'gene_moe'"
            )
        self._check_genes()
        self._check_exchange()
        if self.pretraining.rounds and RNA not in self.modalities:
            raise ValueError(
                "pretraining reconstructs expression; add 'rna' to fusion.modalities or set pretraining.rounds = 0"
            )
        if self.analysis.attributions and (self.embeds or RNA not in self.modalities):
            raise ValueError(
                "analysis.attributions ranks genes that the model sees one by one; it needs 'rna' in fusion.modalities and "
                "fusion.rna_encoder = 'gene_moe'"
            )
        a = self.analysis
        if self.evaluation.epsilon and (self.task.kind != "survival" or not self.evaluation.tables):
            raise ValueError(
                "evaluation.epsilon puts noise on the table of risk and time, which survival has; set evaluation.tables = true and task.kind "
                "= 'survival', or epsilon = 0"
            )
        if self.evaluation.epsilon and (a.cross_site or a.ablation or self.splits.validation):
            raise ValueError(
                "with evaluation.epsilon nothing of patients who are kept aside leaves without noise: leave out analysis.cross_site, "
                "analysis.ablation and splits.validation"
            )
        if "personalised" in a.cross_site and a.personal_rounds > self.training.rounds:
            raise ValueError(
                f"analysis.personal_rounds = {a.personal_rounds} exceeds training.rounds = {self.training.rounds}, the rounds "
                "that a site knows of; lower it"
            )
        if self.training.patience and not (self.splits.validation and self.training.evaluate_every):
            raise ValueError(
                "training.patience chooses a round by validation patients: set splits.validation (0.15, say) "
                "and training.evaluate_every"
            )
        if self.training.first_layer != "train" and not (self.pretraining.rounds or self.training.start):
            raise ValueError(
                f"training.first_layer = {self.training.first_layer!r} keeps a first layer that nothing has trained; "
                "set pretraining.rounds or training.start, or first_layer = 'train'"
            )
        if self.training.encoder == "frozen" and not self.training.start:
            raise ValueError(
                "training.encoder = 'frozen' keeps an encoder that nothing has trained; name a saved model in training.start"
            )
        if self.training.start and self.pretraining.rounds:
            raise ValueError(
                "training.start brings a trained encoder, which pretraining would train again; set pretraining.rounds = 0, or leave it out"
            )
        if self.privacy.of_patients and self.splits.deal == "stratified":
            raise ValueError(
                "splits.deal = 'stratified' deals patients in turn, so that one who comes moves others between folds; use 'independent'"
            )
        hidden = hidden_by_masks(self)
        if hidden:
            raise ValueError("privacy.secure_sum shows the server totals alone:\n    " + "\n    ".join(hidden))
        unshared = not_shared(self)
        if unshared:
            raise ValueError(f"privacy.noise = '{self.privacy.noise}' cannot be:\n    " + "\n    ".join(unshared))
        broken = broken_by(self)
        if broken:
            raise ValueError(f"privacy.unit = '{self.privacy.unit}' cannot be promised:\n    " + "\n    ".join(broken))
        return self

    def _check_genes(self) -> None:
        """Refuse analyses that the model or the task has nothing for."""
        a, classification, attention = self.analysis, self.task.kind == "classification", self.model.name == "t_gem"
        if self.model.name == "t_gem" and self.pretraining.rounds:
            raise ValueError(
                "model.name = 't_gem' has no encoder to pre-train; set pretraining.rounds = 0, or use 'gene_moe'"
            )
        if (a.attention or a.network_genes) and not (attention and self.model.layers):
            raise ValueError(
                "analysis.attention and analysis.network_genes look at attention between genes; set model.name = 't_gem' with "
                "layers, or leave them out"
            )
        if a.network_genes and self.model.self_attention == "keep":
            raise ValueError(
                "analysis.network_genes goes from uniform attention to the model's; with model.self_attention = 'keep' uniform "
                "attention gives all genes the same number and the layer norm has no way from there; use 'before' or 'after'"
            )
        if a.network_genes and not (classification and a.attributions):
            raise ValueError(
                "analysis.network_genes needs classes (task.kind = 'classification') and analysis.attributions = true"
            )
        if a.ablation and not (classification and a.attributions):
            raise ValueError(
                "analysis.ablation takes out the genes that attributions rank, and counts recall; set "
                "analysis.attributions = true and task.kind = 'classification'"
            )
        if a.pathways and not a.attributions:
            raise ValueError("analysis.pathways adds up attributions of genes; set analysis.attributions = true")
        if not classification and (self.task.classes or self.task.label != "cancer_type"):
            raise ValueError("task.label and task.classes are of classification; set task.kind = 'classification'")

    def _check_exchange(self) -> None:
        """Refuse robust rules and codings that secure sums, or sums over sites, have no room for."""
        robust = self.aggregation.robust
        if self.secure_sums and robust != "none":
            raise ValueError(
                f"aggregation.robust = {robust!r} looks at each site's change, privacy.secure_sum hides them from the server; choose one of both"
            )
        if self.secure_sums and self.transport.upload != "float32":
            raise ValueError(
                f"transport.upload = {self.transport.upload!r} gives every site a scale of its own, and masks cancel on one scale alone; set "
                "transport.upload = 'float32' beside privacy.secure_sum"
            )
        if robust != "none" and self.multimodal and self.fusion.modulation == "federated":
            raise ValueError(
                "fusion.modulation = 'federated' follows a plain sum over sites, which aggregation.robust does not guard; set it to 'local'"
            )

    @property
    def secure_sums(self) -> bool:
        """Whether the server sees sums over sites alone, so that every site must send every block, on the same scale."""
        return getattr(self.privacy, "secure_sum", "none") not in (False, "", "none", "off")

    @property
    def of(self) -> tuple[str, ...]:
        """Cancer types whose patients are classified by another label; empty: all, or the classes are cancer types."""
        return self.cancers if self.task.label != "cancer_type" else ()

    @property
    def groups(self) -> tuple[str, ...]:
        """The classes or cancer types that the study names; empty: those that the sites hold."""
        return self.task.classes or (self.cancers if self.task.label == "cancer_type" else ())

    @property
    def multimodal(self) -> bool:
        """Whether the model may see more of a patient than expression."""
        return self.model.name == "path_gptomic"

    @property
    def scale_by_cancer(self) -> bool:
        """Whether genes are held against the patient's own cancer type."""
        return self.panel.scale_by == "cancer" or (self.panel.scale_by == "auto" and self.task.kind == "survival")

    @property
    def modalities(self) -> tuple[str, ...]:
        """What the model sees beside the cancer type and covariates, in the order of `MODALITIES`."""
        if not self.multimodal:
            return (RNA,)
        return tuple(m for m in MODALITIES if m in self.fusion.modalities)

    @property
    def independent_folds(self) -> bool:
        """Whether a patient's fold depends on her name alone."""
        deal = self.splits.deal
        return deal == "independent" or (deal == "auto" and self.privacy.on)

    @property
    def ranked(self) -> bool:
        """Whether expression enters as ranks among a patient's own genes."""
        return self.panel.scale_by == "patient" and not self.embeds

    @property
    def embeds(self) -> bool:
        """Whether expression enters as embeddings of a frozen model."""
        return self.multimodal and RNA in self.modalities and self.fusion.rna_encoder == "scgpt"

    @property
    def phases(self) -> tuple[str, ...]:
        """The phases that have rounds, in order."""
        return (PRETRAIN, TRAIN) if self.pretraining.rounds else (TRAIN,)

    def steps(self, phase: str) -> Pretraining | Training:
        """The table of a phase."""
        return self.pretraining if phase == PRETRAIN else self.training

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
        """The inverse of `model_dump_json`; numbers that are none are refused: no bound would hold for them."""
        return cls.parse(json.loads(text, parse_constant=_no_number), "study in the message")

    def changed(self, **dotted: Any) -> Study:
        """A validated copy with dotted keys replaced, written with `__` for the dot: `changed(training__rounds=3)`."""
        flat = {k.replace("__", "."): v for k, v in dotted.items()}
        return Study.parse(merge(self.model_dump(), flat), f"study {self.name}")

    def run_config(self) -> dict[str, bool | int | float | str]:
        """The study as Flower's flat run config."""
        flat: dict[str, bool | int | float | str] = {}
        for key, value in _flatten(self.model_dump()):
            flat[key] = join_text(value) if isinstance(value, list | tuple) else value
        return flat


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no number")


RUN_KEYS = ("study", "plan", "sites")
"""Run-config keys that are not part of the study: a study file to read, a plan to run instead, and the folder of simulated sites."""


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
