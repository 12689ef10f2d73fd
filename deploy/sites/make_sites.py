"""What every maker of site folders from pooled data shares: small groups, a folder that is written whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import pandas as pd
from oncofed.client.data.site import SiteDescription, folder_name, write_description

Rest = Literal["merge", "drop"]

REST = "Rest"
"""The site of all patients whose institution is too small to be one."""


def refuse_target(out: Path) -> None:
    """Raise `ValueError` where something lies in `out` already."""
    if out.exists() and any(out.glob("*/site.toml")):
        raise ValueError(f"{out} holds sites already; choose another folder or remove it")
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty; choose another folder")


def group_by_size(groups: pd.Series, min_patients: int, rest: Rest) -> pd.Series:
    """A site's name for each patient: the group, or `Rest` (merge) or None (drop) where it has fewer than `min_patients`."""
    sizes = groups.map(groups.value_counts())
    sites = groups.astype(str).where(sizes >= min_patients, REST if rest == "merge" else None)
    if sites.isna().all():
        raise ValueError(
            f"no group of '{groups.name}' has {min_patients} patients; lower --min-patients or merge with --rest merge"
        )
    return sites


@contextmanager
def new_sites(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its place when the block ends well, and is gone when it does not."""
    refuse_target(out)
    temporary = out.with_name(out.name + ".partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if out.exists():
        out.rmdir()
    temporary.rename(out)


def begin_site(root: Path, description: SiteDescription, clinical: pd.DataFrame) -> Path:
    """A site's new folder in `root` with `site.toml` and `clinical.csv`; raises where two sites would share it."""
    folder = root / folder_name(description.name)
    if folder.exists():
        raise ValueError(f"two institutions share the folder name '{folder.name}'; rename one in the clinical table")
    write_description(folder, description)
    clinical.to_csv(folder / "clinical.csv", index=False)
    return folder
