"""Where a model looks: GeoJSON files of a patient's slides, against the gated attention computed by hand."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pytest
from oncofed.client.attention import Drawn, choose_patients, usual_step, write_attention
from oncofed.client.data.slide_files import read_slide
from oncofed.client.predict import Prediction, predict
from oncofed.common.errors import Refusal
from oncofed.common.saved import SavedModel
from oncofed.deploy.cli import cli
from oncofed.server.checkpoint import load_arrays, save_arrays
from toy_slides import trident
from toy_studies import copy_sites, model_of, train
from typer.testing import CliRunner

WIDTH, EDGE = 8, 512.0
"""Numbers of a tile; a tile's edge as `toy_slides.trident` says it."""


def write_slides(folder: Path, patients: list[str]) -> None:
    """One to three slides of some tiles on a grid for four patients of five; one slide in nine is empty."""
    rng = np.random.default_rng(0)
    for i, patient in enumerate(patients):
        for letter in "abc"[: i % 3 + 1] if i % 5 else ():
            tiles = 0 if letter != "a" and i % 9 == 4 else int(rng.integers(3, 9))
            place = rng.permutation(20)[:tiles]
            corners = (np.column_stack([place % 5, place // 5]) * int(EDGE) + 17).astype(np.int64)
            trident(folder, rng.normal(size=(tiles, WIDTH)).astype(np.float32), corners, f"{patient}-{letter}")


@pytest.fixture(scope="module")
def bags(tmp_path_factory: pytest.TempPathFactory, consortium: Path) -> Path:
    """A study of tiles: in training three of a patient are seen, at Coimbra and Dublin there are none."""
    root = tmp_path_factory.mktemp("bags")
    for folder in sorted(copy_sites(root, consortium).glob("*/")):
        (folder / "pathology.parquet").unlink(missing_ok=True)
        if folder.name in ("aachen", "bergen"):
            write_slides(folder / "slides", pd.read_csv(folder / "clinical.csv")["patient"].tolist())
    train(root, model__name="path_gptomic", fusion__tiles=3, model__first_layer_scale=1.0)
    return root


@pytest.fixture
def prediction(bags: Path) -> Prediction:
    return predict(model_of(bags), bags / "sites" / "aachen")


@pytest.fixture
def slides_changed(bags: Path, tmp_path: Path) -> Callable[..., Prediction]:
    """A prediction for a copy of Aachen each of whose slides that `wanted` names went through `change`."""

    def make(change: Callable[[h5py.File], None], wanted: str = "*.h5") -> Prediction:
        folder = tmp_path / "changed"
        shutil.copytree(bags / "sites" / "aachen", folder, ignore=shutil.ignore_patterns(".oncofed"))
        for path in sorted((folder / "slides").glob(wanted)):
            with h5py.File(path, "a") as file:
                change(file)
        return predict(model_of(bags), folder)

    return make


def draw(prediction: Prediction, folder: Path, *, mpp: float = 0.0) -> tuple[Drawn, dict[str, list[dict[str, Any]]]]:
    """All patients with slides -> what was counted, and the features by slide."""
    rows = np.flatnonzero(prediction.cohort.slides != "")
    drawn = write_attention(prediction, rows, folder, mpp)
    assert not [p for p in folder.iterdir() if p.suffix != ".geojson"]
    return drawn, {p.stem: json.loads(p.read_text())["features"] for p in sorted(folder.iterdir())}


def weights_of(features: list[dict[str, Any]]) -> np.ndarray:
    return np.array([f["properties"]["measurements"]["attention"] for f in features])


def by_hand(model: SavedModel, tiles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ilse et al. 2018, eq. 9: weights `[T]` and latent `[Z]` of one patient's tiles, from the numbers in the file."""
    w = {k.removeprefix("branches.pathology."): v.astype(np.float64) for k, v in model.weights.items()}
    centred = tiles - tiles.mean(1, keepdims=True)
    x = centred / np.sqrt(centred.var(1, keepdims=True) + 1e-5) * w["norm.weight"] + w["norm.bias"]
    h = np.maximum(x @ w["embed.weight"].T + w["embed.bias"], 0)
    gate = 1 / (1 + np.exp(-(h @ w["gate.weight"].T + w["gate.bias"])))
    score = (np.tanh(h @ w["tanh.weight"].T + w["tanh.bias"]) * gate) @ w["score.weight"][0]
    a = np.exp(score) / np.exp(score).sum()
    return a, np.tanh(w["latent.weight"] @ (a @ h) + w["latent.bias"])


def test_weights_and_the_part_of_the_images_by_hand(bags: Path, prediction: Prediction, tmp_path: Path) -> None:
    _, files = draw(prediction, tmp_path)
    model, folder = SavedModel.read(model_of(bags)), bags / "sites" / "aachen" / "slides"
    checked = 0
    for row, patient in enumerate(prediction.cohort.patient):
        paths = [p for p in sorted(folder.glob(f"{patient}-*.h5")) if len(read_slide(p).features)]
        if len(paths) < 2:
            continue
        a, z = by_hand(model, np.concatenate([read_slide(p).features for p in paths]).astype(np.float64))
        ours = np.concatenate([weights_of(files[p.stem]) for p in paths])
        np.testing.assert_allclose(ours, a, rtol=1e-4, atol=1e-7)
        assert np.ptp(a) > 1e-3  # weights that are all alike would say nothing
        cancer, head = prediction.cohort.cancer[row], "head.risks.pathology."
        shared, own = model.weights[f"{head}shared"], model.weights[f"{head}own"][cancer]
        risk = z @ (shared + np.sqrt(model.study.model.cancer_head) * own)
        assert prediction.parts["pathology"][row] == pytest.approx(risk, rel=1e-4, abs=1e-6)
        checked += 1
    assert checked > 5


def test_weights_sum_to_one_over_a_patients_slides(prediction: Prediction, tmp_path: Path) -> None:
    drawn, files = draw(prediction, tmp_path)
    with_slides = prediction.cohort.patient[prediction.cohort.slides != ""]
    assert drawn == Drawn(patients=len(with_slides), slides=len(files))
    assert drawn.notes == []
    of_patient: dict[str, list[dict[str, Any]]] = {}
    for stem, features in files.items():
        of_patient.setdefault(stem[:-2], []).extend(features)
    assert set(of_patient) == set(with_slides)
    assert any(f"{p}-c" in files for p in with_slides)
    for features in of_patient.values():
        weight = weights_of(features)
        assert weight.sum() == pytest.approx(1.0, abs=1e-5)
        percentile = np.array([f["properties"]["measurements"]["percentile"] for f in features])
        assert (np.argsort(percentile) == np.argsort(weight)).all()
        np.testing.assert_allclose(np.sort(percentile), (np.arange(len(weight)) + 0.5) / len(weight) * 100, atol=0.006)


def test_squares_lie_where_the_tiles_do(bags: Path, prediction: Prediction, tmp_path: Path) -> None:
    _, files = draw(prediction, tmp_path)
    for stem, features in files.items():
        coords = read_slide(bags / "sites" / "aachen" / "slides" / f"{stem}.h5").coords
        assert coords is not None
        assert len(coords) == len(features)
        for corner, feature in zip(coords.tolist(), features, strict=True):
            (ring,) = feature["geometry"]["coordinates"]
            assert ring[0] == ring[-1] == corner
            assert len({tuple(point) for point in ring}) == 4
            low, high = np.min(ring, axis=0), np.max(ring, axis=0)
            assert (low == corner).all()
            assert (high - low == EDGE).all()


def test_what_qupath_reads(prediction: Prediction, tmp_path: Path) -> None:
    """QuPathTypeAdapters.java: a type, a colour of three whole numbers, and measurements by name."""
    draw(prediction, tmp_path)
    collection = json.loads(next(tmp_path.iterdir()).read_text())
    assert collection["type"] == "FeatureCollection"
    for feature in collection["features"]:
        assert feature["type"] == "Feature"
        assert feature["geometry"]["type"] == "Polygon"
        assert feature["properties"].keys() == {"objectType", "color", "measurements"}
        assert feature["properties"]["objectType"] == "detection"
        colour = feature["properties"]["color"]
        assert [type(c) for c in colour] == [int] * 3
        assert all(0 <= c <= 255 for c in colour)
        assert all(isinstance(v, float) for v in feature["properties"]["measurements"].values())


def test_an_old_file_is_replaced(prediction: Prediction, tmp_path: Path) -> None:
    _, files = draw(prediction, tmp_path)
    first = next(iter(files))
    (tmp_path / f"{first}.geojson").write_text("old")
    assert draw(prediction, tmp_path)[1] == files


# -- coordinates that are missing, or say less ------------------------------------------------------------------------------


def test_slides_without_coords_are_skipped_and_counted(
    bags: Path, slides_changed: Callable[..., Prediction], tmp_path: Path
) -> None:
    whole = predict(model_of(bags), bags / "sites" / "aachen")
    before = draw(whole, tmp_path / "a")[1]
    changed = slides_changed(lambda file: file.pop("coords"), "*-a.h5")
    drawn, files = draw(changed, tmp_path / "b")
    assert set(files) == {stem for stem in before if not stem.endswith("-a")}
    for stem, features in files.items():  # those that are left keep their share of the patient's whole
        np.testing.assert_array_equal(weights_of(features), weights_of(before[stem]))
    without = len(before) - len(files)
    assert drawn.notes == [f"{without} slides hold no coords, so nobody can say where their tiles lie: skipped"]
    assert drawn.patients == len({stem[:-2] for stem in files})


def test_the_size_of_a_tile_is_inferred_and_said(
    bags: Path, prediction: Prediction, slides_changed: Callable[..., Prediction], tmp_path: Path
) -> None:
    _, before = draw(prediction, tmp_path / "a")

    def forget(file: h5py.File) -> None:
        del file["coords"].attrs["patch_size_level0"]

    drawn, files = draw(slides_changed(forget), tmp_path / "b")
    # tiles that happen to have no neighbour in their row or column tell another step, or none
    same = sum(files.get(stem) == features for stem, features in before.items())
    assert same > len(before) / 2
    assert drawn.notes[-1].startswith(f"{len(files)} slides do not say how large a tile is: taken as the usual step")
    assert drawn.sizeless == len(before) - len(files)


def test_the_usual_step_on_grids_that_do_not_meet() -> None:
    grid = np.array([[x, y] for x in range(0, 5 * 256, 256) for y in range(0, 4 * 256, 256)], dtype=float)
    assert usual_step(grid) == 256
    for away in ([3 * 2048 + 7, 5], [1100, 0]):  # another piece of tissue, off by some pixels, or in the same rows
        assert usual_step(np.concatenate([grid, grid + np.array(away)])) == 256
    assert usual_step(grid[np.random.default_rng(0).permutation(len(grid))[:12]]) == 256
    assert usual_step(np.array([[0.0, 0.0], [256.0, 512.0]])) == 0  # no two share a row or a column
    assert usual_step(grid[:1]) == usual_step(grid[:0]) == 0


def test_micrometres_want_the_scanners_resolution(
    slides_changed: Callable[..., Prediction], prediction: Prediction, tmp_path: Path
) -> None:
    _, before = draw(prediction, tmp_path / "a")

    def as_stamp(file: h5py.File) -> None:
        corners = file["coords"][()].astype(np.float32) / 4
        del file["coords"]
        file["coords"] = corners
        file.attrs.update({"unit": "um", "tile_size_um": EDGE / 4, "tile_size_px": 224})

    changed = slides_changed(as_stamp)
    drawn, files = draw(changed, tmp_path / "b")
    assert files == {}
    assert drawn.patients == 0
    assert drawn.notes == [
        f"{len(before)} slides hold coords in micrometres: skipped; name the scanner's --microns-per-pixel"
    ]
    assert draw(changed, tmp_path / "c", mpp=0.25)[1] == before


# -- whose slides ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trained", [0.0, 100.0])
def test_the_highest_percentiles_come_first(bags: Path, tmp_path: Path, trained: float) -> None:
    """Of COADREAD too few trained, or only patients of the highest risks: its patients come last, whatever their risks."""
    arrays, about = load_arrays(model_of(bags))
    last = about["cancers"].index("COADREAD")
    arrays["explanation/risk_counts"][last] = 0.0
    arrays["explanation/risk_counts"][last, -1] = trained
    save_arrays(tmp_path / "model.safetensors", arrays, about)
    prediction = predict(tmp_path / "model.safetensors", bags / "sites" / "aachen")
    rows = choose_patients(prediction, [])
    with_slides = prediction.cohort.slides != ""
    assert len(rows) == 20 < with_slides.sum()
    assert with_slides[rows].all()
    first = int((with_slides & (prediction.cohort.cancer != last)).sum())
    assert 0 < first < 20
    assert (prediction.cohort.cancer[rows[:first]] != last).all()
    assert (np.diff(prediction.percentile[rows[:first]]) <= 0).all()
    assert (np.diff(prediction.score[rows[first:]]) <= 0).all()
    assert prediction.score[rows[first:]].max() > prediction.score[rows[:first]].min()


def test_named_patients(prediction: Prediction) -> None:
    names = prediction.cohort.patient[prediction.cohort.slides != ""][[3, 1]].tolist()
    assert set(prediction.cohort.patient[choose_patients(prediction, [*names, names[0]])]) == set(names)
    without = prediction.cohort.patient[prediction.cohort.slides == ""][0]
    with pytest.raises(ValueError, match="2 of 3 names are of no patient with slides here") as stop:
        choose_patients(prediction, [names[0], without, "nobody"])
    assert without not in str(stop.value)


def test_terminal_counts_and_names_nobody(bags: Path, prediction: Prediction, tmp_path: Path) -> None:
    site, out, folder = bags / "sites" / "aachen", tmp_path / "risks.csv", tmp_path / "attention"
    name = prediction.cohort.patient[prediction.cohort.slides != ""][0]
    call = ["site", "predict", str(model_of(bags)), str(site), "--out", str(out)]
    answer = CliRunner().invoke(cli, [*call, "--attention", str(folder), "--patient", name])
    assert answer.exit_code == 0, answer.output
    slides = len(list((site / "slides").glob(f"{name}-*.h5")))
    assert f"{slides} slides of 1 patients" in answer.output
    assert "AAC-" not in answer.output
    assert {p.stem[:-2] for p in folder.iterdir()} == {name}


def test_mistakes_say_what_to_do(bags: Path, consortium: Path, tmp_path: Path) -> None:
    def call(root: Path, site: str, *more: str) -> None:
        folder = str(root / "sites" / site)
        answer = CliRunner().invoke(
            cli, ["site", "predict", str(model_of(root)), folder, "--out", str(tmp_path / "r.csv"), *more]
        )
        assert answer.exception is not None
        raise answer.exception

    with pytest.raises(ValueError, match="name a folder for them with --attention"):
        call(bags, "aachen", "--patient", "AAC-0001")
    with pytest.raises(ValueError, match="no patient here has slides; leave it out"):
        call(bags, "coimbra", "--attention", str(tmp_path / "a"))
    copy_sites(tmp_path, consortium)
    train(tmp_path, model__name="path_gptomic", training__rounds=1)
    with pytest.raises(ValueError, match=r"this one reads no tiles \(images: vector of named features, width 16"):
        call(tmp_path, "aachen", "--attention", str(tmp_path / "a"))
    assert not (tmp_path / "a").exists()
    assert not (tmp_path / "r.csv").exists()


def test_tiles_of_another_encoder_are_refused(slides_changed: Callable[..., Prediction]) -> None:
    with pytest.raises(
        Refusal, match=r"its images are bag of virchow, width 8, the model reads bag of uni-v1, width 8; encode"
    ) as stop:
        slides_changed(lambda file: file["features"].attrs.update({"encoder": "virchow"}))
    assert "AAC-" not in str(stop.value)
