"""The pooled reference is the federation without the messages: where there is one site, the two are one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from oncofed.client.data.site import list_sites
from oncofed.common.blocks import part
from oncofed.common.modalities import RNA
from oncofed.common.panel import GenePanel
from oncofed.common.study import Study
from oncofed.deploy.comparison.reference import Pool, frame_of, predict_pooled
from oncofed.deploy.comparison.ridge import predict_ridge
from oncofed.deploy.simulate import simulate
from oncofed.deploy.sites.synth import SynthSettings, write_consortium
from oncofed.server.checkpoint import load_arrays

Make = Callable[..., Study]


@pytest.fixture(scope="module")
def one_site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One hospital that calls itself `pooled`, as the reference calls all patients: so the two draw the same noise."""
    sites = tmp_path_factory.mktemp("one") / "sites"
    (folder,) = write_consortium(sites, SynthSettings(sites=1, patients=150, genes=40, cancers=2, genes_per_program=8))
    (folder / "site.toml").write_text('name = "pooled"\nexpression_unit = "log2"\n')
    return sites


def pool_of(sites: Path, study: Study, cancers: list[str]) -> Pool:
    genes = GenePanel(tuple(load_arrays(Path(study.runtime.out) / "model-fold-0.safetensors")[1]["genes"]))
    names = {folder.name.capitalize() for folder in list_sites(sites)} | {"pooled"}
    return Pool.open(sites, study, genes, tuple(cancers), names)


@pytest.mark.parametrize(
    "keys",
    [
        {"training__rounds": 4, "panel__covariates": ["age", "sex=female|male"]},
        {"pretraining__rounds": 2, "pretraining__critic": True, "training__first_layer": "adapters"},
        {
            "training__rounds": 12,
            "training__learning_rate": 0.15,
            "training__patience": 2,
            "splits__validation": 0.25,
        },
    ],
    ids=["covariates", "pretraining", "patience"],
)
def test_a_federation_of_one_site_is_the_pooled_reference(
    one_site: Path, small_study: Make, keys: dict[str, object]
) -> None:
    base = {
        "aggregation__min_sites": 1,
        "analysis__experts": False,
        # all experts open: fixed point differs from float in the last bits, which decide the route at a top-k boundary
        "model__top_k": 4,
        "model__attention_top_k": 3,
        "panel__scale_by": "all",  # by cancer type the site withholds small cells, which the reference may see
    }
    study = small_study(**(base | keys))
    run = simulate(study, one_site)
    pool = pool_of(one_site, study, run.results["cancers"])
    rounds = []
    pooled = predict_pooled(pool, study, 0, lambda: rounds.append(1))
    both = run.predictions.merge(pooled, on=["site", "patient", "cancer_type"], suffixes=("", "_pooled"))
    assert len(both) == len(pooled) == len(run.predictions)
    assert both["risk"].std() > 1e-3
    np.testing.assert_allclose(both["risk_pooled"], both["risk"], rtol=1e-4, atol=1e-5)
    fold = run.results["folds"][0]
    assert len(rounds) == len(fold["curve"]) + len(fold.get("pretraining", {}).get("curve", []))


def test_the_references_frame_is_the_federations(consortium: Path, small_study: Make) -> None:
    """Sums over four sites in four units, and the same patients in one place: one scale, one time grid."""
    study = small_study(panel__scale_by="all", panel__covariates=["age", "sex=female|male"], training__rounds=1)
    results = simulate(study, consortium).results
    pool = pool_of(consortium, study, results["cancers"])
    train = pool.all.select(pool.split(study, 0) == "train")
    lens = frame_of(study, train, len(pool.cancers))
    arrays, _ = load_arrays(Path(study.runtime.out) / "model-fold-0.safetensors")
    assert list(lens.grid.starts) == results["folds"][0]["grid_months"]
    for name, value in part("scaling/", arrays).items():
        np.testing.assert_allclose(getattr(lens.scales[RNA], name), value, rtol=1e-4, atol=1e-5, err_msg=name)
    np.testing.assert_allclose(lens.covariates[0], arrays["covariate_mean"], rtol=1e-6)
    np.testing.assert_allclose(lens.covariates[1], arrays["covariate_sd"], rtol=1e-6)


@pytest.mark.parametrize("keys", [{}, {"own": True, "powers": True}])
def test_ridge_never_sees_the_outcome_of_the_held_out(
    one_site: Path, small_study: Make, keys: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("oncofed.deploy.comparison.ridge.PENALTIES", (1.0, 10.0))
    monkeypatch.setattr("oncofed.deploy.comparison.ridge.INNER", 2)
    study = small_study(aggregation__min_sites=1, training__rounds=1, panel__covariates=["age"])
    run = simulate(study, one_site)
    pool = pool_of(one_site, study, run.results["cancers"])
    table = predict_ridge(pool, study, 0, lambda: None, **keys)
    (cohort,) = pool.cohorts.values()
    time = np.array(cohort.time)
    time[cohort.fold == 0] = np.random.default_rng(0).permutation(time[cohort.fold == 0])
    shuffled = Pool(
        {"pooled": type(cohort)(*(v if k != "time" else time for k, v in vars(cohort).items()))},
        pool.panel,
        pool.cancers,
    )
    again = predict_ridge(shuffled, study, 0, lambda: None, **keys)
    pd.testing.assert_series_equal(table["risk"], again["risk"])
    assert (table["split"] == "test").sum() == (cohort.fold == 0).sum() > 0
