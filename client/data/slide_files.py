"""Slide feature files as CLAM, TRIDENT, STAMP and the UNI2-h release write them: one file a slide.

T tiles, D numbers a tile. A slide's file is mostly named after its patient and a refusal may leave the hospital: the
refusal says what is wrong, the site's own log says in which file.
"""

from __future__ import annotations

import contextlib
import logging
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
from oncofed.common.errors import Refusal

log = logging.getLogger("oncofed.client")

ENDINGS = (".h5", ".pt")
PICKLES = (".pkl", ".pickle", ".npy", ".npz")
"""Endings of files that hold, or may hold, pickled objects: reading one can run code, so none is read."""

KEYS = ("features", "feats", "embeddings")
CONVERT = "save the features as .h5 with a dataset `features`, or one plain tensor as .pt"


@dataclass(frozen=True)
class Slide:
    """One slide: `features` [T, D] of its tiles or [D] of the whole, float32; `coords` [N, 2] of its tiles' corners.

    `coords` are in level-0 pixels, from STAMP in micrometres; `patch` is a tile's edge in the same unit.
    """

    features: np.ndarray
    coords: np.ndarray | None
    patch: float | None


@dataclass(frozen=True)
class SlideHeader:
    """What a file says before its numbers are read; a vector counts as one tile, `encoder` is empty where unknown.

    TRIDENT writes a slide without tissue as [0, D] or as (0,): then `tiles` is 0, in the second case `width` too.
    """

    kind: Literal["vector", "bag"]
    tiles: int
    width: int
    encoder: str


SAME_ENCODER = {
    "uni": "uni-v1",
    "uni2": "uni2-h",
    "uni-v2": "uni2-h",
    "conch": "conch-v1",
    "conch-v15": "conch-v1.5",
    "conch1.5": "conch-v1.5",
    "conch1-5": "conch-v1.5",
}
"""Names that TRIDENT, STAMP and the encoders' own releases use for one and the same encoder."""


def encoder_name(text: str) -> str:
    """One spelling of an encoder's name, safe to leave the hospital: `uni_v2`, STAMP's `uni2` and `UNI2-h` are `uni2-h`."""
    name = re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-").removeprefix("mahmoodlab-")[:40]
    return "" if name == "none" else SAME_ENCODER.get(name, name)  # TRIDENT writes None as text


def read_header(path: Path) -> SlideHeader:
    """Kind, size and encoder of a slide's file; of an .h5 file only shapes and attributes are read."""
    with _open(path, lazy=True) as stored:
        return stored.header


def read_slide(path: Path) -> Slide:
    """All of a slide's file; raises `Refusal` on one that is broken, unsafe, of another layout, or not finite."""
    with _open(path) as stored:
        header = stored.header
        shape = (header.tiles, header.width) if header.kind == "bag" else (header.width,)
        with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite, which is refused below
            features = np.asarray(stored.features[()], dtype=np.float32).reshape(shape)
        coords = None if stored.coords is None else np.asarray(stored.coords[()])
    bad = features.size - int(np.isfinite(features).sum())
    if bad:
        raise refuse(path, "values that are not finite", "encode the slide again or leave it out", seen=f"{bad} values")
    if coords is not None:
        # TRIDENT squeezes: the coordinates of a slide with one tile may lie there as (2,)
        coords = coords.reshape(-1, 2) if coords.size == 0 or coords.shape[-1] == 2 else coords
        if coords.ndim != 2 or coords.shape[1] != 2 or (header.kind == "bag" and len(coords) != header.tiles):
            seen = f"coords {list(coords.shape)}, features {list(shape)}"
            raise refuse(path, "coords that do not match the features", "write one x, y a tile", seen=seen)
    return Slide(features, coords, stored.patch)


def refuse(path: Path, problem: str, remedy: str, seen: str = "") -> Refusal:
    """A refusal of a slide's file that does not name the file, which goes to the site's log with what was `seen`."""
    log.warning("%s: %s%s; %s", path, problem, f" ({seen})" if seen else "", remedy)
    ending = (
        path.suffix.lower() if path.suffix.lower() in (*ENDINGS, *PICKLES) else "unknown"
    )  # else it may be a name's
    return Refusal(f"a slide's file ({ending}): {problem}; {remedy} (the site's log names the file)")


@dataclass(frozen=True)
class _Stored:
    """An open file; its arrays are not read yet."""

    header: SlideHeader
    features: Any
    coords: Any
    patch: float | None


@contextlib.contextmanager
def _open(path: Path, lazy: bool = False) -> Iterator[_Stored]:
    """Open by ending; what goes wrong in opening or in reading from it becomes a `Refusal`."""
    ending = path.suffix.lower()
    if ending not in ENDINGS:
        problem = "it may hold pickled objects, which can run code" if ending in PICKLES else "wanted .h5 or .pt"
        raise refuse(path, f"not read: {problem}", CONVERT)
    try:
        if ending == ".h5":
            with h5py.File(path, "r") as file:
                yield _stored(path, file, file.attrs)
        else:
            yield _stored(path, _read_tensors(path, lazy), {})
    except Refusal:
        raise
    except pickle.UnpicklingError:
        raise refuse(path, "holds other objects than tensors, and those are never unpickled", CONVERT) from None
    except Exception as error:  # h5py and torch raise what they like on a broken file
        raise refuse(path, f"cannot be read ({type(error).__name__})", "copy or encode it again") from None


def _read_tensors(path: Path, lazy: bool) -> dict[str, Any]:
    """A bare tensor or the tensors of a dict, as arrays; if `lazy`, they are read only when used."""
    import torch  # slow to import and needed for this format only

    mapped = lazy and zipfile.is_zipfile(path)  # the format before PyTorch 1.6 cannot be mapped
    held = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    held = held if isinstance(held, Mapping) else {"features": held}
    tensors = {key: value.detach() for key, value in held.items() if isinstance(value, torch.Tensor)}
    # NumPy has no bfloat16
    return {key: (t.float() if t.dtype == torch.bfloat16 else t).numpy() for key, t in tensors.items()}


def _stored(path: Path, file: Mapping[str, Any], attrs: Mapping[str, Any]) -> _Stored:
    arrays = {key: file[key] for key in (*KEYS, "coords") if isinstance(file.get(key), h5py.Dataset | np.ndarray)}
    features = next((arrays[key] for key in KEYS if key in arrays), None)
    if features is None:
        remedy = "let `slides` in site.toml name the folder of features, not of patches"
        raise refuse(path, f"no {', '.join(KEYS)} in it", remedy, seen=f"{len(file)} other entries")
    if features.dtype.kind != "f":
        raise refuse(path, f"features of type {features.dtype}, wanted floating point", CONVERT)
    coords = arrays.get("coords")
    own, of_coords = getattr(features, "attrs", {}), getattr(coords, "attrs", {})
    said = (own.get("encoder"), attrs.get("encoder"), attrs.get("extractor"), _encoder_of_folder(path.parent.name))
    encoder = next((name for text in said if (name := encoder_name(_text(text)))), "")
    whole = _text(attrs.get("feat_type")) in ("slide", "patient")
    return _Stored(_header(path, tuple(features.shape), encoder, whole), features, coords, _patch(attrs, of_coords))


def _header(path: Path, shape: tuple[int, ...], encoder: str, whole: bool) -> SlideHeader:
    if len(shape) == 3 and shape[0] == 1:  # the UNI2-h release keeps the axis of a batch of one slide
        shape = shape[1:]
    if whole and len(shape) == 2 and shape[0] == 1:
        shape = shape[1:]
    if len(shape) == 1:
        return SlideHeader("vector", min(shape[0], 1), shape[0], encoder)
    if len(shape) != 2 or (shape[0] and not shape[1]):
        raise refuse(path, "features that are neither [tiles, width] nor [width]", CONVERT, seen=f"shape {list(shape)}")
    return SlideHeader("bag", shape[0], shape[1], encoder)


def _encoder_of_folder(name: str) -> str:
    """TRIDENT's `features_uni_v2` and `slide_features_titan`."""
    match = re.fullmatch(r"(?:slide_)?features_(.+)", name)
    return match[1] if match else ""


def _patch(of_file: Mapping[str, Any], of_coords: Mapping[str, Any]) -> float | None:
    """A tile's edge in the unit of `coords`, None where the file does not say it."""
    edge = of_coords.get("patch_size_level0")  # TRIDENT; its patch_size is in pixels of another magnification
    if edge is None and _text(of_file.get("unit")) == "um":
        edge = of_file.get("tile_size_um", of_file.get("tile_size"))
    if edge is None and of_coords.get("patch_level") == 0:  # CLAM, whose patch_size is in pixels of patch_level
        edge = of_coords.get("patch_size")
    try:
        return None if edge is None else float(edge)
    except (TypeError, ValueError):  # TRIDENT writes None as text
        return None


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else "" if value is None else str(value)
