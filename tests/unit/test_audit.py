"""Attacks of an audit: their statistics have known answers, what is broken is caught, and what is honest passes.

Noise has no seed, so honest runs pass but for a stated chance: 6e-5 a run of the gate, 3e-4 over the honest runs of this file.
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
from oncofed.client.privacy import train
from oncofed.client.privacy.dp_sgd import PatientGradients
from oncofed.client.privacy.evidence import Held
from oncofed.common.errors import Refusal
from oncofed.common.modalities import Beside
from oncofed.common.models.build import Sizes, build_model, get_weights
from oncofed.common.models.layers import balance_penalty
from oncofed.common.noise import SecureNoise
from oncofed.common.privacy.accounting import gaussian_epsilon
from oncofed.common.privacy.releases import promise_of
from oncofed.common.privacy.settings import Privacy
from oncofed.common.study import Study
from oncofed.deploy.audit import canary, inversion, membership, released, residuals
from oncofed.deploy.audit.audit import audit, gate
from oncofed.deploy.audit.canary import audit_canaries, gaussian_bound, one_run_epsilon, p_value
from oncofed.deploy.audit.sensitivity import LIMIT, SINGLE, hostile, measure_sensitivity
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


def test_a_sum_whose_norms_round_otherwise_is_caught_with_hostile_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large norms that single precision loses: first weights have none, and double precision loses nothing."""
    from oncofed.client.privacy import dp_sgd

    real = dp_sgd._squared_norms

    def coarse(layer: Any, passes: Any) -> Any:
        out = real(layer, passes)
        return out if passes[0].grad.dtype == torch.float64 else out * (out < 1e4)

    monkeypatch.setattr(dp_sgd, "_squared_norms", coarse)
    found = measure_sensitivity(setting_of(n=24), seed=0)
    assert max(found["largest"]) <= LIMIT
    assert not found["single"]["passed"]
    assert not found["passed"]
    assert found["single"]["worst"] != "first weights"


def test_hostile_weights_are_what_a_site_takes() -> None:
    setting = setting_of("path_gptomic")
    for weights in hostile(setting.weights, np.random.default_rng(0)).values():
        assert {n: (v.shape, v.dtype) for n, v in weights.items()} == {
            n: (v.shape, v.dtype) for n, v in setting.weights.items()
        }
        train.check_sent(setting.model, weights, setting.load)


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


def noise_of(steps: int = 40, numbers: int = 300) -> np.ndarray:
    return np.random.default_rng(5).normal(size=(steps, numbers))


def test_a_parameter_with_less_noise_or_more_is_named_and_honest_ones_are_not() -> None:
    r, sizes, flat = noise_of(), [10, 90, 200], np.zeros(300)
    assert residuals.odd_deviations(r, sizes, flat, 1e-5) == ([], [])
    r[:, :10] = 0.0
    r[:, 100:] *= 1.1
    assert residuals.odd_deviations(r, sizes, flat, 1e-5) == ([0], [2])
    r[:, :10] = np.nan  # which was not released
    assert residuals.odd_deviations(r, sizes, np.full(300, 0.5), 1e-5) == ([], [])
    assert residuals.uncovered(noise_of(), 1e-5) == 0
    r[:, 50] = 1e-9
    assert residuals.uncovered(r, 1e-5) == 1


def test_noise_that_comes_again_is_told() -> None:
    draw, r = np.random.default_rng(0), noise_of()
    assert residuals.repeated(r, 1e-5, draw) == ""
    twice = r.copy()
    twice[17] = -r[3]
    assert "two steps have noise that correlates by 1.000" in residuals.repeated(twice, 1e-5, draw)
    mixed = r + 0.6 * np.random.default_rng(1).normal(size=300)
    assert residuals.repeated(mixed, 1e-5, draw)
    halves = np.concatenate([r[:, :150], r[:, :150]], axis=1)  # two parameters, one noise
    assert residuals.repeated(halves, 1e-5, draw) == "noise comes again after 150 numbers"
    assert residuals.repeated(r[:, :1], 1e-5, draw) == ""


def test_noise_of_another_shape_is_told() -> None:
    draw = np.random.default_rng(0)
    assert not residuals.bent(noise_of(), 1e-5, draw)
    assert residuals.bent(np.random.default_rng(1).laplace(scale=math.sqrt(0.5), size=(40, 300)), 1e-5, draw)


def samples(rate: float, steps: int = 60, of: int = 50) -> list[list[bytes]]:
    inside = np.random.default_rng(3).random((steps, of)) < rate
    return [[b"%d" % i for i in np.flatnonzero(row)] for row in inside]


@pytest.mark.parametrize(
    ("patients", "says"),
    [
        (samples(0.2), ""),
        (samples(0.35), "steps take 0.3"),
        (samples(1.0), "steps take 1.000"),
        ([samples(0.2)[0]] * 60, "the numbers that patients are in spread by"),
        (
            [[b"%d" % ((10 * t + i) % 50) for i in range(10)] for t in range(60)],
            "the numbers that steps take spread by 0.00",
        ),
        ([[*s, s[0]] for s in samples(0.2)], "a patient is more than once in a step"),
        ([[*s, b"%d" % (100 + t)] for t, s in enumerate(samples(0.2))], "patients, 50 are to be trained on"),
    ],
    ids=["honest", "too many", "all", "the same", "in turn", "twice", "strangers"],
)
def test_samples_that_are_not_poisson_are_told(patients: list[list[bytes]], says: str) -> None:
    wrong, told = residuals.odd_samples(patients, 50, 0.2, 1e-5)
    assert told["rate"] == 0.2
    assert any(says in text for text in wrong) if says else not wrong
    assert residuals.odd_samples([[b"a", b"b"]] * 4, 2, 1.0, 1e-5)[0] == []
    assert residuals.odd_samples([[b"a", b"b"], [b"a"]], 2, 1.0, 1e-5)[0] == ["a step does not have every patient"]


POISSON = {"privacy__sample_rate": 0.3, "training__rounds": 24}


def asked(consortium: Path, **keys: object) -> Setting:
    """A study about to train at the consortium's sites, which answer its messages."""
    base = {
        "model__size": "tiny",
        "panel__scale_by": "patient",
        "task__loss": "discrete_time",
        "task__time_edges": (0, 12, 24, 60),
        "training__rounds": 6,
        "training__local_steps": 1,
        "training__learning_rate": 0.05,
        "training__weight_decay": 0.0,
        "splits__only": (0,),
        "privacy__unit": "patient",
        "runtime__threads": 1,
    }
    return open_setting(consortium, Study().changed(**(base | keys)))


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"privacy__epsilon": 1.0},
        POISSON,
        {"training__rounds": 3, "training__local_steps": 2, "training__prox_mu": 0.1, "training__weight_decay": 0.01},
        {"training__optimizer": "adam", "training__learning_rate": 0.001},
    ],
    ids=["epsilon 8", "epsilon 1", "sampled", "two steps, decay and prox", "adam"],
)
def test_what_an_honest_site_releases_passes_the_gate(consortium: Path, keys: dict[str, object]) -> None:
    """Fails by chance in one of 15,000 runs: six tests at 1e-5 each."""
    setting = asked(consortium, **keys)
    epsilon = setting.study.privacy.epsilon
    found = audit_canaries(setting, seed=0)
    assert found["wrong"] == found["quiet_parameters"] == found["loud_parameters"] == []
    assert found["passed"]
    assert found["epsilon"] == pytest.approx(epsilon, rel=1e-3)
    assert found["steps"] == setting.steps
    assert found["false_alarm"] < 1e-4
    assert found["deviation"]["found"] == pytest.approx(found["deviation"]["claimed"], rel=0.02)
    assert 0.1 * epsilon < found["epsilon_lower"] < 1.6 * epsilon  # and it is no empty promise


def _not_drawn(patch: pytest.MonkeyPatch) -> None:
    real = train.cover
    patch.setattr(train, "cover", lambda total, **keys: [total[0], *real(total[1:], **keys)])


def _not_used(patch: pytest.MonkeyPatch) -> None:
    real = train.cover
    patch.setattr(train, "cover", lambda total, **keys: [*real(total, **keys)[:-1], total[-1]])


def _times_three(patch: pytest.MonkeyPatch) -> None:
    class Loose(PatientGradients):
        def clipped_sum(self, parts: Any) -> list[torch.Tensor]:
            return [3 * t for t in super().clipped_sum(parts)]

    patch.setattr(train, "PatientGradients", Loose)


def _three_times_covered(patch: pytest.MonkeyPatch) -> None:
    """The sum once more, twice over, after its noise."""
    real = train.cover

    def cover(total: list[torch.Tensor], **keys: Any) -> list[torch.Tensor]:
        return [noisy + 2 * t for noisy, t in zip(real(total, **keys), total, strict=True)]

    patch.setattr(train, "cover", cover)


def _everybody(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(SecureNoise, "chosen", lambda self, count, rate: torch.arange(count))


def _everybody_unasked(patch: pytest.MonkeyPatch) -> None:
    """A sample is drawn and not taken."""
    patch.setattr(train, "_part", lambda batch, piece, losses_of: lambda *_: losses_of(batch))


def _same_noise(patch: pytest.MonkeyPatch) -> None:
    real, known = SecureNoise.normal, {}

    def normal(self: SecureNoise, count: int) -> torch.Tensor:
        if count not in known:
            known[count] = real(self, count)
        return known[count].clone()

    patch.setattr(SecureNoise, "normal", normal)


def _hundredth(patch: pytest.MonkeyPatch) -> None:
    real = train.train_privately
    patch.setattr(train, "train_privately", lambda *a, **k: real(*a, **(k | {"deviation": k["deviation"] / 100})))


def _first_step_alone(patch: pytest.MonkeyPatch) -> None:
    """Noise in every other step, of twice the variance: a round's sum of two steps looks as it should."""
    real, steps = train.cover, [0]

    def cover(total: list[torch.Tensor], *, deviation: float, **keys: Any) -> list[torch.Tensor]:
        steps[0] += 1
        return real(total, deviation=deviation * math.sqrt(2) if steps[0] % 2 else 0.0, **keys)

    patch.setattr(train, "cover", cover)


def _fifth(patch: pytest.MonkeyPatch) -> None:
    """A fifth of the variance, as five sites would add under a secure sum that is not there."""
    real = SecureNoise.covered

    def covered(self: SecureNoise, total: torch.Tensor, *, sensitivity: float, deviation: float) -> torch.Tensor:
        return real(self, total, sensitivity=sensitivity, deviation=deviation / math.sqrt(5))

    patch.setattr(SecureNoise, "covered", covered)


BROKEN: dict[str, tuple[Any, dict[str, object], str]] = {
    "a parameter without noise": (_not_drawn, {}, "quiet"),
    "noise that is drawn and not used": (_not_used, {}, "quiet"),
    "sums thrice before the noise": (_times_three, {}, "canaries"),
    "sums thrice after the noise": (_three_times_covered, {}, "canaries"),
    "everybody for a sample": (_everybody, POISSON, "steps take 1.000"),
    "a sample that is not taken": (_everybody_unasked, POISSON, "steps take 1.000"),
    "the same noise in every step": (_same_noise, {}, "two steps"),
    "a hundredth of the noise in the answer": (_hundredth, {}, "canaries"),
    "noise in every other step": (
        _first_step_alone,
        {"training__rounds": 3, "training__local_steps": 2},
        "not Gaussian",
    ),
    "a fifth of the variance": (_fifth, {}, "canaries"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_product_that_breaks_its_promise_fails_the_gate(
    consortium: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    breaks, keys, says = BROKEN[how]
    setting = asked(consortium, **keys)
    breaks(monkeypatch)
    found = audit_canaries(setting, 0)
    assert not found["passed"]
    said = gate({"claim": {"accounted": 8.0, "epsilon": 8.0}, "canary": found})
    assert not said["passed"]
    if says == "quiet":
        first = [name for name, p in setting.model.named_parameters() if p.requires_grad]
        assert found["quiet_parameters"] in ([first[0]], [first[-1]])
    elif says == "canaries":
        assert found["epsilon_lower_gate"] > found["epsilon"]
    else:
        assert any(says in text for text in said["failed"]), said


def test_after_an_audit_the_product_is_as_it_was(consortium: Path) -> None:
    before = PatientGradients.clipped_sum, SecureNoise.chosen, Batch.inputs
    watch = released.Watch(np.arange(3), np.ones(3, bool), 1.0)
    with watch.on():
        assert PatientGradients.clipped_sum is not before[0]
    assert (PatientGradients.clipped_sum, SecureNoise.chosen, Batch.inputs) == before


def test_canaries_go_where_they_should() -> None:
    inside = np.array([True, False, True])
    watch = released.Watch(np.array([7, 0, 3]), inside, 2.0)
    a, b = watch._with_canaries([torch.full((4,), 5.0), torch.full((2, 2), 1.0)], inside)
    np.testing.assert_array_equal(a.numpy(), [5, 5, 5, 7])
    np.testing.assert_array_equal(b.numpy(), [[1, 1], [1, 3]])


def test_a_site_that_does_not_answer_is_an_error(consortium: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = asked(consortium)

    def refuse(*_: Any, **__: Any) -> Any:
        raise Refusal("nothing leaves today")

    monkeypatch.setattr(train, "train_privately", refuse)
    with pytest.raises(ValueError, match=r"does not answer round 1 of .*: nothing leaves today"):
        audit_canaries(setting, 0)


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
    assert "policy" not in found


def test_of_a_frozen_encoder_the_first_layer_does_not_travel() -> None:
    found = inversion.audit_inversion(setting_of("gene_moe, frozen"), seed=0)
    assert not found["first_layer_travels"]
    assert found["layer"] == {"name": "head.shared", "tells": "features"}
    assert found["one"]["unprotected"]["correlation"] > 0.9999  # the features, which is what the head sees
    assert "lone_expert" not in found


# -- the whole ---------------------------------------------------------------------------------------------------------


def test_the_gate_says_what_failed() -> None:
    claim = {"accounted": 8.0, "epsilon": 8.0}
    hostile = {"largest": 3.0, "limit": SINGLE, "worst": "cancelling heads"}
    assert gate({"claim": claim}) == {"passed": True, "failed": [], "alarms": []}
    many = {
        "claim": claim | {"accounted": 9.0},
        "sensitivity": {"passed": False, "largest": [1.0, LIMIT + 1], "limit": LIMIT, "single": hostile},
        "canary": {
            "passed": False,
            "quiet_parameters": ["head.own"],
            "loud_parameters": ["head.shared"],
            "wrong": ["two steps have noise that correlates by 1.000"],
            "epsilon_lower_gate": 9.0,
            "epsilon_lower_one_run": 8.5,
            "epsilon": 8.0,
            "steps": 50,
            "alarm": True,
        },
        "membership": {"alarm": True},
    }
    said = gate(many)
    assert not said["passed"]
    assert [text.split()[0] for text in said["failed"]] == ["the", "one", "one", "1", "canaries", "1", "two"]
    assert len(said["alarms"]) == 2


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"privacy\.unit = 'none': an audit attacks what is promised of a patient"):
        open_setting(tmp_path, Study())
    with pytest.raises(ValueError, match="--checks magic: choose from sensitivity,canary"):
        audit(Study(), tmp_path, ("magic",))
