"""What attributions rank first is what was planted, far above what random genes would be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oncofed.common.saved import SavedModel
from oncofed.common.study import Study
from oncofed.deploy.simulate import simulate
from oncofed.deploy.sites.synth import SynthSettings, write_consortium
from oncofed.server.genes import rankings

GENES, PROGRAM = 200, 20
BY_MODEL: dict[str, dict[str, Any]] = {
    "t_gem": {
        "model__layers": 1,
        "training__learning_rate": 0.05,
        "training__weight_decay": 0.1,
        "training__schedule": "cosine",
    },
    "gene_moe": {"model__size": "tiny", "training__learning_rate": 0.01, "training__weight_decay": 0.1},
}


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three cancers whose own programs of 20 genes stand a fourfold above the other cancers'."""
    out = tmp_path_factory.mktemp("planted") / "sites"
    size = SynthSettings(sites=4, patients=360, genes=GENES, cancers=3, genes_per_program=PROGRAM, own_level=2.0)
    write_consortium(out, size)
    return out


@pytest.mark.parametrize("model", BY_MODEL)
def test_planted_programs_come_first(tmp_path: Path, sites: Path, model: str) -> None:
    study = Study().changed(
        name=model,
        task__kind="classification",
        model__name=model,
        training__rounds=12,
        splits__folds=2,
        runtime__threads=1,
        runtime__out=str(tmp_path),
        analysis__attributions=True,
        analysis__experts=False,
        **BY_MODEL[model],
    )
    simulate(study, sites)
    models = [SavedModel.read(tmp_path / f"model-fold-{k}.safetensors") for k in (0, 1)]
    truth = json.loads((sites / "truth.json").read_text())["own_programs"]
    precision = []
    for cancer, ranking in rankings(models).items():
        assert ranking is not None
        first = np.argsort(-ranking.score)[:PROGRAM]
        precision.append(np.mean([models[0].panel.genes[g] in truth[cancer] for g in first]))
    assert np.mean(precision) > 5 * PROGRAM / GENES, precision  # a random order has 0.1
