"""One name for a gene: which symbol a name becomes, and which stay as they are."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from oncofed.common import gene_names
from oncofed.common.gene_names import Gene, GeneNames, approve, naming_version, write_table

FEW = GeneNames.of(
    [
        Gene("CCN1", "ENSG00000000001", ("CYR61",), ("GIG1", "P1")),
        Gene("CCN2", "ENSG00000000002", ("CTGF", "OLD"), ("GIG1",)),
        Gene("GIG2", "ENSG00000000003", ("OLD",), ("CCN1",)),
        Gene("C6orf62", "", (), ("CTGF",)),
        Gene("NEW", "ENSG00000000004", ("P1",)),
        Gene("TWIN-A", "ENSG00000000005", (), ("abc",)),
        Gene("TWIN-B", "ENSG00000000005", (), ("ABC",)),
    ]
)


@pytest.mark.parametrize(
    ("name", "symbol"),
    [
        ("CYR61", "CCN1"),
        ("cyr61", "CCN1"),
        ("C6ORF62", "C6orf62"),
        ("ENSG00000000001", "CCN1"),
        ("ENSG00000000001.12", "CCN1"),
        ("ENSG00000000001.12_PAR_Y", "ENSG00000000001.12_PAR_Y"),
        ("CCN1", "CCN1"),  # GIG2's alias as well
        ("CTGF", "CCN2"),  # C6orf62's alias as well
        ("P1", "NEW"),  # CCN1's alias as well
        ("GIG1", "GIG1"),  # of two genes
        ("OLD", "OLD"),  # of two genes, before
        ("ENSG00000000005", "ENSG00000000005"),  # of two genes
        ("abc", "TWIN-A"),
        ("Abc", "Abc"),  # of two genes without its case
        ("ENSG00000000009.1", "ENSG00000000009.1"),
        ("nobody", "nobody"),
        ("", ""),
    ],
)
def test_what_a_name_becomes(name: str, symbol: str) -> None:
    assert FEW.approved(name) == symbol


NAMES = st.lists(st.sampled_from(["a", "A", "b", "B", "c", "ENSG00000000001"]), max_size=3).map(tuple)


@given(
    st.lists(
        st.builds(Gene, st.sampled_from("abcABC"), st.sampled_from(["", "ENSG00000000001"]), NAMES, NAMES),
        unique_by=lambda g: g.symbol,
    ),
    st.sampled_from(["a", "A", "b", "B", "c", "C", "ENSG00000000001.3", "x"]),
)
def test_a_second_time_changes_nothing_and_only_symbols_come_out(genes: list[Gene], name: str) -> None:
    names = GeneNames.of(genes)
    once = names.approved(name)
    assert names.approved(once) == once
    assert once == name or once in {g.symbol for g in genes}
    if name in {g.symbol for g in genes}:
        assert once == name


def test_the_table_that_is_shipped() -> None:
    names = GeneNames.load()
    old = ["CYR61", "CTGF", "H2AFX", "HIST1H2BK", "H1F0", "APOPT1", "SEPT1", "MARCH1", "C6ORF62", "ENSG00000141510.17"]
    new = ["CCN1", "CCN2", "H2AX", "H2BC12", "H1-0", "COA8", "SEPTIN1", "MARCHF1", "C6orf62", "TP53"]
    assert approve(old, "symbols") == new
    assert approve(old, "as_given") == old
    assert names.ensembl("TP53") == "ENSG00000141510"
    assert names.ensembl("nobody") == ""
    assert names.approved("ENSG00000112096.18") == names.approved("ENSG00000291237") == "SOD2"  # retired, present
    assert len(names.ids) == 43_882
    assert all(names.approved(symbol) == symbol for symbol in names.ids)
    assert GeneNames.load() is names
    assert naming_version("symbols") == names.version
    assert naming_version("as_given") == ""


def test_real_counts_by_ensembl_id(real_data: Path) -> None:
    """A table of all genes, coding and not: two thirds have a symbol, no two the same but for a few retired ids."""
    with gzip.open(real_data / "rare_cancers" / "UVM.counts.tsv.gz", "rt") as file:
        ids = [line.split("\t", 1)[0] for line in file][1:]
    symbols = [s for s in approve(ids, "symbols") if not s.startswith("ENSG")]
    assert len(ids) == 56_537
    assert len(symbols) > 40_000
    assert len(symbols) - len(set(symbols)) < 10
    assert {"SOD2", "H2AX", "CCN1", "COA8"} <= set(symbols)


def test_a_table_is_made_from_the_complete_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    header = "hgnc_id\tsymbol\tname\tstatus\talias_symbol\tprev_symbol\tensembl_gene_id\n"
    rows = (
        'HGNC:2\tZZZ\t"last, by name"\tApproved\t\t\t\n'
        'HGNC:1\tCCN1\tcellular\tApproved\t"GIG1|IGFBP10"\tCYR61\tENSG00000142871\n'
        "HGNC:3\tGONE\twithdrawn\tEntry Withdrawn\t\t\t\n"
    )
    (tmp_path / "complete.txt").write_text(header + rows)
    before = "HGNC:1\tCYR61\tcellular\tApproved\t\t\tENSG00000000007\nHGNC:9\tELSE\tx\tApproved\t\t\tENSG00000000008\n"
    (tmp_path / "earlier.txt").write_text(header + before)
    table = tmp_path / "names.tsv.gz"
    write_table(tmp_path / "complete.txt", tmp_path / "earlier.txt", table)
    assert gzip.decompress(table.read_bytes()).decode().splitlines() == [
        "symbol\tensembl_gene_id\tprev_symbol\talias_symbol",
        "CCN1\tENSG00000142871\tCYR61|ENSG00000000007\tGIG1|IGFBP10",
        "ZZZ\t\t\t",
    ]
    monkeypatch.setattr(gene_names, "TABLE", table)
    read = gene_names._load.__wrapped__()
    assert {read.approved(n) for n in ("IGFBP10", "CYR61", "ENSG00000142871.2", "ENSG00000000007.3")} == {"CCN1"}
    assert read.approved("GONE") == "GONE"
    monkeypatch.setattr(gene_names, "TABLE", tmp_path / "absent.tsv.gz")
    with pytest.raises(ValueError, match=r"table of gene names, absent.tsv.gz, which cannot be read .*install oncofed"):
        gene_names._load.__wrapped__()
