"""Whose the slides are, what a patient's slides give, and the one description of a site's images that all sites must share.

T tiles of a patient, D numbers a tile.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
from oncofed.client.data.read import check_rows, read_pathology, read_table
from oncofed.client.data.site import PATHOLOGY, SLIDES, SLIDES_TABLE, SiteFolder
from oncofed.client.data.slide_files import ENDINGS, SlideHeader, encoder_name, read_header, read_slide
from oncofed.common.errors import Refusal
from oncofed.common.modalities import Images

NAME_ENCODER = 'name the model that encoded them in site.toml, such as slide_encoder = "uni2-h"'


@dataclass(frozen=True)
class SlideIndex:
    """The slide files below `folder`: by patient, in the order of their names, and those of no known patient."""

    by_patient: dict[str, tuple[Path, ...]]
    orphans: tuple[Path, ...]
    folder: Path

    @property
    def paths(self) -> tuple[Path, ...]:
        """All slides of known patients."""
        return tuple(p for paths in self.by_patient.values() for p in paths)


class Fault(NamedTuple):
    """Why the slides of a site cannot stand together; `slides` of them are concerned."""

    field: str
    slides: int
    problem: str
    remedy: str


def pathology_source(site: SiteFolder) -> Literal["table", "slides", ""]:
    """Where the site's pathology lies, '' without any; raises where it has both a table and slide files."""
    table, slides = site.find(PATHOLOGY), slide_files(site)
    if table and slides:
        raise Refusal(
            f"site {site.name}: {table.name} and {len(slides)} slide files are both there; keep the one that is meant"
        )
    return "table" if table else "slides" if slides else ""


def slide_files(site: SiteFolder) -> list[Path]:
    """Every slide file in order; of CLAM's h5_files/S.h5 and pt_files/S.pt the first, which has the coordinates too.

    Raises where site.toml names a folder that is not there, and where two files are of one slide: of two runs of an
    encoder, say, that would be put together to one slide.
    """
    folder = site.path / site.description.slides
    if site.description.slides != SLIDES and not folder.is_dir():
        raise Refusal(
            f"site {site.name}: the folder '{folder.name}' that site.toml names as slides is not there; correct slides"
        )
    files = sorted(p for p in files_below(folder) if p.suffix.lower() in ENDINGS)
    whole = {p.stem for p in files if p.suffix.lower() == ".h5"}
    files = [p for p in files if p.suffix.lower() == ".h5" or p.stem not in whole]
    twice = len(files) - len({p.stem for p in files})
    if twice:
        raise Refusal(
            f"site {site.name}: {twice} slide files have a name that another one has too; let slides in site.toml name "
            "the folder of one run's features"
        )
    return files


def files_below(folder: Path) -> Iterator[Path]:
    """Files in a folder and its folders, none without it; leaves out hidden ones, such as a Mac's `._S.h5`."""
    for path in folder.rglob("*"):
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts):
            yield path


def find_slides(site: SiteFolder, patients: pd.Index) -> SlideIndex:
    """Slides by patient of the clinical table: as slides.csv says, else by the file's name, which starts with the patient's.

    Raises as `slide_files` does, and on a slides.csv without its columns or with one slide for two patients.
    """
    known, said = set(patients), _read_slide_table(site)
    by_patient: dict[str, list[Path]] = {}
    orphans = []
    for path in slide_files(site):
        patient = said[path.stem] if path.stem in said else patient_of(path.stem, known)
        if patient in known:
            by_patient.setdefault(patient, []).append(path)
        else:
            orphans.append(path)
    slides = {patient: tuple(by_patient[patient]) for patient in sorted(by_patient)}
    return SlideIndex(slides, tuple(orphans), site.path / site.description.slides)


def patient_of(stem: str, patients: Collection[str]) -> str:
    """The longest patient's name that the file's name is or starts with, '' without: `P1` is in `P1-a`, not in `P10-a`."""
    ends = (i for i in range(len(stem), 0, -1) if i == len(stem) or not stem[i].isalnum())
    return next((stem[:i] for i in ends if stem[:i] in patients), "")


def images_of(site: SiteFolder, patients: pd.Index) -> Images | None:
    """What stands for this site's images, None without; raises where it is unclear, mixed, or of no known patient."""
    source = pathology_source(site)
    if source == "table":
        return _images_of_table(site, patients)
    if source == "":
        return None
    paths = find_slides(site, patients).paths
    if not paths:
        raise Refusal(
            f"site {site.name}: no slide belongs to a patient of the clinical table; run `oncofed site check`"
        )
    headers = [read_header(p) for p in paths]
    faults = slide_faults(site, headers)
    if faults:
        listed = "; ".join(f"{f.slides} {f.problem}: {f.remedy}" for f in faults)
        raise Refusal(f"site {site.name}: {listed}")
    return images_of_headers(site, headers)


def images_of_headers(site: SiteFolder, headers: Iterable[SlideHeader]) -> Images:
    """The description of slides without faults."""
    first = next(h for h in headers if h.width)
    return Images(first.kind, encoder_name(site.description.slide_encoder) or first.encoder, first.width)


def slide_faults(site: SiteFolder, headers: Sequence[SlideHeader]) -> list[Fault]:
    """All reasons why slides cannot stand for one site's images; those of shape (0,) say nothing and have no say."""
    says = [h for h in headers if h.width]
    if not says:
        return [Fault("", len(headers), "slides, all without tiles", "encode the slides again")]
    faults = [*_mixed("kind", (h.kind for h in says)), *_mixed("width", (h.width for h in says))]
    encoders, declared = Counter(h.encoder for h in says), encoder_name(site.description.slide_encoder)
    if declared:
        for name in sorted(set(encoders) - {"", declared}):
            problem = f"slides whose files name the encoder '{name}', site.toml '{declared}'"
            faults.append(Fault("encoder", encoders[name], problem, "correct slide_encoder or take these slides out"))
    elif set(encoders) == {""}:
        faults.append(Fault("encoder", len(says), "slides of an unknown encoder", NAME_ENCODER))
    else:
        faults += _mixed("encoder", (h.encoder or "an unknown one" for h in says))
    return faults


def _mixed(field: str, values: Iterable[Hashable]) -> list[Fault]:
    counts = Counter(values).most_common()
    if len(counts) < 2:
        return []
    listed = ", ".join(f"{value}: {n}" for value, n in counts)
    other = sum(n for _, n in counts[1:])
    return [Fault(field, other, f"slides of another {field} than the others ({listed})", f"keep one {field}")]


def load_bag(paths: Sequence[Path], most: int, rng: np.random.Generator | None) -> np.ndarray:
    """Tiles `[T, D]` float32 of a patient's slides in order, at most `most` of them (0: all).

    With `rng` a random subset, without one an evenly spaced one. A slide vector counts as one tile; slides without
    tiles add none. Raises `Refusal` where the slides differ in width.
    """
    headers = [read_header(p) for p in paths]
    widths = {h.width for h in headers if h.width}
    if len(widths) > 1:
        raise Refusal(f"a patient's slides have widths {sorted(widths)}; run `oncofed site check`")
    total = sum(h.tiles for h in headers)
    rows = np.arange(total)
    if 0 < most < total:
        middles = (2 * np.arange(most) + 1) * total // (2 * most)  # of `most` stretches of the same length
        rows = middles if rng is None else np.sort(rng.choice(total, most, replace=False))
    parts, start = [np.zeros((0, max(widths, default=0)), np.float32)], 0
    for path, header in zip(paths, headers, strict=True):
        here = rows[(rows >= start) & (rows < start + header.tiles)] - start
        start += header.tiles
        if len(here):  # sliced at once: one whole slide in memory at a time, not all of a patient's
            parts.append(read_slide(path).features.reshape(header.tiles, header.width)[here])
    return np.concatenate(parts)


def slide_vectors(index: SlideIndex) -> pd.DataFrame:
    """The mean of each patient's slide vectors, patients x D with columns "0" to "D-1"; patients of empty slides are left out.

    Raises on a bag of tiles and on vectors of several widths.
    """
    means: dict[str, np.ndarray] = {}
    for patient, paths in index.by_patient.items():
        vectors = [v for p in paths if len(v := read_slide(p).features)]
        if any(v.shape != vectors[0].shape or v.ndim != 1 for v in vectors):
            raise Refusal("slides are no vectors of one width; run `oncofed site check`")
        if vectors:
            means[patient] = np.stack(vectors).mean(axis=0, dtype=np.float64).astype(np.float32)
    if len({len(m) for m in means.values()}) > 1:
        raise Refusal("slides are no vectors of one width; run `oncofed site check`")
    table = pd.DataFrame.from_dict(means, orient="index").rename_axis("patient")
    return table.set_axis(table.columns.astype(str), axis=1)


def column_order(columns: Iterable[object]) -> tuple[list[str], bool]:
    """Columns of a pathology table in the order all sites share, and whether they are numbers of an embedding.

    An embedding's columns are numbered from 0 or 1 without a gap, behind one prefix at most (`0`, `feat_12`), and stand
    by number; names that mean something stand by name.
    """
    names = [str(c) for c in columns]
    numbers = {n: int(m[0]) for n in names if (m := re.search(r"[0-9]+$", n))}
    counted = sorted(numbers.values()) in (list(range(len(names))), list(range(1, len(names) + 1)))
    if counted and len({n.rstrip("0123456789") for n in names}) == 1:
        return sorted(names, key=numbers.__getitem__), True
    return sorted(names), False


def _images_of_table(site: SiteFolder, patients: pd.Index) -> Images:
    table = read_pathology(site)
    assert table is not None  # its source is the table
    check_rows(site, table, patients, "pathology")
    names, nameless = column_order(table.columns)
    text = len(names) - table.select_dtypes("number").shape[1]
    if text or not names:
        raise Refusal(
            f"site {site.name}: pathology has {text} columns that are not numeric among {len(names)}; export plain numbers"
        )
    encoder = encoder_name(site.description.slide_encoder)
    if nameless and not encoder:
        raise Refusal(
            f"site {site.name}: pathology has {len(names)} columns that are numbered, not named; {NAME_ENCODER}"
        )
    digest = "" if nameless else hashlib.sha256("\n".join(names).encode()).hexdigest()[:8]
    return Images("vector", encoder, len(names), digest)


def _read_slide_table(site: SiteFolder) -> dict[str, str]:
    """Patients by slide name without ending from slides.csv, '' where the cell is empty; no file, no entries."""
    path = site.path / SLIDES_TABLE
    if not path.exists():
        return {}
    table = read_table(path, dtype=str)
    missing = [c for c in ("slide", "patient") if c not in table.columns]
    if missing:
        raise Refusal(f"site {site.name}: {path.name} lacks columns {missing}; the first line must be slide,patient")
    table = table.dropna(subset=["slide"]).fillna({"patient": ""})
    stems = table["slide"].map(lambda name: name[:-3] if name.lower().endswith(ENDINGS) else name)
    pairs = pd.DataFrame({"slide": stems, "patient": table["patient"]}).drop_duplicates()
    twice = int(pairs["slide"].duplicated().sum())
    if twice:
        raise Refusal(
            f"site {site.name}: {path.name} gives {twice} slides to more than one patient; keep one row a slide"
        )
    return dict(zip(pairs["slide"], pairs["patient"], strict=True))
