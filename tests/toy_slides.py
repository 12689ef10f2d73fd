"""Toy slide files in the layouts of the programs that write them."""

from __future__ import annotations

import pickle
from pathlib import Path

import h5py
import numpy as np
import torch

RNG = np.random.default_rng(0)
TILES = RNG.normal(size=(5, 8)).astype(np.float32)
VECTOR = TILES[0]
CORNERS = (np.arange(10).reshape(5, 2) * 512).astype(np.int64)
OF_COORDS = {"patch_size": 256, "patch_size_level0": 512, "level0_magnification": 40, "target_magnification": 20}


def write_h5(path: Path, features: np.ndarray, coords: np.ndarray | None = None, key: str = "features") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file[key] = features
        if coords is not None:
            file["coords"] = coords
    return path


def clam_h5(folder: Path, tiles: np.ndarray = TILES) -> Path:
    """utils/file_utils.py, save_hdf5: chunks of 32 rows that can grow, int32 coordinates without attributes."""
    path = folder / "h5_files" / "P1-a.h5"
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for key, value in (("features", tiles), ("coords", CORNERS.astype(np.int32))):
            file.create_dataset(key, data=value, maxshape=(None, value.shape[1]), chunks=(32, value.shape[1]))
    return path


def clam_h5_with_attributes(folder: Path) -> Path:
    path = clam_h5(folder)
    with h5py.File(path, "a") as file:
        file["coords"].attrs.update({"patch_size": 256, "patch_level": 0})
    return path


def pt(folder: Path, held: object, name: str = "P1-a.pt") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(held, folder / name)
    return folder / name


def trident(folder: Path, features: np.ndarray, coords: np.ndarray, name: str = "P1-a", says: bool = True) -> Path:
    """trident/IO.py, save_h5: attributes beside each array; only patch features name their encoder."""
    path = write_h5(folder / f"{name}.h5", features, coords)
    with h5py.File(path, "a") as file:
        file["features"].attrs.update({"name": name, "savetodir": "/x"} | ({"encoder": "uni_v1"} if says else {}))
        file["coords"].attrs.update(OF_COORDS)
    return path


def stamp(folder: Path) -> Path:
    """stamp/preprocessing/__init__.py: half precision, micrometres, attributes of the file."""
    path = write_h5(folder / "P1-a.h5", TILES.astype(np.float16), CORNERS.astype(np.float32) / 4, key="feats")
    with h5py.File(path, "a") as file:
        file.attrs.update({"extractor": "uni2", "unit": "um", "tile_size_um": 256.0, "tile_size_px": 224})
        file.attrs["feat_type"] = "tile"
    return path


def stamp_slide(folder: Path) -> Path:
    path = write_h5(folder / "P1-a.h5", VECTOR[None], key="feats")
    with h5py.File(path, "a") as file:
        file.attrs.update({"encoder": "titan", "precision": "torch.float32", "feat_type": "slide"})
    return path


def write_text(path: Path) -> Path:
    path.write_bytes(pickle.dumps("no features") if path.suffix == ".pkl" else b"no features")
    return path
