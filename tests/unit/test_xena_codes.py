"""The GDC's table of tissue source site codes, as users bring it to `oncofed data xena`."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oncofed.deploy.sites.xena.institutions import read_codes
from toy_xena import EAST, NORTH, TABLE


def test_a_code_table_by_commas_with_lost_zeros_and_marks_around_its_cells(tmp_path: Path) -> None:
    wanted = {"A8": NORTH, "NA": EAST, "AA": NORTH, "02": EAST, "ZY": 'University of the "South'}
    tabs = tmp_path / "codes.tsv"
    tabs.write_text(TABLE)
    assert read_codes(tabs) == wanted
    tabs.write_text(TABLE.replace("X\n", "X\t\n"))  # a tab at the end of each line but the first
    assert read_codes(tabs) == wanted
    cells = [line.split("\t") for line in TABLE.replace(' "South', " South").splitlines()]
    plain = wanted | {"ZY": "University of the South"}
    tabs.write_text("\n".join("\t".join(f'"{c}"' for c in row) for row in cells))
    assert read_codes(tabs) == plain
    commas = tmp_path / "codes.csv"
    table = pd.DataFrame(cells[1:], columns=["TSS.Code", "Source site", "STUDY", "bcr"])
    table.replace({"02": "2"}).to_csv(commas, index=False, encoding="utf-8-sig")
    assert read_codes(commas) == plain


@settings(max_examples=50, deadline=None)
@given(
    name=st.text("abcdefXYZ 123", min_size=1).filter(str.strip),
    marks=st.lists(st.sampled_from([" ", ".", "-", " - ", "'", ", ", "(", ")"]), min_size=1, max_size=5),
    upper=st.booleans(),
)
def test_spellings_are_one_institution_and_other_letters_are_not(
    name: str, marks: list[str], upper: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = name.upper() if upper else name.lower()
    for i, mark in enumerate(marks):
        other = other[: 2 * i] + mark + other[2 * i :]
    file = tmp_path_factory.mktemp("codes") / "codes.tsv"
    file.write_text(f"TSS Code\tSource Site\nA1\t{name}\nA2\t{other}\nA3\t{name}q\nA4\t.\n")
    names = read_codes(file)
    assert names["A1"] == names["A2"] == " ".join(name.split())
    assert names["A3"] != names["A1"]
    assert "A4" not in names


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "cannot be read as a code table"),
        (b"\x50\x4b\x03\x04\xff\xfe", "cannot be read as a code table"),
        (TABLE.replace("TSS Code", "Batch").encode(), "is no code table: its columns are \\['Batch', 'Source Site'"),
        (TABLE.replace("\t", ";").encode(), "is no code table"),
        (TABLE.replace("BCR", "source_site").encode(), "is no code table"),
        (TABLE.splitlines()[0].encode(), "names no site in its 0 rows"),
    ],
)
def test_a_wrong_code_table_is_an_error_that_names_the_columns(text: bytes, words: str, tmp_path: Path) -> None:
    codes = tmp_path / "own.tsv"
    codes.write_bytes(text)
    with pytest.raises(ValueError, match=f"own.tsv {words}.* with columns TSS Code and Source Site, separated by tabs"):
        read_codes(codes)
