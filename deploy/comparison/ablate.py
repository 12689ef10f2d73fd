"""Ablations: the study as it is beside the study without one of its parts, on the same folds and patients, in one table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from oncofed.common.covariates import input_names
from oncofed.common.modalities import RNA, Beside
from oncofed.common.models.build import Sizes, build_model
from oncofed.common.study import Study
from oncofed.deploy.comparison.compare import SCORING, common_patients, cost_of, difference
from oncofed.deploy.simulate import simulate

WHOLE, EQUAL = "as it is", "dense perceptron of equal size"


def ablations(study: Study) -> dict[str, dict[str, Any]]:
    """What each ablation changes (dotted keys with `__`); those that would change nothing are left out."""
    m, pretrained, rna = study.model, study.pretraining.rounds > 0, RNA in study.modalities
    has = m.encoder() if rna else {"experts": 0, "attention_experts": 0}
    plain = {"model__experts": 0, "model__attention_experts": 0}
    by_cancer = m.gate_sees_cancer and study.task.kind == "survival"
    table: dict[str, tuple[bool, dict[str, Any]]] = {
        "no pre-training": (pretrained, {"pretraining__rounds": 0, "training__first_layer": "train"}),
        "with pre-training": (rna and not pretrained, {"pretraining__rounds": 10}),
        "no critic": (pretrained and study.pretraining.critic, {"pretraining__critic": False}),
        "with critic": (pretrained and not study.pretraining.critic, {"pretraining__critic": True}),
        "no attention experts": (has["attention_experts"] > 0, {"model__attention_experts": 0}),
        "no experts": (has["experts"] > 0, {"model__experts": 0}),
        EQUAL: (has["experts"] > 0, plain),
        "no shared expert": (m.shared_expert and has["experts"] > 0, {"model__shared_expert": False}),
        "no cancer input": (by_cancer, {"model__gate_sees_cancer": False, "model__cancer_head": 0.0}),
        "one head for all cancers": (by_cancer and m.cancer_head > 0, {"model__cancer_head": 0.0}),
        "plain scale of genes": (study.panel.powers, {"panel__powers": False, "panel__scale_by": "all"}),
        "no covariates": (bool(study.panel.covariates), {"panel__covariates": ()}),
        "FedAvg instead of evidence": (study.aggregation.rule == "evidence", {"aggregation__rule": "fedavg"}),
    }
    table |= _of_fusion(study)
    return {name: change for name, (applies, change) in table.items() if applies}


def _of_fusion(study: Study) -> dict[str, tuple[bool, dict[str, Any]]]:
    """Those of several modalities: whether each applies, and what it changes."""
    f, several = study.fusion, len(study.modalities) > 1
    modulated = several and f.kind == "additive"
    return {
        "no modulation": (modulated and f.modulation != "none", {"fusion__modulation": "none"}),
        "federated modulation": (modulated and f.modulation != "federated", {"fusion__modulation": "federated"}),
        "no modality dropout": (several and f.modality_dropout > 0, {"fusion__modality_dropout": 0.0}),
        "concatenation instead of a sum": (several and f.kind != "concat", {"fusion__kind": "concat"}),
    }


def equal_width(study: Study, sizes: Sizes) -> int:
    """The width at which a perceptron without experts has as many parameters as the study's model."""

    def parameters(s: Study) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in build_model(s, sizes).parameters())

    wanted, low, high = parameters(study), 1, 1
    plain = study.changed(model__experts=0, model__attention_experts=0)
    while parameters(plain.changed(model__width=high)) < wanted:
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if parameters(plain.changed(model__width=middle)) < wanted else (low, middle)
    return high


def ablate(study: Study, sites: Path, only: tuple[str, ...] = ()) -> dict[str, Any]:
    """Run the study and each ablation; scores with intervals, and the paired difference of each to the whole.

    Raises `ValueError` on a name in `only` that is no ablation of this study.
    """
    chosen = ablations(study)
    unknown = [name for name in only if name not in chosen]
    if unknown:
        raise ValueError(f"--only {', '.join(unknown)}: no ablation of this study; it has {', '.join(chosen)}")
    scoring, out = SCORING[study.task.kind], Path(study.runtime.out)
    tables, costs = {}, {}

    def run(name: str, change: dict[str, Any]) -> dict[str, Any]:
        slug = "-".join(name.split())
        done = simulate(study.changed(name=f"{study.name}-{slug}"[:64], runtime__out=str(out / slug), **change), sites)
        tables[name] = done.predictions
        costs[name] = cost_of(done.results) | {"parameters": done.results["folds"][0]["parameters"]}
        return done.results

    whole = run(WHOLE, {})
    for name, change in chosen.items():
        if only and name not in only:
            continue
        if name == EQUAL:
            change["model__width"] = equal_width(study, sizes_of(whole, study))
        run(name, change)
    tables = common_patients(tables)
    return {
        "task": study.task.kind,
        "study": study.model_dump(mode="json"),
        "main": WHOLE,
        "methods": {n: scoring.summarise(t, study.seed) | {"cost": costs[n]} for n, t in tables.items()},
        "differences": {n: difference(tables[WHOLE], t, study.seed, scoring) for n, t in tables.items() if n != WHOLE},
        "changes": {n: {k.replace("__", "."): v for k, v in c.items()} for n, c in chosen.items() if n in tables},
    }


def sizes_of(results: dict[str, Any], study: Study) -> Sizes:
    """The shape that the federation agreed on, from its results."""
    grid = len(results["folds"][0]["grid_months"])
    covariates = len(input_names(study.panel.covariates))
    beside = Beside.of(results["beside"])
    return Sizes(results["panel"]["genes"], tuple(results["cancers"]), grid, covariates, beside)
