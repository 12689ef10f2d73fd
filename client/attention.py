"""Where a model looks in a patient's slides: one GeoJSON file a slide, a square a tile, in the form that QuPath imports.

They lie beside the hospital's own slides and leave it as little. T tiles.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from oncofed.client.bags import slide_paths
from oncofed.client.data.slide_files import Slide, read_header, read_slide
from oncofed.client.predict import Prediction
from oncofed.common.files import write_text
from scipy.stats import rankdata

MOST = 20
"""Patients whose slides are drawn when none is named."""


@dataclass
class Drawn:
    """How many slides of how many patients were written, and how many were not, or not surely right."""

    patients: int = 0
    slides: int = 0
    placeless: int = 0
    micrometres: int = 0
    sizeless: int = 0
    inferred: int = 0

    @property
    def notes(self) -> list[str]:
        """Counts for the terminal."""
        said = (
            (self.placeless, "hold no coords, so nobody can say where their tiles lie: skipped"),
            (self.micrometres, "hold coords in micrometres: skipped; name the scanner's --microns-per-pixel"),
            (self.sizeless, "do not say how large a tile is, nor do their coords: skipped"),
            (self.inferred, "do not say how large a tile is: taken as the usual step between their coords"),
        )
        return [f"{n} slides {what}" for n, what in said if n]


def choose_patients(prediction: Prediction, names: Sequence[str]) -> np.ndarray:
    """Rows of the patients to draw: those named, or the `MOST` of highest percentile, then risk. Raises where there are none."""
    cohort = prediction.cohort
    if not prediction.scorer.lens.tile_width:
        held = prediction.model.beside.images or "none"
        raise ValueError(
            f"--attention shows which tiles a model looks at, and this one reads no tiles (images: {held}); leave it out"
        )
    rows = np.flatnonzero(cohort.slides != "")
    if names:
        unknown = set(names) - set(cohort.patient[rows].tolist())
        if unknown:
            raise ValueError(
                f"--patient: {len(unknown)} of {len(set(names))} names are of no patient with slides here; write them as the "
                "clinical table does"
            )
        return rows[np.isin(cohort.patient[rows], list(names))]
    if not len(rows):
        raise ValueError("--attention: no patient here has slides; leave it out")
    # Risks of different cancer types cannot be held against each other, percentiles can; unknown ones come last.
    percentile = np.nan_to_num(prediction.percentile[rows], nan=-1.0)
    return rows[np.lexsort((-prediction.score[rows], -percentile))][:MOST]


def write_attention(prediction: Prediction, rows: np.ndarray, folder: Path, microns_per_pixel: float = 0.0) -> Drawn:
    """Write `<slide>.geojson` for every slide of the patients in `rows`; weights sum to 1 over all slides of a patient."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = Drawn()
    for row in rows.tolist():
        weight_T = prediction.scorer.score(prediction.cohort.select(np.array([row]))).attention
        if weight_T is None or not len(weight_T):
            continue
        attention = weight_T.double().cpu().numpy()
        percentile = (rankdata(attention) - 0.5) / len(attention) * 100
        before, start = drawn.slides, 0
        for path in slide_paths(str(prediction.cohort.slides[row])):  # in the order of the patient's bag
            here = slice(start, start + read_header(path).tiles)
            start = here.stop
            if here.start == here.stop:
                continue
            edge, corner_T2 = _squares(read_slide(path), microns_per_pixel, drawn)
            if edge:
                collection = _collection(corner_T2, edge, attention[here], percentile[here])
                write_text(folder / f"{path.stem}.geojson", json.dumps(collection, separators=(",", ":")))
                drawn.slides += 1
        assert start == len(attention)
        drawn.patients += drawn.slides > before
    return drawn


def _squares(slide: Slide, microns_per_pixel: float, drawn: Drawn) -> tuple[float, np.ndarray]:
    """Edge and corners `[T, 2]` of a slide's tiles in pixels; an edge of 0 where they cannot be known, counted in `drawn`."""
    nowhere = 0.0, np.zeros((0, 2))
    if slide.coords is None:
        drawn.placeless += 1
        return nowhere
    corner_T2, scale = slide.coords.astype(np.float64), 1.0
    if slide.coords.dtype.kind == "f":  # whole numbers are pixels; STAMP's are micrometres
        if not microns_per_pixel:
            drawn.micrometres += 1
            return nowhere
        scale = 1.0 / microns_per_pixel
    edge = slide.patch or usual_step(corner_T2)
    if not edge:
        drawn.sizeless += 1
        return nowhere
    drawn.inferred += slide.patch is None
    return edge * scale, corner_T2 * scale


def usual_step(corner_T2: np.ndarray) -> float:
    """The most frequent distance between neighbours of one row or one column, the smallest of several; 0 without any.

    Not the smallest distance: pieces of tissue may be laid out on grids of their own, which are off by any number of pixels.
    """
    steps = []
    for along, across in ((0, 1), (1, 0)):
        order = np.lexsort((corner_T2[:, along], corner_T2[:, across]))
        step_T2 = np.diff(corner_T2[order], axis=0)
        steps.append(step_T2[(step_T2[:, across] == 0) & (step_T2[:, along] > 0), along])
    values, counts = np.unique(np.concatenate(steps), return_counts=True)
    return float(values[counts.argmax()]) if len(values) else 0.0


def _collection(corner_T2: np.ndarray, edge: float, weight_T: np.ndarray, percentile_T: np.ndarray) -> dict[str, Any]:
    """A GeoJSON FeatureCollection of detections, coloured by percentile."""
    colour_T3 = (matplotlib.colormaps["coolwarm"](percentile_T / 100)[:, :3] * 255).round().astype(int)
    features = []
    for (x, y), weight, percentile, colour in zip(
        corner_T2.tolist(), weight_T.tolist(), percentile_T.tolist(), colour_T3.tolist(), strict=True
    ):
        ring = [(x, y), (x + edge, y), (x + edge, y + edge), (x, y + edge), (x, y)]
        features.append(
            {
                "type": "Feature",
                "geometry": {"type": "Polygon", "coordinates": [[[_short(a), _short(b)] for a, b in ring]]},
                "properties": {
                    "objectType": "detection",
                    "color": colour,
                    "measurements": {"attention": float(f"{weight:.7g}"), "percentile": round(percentile, 2)},
                },
            }
        )
    return {"type": "FeatureCollection", "features": features}


def _short(value: float) -> float:
    """Pixels without digits that say nothing."""
    return int(value) if value == int(value) else round(value, 2)
