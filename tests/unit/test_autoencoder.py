"""Pre-training: expression from the latent vector and back, with and without an adversary."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from oncofed.client.batch import Batch
from oncofed.client.objectives import Reconstruction
from oncofed.client.train import train_locally
from oncofed.common.blocks import EVIDENCE, Sum
from oncofed.common.models.autoencoder import DECODER, LOG_VARIANCE, Critic, GeneAutoencoder, reconstruction_loss
from oncofed.common.models.build import Sizes, build_model, get_weights, set_weights, transfer
from oncofed.common.models.output import ModelOutput
from oncofed.common.study import PRETRAIN, TRAIN, Study
from oncofed.server.aggregate import Accumulator, mean_by_block
from oncofed.server.strategy import EvidenceStrategy
from torch.distributions import Normal, kl_divergence

CANCERS = ("BRCA", "LUAD", "STAD")
SIZES = Sizes(20, CANCERS, 4, 2)


def study(**keys: object) -> Study:
    base = {"model__size": "tiny", "pretraining__rounds": 12, "pretraining__learning_rate": 0.02}
    return Study().changed(**(base | keys))


def build(s: Study) -> GeneAutoencoder:
    model = build_model(s, SIZES, phase=PRETRAIN)
    assert isinstance(model, GeneAutoencoder)
    return model


def batch(n: int = 40, seed: int = 0) -> Batch:
    """Expression of three programs: of the variance of 1, most can be told from three numbers."""
    programs = np.random.default_rng(99).normal(size=(3, SIZES.genes))
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 3)) @ programs / np.sqrt(3) * 0.95 + rng.normal(size=(n, SIZES.genes)) * 0.3
    rest = [torch.zeros(n) for _ in range(2)]
    return Batch(
        torch.tensor(x, dtype=torch.float32),
        torch.zeros(n, 2),
        torch.arange(n) % 3,
        *rest,
        torch.zeros(n, 4),
        torch.zeros(n, dtype=torch.long),
    )


def local_sum(s: Study, model: GeneAutoencoder, weights: Sum, patients: Batch, round_: int = 1) -> Sum:
    load = {group: np.full(n, 1.0 / n) for group, n in model.mixtures().items()}
    return train_locally(model, weights, patients, s, phase=PRETRAIN, round_=round_, seed=round_, load=load)[0]


def error_of(model: GeneAutoencoder, patients: Batch) -> float:
    with torch.no_grad():
        return float((model(patients.x_BG, patients.cancer_B).score - patients.x_BG).square().mean())


@pytest.mark.parametrize("critic", [False, True])
def test_a_federations_reconstruction_gets_better_also_for_patients_that_nobody_trained(critic: bool) -> None:
    s = study(pretraining__critic=critic)
    model, sites, others = build(s), [batch(60, 1), batch(30, 2)], batch(50, 3)
    strategy = EvidenceStrategy.of(s.aggregation, model)
    errors = []
    for round_ in range(1, s.pretraining.rounds + 1):
        shapes = {n: v.shape for n, v in strategy.weights.items()} | {EVIDENCE: (len(strategy.blocks.names),)}
        accumulator = Accumulator(shapes)
        for site in sites:
            accumulator.add(local_sum(s, model, strategy.weights, site, round_))
        strategy.step(*mean_by_block(accumulator.total(), strategy.blocks, 0.0))
        set_weights(model, strategy.weights)
        errors.append(error_of(model.eval(), others))
    alone = float(others.x_BG.square().mean())  # who says the mean patient every time
    assert errors[-1] < errors[4] < errors[0]
    assert errors[-1] < 0.6 * alone


def test_every_parameter_is_owned_by_a_block_and_moves_in_a_round() -> None:
    s = study(pretraining__critic=True)
    model = build(s)
    before = {name: value.copy() for name, value in get_weights(model).items()}
    total = local_sum(s, model, before, batch())
    assert set(model.state_dict()) == set(before) == set(model.blocks().owners) == total.keys() - {EVIDENCE}
    for name in before:
        assert np.abs(total[name]).max() > 0, name
    evidence = dict(zip(model.blocks().names, total[EVIDENCE], strict=True))
    assert evidence["trunk"] == pytest.approx(40)
    for group, n in model.mixtures().items():
        assert sum(evidence[f"{group}/{e}"] for e in range(n)) == pytest.approx(40, rel=1e-5)


def test_blocks_are_those_of_the_model_to_come_and_the_decoders_experts() -> None:
    s = study()
    ours, later = build(s).blocks().owners, build_model(s, SIZES, phase=TRAIN).blocks().owners
    assert {n: o for n, o in ours.items() if n.startswith("encoder.")} == {
        n: o for n, o in later.items() if n.startswith("encoder.")
    }
    assert ours["decoder.weight"] == tuple(f"{DECODER}/{e}" for e in range(4))
    assert ours["output.weight"] == ours["log_variance.weight"] == ours["gate.weight"] == "trunk"


def test_the_encoder_goes_over_whole_and_the_rest_of_the_model_keeps_its_own() -> None:
    s = study()
    pretrained, first = get_weights(build(s)), get_weights(build_model(s, SIZES, phase=TRAIN, fold=1))
    weights = transfer(first, pretrained)
    assert weights.keys() == first.keys()
    for name, value in weights.items():
        np.testing.assert_array_equal(value, (pretrained if name.startswith("encoder.") else first)[name])


def test_a_patients_reconstruction_does_not_depend_on_the_others() -> None:
    model, patients = build(study()).eval(), batch()
    whole = model(patients.x_BG, patients.cancer_B)
    for i in range(5):
        row = torch.tensor([i])
        alone = model(patients.x_BG[row], patients.cancer_B[row])
        torch.testing.assert_close(alone.score, whole.score[row], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(alone.latent, whole.latent[row], rtol=1e-4, atol=1e-5)


def test_noise_of_the_latent_comes_from_the_generator_and_is_as_wide_as_it_says() -> None:
    model, patients = build(study(model__gate_noise=False, model__dropout=0.0)), batch()
    decoded: list[torch.Tensor] = []
    model.gate.register_forward_pre_hook(lambda gate, inputs: decoded.append(inputs[0]))
    x, c = patients.x_BG, patients.cancer_B

    def variance(log_variance: float) -> float:
        with torch.no_grad():
            model.log_variance.weight.zero_()
            model.log_variance.bias.fill_(log_variance)
            decoded.clear()
            noisy = model(x, c, torch.Generator().manual_seed(1))
            again = model(x, c, torch.Generator().manual_seed(1))
            torch.testing.assert_close(noisy.score, again.score, rtol=0, atol=0)
            mean = model(x, c).latent[:, 0]
        torch.testing.assert_close(decoded[2], mean, rtol=0, atol=0)  # without a generator, the mean itself
        return float((decoded[0] - mean).square().mean())

    assert variance(0.0) == pytest.approx(1.0, rel=0.2)
    assert variance(-4.0) == pytest.approx(np.exp(-4.0), rel=0.2)
    assert variance(50.0) == variance(LOG_VARIANCE[1])  # beyond its bounds it is cut: exp would overflow


def test_the_loss_is_squared_error_and_the_divergence_from_a_standard_normal() -> None:
    mean, log_variance, x = torch.randn(7, 3), torch.randn(7, 3), torch.randn(7, 20)
    output = ModelOutput(score=torch.randn(7, 20), latent=torch.stack([mean, log_variance], dim=1))
    loss, error = reconstruction_loss(output, x, kl=0.3)
    theirs = kl_divergence(Normal(mean, torch.exp(0.5 * log_variance)), Normal(0.0, 1.0)).mean(1)
    torch.testing.assert_close(error, (output.score - x).square().mean(1))
    torch.testing.assert_close(loss, error + 0.3 * theirs)


# -- the critic --------------------------------------------------------------------------------------------------------


def test_the_critics_steps_leave_encoder_and_decoder_untouched() -> None:
    s = study(pretraining__critic=True)
    model = build(s)
    before = {name: value.copy() for name, value in get_weights(model).items()}
    Reconstruction(s.pretraining).before_step(model, batch(), torch.Generator().manual_seed(0))
    for name, p in model.named_parameters():
        moved = (get_weights(model)[name] != before[name]).any()
        assert moved == name.startswith("critic."), name
        assert (p.grad is not None) == name.startswith("critic."), name


def test_the_models_own_step_moves_the_critic_no_further() -> None:
    """The verdict on a reconstruction has a gradient in the critic too, but only the critic's own optimiser moves it."""
    s = study(pretraining__critic=True, pretraining__local_steps=1)
    model, patients = build(s), batch(20)
    before = {name: value.copy() for name, value in get_weights(model).items()}
    local_sum(s, model, before, patients)
    after = {name: value.copy() for name, value in get_weights(model).items()}
    set_weights(model, before)
    Reconstruction(s.pretraining).before_step(model, patients, torch.Generator().manual_seed(1))
    for name, value in get_weights(model).items():
        if name.startswith("critic."):
            np.testing.assert_array_equal(value, after[name])


def test_a_critic_learns_to_tell_patients_from_reconstructions() -> None:
    s = study(pretraining__critic=True, pretraining__critic_steps=60)
    model, patients = build(s), batch()
    Reconstruction(s.pretraining).before_step(model, patients, torch.Generator().manual_seed(0))
    assert model.critic is not None
    with torch.no_grad():
        fake = model(patients.x_BG, patients.cancer_B).score
        assert model.critic(patients.x_BG).mean() > model.critic(fake).mean() + 0.1


@pytest.mark.parametrize(("slope", "expected"), [(1.0, 0.0), (3.0, 4.0), (0.0, 1.0)])
def test_the_gradient_penalty_of_a_linear_critic_is_its_slopes_distance_from_one(slope: float, expected: float) -> None:
    critic = Critic(20, 16)
    linear = torch.nn.Linear(20, 1)
    with torch.no_grad():
        linear.weight.copy_(slope * linear.weight / linear.weight.norm())
    critic.layers = torch.nn.Sequential(linear)
    real, fake = torch.randn(9, 20), torch.randn(9, 20)
    penalty = critic.gradient_penalty(real, fake, torch.Generator().manual_seed(0))
    torch.testing.assert_close(penalty, torch.full((9,), expected), rtol=1e-5, atol=1e-6)


def test_the_gradient_penalty_is_taken_between_each_pair_and_trains_the_critic() -> None:
    critic = Critic(20, 16)
    real, fake = torch.randn(9, 20), torch.randn(9, 20)
    penalty = critic.gradient_penalty(real, fake, torch.Generator().manual_seed(0))
    share = torch.rand(9, 1, generator=torch.Generator().manual_seed(0))
    between = share * real + (1 - share) * fake
    jacobian = torch.autograd.functional.jacobian(lambda x: critic(x).sum(), between)
    torch.testing.assert_close(penalty, (jacobian.norm(dim=1) - 1).square())
    penalty.mean().backward()
    assert all(p.grad is not None for name, p in critic.named_parameters() if name.endswith("weight"))
