"""FLamby's Fed-TCGA-BRCA: the exact federated fit is the pooled one, and does as well as was measured; skipped without ONCOFED_DATA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from oncofed.common.metrics import concordance_index
from oncofed.common.plan import Plan
from oncofed.deploy.analyse import analyse
from oncofed.deploy.sites.flamby import write_flamby_sites
from sksurv.linear_model import CoxPHSurvivalAnalysis

PATIENTS = (248, 156, 164, 129, 129, 40)
TEST_PATIENTS = (63, 40, 42, 33, 33, 11)


@pytest.fixture(scope="module")
def benchmark(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The benchmark's sites, its patients in one table, and the fit of the plan that is written beside the sites."""
    root = tmp_path_factory.mktemp("fed-tcga-brca")
    folders, covariates = write_flamby_sites(real_data / "fed_tcga_brca", root / "sites")
    table = pd.concat([pd.read_csv(f / "clinical.csv").assign(client=i) for i, f in enumerate(folders)])
    plan = Plan.read(str(root / "sites" / "plan.toml")).model_copy(update={"out": str(root / "out")})
    result = analyse(plan, root / "sites")
    train, test = (table[table["split"] == s] for s in ("train", "test"))
    return {"plan": plan, "covariates": list(covariates), "train": train, "test": test, "result": result}


def test_the_clients_are_the_published_ones(benchmark: dict[str, Any]) -> None:
    for table, sizes in ((benchmark["train"], PATIENTS), (benchmark["test"], TEST_PATIENTS)):
        assert tuple(table["client"].value_counts().sort_index()) == sizes
    assert benchmark["test"].groupby("client")["event"].sum().tolist() == [14, 4, 8, 3, 2, 1]


def test_federated_is_pooled(benchmark: dict[str, Any], tmp_path: Path) -> None:
    """The same patients at one site, and scikit-survival on one table; columns that stand in it twice included."""
    cox, columns, plan = benchmark["result"]["cox"], benchmark["covariates"], benchmark["plan"]
    (tmp_path / "sites" / "all").mkdir(parents=True)
    (tmp_path / "sites" / "all" / "site.toml").write_text(
        'name = "All"\nexpression_unit = "log2"\ntime_unit = "days"\n'
    )
    benchmark["train"].to_csv(tmp_path / "sites" / "all" / "clinical.csv", index=False)
    alone = plan.model_copy(update={"test": (), "min_sites": 1, "out": str(tmp_path / "out")})
    one = analyse(alone, tmp_path / "sites")["cox"]
    x = benchmark["train"][columns].to_numpy(dtype=np.float64)
    sd = x.std(0)
    found, wanted = np.array(cox["coef"]) * sd, np.array(one["coef"]) * sd
    np.testing.assert_allclose(found, wanted, rtol=1e-10)
    assert cox["loglik"] == pytest.approx(one["loglik"], rel=1e-12)
    outcome = benchmark["train"][["event", "time"]].astype({"event": bool}).to_records(index=False)
    library = CoxPHSurvivalAnalysis(alpha=plan.ridge * len(x), ties="breslow", n_iter=200, tol=1e-15)
    beta = library.fit((x - x.mean(0)) / sd, outcome).coef_
    np.testing.assert_allclose(found, beta, rtol=1e-10)
    assert (cox["patients"], cox["events"]) == (866, 119)


def test_it_does_as_well_on_the_test_patients_as_was_measured(benchmark: dict[str, Any]) -> None:
    test, evaluation = benchmark["test"], benchmark["result"]["evaluation"]
    risk = test[benchmark["covariates"]].to_numpy() @ np.array(benchmark["result"]["cox"]["coef"])
    value = concordance_index(risk, test["time"].to_numpy(), test["event"].to_numpy())
    assert value == pytest.approx(0.846, abs=0.001)
    low, high = evaluation["c_index"]["bounds"]
    assert low <= value <= high < low + 0.03
    assert evaluation["c_index"]["value"] == pytest.approx(value, abs=0.01)
    for client, rows in test.assign(risk=risk).groupby("client"):
        wanted = concordance_index(*(rows[c].to_numpy() for c in ("risk", "time", "event")))
        assert evaluation["by_site"][f"Client {client}"]["value"] == pytest.approx(wanted, abs=1e-12)
