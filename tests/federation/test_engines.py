"""In-process, Ray and SuperLink run the same apps and give the same weights."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
from oncofed.common.plan import Plan
from oncofed.common.study import Study
from oncofed.deploy.analyse import analyse
from oncofed.deploy.simulate import Engine, simulate
from oncofed.deploy.sites.synth import SynthSettings, write_consortium
from oncofed.server.checkpoint import load_arrays

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("engines") / "sites"
    write_consortium(out, SynthSettings(sites=3, patients=180, genes=60, cancers=3, genes_per_program=8))
    return out


def study(out: Path, **keys: object) -> Study:
    base = {
        "model__size": "tiny",
        "panel__covariates": ["age", "sex=female|male"],
        "pretraining__rounds": 1,
        "training__rounds": 2,
        "training__evaluate_every": 0,
        "splits__only": [0],
        "runtime__threads": 1,
        "aggregation__min_sites": 3,
    }
    return Study().changed(**(base | {"runtime__out": str(out)} | keys))


MODELS: dict[str, dict[str, object]] = {
    "gene_moe": {},
    "path_gptomic": {
        "model__name": "path_gptomic",
        "fusion__modulation": "federated",
        "aggregation__optimizer": "adam",
    },
}


@pytest.fixture(scope="module", params=MODELS)
def local(request, sites: Path, tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """A model's name, and the weights and results of its study in this process."""
    out = tmp_path_factory.mktemp("local")
    run = simulate(study(out, **MODELS[request.param]), sites)
    return request.param, load_arrays(out / "model-fold-0.safetensors")[0], run.results


@pytest.mark.parametrize("engine", ["ray", "superlink"])
def test_engines_give_the_same_weights(engine: str, sites: Path, local, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    model, expected, results = local
    run = simulate(study(tmp_path / "out", **MODELS[model]), sites, engine)  # type: ignore[arg-type]
    arrays, _ = load_arrays(tmp_path / "out" / "model-fold-0.safetensors")
    assert arrays.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(arrays[name], expected[name], err_msg=name)
    assert run.results["folds"][0]["evaluation"] == results["folds"][0]["evaluation"]
    assert run.results["left_out"] == []
    assert len(run.predictions) == 180
    if engine == "superlink":
        assert not _alive(tmp_path / "out" / "processes")


def _alive(root: Path, patience_s: float = 30.0) -> list[str]:
    """Processes whose working folder lies below `root`. Flower's apps end by themselves once their parent is gone."""
    end = time.monotonic() + patience_s
    while (found := _processes(root)) and time.monotonic() < end:
        time.sleep(0.5)
    return found


def _processes(root: Path) -> list[str]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if str((process / "cwd").resolve()).startswith(str(root)):
                found.append((process / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue
    return found


def test_a_failed_run_on_real_processes_raises_with_the_reason(sites: Path, tmp_path: Path) -> None:
    wrong = study(tmp_path / "out", cancers=["UVM"])
    with pytest.raises(RuntimeError, match=r"(?s)finished:failed.*cancers = \['UVM'\] are at no site"):
        simulate(wrong, sites, "superlink")
    assert not _alive(tmp_path / "out" / "processes")
    assert not (tmp_path / "out" / "results.json").exists()
    json.loads((sites / "truth.json").read_text())


@pytest.mark.parametrize("engine", ["ray", "superlink"])
def test_engines_give_the_same_analysis(engine: Engine, sites: Path, tmp_path: Path) -> None:
    """To the last bit, whoever answers first: also the evaluation on other patients."""
    keys = {"covariates": ("age", "sex=female|male"), "strata": ("cancer_type",), "times": "exact", "robust": True}
    plan = Plan(kind="cox", ridge=0.01, min_sites=3, **keys)  # type: ignore[arg-type]
    here, there = (
        analyse(plan.model_copy(update={"out": str(tmp_path / name)}), sites, name)  # type: ignore[arg-type]
        for name in ("local", engine)
    )
    assert there["cox"] == here["cox"]
    assert there["sites"] == here["sites"]
    assert (tmp_path / engine / "analysis.html").exists()


@pytest.mark.parametrize("engine", ["ray", "superlink"])
def test_engines_run_private_studies_alike(engine: Engine, sites: Path, tmp_path: Path) -> None:
    """Noise differs, so its size is held: weights of two runs lie as far apart as it says, and the statement is the same."""
    keys = {
        "pretraining__rounds": 0,
        "panel__covariates": [],
        "panel__scale_by": "patient",
        "task__time_edges": (0, 12, 24, 60),
        "privacy__unit": "patient",
        "privacy__evidence": "noised",
        "evaluation__epsilon": 1.0,
    }
    weights, statements = [], []
    for name in ("local", "local", engine):
        out = tmp_path / f"{name}-{len(weights)}"
        results = simulate(study(out, **keys), sites, name).results  # type: ignore[arg-type]
        assert results["left_out"] == []
        weights.append(load_arrays(out / "model-fold-0.safetensors")[0]["weights/encoder.shared.weight"])
        statements.append(json.dumps(results["privacy"], sort_keys=True))
    within, across = float((weights[0] - weights[1]).std()), float((weights[0] - weights[2]).std())
    assert across == pytest.approx(within, rel=0.3)
    assert statements[0] == statements[1] == statements[2]
