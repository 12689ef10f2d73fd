"""Methods that are other federations of the same sites: what each changes in the study, and late fusion of two of them."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from oncofed.common.modalities import PATHOLOGY, RNA
from oncofed.common.saved import SavedModel, model_file
from oncofed.common.study import Study
from oncofed.deploy.comparison.reference import Pool
from oncofed.deploy.comparison.rescore import predict_again
from oncofed.deploy.simulate import Engine, SimulatedRun, simulate

FEDAVG, LINEAR, UNPROTECTED = "fedavg", "linear", "unprotected"
CONCAT, UNMODULATED, LATE = "concat", "unmodulated", "late"

VARIANTS: dict[str, dict[str, Any]] = {
    FEDAVG: {"aggregation__rule": "fedavg"},
    LINEAR: {  # what concerns attention, encoder and interpretation goes
        "model__name": "t_gem",
        "model__layers": 0,
        "model__activation": "none",
        "pretraining__rounds": 0,
        "training__first_layer": "train",
        "analysis__attention": False,
        "analysis__network_genes": 0,
    },
    # the same steps, clipping included, with next to no noise: rates are chosen for clipped gradients
    UNPROTECTED: {"privacy__epsilon": 1e6, "evaluation__epsilon": 0.0},
    RNA: {"fusion__modalities": (RNA,), "fusion__kind": "additive"},
    PATHOLOGY: {  # what concerns expression alone goes with it
        "fusion__modalities": (PATHOLOGY,),
        "fusion__kind": "additive",
        "pretraining__rounds": 0,
        "training__first_layer": "train",
        "analysis__attributions": False,
    },
    CONCAT: {"fusion__kind": "concat"},
    UNMODULATED: {"fusion__modulation": "none"},
}
"""Keys of the study that a federation changes (`Study.changed`)."""

PARTS = {LATE: (RNA, PATHOLOGY)}
"""Methods that are made of other federations' predictions."""

MULTIMODAL = (RNA, PATHOLOGY, LATE, CONCAT, UNMODULATED)
"""Methods of studies of several modalities."""

KEYS = ["site", "patient", "fold"]
"""What names a prediction."""

ABOUT = [*KEYS, "cancer_type", "time_months", "event", "split"]
LEAST_SD = 1e-9


def check_variant(study: Study, method: str, asked: str = "--compare") -> None:
    """Raise `ValueError` with the remedy where `method` is one of several modalities and the study has no such variant."""
    if method == UNPROTECTED and not study.privacy.on:
        raise ValueError(f"{asked} {method}: the study promises no privacy; set privacy.unit, or leave it out")
    if method not in MULTIMODAL:
        return
    f = study.fusion
    if not study.multimodal:
        raise ValueError(
            f"{asked} {method}: model.name = '{study.model.name}' sees expression alone; set model.name = 'path_gptomic'"
        )
    absent = [m for m in (RNA, PATHOLOGY) if m not in study.modalities]
    if absent and method != UNMODULATED:
        raise ValueError(
            f"{asked} {method}: needs rna and pathology in the study, fusion.modalities = {list(f.modalities)}; add {absent[0]}"
        )
    if method == LATE and (study.panel.covariates or len(study.modalities) > 2):
        raise ValueError(
            f"{asked} {method}: adds a model of expression and one of images, so covariates would count twice and alterations not "
            "at all; leave panel.covariates and alterations out, or late fusion"
        )
    if method == CONCAT and f.kind == "concat":
        raise ValueError(f"{asked} {method}: fusion.kind is 'concat' already; leave it out")
    if method == UNMODULATED and (f.modulation == "none" or f.kind != "additive" or len(study.modalities) < 2):
        raise ValueError(
            f"{asked} {method}: nothing is modulated with fusion.modulation = '{f.modulation}', fusion.kind = '{f.kind}' and "
            f"fusion.modalities = {list(f.modalities)}; leave it out"
        )


def renamed(study: Study, suffix: str, **dotted: Any) -> Study:
    """A changed copy named `<name>-<suffix>`: a study's name is that of its predictions at the sites."""
    return study.changed(name=f"{study.name[: 63 - len(suffix)]}-{suffix}", **dotted)


@dataclass
class Federations:
    """A study's federation (named '') and its variants over one folder of sites, each run when it is first asked for."""

    study: Study
    sites: Path
    engine: Engine = "local"
    seconds: dict[str, float] = field(default_factory=dict)
    done: dict[str, SimulatedRun] = field(default_factory=dict)

    def study_of(self, variant: str = "") -> Study:
        """The study of a variant, which writes below the folder of its name."""
        if not variant:
            return self.study
        out = str(self.folder(variant))
        return renamed(self.study, variant, **VARIANTS[variant], runtime__out=out, splits__refit=False)

    def folder(self, variant: str = "") -> Path:
        """Where a variant's results and models are."""
        return Path(self.study.runtime.out) / variant

    def run(self, variant: str = "") -> SimulatedRun:
        """A variant's results and predictions."""
        if variant not in self.done:
            begin = time.perf_counter()
            self.done[variant] = simulate(self.study_of(variant), self.sites, self.engine)
            self.seconds[variant] = time.perf_counter() - begin
        return self.done[variant]

    def table(self, method: str) -> pd.DataFrame:
        """Predictions of a variant, or of late fusion."""
        if method in PARTS:
            return late_fusion(*(self.with_training(part) for part in PARTS[method]))
        return self.run(method).predictions

    def with_training(self, variant: str) -> pd.DataFrame:
        """A variant's predictions, training patients among them even where whole sites are held out, who alone score then."""
        table = self.run(variant).predictions
        if not self.study.splits.held_out_sites:
            return table
        pool, device = self.pool(variant), self.study.runtime.device
        train = [predict_again(self.model(variant, k), pool, held_out=False, device=device) for k in self.folds]
        return pd.concat([table[table["split"] == "test"], *train], ignore_index=True)

    @property
    def folds(self) -> list[int]:
        """The folds that are run."""
        return [int(f["fold"]) for f in self.run().results["folds"] if f["fold"] >= 0]

    @property
    def members(self) -> set[str]:
        """Sites that took part: who scored nobody did not; but where whole sites are held out, the others only train."""
        run = self.run()
        return set(run.results["sites"] if self.study.splits.held_out_sites else run.predictions["site"])

    def model(self, variant: str, fold: int) -> SavedModel:
        """A variant's model of a fold."""
        self.run(variant)
        return SavedModel.read(self.folder(variant) / model_file(fold))

    def pool(self, variant: str = "", sites: Path | None = None) -> Pool:
        """All members' patients as a variant's models see them, from their own folders or those of the same names in `sites`."""
        m = self.model(variant, self.folds[0])
        return Pool.open(sites or self.sites, m.study, m.panel, m.cancers, self.members, m.beside)


def late_fusion(rna: pd.DataFrame, pathology: pd.DataFrame) -> pd.DataFrame:
    """Predictions of two models -> the sum of their risks, each standardised, over the modalities that a patient has.

    A risk is held against those of the training patients (all who are not held out) of its own table, fold and cancer type.
    Validation patients of the two may differ, so the rows are `train` or `test`. Raises where the tables disagree otherwise.
    """
    both = pd.concat([standardised(rna), standardised(pathology)], ignore_index=True)
    both["split"] = both["split"].where(both["split"] == "test", "train")
    fused = both[[*ABOUT, "risk"]].groupby(ABOUT, as_index=False, sort=False)["risk"].sum()
    twice = int(fused.duplicated(KEYS).sum())
    if twice:
        raise ValueError(
            f"two models disagree on fold, cancer type or outcome of {twice} patients; run both on the same site folders"
        )
    return fused


def standardised(table: pd.DataFrame) -> pd.DataFrame:
    """Risks less the mean of training risks of the fold and cancer type, over their deviation.

    Of a cancer type without training patients, those of all cancer types are taken; a deviation of 0 leaves risks as wide
    as they are. Raises where a fold has no training patients at all.
    """
    train = table[table["split"] != "test"]
    spread = {}
    for by in (("fold", "cancer_type"), ("fold",)):
        risks = train.groupby(list(by))["risk"]
        moments = pd.DataFrame({"mean": risks.mean(), "sd": risks.std(ddof=0)})
        spread[by] = table[list(by)].join(moments, on=list(by))[["mean", "sd"]]
    scale = spread["fold", "cancer_type"].fillna(spread["fold",])
    if scale.isna().to_numpy().any():
        raise ValueError(
            "a fold without training patients: its risks have no scale; late fusion needs predictions of all"
        )
    sd = scale["sd"].where(scale["sd"] > LEAST_SD, 1.0)
    return table.assign(risk=(table["risk"] - scale["mean"]) / sd)
