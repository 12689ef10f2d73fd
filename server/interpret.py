"""What a study's results say of its genes: rankings, pathways, attention and networks, from the models it has saved."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from oncofed.common.saved import SavedModel
from oncofed.server import genes, network, network_results, pathways


def interpret(out: Path, folds: list[int], sets: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """`genes`, `pathways`, `attention` and `network` of a run's results, from the models of `folds` below `out`.

    A part that the study did not ask for is left out, and so is a fold whose sites could not explain its model.
    """
    models = genes.models_of(out, folds)
    told: dict[str, Any] = {}
    attributed = [m for m in models if "attribution/patients" in m.explanation]
    if attributed:
        told["genes"] = genes.summarise(attributed)
        if sets:
            told["pathways"] = pathways.summarise(attributed, sets)
    looked = [m for m in models if "attention/entropy" in m.explanation]
    if looked:
        told["attention"] = attention_focus(looked)
    linked = [m for m in models if network.has_networks(m)]
    if linked:
        told["network"] = network_results.summarise([linked])
    return told


def attention_focus(models: Sequence[SavedModel]) -> dict[str, Any]:
    """Entropy of the heads' attention in nats: means over classes and folds `[L, H]`, by class `[L, H]`, and what is possible.

    Low: a gene looks at few others. At the maximum it looks at all alike.
    """
    first = models[0]
    names, genes_ = first.cancers, len(first.panel)
    by_class: dict[str, Any] = {}
    for c, name in enumerate(names):
        each = [
            m.explanation["attention/entropy"][c] / m.explanation["attention/patients"][c]
            for m in models
            if m.explanation["attention/patients"][c] > 0
        ]
        if each:
            by_class[name] = np.mean(each, axis=0)
    others = genes_ - 1 if first.study.model.self_attention == "before" else genes_
    return {
        "maximum": math.log(max(others, 1)),
        "mean": np.mean(list(by_class.values()), axis=0).tolist() if by_class else [],
        "classes": {name: value.tolist() for name, value in by_class.items()},
        "withheld": [name for name in names if name not in by_class],
    }
