"""scGPT: the loader against plain matrix algebra, tokens against scGPT's formula, and every way a folder can be wrong."""

from __future__ import annotations

import contextlib
import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from oncofed.client.data.units import harmonise
from oncofed.client.embeddings import BATCH, Embedder
from oncofed.common.errors import Refusal
from oncofed.common.models.scgpt import ScGPT, ScGPTSettings, fingerprint, load_scgpt
from oncofed.common.models.tokens import Tokeniser, bins
from toy_scgpt import HEADS, LAYERS, WIDTH, write_toy_checkpoint

GENES = tuple(f"GENE{i}" for i in range(60))
SETTINGS = ScGPTSettings(
    embsize=32, nheads=4, d_hid=48, nlayers=2, n_bins=51, max_seq_len=1200, pad_token="<pad>", pad_value=-2
)
VOCAB = {token: i for i, token in enumerate((*GENES, "<pad>", "<cls>", "<eoc>"))}


def expression(n: int = 5, seed: int = 0) -> np.ndarray:
    """Counts with many zeros and ties, each sample of another length."""
    rng = np.random.default_rng(seed)
    return rng.poisson(rng.uniform(0.2, 3.0, (n, 1)), (n, len(GENES))).astype(np.float32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_toy_checkpoint(tmp_path / "toy", GENES)
    return tmp_path / "toy"


# The network


def by_hand(w: dict[str, torch.Tensor], ids: list[int], values: list[float]) -> np.ndarray:
    """The forward pass of one unpadded sample, in float64 and matrix algebra alone."""
    p = {name: value.double().numpy() for name, value in w.items()}

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        z = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)
        return z * p[f"{name}.weight"] + p[f"{name}.bias"]

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    v = np.array(values, dtype=np.float64)[:, None]
    hidden = np.maximum(linear(v, "value_encoder.linear1"), 0)
    x = norm(p["encoder.embedding.weight"][ids], "encoder.enc_norm")
    x = x + norm(linear(hidden, "value_encoder.linear2"), "value_encoder.norm")
    for i in range(LAYERS):
        at = f"transformer_encoder.layers.{i}"
        stacked = x @ p[f"{at}.self_attn.Wqkv.weight"].T + p[f"{at}.self_attn.Wqkv.bias"]
        heads = []
        for h in range(HEADS):
            q, k, v_ = (stacked[:, j * WIDTH :][:, h * WIDTH // HEADS : (h + 1) * WIDTH // HEADS] for j in range(3))
            score = np.exp(q @ k.T / np.sqrt(WIDTH // HEADS))
            heads.append(score / score.sum(1, keepdims=True) @ v_)
        x = norm(x + linear(np.hstack(heads), f"{at}.self_attn.out_proj"), f"{at}.norm1")
        inner = linear(np.maximum(linear(x, f"{at}.linear1"), 0), f"{at}.linear2")
        x = norm(x + inner, f"{at}.norm2")
    return x[0] / np.sqrt((x[0] ** 2).sum())


def test_embeddings_equal_the_forward_pass_by_hand(tmp_path: Path) -> None:
    weights = write_toy_checkpoint(tmp_path, GENES)
    checkpoint = load_scgpt(tmp_path)
    tokens = Tokeniser(checkpoint.vocab, checkpoint.settings, GENES).encode(expression())
    got = checkpoint.network(*tokens).numpy()
    for n in range(len(got)):
        real = ~tokens.padding[n]
        wanted = by_hand(weights, tokens.ids[n, real].tolist(), tokens.values[n, real].tolist())
        np.testing.assert_allclose(got[n], wanted, atol=1e-5)
    assert np.abs(got[0] - got[1]).max() > 0.01  # samples differ a thousand times more


def test_values_above_512_are_512(folder: Path) -> None:
    limit, above, below = load_scgpt(folder).network.value_encoder(torch.tensor([512.0, 1e6, 511.0]))
    assert torch.equal(above, limit)
    assert not torch.equal(below, limit)


def test_the_three_names_of_attention_give_the_same_network(tmp_path: Path) -> None:
    results = []
    for i, name in enumerate(("self_attn.Wqkv.", "self_attn._impl.Wqkv.", "self_attn.in_proj_")):
        write_toy_checkpoint(tmp_path / str(i), GENES, attention=name)
        checkpoint = load_scgpt(tmp_path / str(i))
        results.append(checkpoint.network(*Tokeniser(VOCAB, checkpoint.settings, GENES).encode(expression())))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_the_network_is_frozen_and_has_no_chance_in_it(folder: Path) -> None:
    checkpoint = load_scgpt(folder)
    tokens = Tokeniser(checkpoint.vocab, checkpoint.settings, GENES).encode(expression())
    assert not checkpoint.network.training
    assert not any(p.requires_grad for p in checkpoint.network.parameters())
    before = checkpoint.network(*tokens)
    torch.testing.assert_close(checkpoint.network.train()(*tokens), before, atol=1e-5, rtol=0)


def test_at_the_published_size_it_has_the_published_parameters() -> None:
    with torch.device("meta"):
        whole_human = ScGPT(replace(SETTINGS, embsize=512, nheads=8, d_hid=512, nlayers=12), 60697)
    assert sum(p.numel() for p in whole_human.parameters()) == 50_278_400  # path_gptomic.md section 3


def test_padding_does_not_change_embeddings(folder: Path) -> None:
    checkpoint = load_scgpt(folder)
    tokeniser = Tokeniser(checkpoint.vocab, checkpoint.settings, GENES)
    x = expression(6)
    together = tokeniser.encode(x)
    assert together.padding.any(1).sum() == 5  # all but the longest
    alone = torch.cat([checkpoint.network(*tokeniser.encode(x[n : n + 1])) for n in range(len(x))])
    torch.testing.assert_close(checkpoint.network(*together), alone, atol=1e-5, rtol=0)
    values = together.values.masked_fill(together.padding, 40.0)
    torch.testing.assert_close(checkpoint.network(together.ids, values, together.padding), alone, atol=1e-5, rtol=0)


# The folder


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = torch.load(folder / "best_model.pt", weights_only=True)
    change(weights)
    torch.save(weights, folder / "best_model.pt")


LAYER = "transformer_encoder.layers.1"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda w: w.pop(f"{LAYER}.norm2.bias"),
            r"1 parameters are missing, first \['transformer.*norm2.bias'\]; check",
        ),
        (lambda w: w.pop("value_encoder.linear1.weight"), "missing, first .*value_encoder.linear1.weight"),
        (
            lambda w: w.update({"encoder.embedding.weight": torch.zeros(61, WIDTH)}),
            r"encoder.embedding.weight is \[61, 32\], wanted \[63, 32\]; check that args.json",
        ),
        (lambda w: w.update({f"{LAYER}.linear1.weight": torch.zeros(7, WIDTH)}), r"is \[7, 32\], wanted \[48, 32\]"),
        (
            lambda w: w.update({"dsbn.bns.0.weight": torch.zeros(3)}),
            "no place in the model, first .'dsbn.bns.0.weight'",
        ),
        (lambda w: w.update({"transformer_encoder.layers.2.norm1.bias": torch.zeros(WIDTH)}), "have no place"),
        (lambda w: w.update({f"{LAYER}.self_attn.in_proj_bias": torch.zeros(3 * WIDTH)}), "under two names"),
        (lambda w: w.update({"epoch": 3}), "holds other things than tensors; save model.state_dict"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], object], message: str
) -> None:
    change_weights(folder, change)
    with pytest.raises(ValueError, match=message) as error:
        load_scgpt(folder)
    assert "best_model.pt" in str(error.value)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"input_emb_style": "category"}, "input_emb_style is 'category'"),
        ({"norm": "pre"}, "norm 'pre'"),
        ({"n_bins": None}, "missing or odd n_bins = None"),
        ({"nlayers": "12"}, "odd nlayers = '12'"),
        ({"nheads": True}, "odd nheads = True"),
        ({"nheads": 5}, "nheads divides embsize"),
        ({"n_bins": 2}, "n_bins is 3 or more"),
        ({"pad_token": "<none>"}, "lacks the token <none>"),
    ],
)
def test_settings_that_are_missing_or_odd_are_refused(folder: Path, changed: dict[str, object], message: str) -> None:
    args = json.loads((folder / "args.json").read_text()) | changed
    (folder / "args.json").write_text(json.dumps({k: v for k, v in args.items() if v is not None}))
    with pytest.raises(ValueError, match=message):
        load_scgpt(folder)


@pytest.mark.parametrize(
    ("vocab", "message"),
    [
        ({t: i for t, i in VOCAB.items() if t != "<cls>"}, "lacks the token <cls>"),
        (VOCAB | {"GENE0": 1}, "ids of its 63 entries are not 0 to 62"),
        (VOCAB | {"GENE0": "0"}, "ids of its 63 entries"),
        ([*VOCAB], "not a JSON object"),
    ],
)
def test_a_vocabulary_that_names_no_rows_is_refused(folder: Path, vocab: object, message: str) -> None:
    (folder / "vocab.json").write_text(json.dumps(vocab))
    with pytest.raises(ValueError, match=message):
        load_scgpt(folder)


@pytest.mark.parametrize("name", ["args.json", "vocab.json", "best_model.pt"])
def test_files_that_are_absent_or_broken_are_named(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"\x80\x02no")
    with pytest.raises(ValueError, match=f"{name}: not a .*download"):
        load_scgpt(folder)
    (folder / name).unlink()
    for read in (load_scgpt, fingerprint):
        with pytest.raises(ValueError, match=f"{name} is missing; an scGPT checkpoint is a folder with"):
            read(folder)


class Malice:
    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.victim,)


@pytest.mark.parametrize("save", [torch.save, lambda o, f: f.write_bytes(pickle.dumps(o, protocol=2))])
def test_a_malicious_pickle_is_not_executed(folder: Path, save: Callable[[object, Path], object]) -> None:
    weights = torch.load(folder / "best_model.pt", weights_only=True)
    save(weights | {"x": Malice(folder / "victim")}, folder / "best_model.pt")
    with pytest.raises(ValueError, match=r"best_model.pt: not a plain state_dict .*nothing else is ever unpickled"):
        load_scgpt(folder)
    assert not (folder / "victim").exists()
    with contextlib.suppress(RuntimeError):
        torch.load(folder / "best_model.pt", weights_only=False)
    assert (folder / "victim").exists()  # it would have been


def test_the_fingerprint_changes_with_every_file(folder: Path) -> None:
    seen = [fingerprint(folder)]
    assert len(seen[0]) == 16
    for name in ("args.json", "vocab.json", "best_model.pt"):
        (folder / name).write_bytes((folder / name).read_bytes() + b" ")
        seen.append(fingerprint(folder))
    (folder / "smoothing.safetensors").write_bytes(b"x")
    assert fingerprint(folder, smoothing=False) == seen[-1]
    seen.append(fingerprint(folder))
    assert len(set(seen)) == 5
    assert fingerprint(folder) == seen[-1]


# Tokens


def literal_bins(x: np.ndarray, tie: np.ndarray, n_bins: int) -> list[int]:
    """The formula of path_gptomic.md section 3, word by word, in exact fractions."""
    values = sorted(Fraction(float(v)) for v in x)
    edges = []
    for k in range(n_bins - 1):
        at = Fraction(k, n_bins - 2) * (len(values) - 1)
        low = int(at)
        high = min(low + 1, len(values) - 1)
        edges.append(values[low] + (at - low) * (values[high] - values[low]))
    result = []
    for v, u in zip(x, tie, strict=True):
        left, right = sum(e <= Fraction(float(v)) for e in edges), sum(e < Fraction(float(v)) for e in edges)
        result.append(int(np.ceil(u * (right - left) + left)))
    return result


SAMPLES = hnp.arrays(
    np.float32, st.integers(1, 70), elements=st.one_of(st.integers(1, 6), st.floats(0.0078125, 1e4, width=32))
)


@settings(max_examples=150, deadline=None)
@given(x=SAMPLES, n_bins=st.sampled_from([3, 4, 11, 51]), seed=st.integers(0, 5))
def test_bins_are_the_formula_and_keep_the_order(x: np.ndarray, n_bins: int, seed: int) -> None:
    tie = np.random.default_rng(seed).random(len(x))
    got = bins(x, tie, n_bins)
    assert got.tolist() == literal_bins(x, tie, n_bins)
    assert got.min() >= 1
    assert got.max() <= n_bins - 1
    order = np.argsort(x, kind="stable")
    higher = np.diff(x[order]) > 0
    assert (np.diff(got[order])[higher] >= 0).all()
    np.testing.assert_array_equal(got, bins(np.log2(x.astype(np.float64) + 1), tie, n_bins))
    np.testing.assert_array_equal(got, bins(x.astype(np.float64) ** 3, tie, n_bins))


def test_bins_are_numpys_where_no_edge_falls_on_a_value() -> None:
    x = np.random.default_rng(0).lognormal(size=1000)  # 999 and 49 gaps share no factor: only the ends meet
    edges = np.quantile(x, np.linspace(0, 1, 50))
    got = bins(x, np.random.default_rng(1).random(1000), 51)
    inner = (x > x.min()) & (x < x.max())
    np.testing.assert_array_equal(got[inner], np.digitize(x, edges)[inner])
    assert sorted(set(got)) == list(range(1, 51))


def test_values_that_tie_spread_over_their_bins() -> None:
    got = bins(np.ones(2000), np.random.default_rng(0).random(2000), 51)
    share = np.bincount(got.astype(int), minlength=51)[1:] / 2000
    assert share.min() > 0.005
    assert share.max() < 0.04  # 1 in 50 each


@settings(max_examples=40, deadline=None)
@given(x=hnp.arrays(np.float32, (4, len(GENES)), elements=st.integers(0, 5)), order=st.permutations(range(4)))
def test_a_sample_has_the_same_tokens_in_every_batch(x: np.ndarray, order: list[int]) -> None:
    tokeniser = Tokeniser(VOCAB, SETTINGS, GENES)
    batch = tokeniser.encode(x[order])
    for place, n in enumerate(order):
        alone = tokeniser.encode(x[n : n + 1])
        end = alone.ids.shape[1]
        assert end == 1 + (x[n] != 0).sum()
        for whole, own in zip(batch, alone, strict=True):
            assert torch.equal(whole[place, :end], own[0])
        assert batch.padding[place, end:].all()
        assert (batch.ids[place, end:] == VOCAB["<pad>"]).all()
        assert (batch.values[place, end:] == -2).all()


def test_tokens_are_cls_and_the_genes_that_are_expressed() -> None:
    panel = ("GENE7", "unknown", "GENE3", "GENE5", "GENE9")
    tokeniser = Tokeniser(VOCAB, SETTINGS, panel)
    assert tokeniser.unknown == ("unknown",)
    assert tokeniser.genes == ("GENE7", "GENE3", "GENE5", "GENE9")
    tokens = tokeniser.encode(np.array([[2.0, 8.0, 0.0, 4.0, np.nan], [0, 1, 0, 0, np.inf]]))
    assert tokens.ids.tolist() == [[VOCAB["<cls>"], 7, 5], [VOCAB["<cls>"], VOCAB["<pad>"], VOCAB["<pad>"]]]
    assert tokens.values.tolist() == [[-2.0, 1.0, 50.0], [-2.0, -2.0, -2.0]]
    assert tokens.padding.tolist() == [[False, False, False], [False, True, True]]
    assert (tokens.ids.dtype, tokens.values.dtype, tokens.padding.dtype) == (torch.int64, torch.float32, torch.bool)


def test_ties_are_broken_by_the_gene_whatever_the_panel() -> None:
    ones = np.ones((1, len(GENES)))
    forward = Tokeniser(VOCAB, SETTINGS, GENES).encode(ones)
    backward = Tokeniser(VOCAB, SETTINGS, GENES[::-1]).encode(ones)
    assert torch.equal(forward.ids[0, 1:].flip(0), backward.ids[0, 1:])
    assert torch.equal(forward.values[0, 1:].flip(0), backward.values[0, 1:])
    assert len(set(forward.values[0].tolist())) > 20


def test_counts_and_their_logarithm_are_the_same_tokens() -> None:
    tokeniser, x = Tokeniser(VOCAB, SETTINGS, GENES), expression()
    for a, b in zip(tokeniser.encode(x), tokeniser.encode(harmonise(x, "counts")), strict=True):
        assert torch.equal(a, b)


def test_expression_and_panels_that_cannot_be_read_are_refused() -> None:
    tokeniser = Tokeniser(VOCAB, SETTINGS, GENES)
    with pytest.raises(Refusal, match=r"negative expression cannot be binned.*z-scores.*counts, tpm or log2"):
        tokeniser.encode(np.where(np.arange(60) == 30, -0.1, 1.0)[None])
    with pytest.raises(ValueError, match=r"shape \(1, 59\), but the panel has 60 genes"):
        tokeniser.encode(np.ones((1, 59)))
    with pytest.raises(ValueError, match=r"shape \(60,\), but the panel has 60 genes; give \[N, genes\]"):
        tokeniser.measured(np.ones(60))
    with pytest.raises(Refusal, match=r"none of the panel's 2 genes, e.g. .'ENSG01', 'ENSG02'.*symbols.*not Ensembl"):
        Tokeniser(VOCAB, SETTINGS, ("ENSG01", "ENSG02"))
    with pytest.raises(Refusal, match=r"does not know 1 of the panel's 61 genes, e.g. .'odd'"):
        Tokeniser(VOCAB, SETTINGS, (*GENES, "odd"), strict=True)
    short = replace(SETTINGS, max_seq_len=60)
    with pytest.raises(Refusal, match=r"60 genes.*room for 59; name a panel file \(panel.file\) with at most 59"):
        Tokeniser(VOCAB, short, GENES)
    assert len(Tokeniser(VOCAB, short, (*GENES[1:], "odd")).genes) == 59


# The embedder


def test_the_embedder_leaves_patients_without_rna_and_reads_the_others(folder: Path) -> None:
    x = expression(BATCH + 5)
    x[3], x[BATCH + 1] = np.nan, np.nan
    x[4, :30] = np.nan
    embedder = Embedder.open(folder, GENES, device="cpu")
    got = embedder.embed(x)
    assert (got.shape, got.dtype) == ((len(x), embedder.width), np.float32)
    assert np.flatnonzero(np.isnan(got).any(1)).tolist() == [3, BATCH + 1]
    assert np.isnan(got[3]).all()
    checkpoint = load_scgpt(folder)
    present = np.where(np.isnan(x), 0, x)  # absent and not expressed are the same to scGPT
    wanted = checkpoint.network(*Tokeniser(VOCAB, checkpoint.settings, GENES).encode(present)).numpy()
    rows = ~np.isnan(x).all(1)
    np.testing.assert_allclose(got[rows], wanted[rows], atol=1e-5)
    assert np.isnan(embedder.embed(np.full((2, 60), np.nan))).all()
    partly = np.hstack([np.full((1, 60), np.nan), np.ones((1, 1))])  # only a gene that scGPT does not know
    assert np.isnan(Embedder.open(folder, (*GENES, "odd"), device="cpu").embed(partly)).all()
    assert embedder.embed(np.zeros((0, 60))).shape == (0, WIDTH)
    assert (embedder.fingerprint, embedder.notes) == (fingerprint(folder), ())
    assert Embedder.open(folder, (*GENES, "odd"), device="cpu").notes == (
        "scGPT does not know 1 of the panel's 61 genes, e.g. odd",
    )
