"""Gradients by patient: equal to single backward passes, bounded by the clip, refused where they cannot be told apart."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from oncofed.client.privacy.dp_sgd import PatientGradients, cover
from oncofed.client.privacy.separable import check_layers, check_separable
from oncofed.client.privacy.train import bounded, check_sent, train_privately
from oncofed.common.errors import Refusal
from oncofed.common.models.branches import TileEncoder
from oncofed.common.models.build import Predictor, get_weights
from oncofed.common.models.output import ModelOutput
from oncofed.common.noise import SecureNoise
from oncofed.common.survival import cox_loss
from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import GradSampleHooksFastGradientClipping as Ghost

sys.path.insert(0, str(Path(__file__).parents[1]))
from toy_private import GENES, KINDS, losses_of, model_of, patients, study_of

N = 9


def one_by_one(model: Predictor, losses: object) -> list[list[torch.Tensor]]:
    """Gradients of each patient alone, by plain backward passes."""
    out = []
    for i in range(N):
        model.zero_grad(set_to_none=True)
        losses(torch.tensor([i])).sum().backward()  # type: ignore[operator]
        out.append(
            [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters() if p.requires_grad]
        )
    model.zero_grad(set_to_none=True)
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_norms_and_clipped_sums_equal_a_loop_of_single_patients(kind: str) -> None:
    study = study_of(kind)
    model = model_of(study)
    losses = losses_of(model, study, patients(N))
    alone = one_by_one(model, losses)
    norm = torch.stack([torch.sqrt(sum(g.square().sum() for g in one)) for one in alone])  # type: ignore[arg-type]
    clip = float(norm.median())
    with PatientGradients.opened(model, clip) as gradients:
        mine, _ = gradients.norms(lambda: losses(None))
        torch.testing.assert_close(mine, norm, rtol=1e-10, atol=1e-10)
        rows = torch.arange(N).split(4)
        whole = gradients.clipped_sum([losses])
        parts = gradients.clipped_sum([partial(losses, r) for r in rows])
    assert clip * 0.9999 < gradients.bound < clip
    expected = [
        sum(one[j] * min(1.0, gradients.bound / float(n)) for one, n in zip(alone, norm, strict=True))
        for j in range(len(alone[0]))
    ]
    for a, b, c in zip(whole, expected, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(a, c, rtol=1e-10, atol=1e-10)  # parts change memory alone


@pytest.mark.parametrize("kind", KINDS)
def test_samplers_give_the_gradients_whose_norms_they_state(kind: str) -> None:
    """Opacus' hooks mode takes the grad samplers, ghost clipping the norm samplers: both are held against single passes."""
    study = study_of(kind)
    model = model_of(study)
    losses = losses_of(model, study, patients(N))
    alone = one_by_one(model, losses)
    places = {id(p): i for i, p in enumerate(p for p in model.parameters() if p.requires_grad)}
    with PatientGradients.opened(model, 1.0) as gradients:
        gradients._calls, gradients._recording = [], True
        total = losses(None).sum()
        gradients._recording = False
        calls = gradients._calls
        grads = torch.autograd.grad(total, [c[2] for c in calls], allow_unused=True)
    summed: dict[int, torch.Tensor] = {}
    for (layer, inputs, _), grad in zip(calls, grads, strict=True):
        if grad is None:
            continue
        samples = Ghost.GRAD_SAMPLERS[type(layer)](layer, inputs, grad)
        if type(layer) in Ghost.NORM_SAMPLERS:
            for p, n in Ghost.NORM_SAMPLERS[type(layer)](layer, inputs, grad).items():
                torch.testing.assert_close(n.flatten(), samples[p].flatten(1).norm(dim=1), rtol=1e-10, atol=1e-12)
        for p, value in samples.items():
            summed[places[id(p)]] = summed.get(places[id(p)], torch.zeros_like(value)) + value
    for i, value in summed.items():
        torch.testing.assert_close(value, torch.stack([one[i] for one in alone]), rtol=1e-10, atol=1e-10)
    for i in places.values():
        assert i in summed or all(not one[i].any() for one in alone)


@pytest.mark.parametrize("kind", KINDS)
def test_without_noise_nobody_moves_the_sum_by_more_than_the_clip(kind: str) -> None:
    study = study_of(kind)
    model = model_of(study).float()
    batch = patients(40)
    batch = type(batch)(**{k: _single(v) for k, v in vars(batch).items()})
    losses = losses_of(model, study, batch)
    clip = 0.05
    with PatientGradients.opened(model, clip) as gradients:

        def flat(rows: torch.Tensor) -> torch.Tensor:
            total = gradients.clipped_sum([partial(losses, rows)])
            return torch.cat([t.double().flatten() for t in total])

        everyone = flat(torch.arange(40))
        moved = [
            float((everyone - flat(torch.cat([torch.arange(i), torch.arange(i + 1, 40)]))).norm()) for i in range(40)
        ]
    assert max(moved) <= clip * 1.000001
    assert max(moved) > 0.99 * clip  # or nothing was clipped and nothing tested


def _single(value: object) -> object:
    if isinstance(value, dict):
        return value
    return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def test_a_cox_loss_would_break_the_bound() -> None:
    """What the refusal keeps out: risk sets put others into a patient's gradient, and clipping that bounds nothing."""
    n, clip = 400, 3.0
    x, time = torch.randn(n, 20, dtype=torch.float64), torch.rand(n, dtype=torch.float64)
    event, one = torch.ones(n), torch.zeros(n, dtype=torch.long)
    model = torch.nn.Linear(20, 1, bias=False).double()
    torch.nn.init.normal_(model.weight, std=0.5)

    def terms(rows: torch.Tensor) -> torch.Tensor:
        """Losses whose gradients are those that Opacus would clip: d(sum of the loss) / d(risk of a patient) * risk."""
        risk = model(x[rows]).squeeze(1)
        loss = cox_loss(risk, time[rows], event[rows], one[rows]) * len(rows)
        return risk * torch.autograd.grad(loss, risk, retain_graph=True)[0].detach()

    with PatientGradients.opened(model, clip) as gradients:

        def total(rows: torch.Tensor) -> torch.Tensor:
            return gradients.clipped_sum([partial(terms, rows)])[0]

        everyone = total(torch.arange(n))
        with torch.no_grad():  # long under observation at a high risk: legal, and in everybody's risk set
            late = (model(x).squeeze(1) + 3 * time).argsort(descending=True)[:20]
        moved = [float((everyone - total(torch.tensor([i for i in range(n) if i != j]))).norm()) for j in late.tolist()]
    assert max(moved) > 2 * clip


def test_a_gradient_that_is_not_finite_is_left_out_and_the_others_stay() -> None:
    study = study_of("gene_moe")
    model, batch = model_of(study), patients(N)
    batch.x_BG[3, 0] = float("inf")
    losses = losses_of(model, study, batch)
    with PatientGradients.opened(model, 1.0) as gradients:
        got = gradients.clipped_sum([losses])
        keep = torch.tensor([i for i in range(N) if i != 3])
        want = gradients.clipped_sum([partial(losses, keep)])
    for a, b in zip(got, want, strict=True):
        assert torch.isfinite(a).all()
        torch.testing.assert_close(a, b)


def test_an_empty_sample_gives_noise_on_every_parameter() -> None:
    model = model_of(study_of("gene_moe"))
    with PatientGradients.opened(model, 1.0) as gradients:
        total = gradients.clipped_sum([])
    assert all(not t.any() for t in total)
    noisy = cover(total, clip=1.0, deviation=2.0, noise=SecureNoise())
    assert all(t.abs().sum() > 0 for t in noisy)  # also on experts that nobody passed


def test_the_model_is_as_it_was_afterwards() -> None:
    model = model_of(study_of("gene_moe"))
    before = {n: (dict(m._forward_hooks), dict(m._forward_pre_hooks)) for n, m in model.named_modules()}
    with PatientGradients.opened(model, 1.0):
        assert any(m._forward_hooks for m in model.modules())
    assert {n: (dict(m._forward_hooks), dict(m._forward_pre_hooks)) for n, m in model.named_modules()} == before


def test_a_private_step_has_no_draws_but_its_noise() -> None:
    """Dropout is drawn row by row: one patient more would move the draws, and so the gradients, of all who come after."""
    study = study_of(
        "gene_moe",
        model__dropout=0.5,
        model__gate_noise=True,
        privacy__unit="patient",
        panel__scale_by="patient",
        task__time_edges=(0, 12, 24, 36),
    )
    model, batch = model_of(study).float(), patients(N)
    batch = type(batch)(**{k: _single(v) for k, v in vars(batch).items()})
    weights = {n: v.copy() for n, v in get_weights(model).items()}
    load = {g: np.full(n, 1.0 / n) for g, n in model.mixtures().items()}
    evidence = np.ones(len(model.blocks().names))

    def change(deviation: float) -> np.ndarray:
        total = train_privately(
            model, weights, batch, study, round_=1, load=load, deviation=deviation, evidence=evidence
        )
        return total["encoder.latent.weight"]

    np.testing.assert_array_equal(change(0.0), change(0.0))
    assert not np.array_equal(change(1.0), change(1.0))


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_batch_norm_is_refused_by_name() -> None:
    model = model_of(study_of("gene_moe"))
    model.encoder.latent = torch.nn.Sequential(model.encoder.latent, torch.nn.BatchNorm1d(8).double())
    with pytest.raises(Refusal, match=r"latent\.1.*BatchNorm1d.*LayerNorm or GroupNorm"):
        check_layers(model)


def test_multi_head_attention_is_refused() -> None:
    with pytest.raises(Refusal, match="scaled_dot_product_attention"):
        check_layers(torch.nn.Sequential(torch.nn.MultiheadAttention(4, 2)))


def test_a_layer_without_a_sampler_is_refused() -> None:
    class Scale(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(3))

    with pytest.raises(Refusal, match=r"'0' \(Scale\) has parameters and no sampler"):
        check_layers(torch.nn.Sequential(Scale()))


def test_a_tensor_by_keyword_is_refused() -> None:
    model = torch.nn.Linear(3, 2)
    with PatientGradients.opened(model, 1.0), pytest.raises(Refusal, match=r"Linear.*\['input'\] by keyword"):
        model(input=torch.randn(4, 3))


def coupled(kind: str) -> object:
    """Losses of some patients that depend on who else is there."""
    study = study_of("gene_moe, classes", training__balance=0.0)
    model, batch = model_of(study), patients(6)
    weight = torch.tensor([1.0, 5.0, 20.0], dtype=torch.float64)

    def losses(rows: torch.Tensor) -> torch.Tensor:
        part = batch.select(rows)
        output: ModelOutput = part.through(model)
        each = torch.nn.functional.cross_entropy(output.score, part.cancer_B, reduction="none")
        if kind == "class weights":
            w = weight[part.cancer_B]
            return each * w / w.sum()
        if kind == "batch statistics":
            return each + (output.score[:, 0] - output.score[:, 0].mean()).square()
        if kind == "capacity":  # at most two patients pass an expert
            gate = output.shares["expert"]
            return each * ((gate > 0).cumsum(0) <= 2).double().mul(gate).sum(1)
        if kind == "load balance":  # Switch: the batch's own fractions
            share = output.shares["expert"].mean(0)
            return each + 4.0 * (torch.softmax(output.logits["expert"], 1) * share).sum(1)
        return each

    return losses


@pytest.mark.parametrize("kind", ["class weights", "batch statistics", "capacity", "load balance"])
def test_losses_that_couple_patients_are_refused(kind: str) -> None:
    with pytest.raises(Refusal, match="depends on who else is in the batch"):
        check_separable(coupled(kind), 6)  # type: ignore[arg-type]
    check_separable(coupled("nothing"), 6)  # type: ignore[arg-type]


def test_a_loss_that_is_one_number_is_refused() -> None:
    with pytest.raises(Refusal, match="one for each"):
        check_separable(lambda rows: torch.tensor(1.0), 6)


# -- tiles -------------------------------------------------------------------------------------------------------------


def test_tiles_in_rows_give_what_ragged_ones_give() -> None:
    encoder = TileEncoder(5, 6, 3, dropout=0.0).double()
    owner = torch.tensor([0, 2, 2, 0, 2, 3, 0])
    tiles = torch.randn(7, 5, dtype=torch.float64)
    z, a = encoder(tiles, owner, 4, None)
    rows, b = encoder.in_step(tiles, owner, 4, None)
    there = torch.tensor([0, 2, 3])
    torch.testing.assert_close(z[there], rows[there])
    torch.testing.assert_close(a, b)


def test_gradients_of_patients_with_several_tiles_are_theirs() -> None:
    torch.manual_seed(0)
    encoder = TileEncoder(5, 6, 3, dropout=0.0).double()
    owner = torch.tensor([0, 2, 2, 0, 2, 1, 0])
    tiles = torch.randn(7, 5, dtype=torch.float64)

    def losses() -> torch.Tensor:
        return encoder.in_step(tiles, owner, 3, None)[0].square().sum(1)

    expected = []
    for i in range(3):
        encoder.zero_grad(set_to_none=True)
        losses()[i].backward()
        expected.append(torch.sqrt(sum(p.grad.square().sum() for p in encoder.parameters() if p.grad is not None)))  # type: ignore[arg-type]
    with PatientGradients.opened(encoder, 1.0) as gradients:
        norms, _ = gradients.norms(losses)
    torch.testing.assert_close(norms, torch.stack(expected), rtol=1e-10, atol=1e-12)


def test_all_kinds_have_the_genes_that_the_toy_says() -> None:
    assert patients().x_BG.shape[1] == GENES


# -- numbers of a hostile coordinator's choice -------------------------------------------------------------------------


def longest(model: Predictor, losses: object, n: int, clip: float) -> float:
    """The longest clipped gradient of one patient alone, in clips, as a single-precision step makes it."""
    with PatientGradients.opened(model, clip) as gradients:
        lengths = []
        for i in range(n):
            total = gradients.clipped_sum([partial(losses, torch.tensor([i]))])  # type: ignore[operator]
            lengths.append(float(torch.cat([t.double().flatten() for t in total]).norm()))
    return max(lengths) / clip


@pytest.mark.parametrize("power", [0, 20, 40, 60])
@pytest.mark.parametrize("clip", [1e-3, 1.0])
def test_weights_that_cancel_do_not_make_a_clipped_gradient_longer(power: int, clip: float) -> None:
    """Heads that add up to nothing behind a huge latent layer: two passes back would round differently, by 10^6 clips."""
    study = study_of("gene_moe, no experts", training__balance=0.0)
    model = model_of(study).float()
    with torch.no_grad():
        w = torch.randn_like(model.head.shared)
        model.head.shared.copy_(w * 2.0**power)
        model.head.own.copy_(-model.head.shared / model.head.ratio)
        model.encoder.latent.weight.mul_(2.0**power)
    batch = patients(30)
    batch = type(batch)(**{k: _single(v) for k, v in vars(batch).items()})
    assert longest(model, losses_of(model, study, batch), 30, clip) <= 1.000001


@pytest.mark.parametrize("scale", [1e-25, 1e-15, 1.0, 1e15])
def test_gradients_too_small_or_large_for_their_squares_are_clipped_all_the_same(scale: float) -> None:
    model = torch.nn.Linear(5, 1, bias=False)
    x = torch.randn(12, 5) * scale
    assert longest(model, lambda rows: model(x[rows]).squeeze(1), 12, 1e-3) <= 1.000001


def test_norms_of_slides_do_not_cancel() -> None:
    """Tiles with a level in common and scores that add up to nothing: a Gram matrix in single precision says 0."""
    encoder = TileEncoder(5, 6, 3, dropout=0.0)
    with torch.no_grad():
        encoder.norm.weight.fill_(1e-3)
        encoder.norm.bias.fill_(300.0)
    owner = torch.arange(4).repeat_interleave(40)
    tiles = torch.randn(160, 5)

    def losses(rows: torch.Tensor) -> torch.Tensor:
        (i,) = rows.tolist()
        mine = torch.nonzero(owner == i).squeeze(1)
        return 100.0 * encoder.in_step(tiles[mine], torch.zeros(40, dtype=torch.long), 1, None)[0].sum(1)

    assert longest(encoder, losses, 4, 0.01) <= 1.000001  # type: ignore[arg-type]


def test_a_patients_tiles_do_not_depend_on_the_longest_slide() -> None:
    encoder = TileEncoder(5, 6, 3, dropout=0.0)
    with torch.no_grad():
        encoder.score.weight.fill_(-1e12)  # far below any finite mask
    tiles = torch.randn(7, 5)
    alone = encoder.in_step(tiles[:2], torch.tensor([0, 0]), 1, None)[0]
    beside = encoder.in_step(tiles, torch.tensor([0, 0, 1, 1, 1, 1, 1]), 2, None)[0]
    torch.testing.assert_close(alone[0], beside[0])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"weights": 1e4}, r"reach .* takes numbers up to 1000"),
        ({"weights": float("nan")}, "reach nan"),
        ({"load": np.full(4, 1e38)}, "is no 4 shares of one"),
        ({"load": np.full(4, np.nan)}, "is no 4 shares of one"),
        ({"load": np.full((7, 1, 4), 0.1)}, "is no 4 shares of one"),
        ({"load": np.array([-1.0, 1.0, 0.5, 0.5])}, "is no 4 shares of one"),
    ],
)
def test_weights_and_loads_of_no_trained_model_are_refused(change: dict[str, object], says: str) -> None:
    study = study_of("gene_moe", privacy__unit="patient", panel__scale_by="patient", task__time_edges=(0, 12, 24, 36))
    model = model_of(study).float()
    weights = {n: v.copy() for n, v in get_weights(model).items()}
    load: dict[str, np.ndarray] = {g: np.full(n, 1.0 / n) for g, n in model.mixtures().items()}
    if "weights" in change:
        weights["encoder.latent.weight"][0, 0] = change["weights"]
    if "load" in change:
        load["expert"] = change["load"]  # type: ignore[assignment]
    with pytest.raises(Refusal, match=says):
        check_sent(model, weights, load)


def test_numbers_of_a_patient_end_somewhere() -> None:
    batch = patients(4)
    batch.x_BG[0, :3] = torch.tensor([float("inf"), float("nan"), 1e30], dtype=torch.float64)
    cut = bounded(batch)
    assert cut.x_BG[0, :3].tolist() == [10.0, 0.0, 10.0]
    torch.testing.assert_close(cut.x_BG[1:], batch.x_BG[1:])
