"""What becomes of a pre-trained first layer: trained on, slowly, frozen, or changed by adapters; and experts taken out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from oncofed.client.batch import Batch
from oncofed.client.train import train_locally
from oncofed.common.blocks import EVIDENCE, Sum
from oncofed.common.models.build import Sizes, build_model, get_weights, trainable, transfer
from oncofed.common.models.gene_moe import GeneMOE, Off
from oncofed.common.rates import FIRST_LAYER_NAMES
from oncofed.common.study import PRETRAIN, Study
from oncofed.server.aggregate import mean_by_block
from oncofed.server.strategy import EvidenceStrategy

CANCERS = ("BRCA", "LUAD", "STAD")
SIZES = Sizes(20, CANCERS, 2, 1)
ADAPTERS = {f"encoder.{layer}.adapter_{way}" for layer in ("experts", "shared") for way in ("in", "out")}


def study(first_layer: str, **keys: object) -> Study:
    base = {
        "model__size": "tiny",
        "pretraining__rounds": 1,
        "training__first_layer": first_layer,
        "training__adapter_rank": 3,
        "training__local_steps": 1,
        "training__batch_size": 0,
        "training__clip_norm": 0.0,
        "training__learning_rate": 0.1,
    }
    return Study().changed(**(base | keys))


def build(s: Study) -> GeneMOE:
    model = build_model(s, SIZES)
    assert isinstance(model, GeneMOE)
    with torch.no_grad():  # after pre-training the head is 0: no gradient would reach the encoder in the first step
        draw = torch.Generator().manual_seed(5)
        model.head.shared.normal_(generator=draw)
        model.head.own.normal_(generator=draw)
    return model


def batch(n: int = 60) -> Batch:
    rng = np.random.default_rng(0)
    time = torch.tensor(rng.exponential(10, n) + 0.1, dtype=torch.float32)
    return Batch(
        x_BG=torch.tensor(rng.normal(size=(n, SIZES.genes)), dtype=torch.float32),
        v_BV=torch.tensor(rng.normal(size=(n, 1)), dtype=torch.float32),
        cancer_B=torch.arange(n) % 3,
        time_B=time,
        event_B=torch.ones(n),
        exposure_BK=torch.stack([time.clamp(max=5), (time - 5).clamp(min=0)], dim=1),
        interval_B=(time > 5).long(),
    )


def step(s: Study, model: GeneMOE, weights: Sum) -> Sum:
    load = {group: np.full(n, 1.0 / n) for group, n in model.mixtures().items()}
    return train_locally(model, weights, batch(), s, round_=1, seed=0, load=load)[0]


def copy(model: torch.nn.Module) -> Sum:
    return {name: value.copy() for name, value in get_weights(model).items()}


def test_all_names_of_the_first_layer_are_parameters() -> None:
    assert dict(build(study("train")).named_parameters()).keys() >= FIRST_LAYER_NAMES


@pytest.mark.parametrize("first_layer", ["frozen", "adapters"])
@pytest.mark.parametrize("keys", [{}, {"training__optimizer": "adam"}, {"training__prox_mu": 0.1}])
def test_a_kept_first_layer_does_not_change_and_does_not_travel_back(first_layer: str, keys: dict[str, object]) -> None:
    s = study(first_layer, **keys)
    model = build(s)
    before = copy(model)
    total = step(s, model, before)
    assert total.keys() == trainable(model) | {EVIDENCE}
    assert not FIRST_LAYER_NAMES & total.keys()
    assert (total.keys() >= ADAPTERS) == (first_layer == "adapters")
    for name, value in get_weights(model).items():
        same = (value == before[name]).all()
        # adapters begin at A, 0: the first step can only move the 0
        assert same == (name in FIRST_LAYER_NAMES) or name.endswith(("adapter_in", "noise")), name


def test_a_round_at_the_server_moves_what_is_trained_and_keeps_the_rest() -> None:
    s = study("adapters")
    model = build(s)
    strategy = EvidenceStrategy.of(s.aggregation, model)
    before = dict(strategy.weights)
    strategy.step(*mean_by_block(step(s, model, before), strategy.blocks, 0.0))
    assert strategy.weights.keys() == before.keys()
    for name in FIRST_LAYER_NAMES:
        np.testing.assert_array_equal(strategy.weights[name], before[name])
    for name in ("encoder.experts.adapter_out", "encoder.shared.adapter_out", "encoder.latent.weight", "head.shared"):
        assert (strategy.weights[name] != before[name]).any()


def test_adapters_have_the_rank_that_the_study_asks_for() -> None:
    model = build(study("adapters", training__adapter_rank=5))
    assert model.encoder.experts.adapter_in.shape == (4, 20, 5)
    assert model.encoder.experts.adapter_out.shape == (4, 5, 16)
    assert model.encoder.shared.adapter_in.shape == (1, 20, 5)
    assert not ADAPTERS & dict(build(study("frozen")).named_parameters()).keys()


def test_slow_moves_the_first_layer_a_tenth_as_far() -> None:
    moved = {}
    for first_layer in ("train", "slow"):
        s = study(first_layer, training__weight_decay=0.0)
        model = build(study("train"))
        before = copy(model)
        step(s, model, before)
        moved[first_layer] = {name: value - before[name] for name, value in get_weights(model).items()}
    for name in moved["train"]:
        factor = 0.1 if name in FIRST_LAYER_NAMES else 1.0
        np.testing.assert_allclose(
            moved["slow"][name], factor * moved["train"][name], rtol=2e-3, atol=2e-7, err_msg=name
        )
    assert all(np.abs(moved["train"][name]).max() > 1e-4 for name in FIRST_LAYER_NAMES)


def change_of(s: Study) -> Sum:
    model = build(study("train"))
    with torch.no_grad():
        for p in model.head.covariates.parameters():
            p.fill_(0.1)
    before = copy(model)
    step(s, model, before)
    return {name: value - before[name] for name, value in get_weights(model).items()}


@pytest.mark.parametrize(
    ("key", "prefixes"),
    [
        ("covariate_rate", ("head.covariates.",)),
        ("head_rate", ("head.shared", "head.own")),
        ("learning_rate", ("encoder.", "head.log_baseline")),
    ],
)
def test_covariates_head_and_the_rest_move_at_rates_of_their_own(key: str, prefixes: tuple[str, ...]) -> None:
    base = {"training__weight_decay": 0.0, "training__learning_rate": 0.01, "training__head_rate": 0.01}
    once = change_of(study("train", **base, training__covariate_rate=0.01))
    faster = {"training__covariate_rate": 0.01} | base | {f"training__{key}": 0.02}
    twice = change_of(study("train", **faster))
    for name in once:
        mine = name.startswith(prefixes)
        np.testing.assert_allclose(twice[name], (1 + mine) * once[name], rtol=2e-3, atol=2e-7, err_msg=name)


def test_adapters_begin_where_the_pretrained_encoder_stands() -> None:
    s = study("adapters")
    pretrained = get_weights(build_model(s, SIZES, phase=PRETRAIN, fold=3))
    plain, adapted = build(study("frozen")), build(s)
    outputs = []
    for model in (plain, adapted):
        weights = transfer(copy(model), pretrained)
        for name, value in model.named_parameters():
            value.data.copy_(torch.tensor(weights[name]))
        outputs.append(batch().through(model).latent)
    torch.testing.assert_close(outputs[0], outputs[1])


def test_a_pretrained_encoder_of_another_shape_is_refused() -> None:
    s = study("train")
    weights = copy(build(s))
    other = get_weights(build_model(s.changed(model__width=8), SIZES, phase=PRETRAIN))
    with pytest.raises(ValueError, match=r"does not fit the model .*encoder\.gate|encoder\.experts"):
        transfer(weights, other)
    with pytest.raises(ValueError, match="does not fit the model"):
        transfer(weights, {"head.shared": weights["head.shared"]})


@pytest.mark.parametrize("off", [("expert", 1), ("attention", 2), ("shared", 0)])
def test_routed_and_dense_agree_with_adapters_and_with_an_expert_off(off: Off) -> None:
    dense, routed = (build(study("adapters", model__dispatch=way)) for way in ("dense", "routed"))
    for layer in (dense.encoder.experts, dense.encoder.shared):
        torch.nn.init.normal_(layer.adapter_out)
    routed.load_state_dict(dense.state_dict())
    a, b = (batch().through(m, off=off) for m in (dense, routed))
    torch.testing.assert_close(a.risk, b.risk, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(a.risk, batch().through(dense).risk, rtol=1e-4, atol=1e-5)
