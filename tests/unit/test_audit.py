"""Attacks of an audit: their statistics have known answers, what is broken is caught, and what is honest passes.

Noise has no seed, so honest runs pass but for a stated chance: 2e-5 a run of the gate, less than 1e-4 over this file.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oncofed.client.bags import Bags
from oncofed.client.batch import Batch
from oncofed.client.privacy.train import Held
from oncofed.common.modalities import Beside
from oncofed.common.models.build import Sizes, build_model, get_weights
from oncofed.common.models.layers import balance_penalty
from oncofed.common.noise import SecureNoise
from oncofed.common.privacy.accounting import gaussian_epsilon
from oncofed.common.privacy.releases import promise_of
from oncofed.common.privacy.settings import Privacy
from oncofed.deploy.audit import canary, inversion, membership
from oncofed.deploy.audit.audit import audit, gate
from oncofed.deploy.audit.canary import Tapped, audit_canaries, gaussian_bound, one_run_epsilon, p_value, too_quiet
from oncofed.deploy.audit.sensitivity import LIMIT, measure_sensitivity
from oncofed.deploy.audit.setting import Setting, open_setting, remembered
from scipy.stats import norm

sys.path.insert(0, str(Path(__file__).parents[1]))
from toy_private import BESIDE, CANCERS, GENES, INTERVALS, KINDS, patients, study_of
from toy_slides import write_h5

MODALITIES = frozenset(("rna", "pathology", "alterations"))


def setting_of(kind: str = "gene_moe, discrete time", n: int = 60, epsilon: float = 8.0, **keys: object) -> Setting:
    """A study about to train made-up patients, in single precision as the product does."""
    base = {"training__rounds": 6, "training__local_steps": 1, "training__weight_decay": 0.0}
    base |= {"splits__only": (0,)}
    study = study_of(kind, **(base | keys))
    model = build_model(study, Sizes(GENES, CANCERS, INTERVALS, 2, BESIDE))
    # past the checks of a study, which want a public model behind some of these
    study = study.model_copy(update={"privacy": Privacy(unit="patient", epsilon=epsilon)})
    values = {k: _single(v) for k, v in vars(patients(n)).items()}
    held = Held(frozenset(range(3)), MODALITIES)
    weights = {name: value.copy() for name, value in get_weights(model).items()}
    return Setting(study, model, weights, Batch(**values), held, promise_of(study), ("toy",), 0)  # type: ignore[arg-type]


def _single(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


# -- how far a patient moves a sum -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_no_patient_moves_a_sum_further_than_the_clip(kind: str) -> None:
    found = measure_sensitivity(setting_of(kind, n=24), seed=0)
    assert found["passed"]
    assert found["patients"] == 24
    assert found["others"] < 1e-9
    assert max(found["largest"]) > 0.99  # or nothing was cut and nothing tested


def test_patients_with_tiles_do_not_move_a_sum_further_either(tmp_path: Path) -> None:
    study = study_of("path_gptomic", fusion__modalities=("rna", "pathology"), splits__only=(0,))
    beside = Beside(image_kind="bag", image_width=5, images="toy")
    model = build_model(study, Sizes(GENES, CANCERS, INTERVALS, 2, beside))
    study = study.model_copy(update={"privacy": Privacy(unit="patient")})
    draw = np.random.default_rng(0)
    slides = [
        str(write_h5(tmp_path / f"P{i}.h5", draw.normal(size=(2 + i % 3, 5)).astype(np.float32))) for i in range(12)
    ]
    values = {k: _single(v) for k, v in vars(patients(12)).items()}
    values |= {"bags": Bags(np.array(slides), 5, 0, torch.device("cpu")), "image_BP": None}
    values["has"] = {m: torch.ones(12, dtype=torch.bool) for m in values["has"]}
    weights = {name: value.copy() for name, value in get_weights(model).items()}
    held = Held(frozenset(range(3)), MODALITIES)
    found = measure_sensitivity(
        Setting(study, model, weights, Batch(**values), held, promise_of(study), ("toy",), 0), 0
    )  # type: ignore[arg-type]
    assert found["passed"]
    assert found["others"] < 1e-9


def _cox(model: Any, study: Any, load: Any) -> Any:
    """The terms of Cox' partial likelihood by patient: every risk set has others in it."""

    def losses(batch: Batch) -> torch.Tensor:
        risk_B = batch.through(model).risk
        later_BB = batch.time_B[None] >= batch.time_B[:, None]
        return -batch.event_B * (risk_B - torch.logsumexp(risk_B[None].masked_fill(~later_BB, -torch.inf), dim=1))

    return losses


def _weighted_mean(model: Any, study: Any, load: Any) -> Any:
    """Cross-entropy over the weights of the batch's classes, as `CrossEntropyLoss(weight=...)` has it."""
    weight_C = torch.tensor([8.0, 1.0, 1.0], dtype=torch.float64)

    def losses(batch: Batch) -> torch.Tensor:
        w_B = weight_C[batch.cancer_B]
        loss_B = torch.nn.functional.cross_entropy(batch.through(model).score, batch.cancer_B, reduction="none")
        return w_B * loss_B * len(batch) / w_B.sum()

    return losses


def _balance_of_the_batch(model: Any, study: Any, load: Any) -> Any:
    """The balance of experts by the batch's own load, which every patient is part of."""

    def losses(batch: Batch) -> torch.Tensor:
        output = batch.through(model)
        parts = [balance_penalty(output.logits[g], output.shares[g].mean(0)) for g in output.logits]
        return 10.0 * torch.stack(parts).sum(0)

    return losses


@pytest.mark.parametrize(
    ("kind", "losses"),
    [("gene_moe", _cox), ("gene_moe, classes", _weighted_mean), ("gene_moe", _balance_of_the_batch)],
    ids=["cox", "class weights", "balance of the batch"],
)
def test_losses_that_couple_patients_are_caught(kind: str, losses: Any) -> None:
    found = measure_sensitivity(setting_of(kind, n=120), seed=0, losses=losses)
    assert not found["passed"]
    assert max(found["largest"]) > LIMIT
    assert found["others"] > 0.01


# -- canaries ----------------------------------------------------------------------------------------------------------


def test_the_one_run_p_value_is_the_papers() -> None:
    assert p_value(100, 100, 75, math.log(3), 0.0) == pytest.approx(0.553, abs=5e-4)
    assert p_value(100, 100, 75, 0.0, 1e-3) > p_value(100, 100, 75, 0.0, 0.0)


def test_the_one_run_bound_of_perfect_and_of_blind_guesses() -> None:
    inside = np.arange(600) % 2 == 0
    guesses = 2 * (600 // canary.GUESSED)
    q = 0.05 ** (1 / guesses)  # all guesses right has this chance at most: epsilon = log(q / (1 - q))
    assert one_run_epsilon(inside.astype(float), inside, 0.0) == pytest.approx(math.log(q / (1 - q)), abs=1e-4)
    assert one_run_epsilon(np.random.default_rng(0).normal(size=600), inside, 1e-5) == 0.0


def test_the_gaussian_bound_exceeds_the_truth_as_often_as_it_says() -> None:
    draw, mu, over = np.random.default_rng(0), 1.0, []
    for _ in range(2000):
        inside = draw.random(200) < 0.5
        over.append(gaussian_bound(draw.normal(size=200) + mu * inside, inside, 0.95).low > mu)
    assert 0.03 < np.mean(over) < 0.07
    inside = draw.random(100_000) < 0.5
    found = gaussian_bound(draw.normal(size=100_000) + mu * inside, inside, 0.95)
    assert found.mu == pytest.approx(mu, abs=0.03)
    assert 0.95 * gaussian_epsilon(mu, 1e-5) < gaussian_epsilon(found.low, 1e-5) < 1.02 * gaussian_epsilon(mu, 1e-5)


def test_a_parameter_with_less_noise_is_named_and_honest_ones_are_not() -> None:
    draw = np.random.default_rng(0)
    honest = [(float(np.square(2.0 * draw.normal(size=n)).sum()), n) for n in (10, 300, 5000)]
    assert too_quiet(honest, 2.0, canary.GATE) == []
    assert too_quiet([honest[0], (honest[1][0] / 4, 300), (0.0, 5)], 2.0, canary.GATE) == [1, 2]


@pytest.mark.parametrize("epsilon", [8.0, 1.0])
def test_honest_noise_passes_the_gate(epsilon: float) -> None:
    """Fails by chance in one of 50,000 runs."""
    found = audit_canaries(setting_of(epsilon=epsilon), seed=0)
    assert found["passed"]
    assert found["epsilon"] == pytest.approx(epsilon, rel=1e-3)
    assert found["steps"] == 6
    assert found["canaries"] * found["draws"] >= canary.SCORES
    assert found["deviation"]["found"] == pytest.approx(found["deviation"]["claimed"], rel=0.03)
    assert 0.1 * epsilon < found["epsilon_lower"] < 1.6 * epsilon  # and it is no empty promise


def _tenth(noise: SecureNoise, total: torch.Tensor, sensitivity: float, deviation: float) -> torch.Tensor:
    return SecureNoise.covered(noise, total, sensitivity=sensitivity, deviation=deviation / 10)


def _shared(noise: SecureNoise, total: torch.Tensor, sensitivity: float, deviation: float) -> torch.Tensor:
    """A fifth of the variance, as five sites would add under a secure sum that is not there."""
    return SecureNoise.covered(noise, total, sensitivity=sensitivity, deviation=deviation / math.sqrt(5))


BROKEN = {"a tenth": {"covered": _tenth}, "five sites": {"covered": _shared}, "not clipped": {"length": 3.0}}


@pytest.mark.parametrize("epsilon", [8.0, 1.0])
@pytest.mark.parametrize("how", BROKEN)
def test_broken_noise_fails_the_gate(how: str, epsilon: float) -> None:
    found = audit_canaries(setting_of(epsilon=epsilon), 0, **BROKEN[how])
    assert not found["passed"]
    assert found["epsilon_lower_gate"] > found["epsilon"]  # by canaries alone, whatever the spread of noise says
    assert bool(found["quiet_parameters"]) == ("covered" in BROKEN[how])


def test_one_small_parameter_without_noise_fails_the_gate() -> None:
    """Canaries hardly ever meet it."""

    def covered(noise: SecureNoise, total: torch.Tensor, sensitivity: float, deviation: float) -> torch.Tensor:
        return SecureNoise.covered(
            noise, total, sensitivity=sensitivity, deviation=0.0 if total.shape == (3, 8) else deviation
        )

    found = audit_canaries(setting_of(), 0, covered)
    assert found["quiet_parameters"] == ["head.own"]
    assert not found["passed"]


def test_a_step_that_leaves_a_parameter_uncovered_is_an_error() -> None:
    noise = Tapped(np.arange(4), np.ones((1, 4), bool), 10, height=1.0)
    noise.covered(torch.zeros(6), sensitivity=1.0, deviation=1.0)
    with pytest.raises(ValueError, match="covered 6 numbers, which are not whole steps of 10"):
        _ = noise.score
    noise.covered(torch.zeros(4), sensitivity=1.0, deviation=0.0)
    assert noise.steps == 1


def test_canaries_go_where_they_should_and_training_goes_on_with_the_first_draw() -> None:
    inside = np.array([[True, False, True], [False, True, True]])
    noise = Tapped(np.array([7, 0, 3]), inside, 8, height=2.0)
    a = noise.covered(torch.full((4,), 5.0), sensitivity=1.0, deviation=0.0)
    b = noise.covered(torch.full((2, 2), 1.0), sensitivity=1.0, deviation=0.0)
    np.testing.assert_allclose(noise.score, 2.0 * inside, atol=1e-6)
    np.testing.assert_allclose(a.numpy(), [5, 5, 5, 7], atol=1e-6)
    np.testing.assert_allclose(b.numpy(), [[1, 1], [1, 3]], atol=1e-6)


def test_too_few_parameters_hold_no_canaries() -> None:
    setting = setting_of()
    for name, p in setting.model.named_parameters():
        p.requires_grad_(name == "head.shared")
    with pytest.raises(ValueError, match="trains 8 numbers, which hold no 8 canaries"):
        audit_canaries(setting, 0)


# -- membership --------------------------------------------------------------------------------------------------------


def shadows(effect: float, models: int = 40, n: int = 400, seed: int = 0) -> membership.Trained:
    """Losses around each patient's own level, lower by `effect` deviations where she was trained on."""
    draw = np.random.default_rng(seed)
    inside = np.stack([draw.permutation(n) < n // 2 for _ in range(models)])
    loss = 5.0 + draw.normal(0, 1, n) + 0.3 * (draw.normal(size=(models, n)) - effect * inside)
    return membership.Trained(loss, inside)


def test_scores_with_a_known_answer() -> None:
    draw = np.random.default_rng(0)
    inside = np.arange(200_000) % 2 == 0
    score = draw.normal(size=200_000) + inside
    assert membership.auc(score, inside) == pytest.approx(norm.cdf(1 / math.sqrt(2)), abs=0.004)
    assert membership.found_at(score, inside, 0.01) == pytest.approx(norm.cdf(1 - norm.ppf(0.99)), abs=0.006)
    assert membership.auc(np.zeros(6), np.arange(6) % 2 == 0) == 0.5
    assert membership.found_at(np.zeros(200), np.arange(200) % 2 == 0, 0.01) == 0.0  # ties find nobody
    assert membership.bound_of(1.0, 1e-5, np.array([0.01]))[0] == pytest.approx(math.e * 0.01 + 1e-5)


@pytest.mark.parametrize("effect", [0.0, 1.0, 3.0])
def test_lira_and_rmia_find_what_is_there_and_nothing_else(effect: float) -> None:
    """Of a shift by d deviations the best test has AUC Phi(d / sqrt 2); the levels of patients hide it from the loss alone."""
    found = membership.attack(shadows(effect), 8, bounded=False, seed=0)
    best = norm.cdf(effect / math.sqrt(2))
    for name in ("lira", "rmia"):
        assert found[name]["auc"]["value"] == pytest.approx(best, abs=0.03)
        assert found[name]["auc"]["low"] <= found[name]["auc"]["value"] <= found[name]["auc"]["high"]
        assert found[name]["tpr"]["value"] == pytest.approx(norm.cdf(effect - norm.ppf(0.99)), abs=0.12)
    assert found["loss"]["auc"]["value"] < max(0.55, best - 0.05)


def test_patients_whom_no_reference_tells_apart_get_no_score() -> None:
    inside = np.array([[True, False], [True, True], [True, False]])
    assert membership.lira(np.zeros(2), np.zeros((3, 2)), inside)[0] == 0.0
    assert np.isfinite(membership.rmia(np.zeros(2), np.zeros((3, 2)), inside)).all()


def test_phi_is_the_logit_of_the_likelihood() -> None:
    p = np.array([0.1, 0.5, 0.99])
    np.testing.assert_allclose(membership.phi(-np.log(p)), np.log(p / (1 - p)))


def test_a_frozen_encoder_that_is_remembered_changes_no_model() -> None:
    setting = setting_of("gene_moe, frozen", training__learning_rate=0.1)
    whole, short = (
        membership.train_shadows(s, 2, 0, private=False, advance=lambda: None) for s in (setting, remembered(setting))
    )
    np.testing.assert_allclose(whole.loss, short.loss, rtol=1e-5)
    noisy = membership.train_shadows(remembered(setting), 2, 0, private=True, advance=lambda: None)
    assert np.isfinite(noisy.loss).all()
    trained = setting_of()
    assert remembered(trained) is trained


def test_more_reference_models_are_asked_for() -> None:
    with pytest.raises(ValueError, match="--models 3: attacks need reference models, 8 at least"):
        membership.audit_membership(setting_of(), 3, 0)


# -- inversion ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gene_moe", "gene_moe, classes", "path_gptomic", "t_gem, linear"])
def test_expression_comes_out_exactly_without_protection_and_not_at_all_with_noise(kind: str) -> None:
    found = inversion.audit_inversion(setting_of(kind, n=120), seed=0)
    bare, noisy = found["one"]["unprotected"], found["one"]["protected"]
    assert found["first_layer_travels"]
    assert found["layer"]["tells"] == "expression"
    assert bare["correlation"] > 0.9999
    if kind != "t_gem, linear":  # a head without bias tells all but the length
        assert bare["error"] < 1e-3
        assert found["six"]["unprotected"]["auc"] == 1.0
        assert found["six"]["unprotected"]["distance"] < 0.01 < 0.3 < found["six"]["unprotected"]["others"]
        lone = found["lone_expert"]
        assert lone["unprotected"]["sites"] > 0.1
        assert lone["unprotected"]["correlation"] > 0.9999
        assert lone["unprotected"]["error"] < 1e-3
    assert noisy["correlation"] < noisy["of_another"] + 0.35
    assert noisy["error"] > 0.8
    assert found["policy"] == {"patients": 6, "refused": True, "reason": found["policy"]["reason"]}
    assert "fewer patients are behind 'train' than the 10 that its policy wants" in found["policy"]["reason"]


def test_of_a_frozen_encoder_the_first_layer_does_not_travel() -> None:
    found = inversion.audit_inversion(setting_of("gene_moe, frozen"), seed=0)
    assert not found["first_layer_travels"]
    assert found["layer"] == {"name": "head.shared", "tells": "features"}
    assert found["one"]["unprotected"]["correlation"] > 0.9999  # the features, which is what the head sees
    assert "lone_expert" not in found


# -- the whole ---------------------------------------------------------------------------------------------------------


def test_the_gate_says_what_failed() -> None:
    claim = {"accounted": 8.0, "epsilon": 8.0}
    assert gate({"claim": claim}) == {"passed": True, "failed": [], "alarms": []}
    many = {
        "claim": claim | {"accounted": 9.0},
        "sensitivity": {"passed": False, "largest": [1.0, LIMIT + 1], "limit": LIMIT},
        "canary": {
            "passed": False,
            "quiet_parameters": ["head.own"],
            "epsilon_lower_gate": 9.0,
            "epsilon_lower_one_run": 8.5,
            "epsilon": 8.0,
            "steps": 50,
            "alarm": True,
        },
        "membership": {"alarm": True},
        "inversion": {"policy": {"refused": False, "patients": 6}},
    }
    said = gate(many)
    assert not said["passed"]
    assert [text.split()[0] for text in said["failed"]] == ["the", "one", "1", "canaries", "the"]
    assert len(said["alarms"]) == 2


def test_a_shortened_study_keeps_its_noise_and_claims_less() -> None:
    setting = setting_of(training__rounds=40, training__local_steps=3)
    short = setting.shortened(50)
    assert (short.steps, short.promise) == (48, setting.promise)
    assert setting.epsilon(48) < setting.epsilon(120) == pytest.approx(8.0, rel=1e-3)
    assert setting_of(training__rounds=2, training__local_steps=70).shortened(50).steps == 50


def test_mistakes_are_named(tmp_path: Path) -> None:
    from oncofed.common.study import Study

    with pytest.raises(ValueError, match=r"privacy\.unit = 'none': an audit attacks what is promised of a patient"):
        open_setting(tmp_path, Study())
    with pytest.raises(ValueError, match="--checks magic: choose from sensitivity,canary"):
        audit(Study(), tmp_path, ("magic",))
