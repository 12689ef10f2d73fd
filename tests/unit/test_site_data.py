"""The door in: reading, units, checks and the prepared cohort."""

from __future__ import annotations

from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from oncofed.client.data.check import SiteReport, check_site
from oncofed.client.data.cohort import Cohort, cohort_key, open_cohort
from oncofed.client.data.read import read_clinical, read_expression
from oncofed.client.data.site import SiteDescription, SiteFolder, write_description
from oncofed.client.data.units import CLIP, harmonise
from oncofed.client.greeting import greet
from oncofed.common.errors import Refusal
from oncofed.common.panel import GenePanel
from oncofed.common.scaling import Scaling, groups
from oncofed.common.study import Study

PATIENTS = [f"P{i}" for i in range(12)]
GENES = ["TP53", "EGFR", "KRAS", "MYC"]
PANEL = GenePanel(("EGFR", "ABSENT", "TP53"))


def clinical() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "patient": PATIENTS,
            "cancer_type": ["BRCA", "LUAD"] * 6,
            "time": np.arange(1.0, 13.0),
            "event": [0, 1, 1] * 4,
            "age": 60,
        }
    )


def expression() -> pd.DataFrame:
    values = np.random.default_rng(0).normal(5, 2, (12, 4)).round(3).clip(0)
    return pd.DataFrame(values, index=pd.Index(PATIENTS, name="patient"), columns=GENES)


def write_site(
    folder: Path,
    table: pd.DataFrame | None = None,
    x: pd.DataFrame | None = None,
    kind: str = "csv",
    **description: object,
) -> SiteFolder:
    write_description(folder, SiteDescription(**({"name": "Test", "expression_unit": "log2"} | description)))
    (clinical() if table is None else table).to_csv(folder / "clinical.csv", index=False)
    x = expression() if x is None else x
    if kind == "parquet":
        x.to_parquet(folder / "expression.parquet")
    elif kind == "h5ad":
        anndata.AnnData(x).write_h5ad(folder / "expression.h5ad")
    else:
        x.to_csv(folder / f"expression.{kind}", sep="\t" if "tsv" in kind else ",")
    return SiteFolder.open(folder)


@pytest.mark.parametrize("kind", ["csv", "tsv", "csv.gz", "parquet", "h5ad"])
@pytest.mark.parametrize("turned", [False, True])
def test_every_format_and_orientation_gives_the_same_table(tmp_path: Path, kind: str, turned: bool) -> None:
    x = expression().T.rename_axis("gene") if turned else expression()
    site = write_site(tmp_path, x=x, kind=kind)
    got = read_expression(site, pd.Index(read_clinical(site)["patient"]))
    np.testing.assert_allclose(got.loc[PATIENTS, GENES].to_numpy(float), expression().to_numpy())


def test_orientation_is_never_guessed(tmp_path: Path) -> None:
    x = expression()
    x.index = [f"other-{i}" for i in range(12)]
    site = write_site(tmp_path, x=x)
    with pytest.raises(Refusal, match="orientation is unclear; set orientation"):
        read_expression(site, pd.Index(PATIENTS))
    site = write_site(tmp_path, orientation="genes_x_patients")
    with pytest.raises(Refusal, match="on the other axis: 12"):
        read_expression(site, pd.Index(PATIENTS))


def test_units() -> None:
    x = np.array([[1.0, 3.0, 0.0], [10.0, 30.0, 0.0]])
    counts = harmonise(x, "counts")
    np.testing.assert_allclose(counts[0], counts[1])  # same profile at another depth
    np.testing.assert_allclose(counts[0], np.log2(np.array([0.25, 0.75, 0.0]) * 1e6 + 1))
    np.testing.assert_allclose(harmonise(x, "tpm"), np.log2(x + 1))
    np.testing.assert_allclose(harmonise(x, "log2"), x)
    z = harmonise(np.array([[-36893.0, -1.0, 0.0, 1.0, np.nan]]), "zscore")
    np.testing.assert_allclose(z, [[-CLIP, -np.log(2), 0.0, np.log(2), np.nan]])


def test_clean_site_is_ready(tmp_path: Path) -> None:
    write_site(tmp_path)
    report = check_site(tmp_path, GenePanel(tuple(GENES)))
    assert report.ok
    assert not report.findings
    assert report.facts["expression"] == "12 patients x 4 genes"
    assert report.facts["panel"] == "4 of 4 genes"
    assert "BRCA 6" in report.facts["patients"]


def problems(report: SiteReport) -> dict[tuple[str, str], int]:
    return {(f.column, f.problem.split(" [")[0]): f.count for f in report.findings}


def test_all_problems_in_one_pass_without_a_patient_in_sight(tmp_path: Path) -> None:
    table = clinical().astype({"event": object, "time": object})
    table.loc[0, "time"], table.loc[1, "time"], table.loc[2, "time"] = -4.0, 0.0, "soon"
    table.loc[3, "event"], table.loc[4, "event"] = 2, None
    table.loc[5, "cancer_type"], table.loc[6, "cancer_type"] = "BCRA", None
    table.loc[7, "patient"] = "P8"
    table.loc[9, "patient"] = None
    x = expression().astype(object)
    x.iloc[0, 1] = "high"
    x.loc[PATIENTS[:6], "KRAS"] = None
    x.loc["P1", "MYC"] = 99.0
    x.loc["SECRET-77"] = 1.0
    x = pd.concat([x, x.iloc[[2]]])
    write_site(tmp_path, table=table, x=x)
    report = check_site(tmp_path, GenePanel(("TP53", "ABSENT")))
    found = problems(report)
    assert not report.ok
    expected = {
        ("time", "zero or negative times"): 2,
        ("time", "values that are not numbers"): 1,
        ("event", "values other than 0 and 1"): 1,
        ("event", "missing values"): 1,
        ("cancer_type", "unknown cancer types"): 1,
        ("cancer_type", "missing values"): 1,
        ("patient", "duplicate patients"): 1,
        ("patient", "missing values"): 1,
        ("EGFR", "cells that are not numbers"): 1,
        ("MYC", "cells beyond 40, extreme for log2"): 1,
        ("ABSENT", "genes of the panel that the site lacks"): 1,
        ("patient", "patients without clinical data"): 3,
    }
    for key, count in expected.items():
        assert found.get(key) == count, (key, found)
    assert any("more than 20 % missing" in f.problem and f.column == "KRAS" for f in report.findings)
    assert any("nearest: ['BRCA']" in f.problem for f in report.findings)
    assert all(f.remedy for f in report.findings)
    text = str(report)
    assert "SECRET-77" not in text
    assert not any(p in text.replace("TP53", "") for p in ("'P8'", "P10", "P11"))


@pytest.mark.parametrize(
    ("unit", "problem"),
    [("counts", "not whole numbers"), ("tpm", "negative cells"), ("zscore", "beyond 100")],
)
def test_wrong_units_are_noticed(tmp_path: Path, unit: str, problem: str) -> None:
    x = expression() - (3.0 if unit == "tpm" else 0.0)
    if unit == "zscore":
        x.iloc[0, 0] = 14070.0
    write_site(tmp_path, x=x, expression_unit=unit)
    assert any(problem in f.problem for f in check_site(tmp_path).findings)


def test_faults_of_the_folder_itself(tmp_path: Path) -> None:
    assert "site.toml is missing" in check_site(tmp_path).findings[0].problem
    (tmp_path / "site.toml").write_text('name = "x"\nexpression_unit = "fpkm"\n')
    assert "expression_unit" in check_site(tmp_path).findings[0].problem
    (tmp_path / "site.toml").write_text('name = "x"\nexpression_unit = "tpm"\n')
    assert "no clinical table" in check_site(tmp_path).findings[0].problem
    pd.DataFrame({"patient": ["a"]}).to_csv(tmp_path / "clinical.csv")
    assert "lacks columns ['cancer_type', 'time', 'event']" in check_site(tmp_path).findings[0].problem
    clinical().to_csv(tmp_path / "clinical.csv", index=False)
    assert any("no expression table" in f.problem for f in check_site(tmp_path).findings)
    (tmp_path / "expression.parquet").write_text("not parquet")
    assert any("cannot be read as parquet" in f.problem for f in check_site(tmp_path).findings)
    expression().to_csv(tmp_path / "expression.csv")
    assert any("are both there" in f.problem for f in check_site(tmp_path).findings)


def open_test_cohort(site: SiteFolder, work: Path, **keys: object) -> Cohort:
    study = Study().changed(**({"splits__folds": 3} | keys))
    return open_cohort(cohort_key(site, study, PANEL, ("BRCA", "LUAD")), site, work, PANEL)


def test_cohort_orders_genes_by_panel_and_converts_months(tmp_path: Path) -> None:
    site = write_site(tmp_path, time_unit="years", table=clinical().iloc[::-1])
    c = open_test_cohort(site, tmp_path / "work")
    assert c.patient.tolist() == sorted(PATIENTS)
    np.testing.assert_allclose(c.x_NG[:, 0], expression().loc[sorted(PATIENTS), "EGFR"], rtol=1e-6)
    assert np.isnan(c.x_NG[:, 1]).all()
    assert c.time[c.patient.tolist().index("P4")] == 5 * 12
    mean, sd = np.array([[5.0, 1.0, 5.0]]), np.array([[2.0, 1.0, 2.0]])
    one, zero = np.ones((1, 3)), np.zeros((1, 3))
    x = Scaling(mean, sd, one, zero, one).apply(c.x_NG, groups(c.cancer, False))
    assert (x[:, 1] == 0).all()  # the federation's mean
    np.testing.assert_allclose(x[:, 0], (c.x_NG[:, 0] - 5) / 2, rtol=1e-6)


def test_patients_that_cannot_take_part_are_left_out(tmp_path: Path) -> None:
    table = clinical()
    table.loc[0, "time"], table.loc[1, "cancer_type"] = 0.0, "UVM"
    site = write_site(tmp_path, table=table, x=expression().drop(index="P2"))
    assert set(open_test_cohort(site, tmp_path / "w").patient) == set(PATIENTS) - {"P0", "P1", "P2"}


def test_cohort_is_cached_and_renewed_when_a_file_changes(tmp_path: Path) -> None:
    site = write_site(tmp_path / "site")
    work = tmp_path / "work"
    a = open_test_cohort(site, work)
    assert isinstance(a.x_NG, np.memmap)
    assert len(list((work / "cohorts").iterdir())) == 1
    open_test_cohort(site, work)
    assert len(list((work / "cohorts").iterdir())) == 1
    x = expression()
    x.iloc[0, 1] += 100
    site = write_site(tmp_path / "site", x=x)
    assert np.nanmax(open_test_cohort(site, work).x_NG) > 100
    assert (open_test_cohort(site, work, seed=1).fold != a.fold).any()
    assert greet(site, work, Study())["genes"] == greet(site, work, Study())["genes"] == GENES


def test_duplicates_are_refused_not_silently_merged(tmp_path: Path) -> None:
    site = write_site(tmp_path, x=pd.concat([expression(), expression().iloc[[0]]]))
    with pytest.raises(Refusal, match="duplicate patients or genes"):
        open_test_cohort(site, tmp_path / "w")
