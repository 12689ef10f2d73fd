"""Gene-set files, panels of both kinds, and what a site makes of its own names for genes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oncofed.client.data.check import SiteReport, check_site
from oncofed.client.data.cohort import cohort_key, expression_of, open_cohort
from oncofed.client.data.read import read_expression
from oncofed.client.data.site import SiteDescription, SiteFolder, Unit, write_description
from oncofed.client.data.units import one_column_a_gene
from oncofed.client.greeting import greet
from oncofed.common.errors import Refusal
from oncofed.common.gene_names import GeneNames, is_plain
from oncofed.common.gene_sets import read_gmt
from oncofed.common.panel import GenePanel
from oncofed.common.sections import Panel
from oncofed.common.study import Study
from oncofed.server.app import agree_panel
from toy_genes import FEW, write_hgnc

NAMES = GeneNames.of(FEW)

GMT = (
    "HALLMARK_HYPOXIA\thttps://www.gsea-msigdb.org/gsea/msigdb/human/geneset/HALLMARK_HYPOXIA\tCYR61\tCTGF\tVEGFA\n"
    "HALLMARK_ANGIOGENESIS\thttps://www.gsea-msigdb.org/gsea/msigdb/human/geneset/HALLMARK_ANGIOGENESIS\tVEGFA\tCCN1\tVCAN\n"
)


def text_file(folder: Path, text: str, name: str = "sets.gmt") -> Path:
    (folder / name).write_text(text)
    return folder / name


# ---- gene-set files --------------------------------------------------------------------------------------------------


def test_a_gene_set_file(tmp_path: Path) -> None:
    assert read_gmt(text_file(tmp_path, GMT)) == {
        "HALLMARK_HYPOXIA": ("CYR61", "CTGF", "VEGFA"),
        "HALLMARK_ANGIOGENESIS": ("VEGFA", "CCN1", "VCAN"),
    }
    windows = GMT.replace("\n", "\t\t\r\n") + "\r\n"  # as Enrichr ends its lines, saved by a spreadsheet
    assert read_gmt(text_file(tmp_path, "\ufeff" + windows)) == read_gmt(text_file(tmp_path, GMT))


GENE = st.text(st.characters(codec="ascii", exclude_characters="\t\n\r", categories=["L", "N", "P"]), min_size=1)


@given(st.dictionaries(GENE, st.lists(GENE, min_size=1, unique=True), min_size=1))
def test_sets_come_back_as_they_were_written(
    tmp_path_factory: pytest.TempPathFactory, sets: dict[str, list[str]]
) -> None:
    text = "".join("\t".join([name, "", *genes]) + "\n" for name, genes in sets.items())
    got = read_gmt(text_file(tmp_path_factory.mktemp("gmt"), text))
    assert list(got.items()) == [(name, tuple(genes)) for name, genes in sets.items()]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A\tx\tTP53\nTP53\nEGFR\n", r"sets.gmt, line 2: 'TP53' has no tabs; write one set a line.*\.txt"),
        ("['Hypoxia' ' ' 'FOS' 'PGM1'\n 'PGF']\n", "line 1: this is a printed array.*without brackets and quotes"),
        ("A\tx\tTP53\n\nB\tabout\n", "line 3: the set 'B' has no genes; they stand from the third column"),
        ("A\tx\tTP53\nA\ty\tEGFR\n", "line 2: the set 'A' stands in line 1 already; rename or remove"),
        ("\tx\tTP53\n", "line 1: the set has no name"),
        ("\n", "holds no gene set; write one a line"),
    ],
)
def test_files_that_are_no_gene_sets(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read_gmt(text_file(tmp_path, text))


def test_gene_set_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"absent.gmt: cannot be read .*name an existing"):
        read_gmt(tmp_path / "absent.gmt")
    (tmp_path / "packed.gmt").write_bytes(b"\x1f\x8b\x08\x00\xff\xfe")
    with pytest.raises(ValueError, match=r"packed.gmt: is no text; .*unpacked"):
        read_gmt(tmp_path / "packed.gmt")


# ---- panels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sets.gmt", "sets.v2026.symbols.gmt.txt", "SETS.GMT"])
def test_a_panel_of_gene_sets_is_their_union(tmp_path: Path, name: str) -> None:
    file = text_file(tmp_path, GMT, name)
    assert GenePanel.from_file(file).genes == ("CYR61", "CTGF", "VEGFA", "CCN1", "VCAN")
    panel = GenePanel.from_file(file, NAMES)
    assert panel.genes == ("CCN1", "CCN2", "VEGFA", "VCAN")
    assert panel.others[2:] == (("ENSG00000112715", "VEGF"), ())


def test_a_list_names_a_gene_once_under_any_name(tmp_path: Path) -> None:
    file = text_file(tmp_path, "# a list\nVEGFA\nCYR61\nENSG00000141510.3\n\nCCN1\n", "panel.txt")
    assert GenePanel.from_file(file).genes == ("VEGFA", "CYR61", "ENSG00000141510.3", "CCN1")
    with pytest.raises(ValueError, match=r"panel.txt: names 1 genes more than once, e.g. CYR61 and CCN1 are both CCN1"):
        GenePanel.from_file(file, NAMES)
    file.write_text("VEGFA\nCYR61\nENSG00000141510.3\n")
    assert GenePanel.from_file(file, NAMES).genes == ("VEGFA", "CCN1", "TP53")
    with pytest.raises(ValueError, match=r"2 lines hold tabs; write one gene a line, or name a file of gene sets .gmt"):
        GenePanel.from_file(text_file(tmp_path, GMT, "sets.txt"))


def test_two_names_of_a_panel_and_what_is_no_panel() -> None:
    with pytest.raises(ValueError, match=r"gives 1 names to more than one gene, e.g. \['X'\]"):
        GenePanel(("A", "B"), (("X",), ("X",)))
    with pytest.raises(ValueError, match=r"gives 1 names to more than one gene, e.g. \['B'\]"):
        GenePanel(("A", "B"), (("B",), ()))
    with pytest.raises(ValueError, match=r"has 2 genes and other names of 1"):
        GenePanel(("A", "B"), (("X",),))
    with pytest.raises(ValueError, match=r"1 gene names are empty, begin with #"):
        GenePanel(("A", "B"), (("X",), ("",)))
    with pytest.raises(ValueError, match=r"1 gene names are empty, begin with #"):
        GenePanel(("A", "B"), (("X\tY",), ()))  # on its line it would be two names


def test_the_hash_of_a_panel_without_other_names_stays_what_it_was() -> None:
    assert GenePanel(("TP53", "VEGFA")).hash == "66cf1c8da1176e16"
    assert GenePanel(("TP53", "VEGFA"), ((), ())) == GenePanel(("TP53", "VEGFA"))
    assert GenePanel(("TP53", "VEGFA"), (("p53",), ())).hash != GenePanel(("TP53", "VEGFA"), ((), ("p53",))).hash


@given(st.lists(st.lists(GENE.filter(is_plain), max_size=3), min_size=1, max_size=5), st.data())
def test_a_panel_travels_as_lines(names: list[list[str]], data: st.DataObject) -> None:
    seen = list(dict.fromkeys(name for row in names for name in row))
    genes = data.draw(st.lists(st.sampled_from(["G1", "G2", "G3", *seen]), min_size=1, unique=True))
    left = iter([name for name in seen if name not in genes])
    others = tuple(tuple(itertools.islice(left, data.draw(st.integers(0, 2)))) for _ in genes)
    panel = GenePanel(tuple(genes), others)
    again = GenePanel.of_lines("\n".join(panel.lines).splitlines())
    assert again == panel
    assert again.hash == panel.hash
    assert panel.names_of(genes) == genes
    for gene, its in zip(genes, others, strict=True):
        assert set(panel.names_of(its)) <= {gene}
    kept = data.draw(st.lists(st.sampled_from(genes), min_size=1))
    assert panel.only(kept).lines == [line for line, gene in zip(panel.lines, genes, strict=True) if gene in kept]


HELD = [["CCN1", "VEGFA", "TP53"], ["VEGFA", "VCAN"]]


def test_genes_that_no_site_holds(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    table = str(write_hgnc(tmp_path / "hgnc.txt"))
    file = str(text_file(tmp_path, "VEGFA\nVEGFAA\nCYR61\nVCAN\n", "panel.txt"))
    with pytest.raises(ValueError, match=r"2 of the 4 genes of panel\.file") as refused:
        agree_panel(Panel(file=file), HELD)
    assert "VEGFAA (nearest: VEGFA), CYR61; correct them" in str(refused.value)
    assert "panel.names" not in str(refused.value)  # symbols on both sides
    assert "leave them out with panel.unknown = 'drop'" in str(refused.value)
    with pytest.raises(ValueError, match="1 of the 4 genes") as refused:
        agree_panel(Panel(file=file, names=table), HELD)
    assert "VEGFAA (nearest: VEGFA); correct them" in str(refused.value)
    with caplog.at_level("WARNING", "oncofed.server"):
        assert agree_panel(Panel(file=file, unknown="drop"), HELD).genes == ("VEGFA", "VCAN")
    assert "2 of the 4 genes" in caplog.text
    assert "VEGFAA" in caplog.text
    left = agree_panel(Panel(file=file, names=table, unknown="drop"), HELD)
    assert left.lines == ["VEGFA\tENSG00000112715\tVEGF", "CCN1\tCYR61\tENSG00000142871\tGIG1\tIGFBP10", "VCAN"]


IDS = [["ENSG00000142871.3", "ENSG00000141510.12", "ENSG00000112715.1"], ["ENSG00000112715.2", "C6ORF62", "XTP12"]]


def test_sites_of_ids_and_a_panel_of_symbols(tmp_path: Path) -> None:
    file = str(text_file(tmp_path, "VEGF\nCCN1\n", "panel.txt"))
    with pytest.raises(ValueError, match=r"let panel\.names name HGNC's table of names, since only one side"):
        agree_panel(Panel(file=file, unknown="drop"), IDS[:1])
    asked = Panel(file=file, names=str(write_hgnc(tmp_path / "hgnc.txt")))
    assert agree_panel(asked, IDS).genes == ("VEGFA", "CCN1")
    assert agree_panel(asked.model_copy(update={"file": ""}), IDS).genes == ("VEGFA",)
    half = asked.model_copy(update={"file": "", "min_site_share": 0.5})
    assert agree_panel(half, [*IDS, ["vegfa", " odd", "#"]]).genes == (
        "VEGFA",
    )  # a site would not find the small letters
    assert agree_panel(half, IDS).genes == ("C6orf62", "CCN1", "TP53", "VEGFA")
    with pytest.raises(ValueError, match=r"panel.names = absent.txt: cannot be read"):
        agree_panel(Panel(names="absent.txt"), IDS)


def test_a_panel_of_which_nothing_is_left(tmp_path: Path) -> None:
    file = str(text_file(tmp_path, "Gene1\nGene2\nGene3\nGene4\n", "panel.txt"))
    with pytest.raises(ValueError, match=r"4 of the 4 genes .* \.\.\.; correct them") as refused:
        agree_panel(Panel(file=file, unknown="drop"), HELD)
    assert "'drop'" not in str(refused.value)


# ---- sites -----------------------------------------------------------------------------------------------------------

PATIENTS = [f"P{i}" for i in range(6)]


def site_of(
    folder: Path, x: pd.DataFrame, unit: Unit = "counts", turned: bool = False, name: str = "Ulm"
) -> SiteFolder:
    write_description(folder, SiteDescription(name=name, expression_unit=unit))
    clinical = {"patient": PATIENTS, "cancer_type": "BRCA", "time": 5.0, "event": [0, 1] * 3}
    pd.DataFrame(clinical).to_csv(folder / "clinical.csv", index=False)
    (x.T if turned else x).rename_axis("gene" if turned else "patient").to_csv(folder / "expression.csv")
    return SiteFolder.open(folder)


def counts(columns: list[str]) -> pd.DataFrame:
    return pd.DataFrame(np.random.default_rng(1).integers(0, 99, (6, len(columns))), PATIENTS, columns)


@pytest.mark.parametrize(
    ("unit", "together"),
    [
        ("counts", lambda a, b: a + b),
        ("tpm", lambda a, b: a + b),
        ("log2", lambda a, b: math.log2(2**a + 2**b - 1)),
        ("zscore", lambda a, b: (a + b) / 2),
    ],
)
def test_columns_of_one_gene_become_one(unit: Unit, together: Callable[[float, float], float]) -> None:
    nan = np.nan
    table = pd.DataFrame(
        [[1.0, 7.0, 2.0, 3.0], [nan, 7.0, 2.0, 3.0], [nan, nan, nan, 3.0]], columns=["A", "B", "A", "C"]
    )
    got = one_column_a_gene(table, unit)
    assert got.columns.tolist() == ["A", "B", "C"]
    np.testing.assert_allclose(got["A"], [together(1.0, 2.0), 2.0, nan])
    np.testing.assert_array_equal(got[["B", "C"]], table[["B", "C"]])


@given(st.lists(st.sampled_from("ABCD"), min_size=1, max_size=8))
def test_a_patients_library_stays_what_it_was(columns: list[str]) -> None:
    table = pd.DataFrame(np.random.default_rng(2).integers(0, 9, (3, len(columns))).astype(float), columns=columns)
    got = one_column_a_gene(table, "counts")
    assert got.columns.tolist() == list(dict.fromkeys(columns))
    np.testing.assert_array_equal(got.sum(axis=1), table.sum(axis=1))


@pytest.mark.parametrize("turned", [False, True])
def test_a_site_of_other_names_gives_the_same_numbers(tmp_path: Path, turned: bool) -> None:
    new = counts(["CCN1", "CCN2", "TP53", "VEGFA", "unheard-of"])
    old = new.set_axis(["CYR61", "ENSG00000118523.14", "ENSG00000141510", "VEGF", "unheard-of"], axis=1)
    old["CYR61"] -= new["CCN1"] // 3
    old["IGFBP10"] = new["CCN1"] // 3  # an alias: CCN1 once more
    panel = GenePanel(("VEGFA", "CCN1", "CCN2", "ABSENT"))
    wanted = pd.Index(PATIENTS)
    plain = expression_of(site_of(tmp_path / "new", new, turned=turned), wanted, wanted, panel)
    other = site_of(tmp_path / "old", old, turned=turned)
    names, x_NG = expression_of(other, wanted, wanted, GenePanel.named(panel.genes, NAMES))
    assert names == plain[0]
    np.testing.assert_array_equal(x_NG, plain[1])  # of the same library, though the panel holds a part of it
    assert np.isnan(expression_of(other, wanted, wanted, panel)[1]).all()
    ids = GenePanel(("ENSG00000118523", "ENSG00000141510"))  # without other names an id is found without its version
    np.testing.assert_array_equal(
        expression_of(other, wanted, wanted, ids)[1],
        expression_of(other, wanted, wanted, GenePanel(tuple(old)))[1][:, 1:3],
    )


def test_a_greeting_names_genes_as_the_file_does_and_a_cohort_finds_all_names(tmp_path: Path) -> None:
    site, work = (
        site_of(tmp_path / "site", counts(["CYR61", "ENSG00000141510.2", "IGFBP10", "VCAN"])),
        tmp_path / "work",
    )
    for _ in range(2):  # the second time from the cache
        assert greet(site, work, Study())["genes"] == ["CYR61", "ENSG00000141510.2", "IGFBP10", "VCAN"]
    given = GenePanel(("TP53", "VCAN"))
    missing = []
    for panel in (given, GenePanel.named(given.genes, NAMES), given):
        study = Study().changed(splits__folds=3)
        cohort = open_cohort(cohort_key(site, study, panel, ("BRCA",)), site, work, panel)
        missing.append(bool(np.isnan(cohort.x_NG[:, 0]).all()))
    assert missing == [True, False, True]


# ---- what cannot be expression ---------------------------------------------------------------------------------------


def found(report: SiteReport) -> dict[tuple[str, str], int]:
    return {(f.column, f.problem): f.count for f in report.findings}


def test_columns_beside_the_patients_are_named_as_such(tmp_path: Path) -> None:
    turned = counts(["ENSG00000141510.2", "ENSG00000142871.1"]).T.rename_axis("gene_id")
    turned.insert(0, "gene_name", ["TP53", "CCN1"])
    turned.insert(1, "gene_type", "protein_coding")
    turned["SECRET-77"] = [1, "high"]  # of no row of the clinical table: a patient, by its number
    site = site_of(tmp_path, counts(["A"]))
    turned.to_csv(tmp_path / "expression.csv")
    assert "SECRET" not in str(check_site(tmp_path))
    assert read_expression(site, pd.Index(PATIENTS)).shape == (6, 2)
    turned.drop(columns="SECRET-77").to_csv(tmp_path / "expression.csv")
    report = check_site(tmp_path, panel := GenePanel.named(("TP53", "CCN1"), NAMES))
    assert report.ok
    assert found(report) == {("gene_name, gene_type", "columns of text that are no patients"): 2}
    assert report.facts["expression"] == "6 patients x 2 genes"
    assert report.facts["panel"] == "2 of 2 genes"
    assert read_expression(site, pd.Index(PATIENTS), panel).columns.tolist() == ["TP53", "CCN1"]


def test_a_column_of_text_among_the_genes_is_refused_by_name(tmp_path: Path) -> None:
    x = counts(["TP53", "VCAN"]).assign(tissue="breast")
    site = site_of(tmp_path, x)
    with pytest.raises(Refusal, match=r"6 cells that are not numbers, in 1 columns, e.g. \['tissue'\]; leave out"):
        greet(site, tmp_path / "work", Study())
    assert found(check_site(tmp_path)) == {("tissue", "columns of text"): 1}


@pytest.mark.parametrize("name", ["__no_feature", "N_multimapping"])
def test_a_counters_summary_is_no_gene(tmp_path: Path, name: str) -> None:
    site = site_of(tmp_path, counts(["TP53", name]), turned=True)
    with pytest.raises(Refusal, match=rf"site Ulm: expression.csv has \['{name}'\] among its genes; leave out"):
        read_expression(site, pd.Index(PATIENTS))
    assert found(check_site(tmp_path)) == {(name, "columns that are no genes"): 1}


def test_counts_that_are_none_are_refused_in_a_study(tmp_path: Path) -> None:
    x = counts(["TP53", "VCAN"]).astype(float)
    x.iloc[0, 0], x.iloc[1, 1], x.iloc[2, 0], x.iloc[3, 0] = 0.5, 7.25, -4.0, np.nan
    site, work = site_of(tmp_path / "site", x), tmp_path / "work"
    with pytest.raises(Refusal, match="among 12 cells, 1 negative cells, impossible for counts") as refused:
        greet(site, work, Study())
    assert "site Ulm: expression.csv" in str(refused.value)
    assert "2 cells that are not whole numbers, impossible for counts: round the expected counts of RSEM" in str(
        refused.value
    )
    panel = GenePanel(("TP53",))
    with pytest.raises(Refusal, match="declare tpm or log2"):
        open_cohort(cohort_key(site, Study(), panel, ("BRCA",)), site, work, panel)
    with pytest.raises(Refusal, match="1 negative cells, impossible for tpm"):
        greet(site_of(tmp_path / "tpm", x, "tpm"), work, Study())
    assert greet(site_of(tmp_path / "z", x, "zscore"), work, Study())["genes"] == ["TP53", "VCAN"]


def test_orientation_that_cannot_be_told_is_an_error(tmp_path: Path) -> None:
    square = pd.DataFrame(np.ones((6, 6), dtype=int), PATIENTS, PATIENTS)
    with pytest.raises(
        Refusal, match="6 patients of the clinical table in rows and 6 in columns, so its orientation is"
    ):
        read_expression(site_of(tmp_path, square), pd.Index(PATIENTS))


def test_site_check_says_that_other_names_would_do(tmp_path: Path) -> None:
    site_of(tmp_path, counts(["ENSG00000142871.1", "ENSG00000141510.2", "VCAN"]))
    panel = GenePanel(("CCN1", "TP53", "VCAN", "ABSENT"))
    (finding,) = check_site(tmp_path, panel).findings
    assert (finding.count, finding.level) == (3, "warning")
    assert finding.remedy.endswith("HGNC's table in panel.names finds genes under both: try it with --names")
    (finding,) = check_site(tmp_path, GenePanel.named(panel.genes, NAMES)).findings
    assert (finding.column, finding.count) == ("ABSENT", 1)
    assert "--names" not in finding.remedy
    (finding,) = check_site(tmp_path, GenePanel(("CCN1",))).findings
    assert (finding.level, finding.problem) == ("error", "no gene of the panel")
