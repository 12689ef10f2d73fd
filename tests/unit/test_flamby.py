"""`oncofed data flamby`: six clients from the benchmark's two files, and words about files that are others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from oncofed.client.data.site import SiteFolder
from oncofed.common.plan import Plan
from oncofed.deploy.sites.flamby import COVARIATES, OWN, write_flamby_sites


def files() -> tuple[pd.DataFrame, pd.DataFrame]:
    """Sixty patients dealt to six clients, one more who is in no part of the split."""
    rng = np.random.default_rng(0)
    names = [f"P{i:02d}" for i in range(61)]
    x = pd.DataFrame(rng.integers(0, 2, (61, COVARIATES)), columns=[f"stage_{i}, of one" for i in range(COVARIATES)])
    table = pd.concat([pd.DataFrame({"pid": names}), x], axis=1)
    table = table.assign(E=rng.integers(0, 2, 61).astype(float), T=rng.integers(0, 900, 61))
    fold = np.where(np.arange(60) % 5 == 0, "test", "train")
    split = pd.DataFrame({"pid": names[:60], "fold": fold})
    return table, split.assign(fold2=split["fold"] + "_" + (split.index % 6).astype(str))


def write(folder: Path, table: pd.DataFrame, split: pd.DataFrame) -> Path:
    folder.mkdir(exist_ok=True)
    table.to_csv(folder / "brca.csv", index=False)
    split.to_csv(folder / "train_test_split.csv", index=False)
    return folder


def test_six_clients_hold_the_patients_of_the_split(tmp_path: Path) -> None:
    table, split = files()
    folders, covariates = write_flamby_sites(write(tmp_path / "source", table, split), tmp_path / "sites")
    assert [SiteFolder.open(f).name for f in folders] == [f"Client {i}" for i in range(6)]
    assert SiteFolder.open(folders[0]).description.time_unit == "days"
    written = {i: pd.read_csv(f / "clinical.csv") for i, f in enumerate(folders)}
    assert all(list(t.columns) == [*OWN, *covariates] for t in written.values())
    everybody = pd.concat(written.values()).set_index("patient").loc[split["pid"]]
    wanted = table.set_index("pid").loc[split["pid"]]
    np.testing.assert_array_equal(everybody[list(covariates)], wanted[list(covariates)])
    np.testing.assert_array_equal(everybody[["time", "event"]], wanted[["T", "E"]])
    assert list(everybody["split"]) == list(split["fold"])
    assert {p: i for i, t in written.items() for p in t["patient"]} == {f"P{i:02d}": i % 6 for i in range(60)}
    plan = Plan.read(str(tmp_path / "sites" / "plan.toml"))
    assert plan.covariates == covariates  # names with commas in them, whole
    assert plan.test == ("split=test",)


def _swapped(table: pd.DataFrame, split: pd.DataFrame) -> None:
    table.rename(columns={"E": "T", "T": "E"}, inplace=True)


def _no_client(table: pd.DataFrame, split: pd.DataFrame) -> None:
    split.loc[3, "fold2"] = "train_6"


def _other_fold(table: pd.DataFrame, split: pd.DataFrame) -> None:
    split.loc[0, "fold2"] = "train_0"


def _stranger(table: pd.DataFrame, split: pd.DataFrame) -> None:
    split.loc[0, "pid"] = "P99"


def _twice(table: pd.DataFrame, split: pd.DataFrame) -> None:
    table.loc[1, "pid"] = "P00"


def _no_column(table: pd.DataFrame, split: pd.DataFrame) -> None:
    split.drop(columns="fold2", inplace=True)


def _another_table(table: pd.DataFrame, split: pd.DataFrame) -> None:
    table.drop(columns=table.columns[5], inplace=True)


def _five_clients(table: pd.DataFrame, split: pd.DataFrame) -> None:
    split["fold2"] = split["fold2"].str.replace("5", "4")


def _empty(table: pd.DataFrame, split: pd.DataFrame) -> None:
    table.loc[2, "T"] = np.nan


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (_swapped, r"brca\.csv: E is the event, 0 or 1, and holds"),
        (_no_client, r"train_test_split\.csv: fold2 .* 'train_6'"),
        (_other_fold, r"train_test_split\.csv: fold2 .* 'train_0'"),
        (_stranger, r"1 patients of train_test_split\.csv are not in brca\.csv"),
        (_twice, r"brca\.csv: 1 patients \(pid\) stand in it twice"),
        (_no_column, r"train_test_split\.csv: no columns \['fold2'\]"),
        (_another_table, r"brca\.csv: 38 columns .* has 39"),
        (_five_clients, r"5 clients in fold2, the benchmark has 6"),
        (_empty, r"brca\.csv: empty cells"),
    ],
)
def test_other_files_are_refused_by_name(
    spoil: Callable[[pd.DataFrame, pd.DataFrame], None], told: str, tmp_path: Path
) -> None:
    table, split = files()
    spoil(table, split)
    with pytest.raises(ValueError, match=told):
        write_flamby_sites(write(tmp_path / "source", table, split), tmp_path / "sites")
    assert not (tmp_path / "sites").exists()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"brca\.csv is missing"):
        write_flamby_sites(tmp_path, tmp_path / "sites")
