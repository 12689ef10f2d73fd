"""A site is a folder: `site.toml` says who and in which units, tables hold the patients."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tomli_w
from oncofed.common.errors import Refusal
from pydantic import BaseModel, ConfigDict, Field, ValidationError

Unit = Literal["counts", "tpm", "log2", "zscore"]
Orientation = Literal["auto", "patients_x_genes", "genes_x_patients"]

CLINICAL = ("clinical.csv", "clinical.parquet")
EXPRESSION = (
    "expression.csv",
    "expression.tsv",
    "expression.csv.gz",
    "expression.tsv.gz",
    "expression.parquet",
    "expression.h5ad",
)
PATHOLOGY = ("pathology.csv", "pathology.parquet")
ALTERATIONS = ("alterations.csv", "alterations.parquet")
SLIDES = "slides"
SLIDES_TABLE = "slides.csv"


class SiteDescription(BaseModel):
    """The content of `site.toml`."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(min_length=1, max_length=80, pattern=r"^[^\x00-\x1f/\\]+$")
    expression_unit: Unit
    time_unit: Literal["days", "months", "years"] = "months"
    orientation: Orientation = "auto"
    extra_cancer_types: tuple[str, ...] = Field(
        (), description="codes beside the TCGA ones that this site uses on purpose"
    )
    cancer_types: tuple[str, ...] = Field(
        (),
        description="types that this site treats, as everyone may know; left out, the greeting names those of its patients",
    )
    patients: int = Field(
        0, ge=0, description="of this site, as everyone may know; 0: those of the clinical table, to the nearest ten"
    )
    slides: str = Field(
        SLIDES, description="folder of slide features, one file a slide; relative to the site's or absolute"
    )
    slide_encoder: str = Field("", description="the model that encoded tiles or slides, where the files do not say it")
    scgpt: str = Field("", description="folder of an scGPT checkpoint; relative to the site's or absolute")

    @property
    def months_per_unit(self) -> float:
        return {"days": 12 / 365.25, "months": 1.0, "years": 12.0}[self.time_unit]


@dataclass(frozen=True)
class SiteFolder:
    """Where a site's files lie. Opening it reads `site.toml` only."""

    path: Path
    description: SiteDescription

    @classmethod
    def open(cls, path: Path) -> SiteFolder:
        """Raises `Refusal` with file, field and remedy where `site.toml` is absent or wrong."""
        file = path / "site.toml"
        try:
            data = tomllib.loads(file.read_text())
        except FileNotFoundError:
            raise Refusal(
                f'{path.name}/site.toml is missing; write one with name = "..." and expression_unit = "counts|tpm|log2|zscore"'
            ) from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise Refusal(f"{path.name}/site.toml is not valid TOML: {error}") from None
        try:
            return cls(path, SiteDescription.model_validate(data))
        except ValidationError as error:
            problems = "; ".join(
                f"{'.'.join(map(str, e['loc']))}: {e['msg']} (got {e['input']!r})" for e in error.errors()
            )
            raise Refusal(f"{path.name}/site.toml: {problems}") from None

    @property
    def name(self) -> str:
        return self.description.name

    def find(self, names: tuple[str, ...]) -> Path | None:
        """The one file of a kind, None without; two files of a kind are refused."""
        found = [self.path / n for n in names if (self.path / n).exists()]
        if len(found) > 1:
            raise Refusal(f"site {self.name}: {[f.name for f in found]} are both there; keep the one that is meant")
        return found[0] if found else None


def write_description(folder: Path, description: SiteDescription) -> None:
    """Write `site.toml`, without the settings that stand at their default."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "site.toml").write_text(tomli_w.dumps(description.model_dump(exclude_defaults=True)))


def folder_name(site: str) -> str:
    """A file name for a site: `University of Pittsburgh` -> `university-of-pittsburgh`."""
    return re.sub(r"[^a-z0-9]+", "-", site.lower()).strip("-") or "site"


def list_sites(root: Path) -> list[Path]:
    """Folders with a `site.toml` below `root`, by name; raises when there is none."""
    found = sorted(p.parent for p in root.glob("*/site.toml"))
    if not found and (root / "site.toml").exists():
        raise ValueError(f"{root} is one site; name the folder that holds the sites' folders: {root.resolve().parent}")
    if not found:
        raise ValueError(
            f"{root}: no site folder (a folder with site.toml) in it; make some with `oncofed data split` or `oncofed data synth`"
        )
    return found
