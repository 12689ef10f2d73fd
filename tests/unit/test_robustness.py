"""Taking pathology away: from test patients, from hospitals, and what is shown of it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tomli_w
import torch
from oncofed.client.bags import Bags
from oncofed.client.data.cohort import Cohort, cohort_key, prepare
from oncofed.client.data.site import SiteFolder
from oncofed.client.data.slides import find_slides, images_of
from oncofed.common.modalities import Beside
from oncofed.common.panel import GenePanel
from oncofed.common.study import Study
from oncofed.deploy.comparison.present_robustness import print_robustness, write_robustness
from oncofed.deploy.comparison.reference import Pool
from oncofed.deploy.comparison.rescore import without
from oncofed.deploy.comparison.robustness import HeldOut, choose_patients, robustness
from oncofed.deploy.comparison.sites_without import check_same_folds, choose_hospitals, copy_without, with_pathology
from rich.console import Console
from toy_multimodal import batch
from toy_slides import TILES, write_h5

FUSION = Study().changed(model__name="path_gptomic", splits__folds=3)
PANEL = GenePanel(("GENE0001", "GENE0002"))
BESIDE = Beside(image_kind="vector", image_width=16)


@pytest.fixture
def sites(consortium: Path, tmp_path: Path) -> Path:
    """The consortium to be changed: Aachen, Bergen and Dublin have images of most patients, Coimbra has none."""
    shutil.copytree(consortium, tmp_path / "sites", ignore=shutil.ignore_patterns(".oncofed"))
    return tmp_path / "sites"


# -- test patients -----------------------------------------------------------------------------------------------------


def patients() -> pd.DataFrame:
    rows = [(f"S{i % 3}", f"P{i}", i % 2, "BRCA" if i % 5 else "LUAD") for i in range(60)]
    return pd.DataFrame(rows, columns=["site", "patient", "fold", "cancer_type"])


def test_who_loses_pathology_at_a_share_loses_it_at_a_larger_one() -> None:
    table = patients()
    chosen = [choose_patients(table, share, 0) for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert [int(c.sum()) for c in chosen] == [0, 16, 30, 46, 60]  # 24 and 6 in each fold: 6 + 2, 12 + 3, 18 + 5
    assert all(np.all(less <= more) for less, more in pairwise(chosen))
    count = table.assign(chosen=chosen[2]).groupby(["fold", "cancer_type"])["chosen"].agg(["sum", "size"])
    assert (count["sum"] * 2 == count["size"]).all()


def test_who_loses_pathology_rests_on_names_and_seed_alone() -> None:
    table = patients()
    chosen = choose_patients(table, 0.5, 0)
    shuffled = table.sample(frac=1.0, random_state=1)
    again = pd.Series(choose_patients(shuffled, 0.5, 0), index=shuffled.index).sort_index()
    assert again.to_numpy().tolist() == chosen.tolist()
    assert choose_patients(table, 0.5, 1).tolist() != chosen.tolist()


def test_a_mask_takes_one_modality_from_the_marked_patients() -> None:
    b = batch(6, lacks={"pathology": slice(4, 5)})
    lost = np.array([True, False, True, False, False, False])
    masked = without(b, "pathology", lost)
    assert masked.has["pathology"].tolist() == [False, True, False, True, False, True]
    assert b.has["pathology"].tolist() == [True, True, True, True, False, True]
    assert masked.has["rna"].all()
    assert masked.x_BG is b.x_BG


def test_slides_of_the_marked_patients_are_not_read() -> None:
    slides = np.array(["/none/a.h5", "", "/none/b.h5\n/none/c.h5"])
    b = dataclasses.replace(batch(3), bags=Bags(slides, 6, 0, torch.device("cpu")))
    masked = without(b, "pathology", np.array([True, True, True])).bags
    assert masked is not None
    assert masked.slides.tolist() == ["", "", ""]
    assert masked.load(None)[0].shape == (0, 6)
    assert without(b, "rna", np.array([True, True, True])).bags is b.bags
    kept = without(b, "pathology", np.array([True, False, False])).bags
    assert kept is not None
    assert kept.slides.tolist() == ["", "", slides[2]]


def test_both_methods_lose_the_same_patients() -> None:
    """Fold 0 tests P1 and P2 against P3 and P4 (RNA: 1 +- 1, images: 0 +- 2), fold 1 the other way round."""

    def table(fold: int, split: str, names: str, *risk: float) -> pd.DataFrame:
        about = {"site": "A", "fold": fold, "cancer_type": "BRCA", "time_months": 5.0, "event": 1}
        return pd.DataFrame(about | {"patient": names.split(), "split": split, "risk": risk})

    rna = [table(0, "test", "P1 P2", 3.0, 4.0), table(0, "train", "P3 P4", 0.0, 2.0)]
    rna += [table(1, "test", "P3", 3.0), table(1, "train", "P1 P2", 0.0, 2.0)]
    images = [table(0, "test", "P1 P2", 5.0, 6.0), table(0, "train", "P3 P4", -2.0, 2.0)]
    images += [table(1, "test", "P3", 3.0), table(1, "train", "P1 P2", -2.0, 2.0)]
    whole, bare = (
        pd.concat([table(0, "test", "P1 P2", *risk), table(1, "test", "P3", risk[0])], ignore_index=True)
        for risk in ((10.0, 20.0), (1.0, 2.0))
    )
    held = HeldOut(whole, bare, pd.concat(rna), pd.concat(images))
    expected = {
        (False, False, False): ([10, 20, 10], [2 + 2.5, 3 + 3, 2 + 1.5]),
        (False, True, False): ([10, 2, 10], [2 + 2.5, 3, 2 + 1.5]),  # P2 still trained the model of fold 1
        (True, True, True): ([1, 2, 1], [2, 3, 2]),
    }
    for removed, (fusion, late) in expected.items():
        assert held.fusion(np.array(removed))["risk"].tolist() == fusion
        assert held.late(np.array(removed)).sort_values("patient")["risk"].tolist() == pytest.approx(late)


# -- hospitals ---------------------------------------------------------------------------------------------------------


def test_hospitals_are_drawn_from_those_with_pathology(sites: Path) -> None:
    assert with_pathology(sites) == ["Aachen", "Bergen", "Dublin"]
    study = FUSION.changed(aggregation__min_sites=1)
    one, two = (choose_hospitals(sites, share, study) for share in (0.5, 0.7))
    assert len(one) == 1
    assert len(two) == 2
    assert set(one) < set(two) < {"Aachen", "Bergen", "Dublin"}
    drawn = {tuple(choose_hospitals(sites, 0.5, study.changed(seed=seed))) for seed in range(12)}
    assert drawn == {("Aachen",), ("Bergen",), ("Dublin",)}


def test_a_share_that_leaves_too_few_hospitals_is_refused(sites: Path) -> None:
    with pytest.raises(ValueError, match="of 3 hospitals with pathology 0 would lose it and 3 train with it"):
        choose_hospitals(sites, 0.2, FUSION)
    with pytest.raises(ValueError, match="2 would lose it and 1 train with it"):
        choose_hospitals(sites, 0.7, FUSION)
    (lost,) = choose_hospitals(sites, 0.5, FUSION)
    other = "Aachen" if lost != "Aachen" else "Bergen"
    assert choose_hospitals(sites, 0.5, FUSION.changed(splits__held_out_sites=(lost, "Coimbra"))) == [lost]
    with pytest.raises(ValueError, match="1 would lose it and 1 train with it"):  # where the other is held out
        choose_hospitals(sites, 0.5, FUSION.changed(splits__held_out_sites=(lost, other)))


def cohort(folder: Path, study: Study = FUSION, beside: Beside = BESIDE) -> Cohort:
    site = SiteFolder.open(folder)
    return prepare(site, PANEL, cohort_key(site, study, PANEL, ("BRCA", "COADREAD", "LUAD"), beside))


def test_a_copy_without_pathology_deals_the_same_folds(sites: Path, tmp_path: Path) -> None:
    """Some patients have pathology only: where the copy forgot them, the others would move to other folds."""
    expression = pd.read_parquet(sites / "aachen" / "expression.parquet")
    images = pd.read_parquet(sites / "aachen" / "pathology.parquet")
    only = images.index[:7]
    expression.drop(index=only).to_parquet(sites / "aachen" / "expression.parquet")
    copy_without(sites, tmp_path / "copy", ["Aachen"])
    whole, bare = cohort(sites / "aachen"), cohort(tmp_path / "copy" / "aachen")
    assert whole.has("pathology").sum() == len(images)
    assert not bare.has("pathology").any()
    assert not bare.has("alterations").any()
    assert bare.has("rna").sum() == len(expression) - 7
    assert bare.patient.tolist() == whole.patient.tolist()
    assert bare.fold.tolist() == whole.fold.tolist()
    pools = (Pool({"Aachen": c}, PANEL, ("BRCA",)) for c in (whole, bare.select(bare.has("rna"))))
    check_same_folds(*pools)
    (tmp_path / "copy" / "aachen" / "alterations.parquet").unlink()
    forgetful = cohort(tmp_path / "copy" / "aachen")
    with pytest.raises(ValueError, match=r"other folds than with it \(Aachen: \d+\)"):
        check_same_folds(*(Pool({"Aachen": c}, PANEL, ("BRCA",)) for c in (whole, forgetful)))


def test_other_hospitals_are_copied_as_they_are(sites: Path, tmp_path: Path) -> None:
    (sites / "dublin" / "policy.toml").write_text("min_patients = 3\n")
    (sites / "dublin" / ".oncofed").mkdir()
    copy_without(sites, tmp_path / "copy", ["Aachen"])
    copy_without(sites, tmp_path / "copy", ["Bergen"])  # anew: nothing of the first is left
    assert with_pathology(tmp_path / "copy") == ["Aachen", "Dublin"]
    names = {p.name for p in (tmp_path / "copy" / "dublin").iterdir()}
    assert names == {"site.toml", "clinical.csv", "expression.h5ad", "pathology.parquet", "policy.toml"}
    assert (tmp_path / "copy" / "dublin" / "policy.toml").read_text() == "min_patients = 3\n"
    assert with_pathology(sites) == ["Aachen", "Bergen", "Dublin"]
    assert not (tmp_path / "copy" / "aachen" / "alterations.parquet").exists()


def test_alterations_stay_and_slides_go(sites: Path, tmp_path: Path) -> None:
    folder = sites / "coimbra"
    clinical = pd.read_csv(folder / "clinical.csv")["patient"]
    own = SiteFolder.open(folder).description.model_dump(exclude_defaults=True)
    (folder / "site.toml").write_text(tomli_w.dumps(own | {"slides": "../tiles", "slide_encoder": "uni2"}))
    for patient in clinical[:3]:
        write_h5(sites / "tiles" / f"{patient}-1.h5", TILES)
    pd.DataFrame({"TP53": [1.0, 0.0]}, index=pd.Index(clinical[2:4], name="patient")).to_csv(folder / "alterations.csv")
    for name, has in (("kept", True), ("bare", False)):
        copy_without(sites, tmp_path / name, [] if has else ["Coimbra"])
        copy = SiteFolder.open(tmp_path / name / "coimbra")
        index = pd.Index(clinical)
        assert (images_of(copy, index) is not None) == has
        assert len(find_slides(copy, index).by_patient) == 3 * has
        beside = Beside(image_kind="bag", image_width=8, alterations=("TP53",))
        c = cohort(copy.path, FUSION.changed(fusion__modalities=("rna", "pathology", "alterations")), beside)
        assert c.has("pathology").sum() == 3 * has
        assert c.a_NA[c.has("alterations"), 0].tolist() == [1.0, 0.0]


def test_wrong_shares_and_studies_are_refused_before_any_work(sites: Path, tmp_path: Path) -> None:
    study = FUSION.changed(runtime__out=str(tmp_path / "out"))
    with pytest.raises(ValueError, match="name shares from 0 to 1"):
        robustness(study, sites, (0.0, 1.5))
    with pytest.raises(ValueError, match="name shares"):
        robustness(study, sites, ())
    with pytest.raises(ValueError, match=r"compares with late: model\.name = 'gene_moe'"):
        robustness(Study(), sites)
    with pytest.raises(ValueError, match=r"--train-hospitals 0\.9"):
        robustness(study, sites, (0.0, 1.0), 0.9)
    assert not (tmp_path / "out").exists()


# -- what is shown -----------------------------------------------------------------------------------------------------


def result() -> dict[str, Any]:
    def value(c: float) -> dict[str, float]:
        return {"value": c, "low": c - 0.05, "high": c + 0.05}

    def part(hospitals: list[str], drop: float) -> dict[str, Any]:
        points = [
            {
                "share": share,
                "removed": int(40 * share),
                "methods": {"fusion": {"c_index": value(0.7 - drop)}, "late": {"c_index": value(0.65 - drop)}},
                "difference": value(0.05),
            }
            for share in (0.0, 1.0)
        ]
        return {"hospitals_without": hospitals, "patients": 40, "points": points}

    return {"study": {}, "hospitals": 4, "shares": [0.0, 1.0], "trained": [part([], 0.0), part(["A", "B"], 0.02)]}


def test_the_table_fits_a_terminal() -> None:
    console = Console(width=80)
    with console.capture() as capture:
        print_robustness(result(), console)
    text = capture.get()
    assert "…" not in text
    assert "trained with all pathology; 40 patients" in text
    assert "trained without that of 2 of 4 hospitals; 40 patients" in text
    assert "0.630 (.580-.680)  +.050 (+.000, +.100)" in text


def test_numbers_and_pictures_are_written(tmp_path: Path) -> None:
    unknown = result()
    unknown["trained"][0]["points"][1]["methods"]["late"]["c_index"] = dict.fromkeys(("value", "low", "high"), np.nan)
    assert write_robustness(unknown, tmp_path) == tmp_path / "robustness.png"
    assert (tmp_path / "robustness.png").read_bytes().startswith(b"\x89PNG")
    written = json.loads((tmp_path / "robustness.json").read_text())
    assert written["trained"][0]["points"][1]["methods"]["late"]["c_index"]["value"] is None
    picture = (tmp_path / "robustness.svg").read_text()
    assert all(f">{words}</text>" in picture for words in ("late fusion", "trained without that of 2 of 4 hospitals"))
    write_robustness(unknown, tmp_path / "again")
    assert (tmp_path / "again" / "robustness.svg").read_text() == picture
