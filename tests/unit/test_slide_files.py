"""One slide's file: every producer's layout is read, everything else is refused, and a bag is a subset in order."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oncofed.client.data.slide_files import SlideHeader, encoder_name, read_header, read_slide
from oncofed.client.data.slides import load_bag
from oncofed.common.errors import Refusal
from toy_slides import (
    CORNERS,
    TILES,
    VECTOR,
    clam_h5,
    clam_h5_with_attributes,
    pt,
    stamp,
    stamp_slide,
    trident,
    write_h5,
    write_text,
)

WRITERS: dict[str, tuple[Callable[[Path], Path], str, float | None, bool]] = {
    "CLAM h5": (clam_h5, "", None, True),
    "CLAM h5 attributes": (clam_h5_with_attributes, "", 256.0, True),
    "CLAM pt": (lambda f: pt(f, torch.from_numpy(TILES)), "", None, False),
    "dict pt": (lambda f: pt(f, {"feats": torch.from_numpy(TILES), "label": torch.ones(1)}), "", None, False),
    "bfloat16 pt": (lambda f: pt(f, torch.from_numpy(TILES).bfloat16()), "", None, False),
    "TRIDENT": (lambda f: trident(f / "features_uni_v1", TILES, CORNERS), "uni-v1", 512.0, True),
    "TRIDENT slide": (
        lambda f: trident(f / "slide_features_titan", VECTOR, CORNERS, says=False),
        "titan",
        512.0,
        True,
    ),
    "UNI2-h": (lambda f: write_h5(f / "P1-a.h5", TILES[None], CORNERS[None]), "", None, True),
    "STAMP": (stamp, "uni2-h", 256.0, True),
    "STAMP slide": (stamp_slide, "titan", None, False),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_producers_file_is_read(tmp_path: Path, name: str) -> None:
    write, encoder, patch, placed = WRITERS[name]
    path = write(tmp_path)
    header, slide = read_header(path), read_slide(path)
    want = VECTOR if "slide" in name else TILES
    assert (header.kind, header.encoder) == ("vector" if "slide" in name else "bag", encoder)
    assert (header.tiles, header.width) == (1 if "slide" in name else 5, 8)
    assert slide.features.dtype == np.float32
    np.testing.assert_allclose(slide.features, want, atol=0.02 if name in ("STAMP", "bfloat16 pt") else 0)
    assert slide.patch == patch
    assert (slide.coords is not None) == placed
    if slide.coords is not None:
        np.testing.assert_array_equal(slide.coords * (4 if name == "STAMP" else 1), CORNERS)


def test_empty_slides_and_squeezed_coordinates(tmp_path: Path) -> None:
    """TRIDENT: [0, D] for a slide without tissue, (0,) for its slide vector, coordinates (2,) for one tile."""
    bag = trident(tmp_path, np.empty((0, 8), np.float32), np.empty((0, 2), np.int64), "bag")
    vector = trident(tmp_path, np.empty((0,), np.float32), np.empty((0, 2), np.int64), "vector")
    one = trident(tmp_path, VECTOR, CORNERS[0], "one")
    assert (read_header(bag).tiles, read_header(bag).width) == (0, 8)
    assert (read_header(vector).tiles, read_header(vector).width) == (0, 0)
    assert load_bag([bag, vector], 0, None).shape == (0, 8)
    assert load_bag([vector], 3, None).shape == (0, 0)
    np.testing.assert_array_equal(read_slide(one).coords, CORNERS[:1])  # type: ignore[arg-type]


def test_a_header_reads_no_features(tmp_path: Path) -> None:
    path, numbers = tmp_path / "P1-a.h5", tmp_path / "numbers"
    with h5py.File(path, "w") as file:
        outside = file.create_dataset("features", (5, 8), np.float32, external=[(numbers, 0, h5py.h5f.UNLIMITED)])
        outside[:] = TILES
    np.testing.assert_array_equal(read_slide(path).features, TILES)
    numbers.unlink()
    assert read_header(path) == SlideHeader("bag", 5, 8, "")
    with pytest.raises(Refusal, match="cannot be read"):
        read_slide(path)


class Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


@pytest.mark.parametrize("held", [lambda b: b, lambda b: {"features": torch.ones(2, 3), "extra": b}])
def test_a_pickle_in_disguise_is_refused_and_does_not_run(tmp_path: Path, held: Callable[[Bomb], object]) -> None:
    path = pt(tmp_path, held(Bomb(tmp_path / "ran")))
    for read in (read_header, read_slide):
        with pytest.raises(Refusal, match=r"never unpickled; save the features as \.h5"):
            read(path)
    assert not (tmp_path / "ran").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "ran").exists()  # it would have


BROKEN: dict[str, tuple[Callable[[Path], Path], str]] = {
    "nan": (lambda f: write_h5(f / "P1.h5", np.where(TILES[0, 0] == TILES, np.nan, TILES)), "not finite; encode"),
    "overflow": (lambda f: write_h5(f / "P1.h5", np.full((2, 3), 1e300)), "not finite; encode"),
    "inf in pt": (lambda f: pt(f, torch.full((2, 3), torch.inf)), "not finite; encode"),
    "patches only": (
        lambda f: write_h5(f / "P1.h5", CORNERS, key="coords"),
        "no features, feats, embeddings.*of patches",
    ),
    "whole numbers": (lambda f: write_h5(f / "P1.h5", CORNERS), "type int64, wanted floating point"),
    "two slides": (lambda f: write_h5(f / "P1.h5", np.stack([TILES, TILES])), "neither .tiles, width. nor .width."),
    "no width": (lambda f: write_h5(f / "P1.h5", np.ones((5, 0))), "neither .tiles, width. nor .width."),
    "coords": (lambda f: write_h5(f / "P1.h5", TILES, CORNERS[:4]), "coords that do not match.*one x, y a tile"),
    "three coords": (lambda f: write_h5(f / "P1.h5", TILES, np.ones((5, 3))), "coords that do not match"),
    "text": (lambda f: write_text(f / "P1.h5"), "cannot be read .OSError.; copy or encode"),
    "text as pt": (lambda f: write_text(f / "P1.pt"), "never unpickled; save"),
    "gone": (lambda f: f / "P1.h5", "cannot be read .FileNotFoundError."),
    "pickle": (lambda f: write_text(f / "P1.pkl"), r"\(\.pkl\).*may hold pickled objects.*save the features as \.h5"),
    "npy": (lambda f: write_text(f / "P1.npy"), "may hold pickled objects"),
    "unknown": (lambda f: write_text(f / "slide.P1"), r"\(unknown\): not read: wanted \.h5 or \.pt"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_refusal_says_what_is_wrong_and_only_the_log_says_where(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    write, message = BROKEN[name]
    path = write(tmp_path)
    with caplog.at_level(logging.WARNING), pytest.raises(Refusal, match=message) as refusal:
        read_slide(path)
    assert "P1" not in str(refusal.value)  # a refusal may leave the hospital, and files are named after patients
    assert str(tmp_path) not in str(refusal.value)
    assert str(path) in caplog.text


def test_one_spelling_of_an_encoder() -> None:
    names = ["uni_v2", "UNI2", " uni v2 ", "MahmoodLab/UNI2-h", "None", "UNI", "Virchow_2"]
    assert [encoder_name(n) for n in names] == ["uni2-h"] * 4 + ["", "uni-v1", "virchow-2"]


def numbered(path: Path, first: int, tiles: int) -> Path:
    """A bag whose tiles carry their place, first, first + 1, ... in all of their 3 numbers."""
    return write_h5(path, np.repeat(np.arange(first, first + tiles, dtype=np.float32), 3).reshape(tiles, 3))


@given(
    sizes=st.lists(st.integers(0, 6), min_size=1, max_size=4),
    most=st.integers(0, 12),
    seed=st.none() | st.integers(0, 9),
)
def test_a_bag_is_whole_or_a_subset_in_order(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], most: int, seed: int | None
) -> None:
    folder, starts = tmp_path_factory.mktemp("bag"), np.cumsum([0, *sizes])
    paths = [numbered(folder / f"{i}.h5", int(starts[i]), n) for i, n in enumerate(sizes)]

    def load() -> list[float]:
        bag = load_bag(paths, most, None if seed is None else np.random.default_rng(seed))
        assert bag.dtype == np.float32
        assert bag.shape[1] == 3
        return list(bag[:, 0])

    got, total = load(), sum(sizes)
    assert len(got) == (min(most, total) if most else total)
    assert got == sorted(set(got))
    assert set(got) <= set(range(total))
    assert got == load()
    if seed is None and len(got) > 1:
        gaps = np.diff(got)
        assert gaps.max() - gaps.min() <= 1
        assert got[0] <= total / len(got)
        assert got[-1] >= total - total / len(got)


def test_a_random_subset_reaches_every_tile(tmp_path: Path) -> None:
    path, rng = numbered(tmp_path / "a.h5", 0, 10), np.random.default_rng(0)
    drawn = [tuple(load_bag([path], 3, rng)[:, 0]) for _ in range(60)]
    assert {tile for bag in drawn for tile in bag} == set(range(10))
    assert len(set(drawn)) > 20


def test_bags_of_several_widths_are_refused(tmp_path: Path) -> None:
    paths = [write_h5(tmp_path / "a.h5", np.ones((2, 3))), write_h5(tmp_path / "b.h5", np.ones((2, 4)))]
    with pytest.raises(Refusal, match=r"widths \[3, 4\]"):
        load_bag(paths, 0, None)
