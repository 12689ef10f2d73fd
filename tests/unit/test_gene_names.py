"""One name for a gene: which symbol a name becomes, which stay as they are, and what HGNC's table may look like."""

from __future__ import annotations

import csv
import gzip
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from oncofed.common.gene_names import Gene, GeneNames, ids_meet_symbols
from oncofed.common.panel import GenePanel

FEW = GeneNames.of(
    [
        Gene("CCN1", "ENSG00000000001", ("CYR61",), ("GIG1", "P1")),
        Gene("CCN2", "ENSG00000000002", ("CTGF", "OLD"), ("GIG1",)),
        Gene("GIG2", "ENSG00000000003", ("OLD",), ("CCN1",)),
        Gene("C6orf62", "", (), ("CTGF", "Lower")),
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


def test_other_names_of_a_gene() -> None:
    genes = ["C6orf62", "CCN1", "CCN2", "TWIN-A", "TWIN-B", "nobody"]
    assert FEW.others(genes) == [
        ("C6ORF62", "LOWER", "Lower"),
        ("CYR61", "ENSG00000000001"),
        ("CTGF", "ENSG00000000002"),
        ("abc",),
        ("ABC",),
        (),
    ]


SPELLINGS = ["a", "A", "b", "B", "c", "C", "bC", "ENSG00000000001"]
NAMES = st.lists(st.sampled_from(SPELLINGS), max_size=3).map(tuple)
GENES = st.lists(
    st.builds(Gene, st.sampled_from("abcABC"), st.sampled_from(["", "ENSG00000000001"]), NAMES, NAMES),
    unique_by=lambda g: g.symbol,
)


@given(GENES, st.sampled_from([*SPELLINGS, "ENSG00000000001.3", "x"]))
def test_a_second_time_changes_nothing_and_only_symbols_come_out(genes: list[Gene], name: str) -> None:
    names = GeneNames.of(genes)
    once = names.approved(name)
    assert names.approved(once) == once
    assert once == name or once in {g.symbol for g in genes}
    if name in {g.symbol for g in genes}:
        assert once == name


@given(GENES.filter(bool), st.sampled_from([*SPELLINGS, "BC", "ENSG00000000001.3", "x"]))
@example([Gene("a", aliases=("bC",))], "BC")
def test_a_panel_knows_what_the_table_knows(genes: list[Gene], name: str) -> None:
    """A site with the panel names a gene as the coordinator with the table does, but for mixed spellings in small letters."""
    names = GeneNames.of(genes)
    panel = GenePanel.named(sorted(g.symbol for g in genes), names)
    (found,) = panel.names_of([name])
    if name in names.exact or name == name.upper():
        assert found == names.approved(name)
    else:
        assert found == name


def test_ids_meet_symbols() -> None:
    ids, symbols = ["ENSG00000000001", "ENSG00000000002.11", "__no_feature"], ["TP53", "ENSG00000000003", "EGFR"]
    assert ids_meet_symbols(ids, symbols)
    assert ids_meet_symbols(symbols, ids)
    assert not ids_meet_symbols(symbols, symbols)
    assert not ids_meet_symbols(ids, ids)


# ---- the file --------------------------------------------------------------------------------------------------------

HEADER = "hgnc_id\tsymbol\tname\tstatus\talias_symbol\tprev_symbol\tensembl_gene_id\tlsdb\n"
ROWS = (
    'HGNC:2\tZZZ\t"last, by name"\tApproved\t\t\t\t\n'
    'HGNC:1\tCCN1\t5\'-end "cellular"\tApproved\t"GIG1|IGFBP10"\tCYR61\tENSG00000142871\t\n'
    "HGNC:3\tGONE\twithdrawn\tEntry Withdrawn\tLONGGONE\t\t\t\n"
)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_the_table_of_hgnc(tmp_path: Path, packed: bool, ending: str) -> None:
    data = ("\ufeff" + HEADER + ROWS).replace("\n", ending).encode()
    (tmp_path / "hgnc.txt").write_bytes(gzip.compress(data) if packed else data)
    names = GeneNames.from_file(tmp_path / "hgnc.txt")
    assert {names.approved(n) for n in ("GIG1", "IGFBP10", "CYR61", "ENSG00000142871.2")} == {"CCN1"}
    assert [names.approved(n) for n in ("GONE", "LONGGONE")] == ["GONE", "LONGGONE"]
    assert set(names.exact.values()) == {"ZZZ", "CCN1"}


def test_without_a_status_all_rows_count(tmp_path: Path) -> None:
    (tmp_path / "names.tsv").write_text(
        "symbol\tensembl_gene_id\tprev_symbol\talias_symbol\nA\tENSG00000000001\tB|C\nD\n"
    )
    names = GeneNames.from_file(tmp_path / "names.tsv")
    assert [names.approved(n) for n in ("ENSG00000000001", "C", "D")] == ["A", "A", "D"]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (None, "cannot be read .No such file"),
        (b"\x1f\x8b\x08\x00", "cannot be read .EOFError"),
        (gzip.compress(HEADER.encode(), mtime=0)[:-12], "cannot be read .EOFError"),
        (b"\x1f\x8b\x08\x00 this was never packed", "cannot be read .error"),
        (b"\xff\xfe\x00", "is no text"),
        (b"", r"lacks the columns \['symbol', 'ensembl_gene_id', 'prev_symbol', 'alias_symbol'\]"),
        (
            b"Approved symbol\tsymbol\n",
            r"lacks .*'alias_symbol'\], its first line begins \['Approved symbol', 'symbol'\]",
        ),
        (HEADER.encode(), "has no row of an approved gene"),
        (HEADER.encode() + b'HGNC:1\t"' + b"A" * 200_000 + b"\n", r"line \d+ cannot be read .field larger"),
    ],
)
def test_files_that_are_no_table_of_names(tmp_path: Path, data: bytes | None, words: str) -> None:
    file = tmp_path / "hgnc.txt"
    if data is not None:
        file.write_bytes(data)
    csv.field_size_limit(131_072)  # Python's own; libraries that read ARFF files raise it for the whole process
    with pytest.raises(ValueError, match=rf"panel.names = .*hgnc.txt: {words}") as refused:
        GeneNames.from_file(file)
    assert str(refused.value).endswith("download hgnc_complete_set.txt from genenames.org, plain or packed as .gz")
