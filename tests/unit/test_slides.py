"""Whose the slides are, what stands for a site's images, and their check."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oncofed.client.data import check_images
from oncofed.client.data.check import SiteReport, check_site
from oncofed.client.data.site import SiteDescription, SiteFolder, write_description
from oncofed.client.data.slide_files import Slide, read_slide
from oncofed.client.data.slides import column_order, find_slides, images_of, patient_of, slide_vectors
from oncofed.common.errors import Refusal
from oncofed.common.modalities import Images
from toy_slides import CORNERS, TILES, pt, trident, write_h5, write_text

PATIENTS = pd.Index([f"P{i}" for i in range(12)])


def test_tcga_names() -> None:
    patients = {"TCGA-3C-AALI", "TCGA-3C", "P1", "P1-2"}
    stems = ["TCGA-3C-AALI-01Z-00-DX1.F6E9A5DF", "TCGA-3C-AALJ-01", "P1", "P10-a", "P1_a", "P1-2.x", "xP1-a", "-P1"]
    assert [patient_of(s, patients) for s in stems] == ["TCGA-3C-AALI", "TCGA-3C", "P1", "", "P1", "P1-2", "", ""]


@given(
    patients=st.sets(st.text("AB1-", min_size=1, max_size=4), max_size=6),
    stem=st.text("AB1-_.", min_size=1, max_size=8),
)
def test_the_longest_name_that_ends_at_a_boundary(patients: set[str], stem: str) -> None:
    fitting = [p for p in patients if stem == p or (stem.startswith(p) and not stem[len(p)].isalnum())]
    assert patient_of(stem, patients) == max(fitting, key=len, default="")


def write_site(folder: Path, *, expression: bool = True, **description: object) -> SiteFolder:
    write_description(folder, SiteDescription(**({"name": "Test", "expression_unit": "log2"} | description)))  # type: ignore[arg-type]
    table = pd.DataFrame({"patient": PATIENTS, "cancer_type": "BRCA", "time": 5.0, "event": [0, 1] * 6})
    table.to_csv(folder / "clinical.csv", index=False)
    if expression:
        x = np.random.default_rng(0).normal(5, 2, (12, 4)).clip(0)
        pd.DataFrame(x, index=PATIENTS.rename("patient"), columns=list("ABCD")).to_csv(folder / "expression.csv")
    return SiteFolder.open(folder)


def names(slides: tuple[Path, ...]) -> list[str]:
    return [s.name for s in slides]


def test_slides_find_their_patients(tmp_path: Path) -> None:
    site = write_site(tmp_path)
    assert find_slides(site, PATIENTS).paths == find_slides(site, PATIENTS).orphans == ()  # no folder is no fault
    for name in ("P1-b", "x/P1-a", "P10-a", "P99-a", "P3-scan", "._P2-a", ".cache/P2-b", "scan7", "none"):
        write_h5(tmp_path / "slides" / f"{name}.h5", TILES)
    pt(tmp_path / "slides" / "pt_files", torch.from_numpy(TILES), "P1-a.pt")  # beside CLAM's h5
    pt(tmp_path / "slides" / "pt_files", torch.from_numpy(TILES), "P5.pt")
    table = "slide,patient\nscan7.h5,P2\nP3-scan,P4\nnone,\n"
    (tmp_path / "slides.csv").write_text(table)
    index = find_slides(site, PATIENTS)
    assert {p: names(s) for p, s in index.by_patient.items()} == {
        "P1": ["P1-b.h5", "P1-a.h5"],
        "P10": ["P10-a.h5"],
        "P2": ["scan7.h5"],
        "P4": ["P3-scan.h5"],
        "P5": ["P5.pt"],
    }
    assert names(index.orphans) == ["P99-a.h5", "none.h5"]
    assert index.folder == tmp_path / "slides"
    (tmp_path / "slides.csv").write_text(table + "scan7,P5\n")
    with pytest.raises(Refusal, match="gives 1 slides to more than one patient"):
        find_slides(site, PATIENTS)
    (tmp_path / "slides.csv").write_text("slide,case\n")
    with pytest.raises(Refusal, match=r"lacks columns \['patient'\]"):
        find_slides(site, PATIENTS)


def test_the_folder_that_site_toml_names(tmp_path: Path) -> None:
    write_h5(tmp_path / "far" / "P1.h5", TILES)
    assert names(find_slides(write_site(tmp_path / "a", slides="../far"), PATIENTS).paths) == ["P1.h5"]
    assert names(find_slides(write_site(tmp_path / "b", slides=str(tmp_path / "far")), PATIENTS).paths) == ["P1.h5"]
    with pytest.raises(Refusal, match=r"folder 'nowhere' that site.toml names as slides is not there") as refusal:
        find_slides(write_site(tmp_path / "c", slides=str(tmp_path / "nowhere")), PATIENTS)
    assert str(tmp_path) not in str(refusal.value)


def test_one_slide_is_not_counted_twice(tmp_path: Path) -> None:
    site = write_site(tmp_path)
    for run in ("20x", "10x"):
        write_h5(tmp_path / "slides" / run / "P1-a.h5", TILES)
    with pytest.raises(Refusal, match="1 slide files have a name that another one has too"):
        find_slides(site, PATIENTS)


def test_what_stands_for_slides(tmp_path: Path) -> None:
    site = write_site(tmp_path)
    assert images_of(site, PATIENTS) is None
    folder = tmp_path / "slides"
    trident(folder, TILES, CORNERS, "P1")
    trident(folder, np.empty((0,), np.float32), np.empty((0, 2)), "P2", says=False)  # has no say
    write_h5(folder / "orphan.h5", np.ones((1, 99)))
    assert images_of(site, PATIENTS) == Images("bag", "uni-v1", 8)
    assert images_of(write_site(tmp_path, slide_encoder="UNI_v1"), PATIENTS) == Images("bag", "uni-v1", 8)
    with pytest.raises(Refusal, match=r"1 slides whose files name the encoder 'uni-v1', site.toml 'conch-v1'"):
        images_of(write_site(tmp_path, slide_encoder="conch"), PATIENTS)
    write_h5(folder / "P3.h5", TILES)
    with pytest.raises(Refusal, match=r"another encoder than the others \(uni-v1: 1, an unknown one: 1\)"):
        images_of(site, PATIENTS)
    assert images_of(write_site(tmp_path, slide_encoder="uni_v1"), PATIENTS) == Images("bag", "uni-v1", 8)
    trident(folder, np.ones(4, np.float32), CORNERS, "P4")
    with pytest.raises(Refusal, match=r"another kind.*\(bag: 2, vector: 1\).*another width.*\(8: 2, 4: 1\)"):
        images_of(site, PATIENTS)
    with pytest.raises(Refusal, match="no slide belongs to a patient"):
        images_of(site, pd.Index(["somebody"]))


def test_an_encoder_that_nobody_names(tmp_path: Path) -> None:
    site = write_site(tmp_path)
    write_h5(tmp_path / "slides" / "P1.h5", TILES)
    with pytest.raises(Refusal, match=r'1 slides of an unknown encoder: .*slide_encoder = "uni2-h"'):
        images_of(site, PATIENTS)
    assert images_of(write_site(tmp_path, slide_encoder="uni2-h"), PATIENTS) == Images("bag", "uni2-h", 8)


def pathology_table(folder: Path, columns: list[str]) -> None:
    pd.DataFrame(1.0, index=PATIENTS.rename("patient"), columns=columns).to_csv(folder / "pathology.csv")


def test_what_stands_for_a_table(tmp_path: Path) -> None:
    site = write_site(tmp_path)
    pathology_table(tmp_path, ["nuclei", "area"])
    named = images_of(site, PATIENTS)
    assert named is not None
    assert (named.kind, named.encoder, named.width, len(named.features)) == ("vector", "", 2, 8)
    pathology_table(tmp_path, ["area", "nuclei"])
    assert images_of(site, PATIENTS) == named  # the order of columns means nothing
    pathology_table(tmp_path, ["area", "mitoses"])
    assert images_of(site, PATIENTS) != named
    pathology_table(tmp_path, ["f1", "f0", "f2"])
    with pytest.raises(Refusal, match=r"3 columns that are numbered, not named; .*slide_encoder"):
        images_of(site, PATIENTS)
    assert images_of(write_site(tmp_path, slide_encoder="TITAN"), PATIENTS) == Images("vector", "titan", 3)
    (tmp_path / "pathology.csv").write_text("patient,area,grade\nP1,1.0,high\n")
    with pytest.raises(Refusal, match="1 columns that are not numeric among 2"):
        images_of(site, PATIENTS)
    write_h5(tmp_path / "slides" / "P1.h5", TILES)
    with pytest.raises(Refusal, match=r"pathology\.csv and 1 slide files are both there; keep"):
        images_of(site, PATIENTS)


@given(st.permutations(range(13)), st.sampled_from(["", "feat_", "uni2_"]), st.sampled_from([0, 1]), st.booleans())
def test_an_embeddings_columns_stand_by_number(order: list[int], prefix: str, first: int, padded: bool) -> None:
    columns = [f"{prefix}{i + first:0{3 if padded else 1}d}" for i in order]
    ordered = [f"{prefix}{i + first:0{3 if padded else 1}d}" for i in range(13)]
    assert column_order(columns) == (ordered, True)
    assert column_order([*columns, f"{prefix}77"])[1] is False  # a gap: part of something, so its names count
    assert column_order([*columns, "area"])[1] is False


def test_mean_of_a_patients_slide_vectors(tmp_path: Path) -> None:
    site, folder = write_site(tmp_path), tmp_path / "slides" / "slide_features_titan"
    for name, vector in {"P1-a": [1.0, 2.0], "P1-b": [3.0, 6.0], "P1-c": [], "P2": [], "P3": [5.0, 5.0]}.items():
        trident(folder, np.array(vector, np.float32), np.empty((0, 2)), name, says=False)
    table = slide_vectors(find_slides(site, PATIENTS))
    want = pd.DataFrame([[2.0, 4.0], [5.0, 5.0]], ["P1", "P3"], ["0", "1"], dtype=np.float32)
    pd.testing.assert_frame_equal(table, want.rename_axis("patient"))
    trident(folder, TILES, CORNERS, "P4")
    with pytest.raises(Refusal, match="no vectors of one width"):
        slide_vectors(find_slides(site, PATIENTS))


def problems(report: SiteReport) -> dict[str, tuple[str, int]]:
    return {f.problem: (f.level, f.count) for f in report.findings}


def test_a_clean_site_of_slides(tmp_path: Path) -> None:
    write_site(tmp_path)
    for i, patient in enumerate(PATIENTS):
        trident(tmp_path / "slides", np.ones((i + 1, 8), np.float32), CORNERS[:1].repeat(i + 1, axis=0), f"{patient}-a")
    report = check_site(tmp_path)
    assert not report.findings
    facts = "12 slides of 12 patients; bag of uni-v1, width 8, 6 tiles in the median"
    assert report.facts["pathology"] == facts
    assert report.facts["slides read in full"] == "12 of 12"


def test_all_problems_of_slides_in_one_pass_without_a_patient_in_sight(tmp_path: Path) -> None:
    write_site(tmp_path)
    folder = tmp_path / "slides"
    for name in ("P1-a", "P1-b", "P2-a"):
        trident(folder, TILES, CORNERS, name)
    trident(folder, np.empty((0, 8), np.float32), np.empty((0, 2)), "P3-a")
    trident(folder, np.full((5, 8), np.inf, np.float32), CORNERS, "P4-a")
    write_h5(folder / "P5-a.h5", np.ones((2, 4)))
    for name in ("P6-a.h5", "P7-a.h5", "P8-a.pkl", "P9-a.npy"):
        write_text(folder / name)
    write_h5(folder / "SECRET-77.h5", TILES)
    report = check_site(tmp_path)
    found = problems(report)
    expected = {
        "files that may hold pickled objects are never read": ("warning", 2),
        "slides without a patient of the clinical table": ("warning", 1),
        "clinical patients without slides": ("warning", 5),
        "slides without tiles": ("warning", 1),
        "slides of another width than the others (8: 5, 4: 1)": ("error", 1),
        "slides of another encoder than the others (uni-v1: 5, an unknown one: 1)": ("error", 1),
    }
    assert expected.items() <= found.items()
    assert sorted(c for text, c in found.items() if "cannot be read" in text or "not finite" in text) == [
        ("error", 1),
        ("error", 2),
    ]
    assert len(found) == len(expected) + 2
    assert all(f.remedy for f in report.findings)
    assert report.facts["pathology"] == "8 slides of 7 patients"
    text = str(report)
    assert "SECRET" not in text
    assert not any(f"P{i}" in text for i in range(12))


def test_slides_of_nobody_and_of_an_unknown_encoder(tmp_path: Path) -> None:
    write_site(tmp_path)
    write_h5(tmp_path / "slides" / "scan1.h5", TILES)
    assert problems(check_site(tmp_path))["no slide belongs to a patient of the clinical table"] == ("error", 1)
    write_h5(tmp_path / "slides" / "P1.h5", TILES)
    assert problems(check_site(tmp_path))["slides of an unknown encoder"] == ("error", 1)
    pathology_table(tmp_path, ["area"])
    assert any("are both there" in text for text in problems(check_site(tmp_path)))


def test_a_sample_of_many_slides_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_site(tmp_path, slide_encoder="uni")
    for i in range(45):
        write_h5(tmp_path / "slides" / f"P{i % 12}-{i}.h5", TILES)
    read: list[Path] = []

    def spy(path: Path) -> Slide:
        read.append(path)
        return read_slide(path)

    monkeypatch.setattr(check_images, "read_slide", spy)
    report = check_site(tmp_path)
    assert report.ok
    assert 10 <= len(read) <= check_images.SAMPLE
    assert report.facts["slides read in full"] == f"{len(read)} of 45"


def test_a_site_may_hold_images_only(tmp_path: Path) -> None:
    write_site(tmp_path, expression=False, slide_encoder="uni")
    assert any("no expression table" in text for text in problems(check_site(tmp_path)))
    assert not check_site(tmp_path).ok
    write_h5(tmp_path / "slides" / "P1.h5", TILES)
    report = check_site(tmp_path)
    assert report.ok
    assert problems(report)["no expression"] == ("warning", 1)
    assert next(f.remedy for f in report.findings if f.problem == "no expression").endswith("multimodal studies only")
    pathology_table(tmp_path, ["area"])  # which images is unclear, but there are some
    assert {(f.level, f.file) for f in check_site(tmp_path).findings} == {
        ("warning", "expression.csv"),
        ("error", "pathology"),
    }


def test_tables_beside_expression_are_checked(tmp_path: Path) -> None:
    write_site(tmp_path)
    pathology_table(tmp_path, ["f0", "f1"])
    (tmp_path / "alterations.csv").write_text("patient,TP53,MYC\nP1,1,inf\nP1,0,2\nX,0,0\n")
    report = check_site(tmp_path)
    assert problems(report) == {
        "columns that are numbered, not named": ("warning", 2),
        "duplicate patients": ("error", 1),
        "patients without clinical data": ("warning", 1),
        "infinite cells": ("error", 1),
    }
    assert report.facts["alterations"] == "3 patients x 2 features"
    assert {f.file for f in report.findings if f.level == "error"} == {"alterations.csv"}
    (tmp_path / "alterations.csv").write_text("patient,TP53\nP1,mutated\n")
    assert problems(check_site(tmp_path))["columns that are not numeric"] == ("error", 1)
