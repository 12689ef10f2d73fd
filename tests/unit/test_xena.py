"""`oncofed data xena`: files as UCSC Xena's GDC hub writes them, of both releases, become site folders."""

from __future__ import annotations

import gzip
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oncofed.client.data.check import check_site
from oncofed.client.data.read import read_clinical
from oncofed.client.data.site import SiteFolder
from oncofed.common.study import Study
from oncofed.deploy.cli import cli
from oncofed.deploy.simulate import simulate
from oncofed.deploy.sites.xena.expression import choose_samples, read_project
from oncofed.deploy.sites.xena.files import find_projects
from oncofed.deploy.sites.xena.sites import write_xena_sites
from toy_xena import CODES, EACH, EAST, GENES, NORTH, TABLE, true_counts, write_hub, write_matrix
from typer.testing import CliRunner


def read_sites(folders: list[Path]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The clinical tables and the expression `[genes, patients]` of all sites."""
    text = {"tissue_source_site": str}  # 02 is no number
    clinical = pd.concat([pd.read_csv(f / "clinical.csv", dtype=text) for f in folders]).set_index("patient")
    return clinical, pd.concat([pd.read_parquet(f / "expression.parquet") for f in folders], axis=1)


@pytest.mark.parametrize("release", [2019, 2024])
def test_both_releases_give_the_same_sites(release: int, tmp_path: Path) -> None:
    source = write_hub(tmp_path / "hub", release)
    done = write_xena_sites(source, tmp_path / "sites", min_patients=30)
    assert [f.name for f in done.folders] == ["north-clinic", "st-ann-s-hospital-east"]
    assert (done.unit, done.patients, done.cancers, done.notes) == ("counts", 80, 2, [])
    expected = {"further samples of a patient": 2, "metastases": 2, "normal tissue": 4}
    assert done.left_out == Counter(expected)
    reports = [check_site(f) for f in done.folders]
    assert not any(r.findings for r in reports), [r.findings for r in reports]
    clinical, expression = read_sites(done.folders)
    truth = pd.concat([true_counts(c) for c in CODES], axis=1)
    assert expression.shape == truth.shape
    pd.testing.assert_frame_equal(
        expression.loc[truth.index, truth.columns], truth, check_names=False, check_dtype=False, check_exact=True
    )
    assert expression.dtypes.map(pd.api.types.is_integer_dtype).all()
    columns = ["cancer_type", "institution", "tissue_source_site", "age", "sex", "time", "event"]
    assert clinical.columns.tolist() == columns
    row = clinical.loc["TCGA-02-0003"]
    assert row.tolist() == ["COAD", EAST, "02", 63.0, "female", 123, 1]
    assert clinical.groupby(clinical.index.str[5:7])["institution"].unique().map(list).to_dict() == {
        "02": [EAST], "A8": [NORTH], "AA": [NORTH], "NA": [EAST]
    }  # fmt: skip
    assert [SiteFolder.open(f).name for f in done.folders] == [NORTH, EAST]
    assert all(SiteFolder.open(f).description.time_unit == "days" for f in done.folders)


def test_a_classification_runs_over_the_written_sites(tmp_path: Path) -> None:
    source = write_hub(tmp_path / "hub")
    for file in source.glob("*.survival.tsv.gz"):
        file.unlink()
    done = write_xena_sites(source, tmp_path / "sites", min_patients=30)
    assert any("classification only" in n for n in done.notes)
    clinical, _ = read_sites(done.folders)
    assert not {"time", "event"} & set(clinical.columns)
    assert all(check_site(f).ok for f in done.folders)
    study = Study().changed(
        task__kind="classification",
        model__size="tiny",
        training__rounds=2,
        splits__folds=3,
        splits__only=[0],
        runtime__threads=1,
        runtime__out=str(tmp_path / "out"),
    )
    run = simulate(study, tmp_path / "sites")
    assert run.results["left_out"] == []
    assert run.results["panel"]["genes"] == 40
    assert len(run.results["folds"]) == 1


def test_linear_units_stay_the_logarithm_that_they_are_and_are_chosen(tmp_path: Path) -> None:
    source = write_hub(tmp_path / "hub")
    write_hub(source, unit="tpm")
    with pytest.raises(ValueError, match=r"several kinds .* --expression star_counts\|star_tpm"):
        write_xena_sites(source, tmp_path / "sites", min_patients=30)
    done = write_xena_sites(source, tmp_path / "sites", expression="tpm", min_patients=30)
    assert (done.kind, done.unit) == ("star_tpm", "log2")
    assert all(check_site(f).ok for f in done.folders)
    _, expression = read_sites(done.folders)
    truth = pd.concat([true_counts(c) for c in CODES], axis=1)
    np.testing.assert_allclose(expression.loc[truth.index, truth.columns], np.log2(truth + 1.0), rtol=1e-6)
    with pytest.raises(ValueError, match=r"no expression of kind fpkm; it holds \['star_counts', 'star_tpm'\]"):
        write_xena_sites(source, tmp_path / "none", expression="fpkm")


@settings(max_examples=25, deadline=None)
@given(rows=st.lists(st.lists(st.integers(0, 2**30), min_size=3, max_size=3), min_size=1, max_size=4))
def test_counts_come_back_to_the_last_one(rows: list[list[int]], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("counts")
    columns = [f"TCGA-A8-{i:04d}-01A" for i in range(3)]
    names = [f"{g}.1" for g in GENES[: len(rows)]]
    write_matrix(folder / "TCGA-BRCA.star_counts.tsv", pd.DataFrame(rows, index=names, columns=columns))
    project = find_projects(folder)[0][0]
    read = read_project(project, choose_samples(project))
    assert read.values.tolist() == rows
    assert read.averaged == 0


def test_means_of_aliquots_are_counts_and_other_units_are_not(tmp_path: Path) -> None:
    source = write_hub(tmp_path / "hub")
    file = source / "TCGA-BRCA.star_counts.tsv.gz"
    x = pd.read_csv(file, sep="\t", index_col=0)
    linear = np.exp2(x) - 1
    halves, thirds = linear.columns[5:7]
    linear[halves] += 0.5
    linear[thirds] += np.where(np.arange(len(linear)) % 2, 1 / 3, 2 / 3)
    write_matrix(file, linear)
    done = write_xena_sites(source, tmp_path / "sites", min_patients=30)
    assert any(n.startswith("2 samples are means of several aliquots") for n in done.notes)
    assert all(check_site(f).ok for f in done.folders)
    _, expression = read_sites(done.folders)
    truth = true_counts("BRCA")
    assert (np.abs(expression.loc[truth.index, halves[:12]] - truth[halves[:12]]) <= 1).all()
    write_matrix(file, linear * 0.137)
    with pytest.raises(ValueError, match=r"TCGA-BRCA\.star_counts\.tsv\.gz: 40 of 40 samples hold no counts"):
        write_xena_sites(source, tmp_path / "none", min_patients=30)


def test_blood_is_the_primary_of_laml_and_an_unknown_code_its_own_site(tmp_path: Path) -> None:
    columns = [f"TCGA-AB-{i:04d}-03A" for i in range(3)] + ["TCGA-ZZ-0000-03B", "TCGA-AB-0000-11A"]
    x = pd.DataFrame(np.arange(200).reshape(40, 5), index=[f"{g}.1" for g in GENES], columns=columns)
    source = tmp_path / "hub"
    source.mkdir()
    write_matrix(source / "TCGA-LAML.htseq_fpkm.tsv", x)
    codes = tmp_path / "codes.txt"
    codes.write_text("TSS Code\tSource Site\nAB\tWest Clinic\n")
    done = write_xena_sites(source, tmp_path / "sites", codes=codes, min_patients=1)
    assert [f.name for f in done.folders] == ["code-zz", "west-clinic"]
    assert done.left_out == Counter({"normal tissue": 1})
    assert any("codes ['ZZ'] have no name in codes.txt" in n for n in done.notes)
    assert any("no clinical file of TCGA-LAML" in n for n in done.notes)


def test_patients_without_follow_up_stay_for_classification(tmp_path: Path) -> None:
    source = write_hub(tmp_path / "hub", 2019)
    file = source / "TCGA-BRCA.survival.tsv"
    table = pd.read_csv(file, sep="\t").astype({"OS.time": float})
    table.loc[table["_PATIENT"] == "TCGA-A8-0003", "OS.time"] = 0
    table.loc[table["_PATIENT"] == "TCGA-A8-0004", "OS.time"] = np.nan
    table[table["_PATIENT"] != "TCGA-A8-0005"].to_csv(file, sep="\t", index=False)
    done = write_xena_sites(source, tmp_path / "sites", min_patients=30)
    assert any(n.startswith("3 patients have no follow-up above 0 days") for n in done.notes)
    clinical, _ = read_sites(done.folders)
    empty = clinical.index[clinical["time"].isna()].tolist()
    assert empty == ["TCGA-A8-0003", "TCGA-A8-0004", "TCGA-A8-0005"]
    assert clinical["event"].isna().sum() == 3
    report = check_site(done.folders[0])
    assert report.ok
    assert [(f.count, f.problem) for f in report.findings] == [(3, "patients without an outcome")]
    assert len(read_clinical(SiteFolder.open(done.folders[0]))) == 40


def test_small_sites_are_merged_or_dropped_and_codes_can_be_sites(tmp_path: Path) -> None:
    source = write_hub(tmp_path / "hub")
    by_code = write_xena_sites(source, tmp_path / "codes", by="code", min_patients=EACH)
    assert [SiteFolder.open(f).name for f in by_code.folders] == ["02", "A8", "AA", "NA"]
    for file in source.glob("TCGA-COAD.*"):
        table = pd.read_csv(file, sep="\t")
        if "star" in file.name:  # one patient fewer at the one than at the other
            table.drop(columns="TCGA-AA-0007-01A").to_csv(file, sep="\t", index=False)
    merged = write_xena_sites(source, tmp_path / "merged", min_patients=40)
    assert [f.name for f in merged.folders] == ["rest", "st-ann-s-hospital-east"]
    dropped = write_xena_sites(source, tmp_path / "dropped", min_patients=40, rest="drop")
    assert [f.name for f in dropped.folders] == ["st-ann-s-hospital-east"]
    assert dropped.patients == 40
    assert any("39 patients of smaller sites are dropped" in n for n in dropped.notes)
    with pytest.raises(ValueError, match="no group of 'institution' has 50 patients"):
        write_xena_sites(source, tmp_path / "none", min_patients=50, rest="drop")


def edit(name: str, change: Callable[[pd.DataFrame], pd.DataFrame]) -> Callable[[Path], None]:
    def spoil(source: Path) -> None:
        change(pd.read_csv(source / name, sep="\t", index_col=0)).to_csv(source / name, sep="\t")

    return spoil


def cut(name: str, share: float, target: str = "") -> Callable[[Path], None]:
    """Keep the first part of a file's bytes; of its text, where `target` is plain."""

    def spoil(source: Path) -> None:
        data = (source / name).read_bytes()
        (source / name).unlink()
        data = gzip.decompress(data) if target else data
        (source / (target or name)).write_bytes(data[: int(len(data) * share)])

    return spoil


def rename(old: str, new: str) -> Callable[[Path], None]:
    return lambda source: (source / old).rename(source / new) and None


def copy(old: str, new: str) -> Callable[[Path], None]:
    return lambda source: (source / new).write_bytes(gzip.decompress((source / old).read_bytes())) and None


BRCA, COAD = "TCGA-BRCA.star_counts.tsv.gz", "TCGA-COAD.star_counts.tsv.gz"


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (cut(BRCA, 0.7), f"{BRCA} cannot be read to its end .*download it again"),
        (cut(BRCA, 0.0), f"{BRCA}: the first column is ''"),
        (cut(BRCA, 0.7, "TCGA-BRCA.star_counts.tsv"), "TCGA-BRCA.star_counts.tsv: .* empty cells"),
        (cut("TCGA-BRCA.survival.tsv.gz", 0.5), "TCGA-BRCA.survival.tsv.gz cannot be read"),
        (edit(COAD, lambda t: t.iloc[:30]), f"{COAD} has 30 genes, 10 fewer and 0 others than {BRCA}"),
        (edit(BRCA, lambda t: np.exp2(t)), f"{BRCA}: values from .* to .*log2\\(x \\+ 1\\) of star_counts"),
        (edit(BRCA, lambda t: t - 5), f"{BRCA}: values from -"),
        (edit(BRCA, lambda t: t.astype(object).where(t != t.iloc[5, 5], "n/d?")), f"{BRCA} cannot be read .*n/d"),
        (edit(BRCA, lambda t: pd.concat([t, t.iloc[:2]])), "42 genes, of which 2 stand in it twice"),
        (edit(BRCA, lambda t: t.rename(columns=lambda c: c.replace("-", "."))), "44 of 44 columns are no sample barcodes"),
        (edit(BRCA, lambda t: t.filter(like="-11")), "none of its 2 samples is a primary tumour \\(type 01\\)"),
        (edit(BRCA, lambda t: t.rename_axis("gene")), "the first column is 'gene', not Ensembl_ID"),
        (copy(BRCA, "TCGA-BRCA.star_counts.tsv"), "TCGA-BRCA.star_counts.tsv and .*tsv.gz are both there"),
        (rename(BRCA, "TCGA-BRCA.star_tpm.tsv.gz"), "several kinds of expression"),
        (lambda source: (source / "TCGA-COAD.survival.tsv.gz").unlink(), f"{COAD} without TCGA-<PROJECT>.survival.tsv"),
        (edit("TCGA-COAD.survival.tsv.gz", lambda t: t.drop(columns="OS")), "lacks columns \\['OS'\\]"),
        (edit("TCGA-COAD.survival.tsv.gz", lambda t: t.rename(index=lambda s: s.replace("A", "B"))), "has none of its project's 40"),
        (copy(COAD, "TCGA-READ.star_counts.tsv"), "without TCGA-<PROJECT>.survival.tsv"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_and_nothing_is_written(
    spoil: Callable[[Path], None], words: str, tmp_path: Path
) -> None:
    source = write_hub(tmp_path / "hub")
    spoil(source)
    with pytest.raises(ValueError, match=words):
        write_xena_sites(source, tmp_path / "sites", min_patients=30)
    assert [p.name for p in tmp_path.iterdir()] == ["hub"]


def test_a_kind_that_one_project_lacks_and_patients_of_two_projects(tmp_path: Path) -> None:
    source = write_hub(tmp_path / "hub")
    rename(BRCA, "TCGA-BRCA.star_tpm.tsv.gz")(source)
    with pytest.raises(ValueError, match=r"one kind, star_counts was chosen and TCGA-BRCA\.star_tpm\.tsv\.gz stand"):
        write_xena_sites(source, tmp_path / "sites", expression="counts")
    source = write_hub(tmp_path / "again")
    for kind in ("star_counts", "survival"):
        copy(f"TCGA-COAD.{kind}.tsv.gz", f"TCGA-READ.{kind}.tsv")(source)
    with pytest.raises(ValueError, match="40 patients are in the files of two projects"):
        write_xena_sites(source, tmp_path / "sites")


def test_a_folder_without_such_files_says_what_is_looked_for(tmp_path: Path) -> None:
    (tmp_path / "BRCA.csv").write_text("x")
    with pytest.raises(
        ValueError, match=r"looked for TCGA-<PROJECT>\.<kind>\.tsv\.gz .*star_counts.* it holds BRCA\.csv"
    ):
        write_xena_sites(tmp_path, tmp_path / "sites")
    with pytest.raises(ValueError, match="no such folder"):
        write_xena_sites(tmp_path / "absent", tmp_path / "sites")


def test_the_command_says_what_stayed_behind_and_never_writes_over_sites(tmp_path: Path) -> None:
    source, sites = write_hub(tmp_path / "hub"), tmp_path / "sites"
    runner = CliRunner()
    arguments = ["data", "xena", str(source), "--out", str(sites), "--min-patients", "30"]
    first = runner.invoke(cli, arguments)
    assert first.exit_code == 0, first.exception
    text = " ".join(first.output.split())
    assert "normal tissue 4" in text
    assert "further samples of a patient 2" in text
    assert "80 patients of 2 cancer types" in text
    checked = runner.invoke(cli, ["site", "check", str(sites / "north-clinic")])
    assert checked.exit_code == 0
    assert "ready" in checked.output
    before = {p: p.read_bytes() for p in sites.rglob("*") if p.is_file()}
    again = runner.invoke(cli, arguments)
    assert again.exit_code != 0
    assert "holds sites already" in str(again.exception)
    assert {p: p.read_bytes() for p in sites.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("release", [2019, 2024])
def test_without_a_table_the_clinical_files_name_institutions_and_else_codes_are_sites(
    release: int, tmp_path: Path
) -> None:
    source = write_hub(tmp_path / "hub", release)
    (source / "tissueSourceSite.tsv").unlink()
    by_code = write_xena_sites(source, tmp_path / "codes", min_patients=EACH)
    assert [SiteFolder.open(f).name for f in by_code.folders] == ["02", "A8", "AA", "NA"]
    assert len(by_code.notes) == 1
    assert "institutions need the GDC's tissueSourceSite.tsv" in by_code.notes[0]
    assert "institution" not in read_sites(by_code.folders)[0].columns
    assert not write_xena_sites(source, tmp_path / "asked", by="code", min_patients=EACH).notes
    with pytest.raises(
        ValueError, match=r"nothing names the institutions; put the GDC's tissueSourceSite\.tsv .* --codes"
    ):
        write_xena_sites(source, tmp_path / "none", by="institution")
    sites = dict(line.split("\t")[:2] for line in TABLE.splitlines())
    for file in [*source.glob("*.clinical.*"), *source.glob("*.GDC_phenotype.*")]:
        table = pd.read_csv(file, sep="\t")
        names = table.iloc[:, 0].str[5:7].map(sites)
        # a patient without a name is at the institution of the code
        table["name.tissue_source_site"] = names.where(table.index != 7)
        table.to_csv(file, sep="\t", index=False)
    named = write_xena_sites(source, tmp_path / "named", min_patients=2 * EACH)
    assert [len(pd.read_csv(f / "clinical.csv")) for f in named.folders] == [2 * EACH, 2 * EACH]
    assert named.folders[0].name == "north-clinic"
    assert named.notes == []
    (source / "tissueSourceSite.tsv").write_text("tss_code\tSOURCE.SITE\nNA\tSouth\nA8\tSouth\nAA\tSouth\n02\tSouth\n")
    table_first = write_xena_sites(source, tmp_path / "table", min_patients=EACH)
    assert [f.name for f in table_first.folders] == ["south"]


def test_code_tables_that_contradict_or_miss_are_refused(tmp_path: Path) -> None:
    source = write_hub(tmp_path / "hub")
    codes = tmp_path / "own.tsv"
    with pytest.raises(ValueError, match=r"own\.tsv cannot be read as a code table \(FileNotFoundError\)"):
        write_xena_sites(source, tmp_path / "sites", codes=codes)
    codes.write_text(TABLE + "A8\tSouth\tBreast\tX\n")
    with pytest.raises(ValueError, match=r"own\.tsv: code 'A8' is of 'North Clinic' and of 'South'"):
        write_xena_sites(source, tmp_path / "sites", codes=codes)
    codes.write_text("TSS Code\tSource Site\nZZ\tSouth\n")
    with pytest.raises(ValueError, match=r"own\.tsv has none of the tissue source site codes .* \(02, A8, AA, NA\)"):
        write_xena_sites(source, tmp_path / "sites", codes=codes)
    (source / "tissue_source_site_codes.csv").write_text("x")
    with pytest.raises(
        ValueError, match=r"tissueSourceSite\.tsv, tissue_source_site_codes\.csv; name one with --codes"
    ):
        write_xena_sites(source, tmp_path / "sites")


def test_the_command_takes_the_table_and_says_that_it_is_missing(tmp_path: Path) -> None:
    source = write_hub(tmp_path / "hub")
    codes = (source / "tissueSourceSite.tsv").rename(tmp_path / "codes.tsv")
    arguments = ["data", "xena", str(source), "--min-patients", "20", "--out"]
    without = CliRunner().invoke(cli, [*arguments, str(tmp_path / "without")])
    assert without.exit_code == 0, without.exception
    assert "institutions need the GDC's" in " ".join(without.output.split())
    given = CliRunner().invoke(cli, [*arguments, str(tmp_path / "given"), "--codes", str(codes)])
    assert given.exit_code == 0, given.exception
    assert sorted(p.name for p in (tmp_path / "given").iterdir()) == ["north-clinic", "st-ann-s-hospital-east"]
