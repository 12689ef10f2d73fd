"""Stage 1 of Path-GPTOmic: mixing, whether MLP-A learns, its file, and both sources of `oncofed smooth`."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch
from oncofed.client.data.site import SiteDescription, write_description
from oncofed.client.embeddings import Embedder
from oncofed.common.models.scgpt import SMOOTHING, Checkpoint, fingerprint, load_scgpt
from oncofed.common.models.smoothing import (
    Mixture,
    Origin,
    Smoother,
    Trained,
    held_out_error,
    load_smoother,
    mix,
    save_smoother,
    train_smoother,
)
from oncofed.common.panel import GenePanel
from oncofed.deploy import smooth as smoothing_command
from oncofed.deploy.smooth import smooth
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from toy_scgpt import WIDTH, write_toy_checkpoint

GENES = tuple(f"GENE{i}" for i in range(60))
TYPES = 3


def cells(n: int, seed: int) -> tuple[np.ndarray, list[str]]:
    """Counts of cells of three types, each with 20 genes of its own."""
    rng = np.random.default_rng(seed)
    kind = rng.integers(TYPES, size=n)
    own = np.repeat(np.eye(TYPES), 20, axis=1)
    return rng.poisson(0.2 + 5.0 * own[kind]).astype(np.float64), [f"type {k}" for k in kind]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    write_toy_checkpoint(path, GENES)
    return path


@pytest.fixture
def checkpoint(folder: Path) -> Checkpoint:
    return load_scgpt(folder)


@pytest.fixture(scope="module")
def trained(folder: Path) -> Trained:
    return train_smoother(load_scgpt(folder), *cells(300, seed=0), GENES, steps=250)


def test_the_papers_mixture_is_uniform_between_two_samples() -> None:
    rows, shares = Mixture().draw(np.random.default_rng(0), 7, 20000)
    assert rows.shape == shares.shape == (20000, 2)
    assert set(rows.ravel().tolist()) == set(range(7))
    np.testing.assert_allclose(shares.sum(1), 1.0)
    quantiles = np.quantile(shares[:, 0], np.linspace(0, 1, 11))
    np.testing.assert_allclose(quantiles, np.linspace(0, 1, 11), atol=0.02)


def test_many_samples_mix_closer_to_their_mean() -> None:
    rng = np.random.default_rng(0)
    spread = [Mixture(k).draw(rng, 9, 4000)[1][:, 0].std() for k in (2, 10, 100)]
    np.testing.assert_allclose(spread, [(1 / k * (1 - 1 / k) / (k + 1)) ** 0.5 for k in (2, 10, 100)], rtol=0.1)
    assert Mixture(10, 100.0).draw(rng, 9, 4000)[1].std() < 0.02
    for wrong in ((1, 1.0), (2, 0.0)):
        with pytest.raises(ValueError, match="mix at least 2 samples, with a concentration above 0"):
            Mixture(*wrong)


def test_mix_is_the_weighted_mean() -> None:
    a, b, share = np.array([1.0, 0.0, 5.0]), np.array([3.0, 2.0, 5.0]), 0.25
    np.testing.assert_allclose(mix(np.array([[a, b]]), np.array([[share, 1 - share]])), [share * a + (1 - share) * b])


class Recorder(nn.Module):
    """In the place of scGPT: remembers the values it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(1))
        self.values: list[torch.Tensor] = []

    def forward(self, ids: torch.Tensor, values: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
        self.values.append(values)
        return torch.zeros(len(ids), WIDTH)


def test_samples_are_mixed_on_the_linear_scale_before_scgpt(checkpoint: Checkpoint) -> None:
    recorder = Recorder()
    x, genes = np.array([[100.0, 10.0], [1.0, 10.0]]), GENES[:2]
    train_smoother(replace(checkpoint, network=recorder), x, ["a", "b"], genes, steps=50)  # type: ignore[arg-type]
    values = torch.cat(recorder.values)
    assert values.shape == (1600, 3)
    first_is_higher = float((values[:, 1] > values[:, 2]).double().mean())
    # 100 s + (1 - s) > 10 for s > 1/11, in half of the pairs; on the logarithm it would be s > 1/2, and 0.5 in all
    assert abs(first_is_higher - (0.25 + 0.5 * 10 / 11)) < 0.04


def test_the_smoother_learns_mixtures_of_samples_it_has_not_seen(checkpoint: Checkpoint, trained: Trained) -> None:
    assert len(trained.curve) == 250
    assert np.mean(trained.curve[-30:]) < 0.7 * np.mean(trained.curve[:30])
    error, baseline = held_out_error(trained, checkpoint, *cells(80, seed=1), GENES)
    assert error < 0.7 * baseline
    assert 0.5 < baseline < 0.6  # two of three types, shares uniform: 5/9 by algebra for equal types

    x, labels = cells(300, seed=0)
    shuffled = np.random.default_rng(0).permutation(labels).tolist()
    nothing = train_smoother(checkpoint, x, shuffled, GENES, steps=100)
    error, baseline = held_out_error(nothing, checkpoint, *cells(80, seed=1), GENES)
    assert error > 0.95 * baseline


def test_only_the_smoother_trains_and_the_seed_decides(checkpoint: Checkpoint) -> None:
    before = {name: p.clone() for name, p in checkpoint.network.state_dict().items()}
    told: list[int] = []

    def train(seed: int) -> Trained:
        torch.manual_seed(len(told))  # a global state that must not matter
        return train_smoother(checkpoint, *cells(30, seed=0), GENES, steps=4, seed=seed, progress=told.append)

    runs = [train(0), train(0), train(1)]
    assert told == [0, 1, 2, 3] * 3
    assert runs[0].curve == runs[1].curve != runs[2].curve
    first = runs[0].smoother.state_dict()
    assert all(torch.equal(p, runs[1].smoother.state_dict()[name]) for name, p in first.items())
    assert all(torch.equal(p, before[name]) for name, p in checkpoint.network.state_dict().items())
    assert [tuple(p.shape) for p in runs[0].smoother.parameters()] == [(128, WIDTH), (128,), *[(128, 128), (128,)] * 2]
    assert not any(p.requires_grad for p in runs[0].smoother.parameters())
    x = torch.randn(9, WIDTH)
    hidden = (x * WIDTH**0.5) @ first["layers.0.weight"].T + first["layers.0.bias"]
    hidden = hidden.relu() @ first["layers.2.weight"].T + first["layers.2.bias"]
    wanted = hidden.relu() @ first["layers.4.weight"].T + first["layers.4.bias"]
    torch.testing.assert_close(runs[0].smoother(x), wanted)


def test_samples_that_cannot_be_mixed_are_refused(checkpoint: Checkpoint, trained: Trained) -> None:
    x, labels = cells(30, seed=0)
    with pytest.raises(ValueError, match="mixture of labels needs two classes or more"):
        train_smoother(checkpoint, x, ["a"] * 30, GENES)
    with pytest.raises(ValueError, match=r"shape \(30, 60\), but 29 labels and 60 genes"):
        train_smoother(checkpoint, x, labels[1:], GENES)
    with pytest.raises(ValueError, match="mixed on a linear scale"):
        train_smoother(checkpoint, x - 1.0, labels, GENES)
    with pytest.raises(ValueError, match=r"held-out labels .'new'. are none of the classes"):
        held_out_error(trained, checkpoint, x, ["new", *labels[1:]], GENES)


# The file


def origin(folder: Path) -> Origin:
    panel = GenePanel(tuple(sorted(GENES))).hash
    return Origin(fingerprint(folder, smoothing=False), panel, "cells by type", ("a", "b"), 2)


def test_saved_and_loaded_is_the_same_to_the_bit(folder: Path, tmp_path: Path, trained: Trained) -> None:
    file = tmp_path / "deep" / SMOOTHING
    save_smoother(file, trained.smoother, origin(folder))
    loaded, about = load_smoother(file)
    assert about == origin(folder)
    assert loaded.widths == (WIDTH, 128, 128, 128)
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    x = torch.randn(50, WIDTH)
    assert torch.equal(loaded(x), trained.smoother(x))
    with safe_open(file, framework="numpy") as saved:
        assert all(key.startswith("layers.") for key in saved.keys())  # noqa: SIM118 - the classifier is dropped
    assert [f.name for f in file.parent.iterdir()] == [SMOOTHING]


def test_a_file_that_is_no_smoothing_is_refused(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / SMOOTHING
    odd = Smoother((WIDTH, 128))
    odd.widths = (WIDTH, 128, 128)  # a layer more than it has
    for write in (
        lambda: file.write_bytes(b"not safetensors"),
        lambda: save_file({"layers.0.weight": torch.zeros(3)}, file),
        lambda: save_file({"layers.0.weight": torch.zeros(3)}, file, {"about": "{}"}),
        lambda: save_smoother(file, odd, origin(folder)),
        lambda: file.unlink(),
    ):
        write()
        with pytest.raises(ValueError, match=r"not a smoothing that `oncofed smooth` has written .*write it again"):
            load_smoother(file)


def test_the_embedder_smooths_where_the_folder_holds_a_smoothing(tmp_path: Path, trained: Trained) -> None:
    write_toy_checkpoint(tmp_path, GENES)
    x, _ = cells(40, seed=3)
    x[7] = np.nan
    plain = Embedder.open(tmp_path, GENES, device="cpu")
    save_smoother(tmp_path / SMOOTHING, trained.smoother, origin(tmp_path))
    smoothed = Embedder.open(tmp_path, GENES[::-1], device="cpu")
    assert (plain.width, smoothed.width, smoothed.notes) == (WIDTH, 128, ())
    assert plain.fingerprint != smoothed.fingerprint == fingerprint(tmp_path)
    got = smoothed.embed(x[:, ::-1])
    assert np.flatnonzero(np.isnan(got).any(1)).tolist() == [7]
    wanted = trained.smoother(torch.from_numpy(plain.embed(x))).numpy()
    np.testing.assert_allclose(got, wanted, atol=1e-4)
    assert Embedder.open(tmp_path, GENES[1:], device="cpu").notes == (
        "the smoothing was trained on other genes than the study's panel",
    )
    write_toy_checkpoint(tmp_path, GENES, seed=1)
    with pytest.raises(ValueError, match=r"smoothing.safetensors: trained on another checkpoint.*or remove it"):
        Embedder.open(tmp_path, GENES)


# `oncofed smooth`


def write_cells(path: Path, *, sparse: bool = True, n: int = 120, **changed: Any) -> anndata.AnnData:
    """Counts over the checkpoint's genes and two that it does not know, symbols in a column, one cell without a label."""
    x, labels = cells(n, seed=0)
    x = np.hstack([x, np.full((n, 2), 7.0)])
    obs = pd.DataFrame({"cell_type": pd.Categorical([None, *labels[1:]])}, index=[f"c{i}" for i in range(n)])
    var = pd.DataFrame({"symbol": [*GENES, "odd 1", "odd 2"]}, index=[f"ENSG{i}" for i in range(62)])
    parts = {"X": scipy.sparse.csr_matrix(x) if sparse else x, "obs": obs, "var": var} | changed
    data = anndata.AnnData(**parts)
    data.write_h5ad(path)
    return data


@pytest.mark.parametrize("sparse", [True, False])
def test_cells_are_read_per_million_of_their_own_library(tmp_path: Path, checkpoint: Checkpoint, sparse: bool) -> None:
    data = write_cells(tmp_path / "cells.h5ad", sparse=sparse)
    counts = data.to_df().to_numpy()[1:]
    samples = smoothing_command._cells(tmp_path / "cells.h5ad", "cell_type", "symbol", None, checkpoint)
    assert samples.genes == GENES
    assert samples.labels.tolist() == data.obs["cell_type"].tolist()[1:]
    np.testing.assert_allclose(samples.x_NG, counts[:, :60] / counts.sum(1, keepdims=True) * 1e6, rtol=1e-5)
    panel = ("GENE5", "absent", "GENE2")
    checkpoint.vocab["absent"] = 0
    samples = smoothing_command._cells(tmp_path / "cells.h5ad", "cell_type", "symbol", panel, checkpoint)
    assert samples.genes == panel
    assert np.isnan(samples.x_NG[:, 1]).all()
    np.testing.assert_allclose(samples.x_NG[:, 0], counts[:, 5] / counts.sum(1) * 1e6, rtol=1e-5)


def test_smoothing_on_cells_is_written_where_the_embedder_finds_it(tmp_path: Path) -> None:
    write_toy_checkpoint(tmp_path / "toy", GENES)
    write_cells(tmp_path / "cells.h5ad", n=200)
    result = smooth(tmp_path / "toy", cells=tmp_path / "cells.h5ad", symbols="symbol", steps=150, device="cpu")
    assert result.file == tmp_path / "toy" / SMOOTHING
    assert result.error < 0.85 * result.baseline
    assert (len(result.curve), result.samples, result.genes, len(result.classes)) == (150, 199, 60, TYPES)
    again = smooth(tmp_path / "toy", cells=tmp_path / "cells.h5ad", symbols="symbol", steps=1, seed=1, device="cpu")
    assert again.file == result.file  # over the old one, which is no part of the checkpoint that it names
    embedder = Embedder.open(tmp_path / "toy", GENES, device="cpu")
    assert (embedder.width, embedder.notes) == (128, ())


def write_bulk(root: Path, unit: str, x: np.ndarray, labels: list[str]) -> None:
    names = [f"{unit}-{i}" for i in range(len(x))]
    folder = root / unit
    write_description(folder, SiteDescription(name=unit, expression_unit=unit))  # type: ignore[arg-type]
    pd.DataFrame({"patient": names, "cancer_type": labels}).to_csv(folder / "clinical.csv", index=False)
    pd.DataFrame(x, index=pd.Index(names, name="patient"), columns=[*GENES, "odd"]).to_csv(folder / "expression.csv")


def test_smoothing_on_bulk_reads_every_unit_as_one_linear_scale(tmp_path: Path, checkpoint: Checkpoint) -> None:
    x, labels = cells(40, seed=0)
    x = np.hstack([x, np.full((40, 1), 30.0)])
    million = x / x.sum(1, keepdims=True) * 1e6
    for unit, values in {"counts": x, "tpm": million, "log2": np.log2(million + 1)}.items():
        write_bulk(tmp_path / "sites", unit, values, labels)
    samples = smoothing_command._bulk(tmp_path / "sites", None, checkpoint)
    assert set(samples.genes) == set(GENES)
    assert sorted(samples.labels.tolist()) == sorted(labels * 3)
    order = [GENES.index(g) for g in samples.genes]
    patients = sorted(range(40), key=str)  # a site's patients come by name
    np.testing.assert_allclose(samples.x_NG, np.tile(million[patients][:, order], (3, 1)), rtol=1e-4, atol=1e-3)
    assert samples.labels[:40].tolist() == [labels[i] for i in patients]

    write_toy_checkpoint(tmp_path / "toy", GENES)
    panel = tmp_path / "panel.txt"
    panel.write_text("\n".join(GENES[:50]))
    target = tmp_path / "elsewhere.safetensors"
    result = smooth(
        tmp_path / "toy", sites=tmp_path / "sites", panel=panel, steps=3, mixed=5, device="cpu", target=target
    )
    assert (result.file, result.samples, result.genes) == (target, 120, 50)
    assert not (tmp_path / "toy" / SMOOTHING).exists()
    assert asdict(load_smoother(target)[1])["samples_mixed"] == 5
    one = smooth(tmp_path / "toy", sites=tmp_path / "sites" / "tpm", steps=1, device="cpu", target=target)
    assert one.samples == 40

    write_bulk(tmp_path / "scored", "zscore", x - 3, labels)
    with pytest.raises(ValueError, match=r"sites .'zscore'. hold z-scores, which cannot be mixed or binned"):
        smooth(tmp_path / "toy", sites=tmp_path / "scored", device="cpu")
    write_bulk(tmp_path / "negative", "log2", x - 3, labels)
    with pytest.raises(ValueError, match=r"site log2: negative expression.*correct expression_unit"):
        smooth(tmp_path / "toy", sites=tmp_path / "negative", device="cpu")


def test_sources_that_cannot_be_used_are_refused(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "cells.h5ad"

    def run(**arguments: Any) -> None:
        smooth(folder, **({"cells": file, "symbols": "symbol", "steps": 1, "device": "cpu"} | arguments))

    for both_or_none in ({"sites": tmp_path}, {"cells": None}):
        with pytest.raises(ValueError, match=r"name either cells .* or sites .*, and not both"):
            run(**both_or_none)
    with pytest.raises(ValueError, match="cannot be read as h5ad"):
        run()
    data = write_cells(file)
    for name in ({"label": "kind"}, {"symbols": "name"}):
        with pytest.raises(ValueError, match=r"obs has .'cell_type'., var has .'symbol'.: name them with --label"):
            run(**name)
    with pytest.raises(ValueError, match=r"none of its 62 genes, e.g. .'ENSG0'.* with --symbols, var has .'symbol'."):
        run(symbols="")
    for wrong in (0.5, -1.0, np.nan):
        write_cells(file, X=np.where(np.arange(62) == 9, wrong, data.to_df().to_numpy()))
        with pytest.raises(ValueError, match="X does not hold counts"):
            run()
    write_cells(file, var=data.var.assign(symbol=["GENE1", "GENE1", *data.var["symbol"][2:]]))
    with pytest.raises(ValueError, match=r"1 genes stand twice, e.g. .'GENE1'.; add up"):
        run()
    write_cells(file, var=data.var.assign(symbol=[*GENES, "odd", "odd"]))
    run(target=tmp_path / "x")  # what scGPT does not know may stand twice
    write_cells(file, n=8)
    with pytest.raises(ValueError, match="too few to keep some of a label aside; give 10 or more a label"):
        run()
    write_cells(file, X=np.zeros((120, 62)))
    with pytest.raises(ValueError, match="no sample expresses any of 60 genes"):
        run()


def test_held_out_samples_are_a_tenth_of_each_label() -> None:
    labels = np.array(["a"] * 50 + ["b"] * 20 + ["c"] * 3)
    samples = smoothing_command.Samples(np.arange(73.0)[:, None], labels, ("G",))
    learn, held = smoothing_command._split(samples, seed=0)
    assert sorted(held.labels.tolist()) == ["a"] * 5 + ["b"] * 2
    assert sorted([*learn.x_NG[:, 0], *held.x_NG[:, 0]]) == list(range(73))
    assert not np.array_equal(held.x_NG, smoothing_command._split(samples, seed=1)[1].x_NG)
