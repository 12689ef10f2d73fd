"""`oncofed data split` on raw counts as sequencing cores hand them over: genes in rows, gzipped, no outcomes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from oncofed.client.data.check import check_site
from oncofed.client.data.read import expression_table, read_clinical, read_expression
from oncofed.client.data.site import SiteFolder
from oncofed.deploy.sites.split import split_pooled

GENES = [f"ENSG{i:011d}" for i in range(80)]
NAMES = [f"TCGA-OR-{i:04d}" for i in range(40)]


def write_pool(folder: Path, change: Callable[[pd.DataFrame], pd.DataFrame] = lambda t: t) -> Path:
    """Two cohorts of 20 patients at two institutions; `change` spoils the second cohort's table."""
    folder.mkdir(parents=True)
    cancer = ["ACC"] * 20 + ["UVM"] * 20
    clinical = pd.DataFrame({"patient": NAMES, "cancer_type": cancer, "institution": ["Ann Arbor", "Paris"] * 20})
    clinical.to_csv(folder / "clinical.csv", index=False)
    counts = pd.DataFrame(np.random.default_rng(0).poisson(90, (80, 40)), pd.Index(GENES, name="gene_id"), NAMES)
    counts.iloc[:, :20].to_csv(folder / "ACC.counts.tsv.gz", sep="\t")
    change(counts.iloc[:, 20:]).to_csv(folder / "UVM.counts.tsv.gz", sep="\t")
    return folder


def test_raw_counts_beside_the_clinical_table(tmp_path: Path) -> None:
    source = write_pool(tmp_path / "pool")
    folders, unit = split_pooled(source, tmp_path / "sites", min_patients=10)
    assert unit == "counts"
    assert [f.name for f in folders] == ["ann-arbor", "paris"]
    assert all(check_site(f).ok for f in folders)
    site = SiteFolder.open(folders[0])
    clinical = read_clinical(site, outcome=False)
    assert clinical.columns.tolist() == ["patient", "cancer_type"]
    expression = read_expression(site, pd.Index(clinical["patient"]))
    assert expression.shape == (20, 80)
    whole = pd.read_csv(source / "ACC.counts.tsv.gz", sep="\t", index_col=0)
    assert expression.loc[NAMES[2]].tolist() == whole[NAMES[2]].tolist()


def test_columns_beside_the_patients_are_left_behind(tmp_path: Path) -> None:
    source = write_pool(tmp_path / "pool", lambda t: t.assign(gene_name="x", length=1000))
    folders, _ = split_pooled(source, tmp_path / "sites", min_patients=10)
    site = SiteFolder.open(folders[1])
    expression, _ = expression_table(site, pd.Index(NAMES))
    assert expression.shape == (20, 80)
    assert expression.dtypes.map(pd.api.types.is_integer_dtype).all()


def test_cohorts_may_lie_either_way(tmp_path: Path) -> None:
    source = write_pool(tmp_path / "pool", lambda t: t.T.rename_axis("patient"))
    folders, _ = split_pooled(source, tmp_path / "sites", min_patients=10)
    assert sum(len(read_expression(SiteFolder.open(f), pd.Index(NAMES))) for f in folders) == 40


def test_a_cohort_without_any_known_patient_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = write_pool(tmp_path / "pool", lambda t: t.rename(columns=lambda c: c.replace("TCGA", "XXXX")))
    with caplog.at_level(logging.WARNING):
        split_pooled(source, tmp_path / "sites", min_patients=10)
    assert "20 of 40 patients of the clinical table are in no expression table" in caplog.text
    (source / "ACC.counts.tsv.gz").unlink()
    with pytest.raises(ValueError, match=r"no patient of the clinical table in \['UVM\.counts\.tsv\.gz'\]"):
        split_pooled(source, tmp_path / "none", min_patients=10)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.rename(columns=lambda c: f"{c}-01A-11R"), "names samples, not patients \\(20, the first: TCGA-OR-0020-01A"),
        (lambda t: pd.concat([t, t.iloc[:3]]), "3 gene names stand in it twice, the first: ENSG00000000000"),
        (lambda t: pd.concat([t, t.iloc[:1].set_axis(["__no_feature"])]), "\\['__no_feature'\\] are a counter's summary"),
        (lambda t: pd.concat([t, t.iloc[:1].set_axis(["N_unmapped"])]), "\\['N_unmapped'\\] are a counter's summary"),
        (lambda t: t.astype(object).where(t != t.iloc[0, 0], "n/d?"), "holds cells that are not numbers"),
        (lambda t: t.rename(columns={NAMES[20]: NAMES[0]}), "1 patients are in two tables or twice in one"),
        (lambda t: t.rename(index={GENES[0]: NAMES[0]}), "1 patients of the clinical table in rows and 20 in columns"),
    ],
)  # fmt: skip
def test_what_cannot_be_split_is_said_before_anything_is_written(
    change: Callable[[pd.DataFrame], pd.DataFrame], words: str, tmp_path: Path
) -> None:
    source = write_pool(tmp_path / "pool", change)
    with pytest.raises(ValueError, match=words):
        split_pooled(source, tmp_path / "sites", min_patients=10)
    assert not (tmp_path / "sites").exists()


def test_outcomes_come_whole_or_not_at_all(tmp_path: Path) -> None:
    source = write_pool(tmp_path / "pool")
    clinical = pd.read_csv(source / "clinical.csv")
    for column, words in (
        ("time_months", "'time_months' has no 'event' beside it"),
        ("event", "no time column beside"),
    ):
        clinical.assign(**{column: 1}).to_csv(source / "clinical.csv", index=False)
        with pytest.raises(ValueError, match=words):
            split_pooled(source, tmp_path / "sites")
    pd.concat([clinical, clinical.iloc[:2]]).to_csv(source / "clinical.csv", index=False)
    with pytest.raises(ValueError, match="2 patients stand in it twice"):
        split_pooled(source, tmp_path / "sites")
    clinical.to_csv(source / "clinical.csv", index=False)
    with pytest.raises(ValueError, match="no group of 'institution' has 30 patients"):
        split_pooled(source, tmp_path / "sites", min_patients=30, rest="drop")
