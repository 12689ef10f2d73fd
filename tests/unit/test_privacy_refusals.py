"""Studies that cannot keep their promise: each is refused with its reason and a remedy that works."""

from __future__ import annotations

import pytest
from oncofed.common.privacy.accounting import epsilon_of
from oncofed.common.privacy.releases import TRAINING, folds_of, kept, promise_of, releases
from oncofed.common.study import Study

SAFE: dict[str, object] = {
    "privacy__unit": "patient",
    "panel__scale_by": "patient",
    "task__time_edges": (0, 12, 24, 60),
    "splits__only": (0,),
}


def study(**keys: object) -> Study:
    return Study().changed(**(SAFE | keys))


def test_the_safe_study_is_allowed() -> None:
    assert study().privacy.of_patients
    assert study().independent_folds


BROKEN: list[tuple[str, dict[str, object], str, dict[str, object]]] = [
    ("cox", {"task__loss": "cox"}, "risk sets.*'piecewise_exponential'", {"task__loss": "weibull"}),
    ("class prior", {"task__kind": "classification"}, "task.class_prior.*'none'", {"task__class_prior": "none"}),
    (
        "modulation",
        {"model__name": "path_gptomic", "training__start": "m"},
        "fusion.modulation.*'none'",
        {"fusion__modulation": "none"},
    ),
    ("bfloat16", {"model__expert_dtype": "bfloat16"}, "low precision", {"model__expert_dtype": "float32"}),
    ("scale", {"panel__scale_by": "auto"}, "mean and spread of genes.*'patient'", {"panel__scale_by": "patient"}),
    ("covariates", {"panel__covariates": ("age",)}, "panel.covariates.*training.start", {"training__start": "m"}),
    (
        "images",
        {"model__name": "path_gptomic", "fusion__modulation": "none"},
        "pathology.*training.start",
        {"training__start": "m"},
    ),
    ("time grid", {"task__time_edges": ()}, "task.time_edges", {"task__time_edges": (0, 24)}),
    ("pre-training", {"pretraining__rounds": 2}, "pretraining.rounds.*public", {"pretraining__rounds": 0}),
    ("patience", {"splits__validation": 0.2}, "splits.validation", {"splits__validation": 0.0}),
    ("attributions", {"analysis__attributions": True}, "analysis.attributions", {"analysis__attributions": False}),
    ("models of sites", {"analysis__cross_site": ("local",)}, "analysis.cross_site", {"analysis__cross_site": ()}),
    ("dealt in turn", {"splits__deal": "stratified"}, "splits.deal.*'independent'", {"splits__deal": "independent"}),
    ("evaluation", {"evaluation__epsilon": 9.0}, "nothing of privacy.epsilon", {"evaluation__epsilon": 1.0}),
    ("noise seed", {"privacy__noise_seed": 3}, "drawn again", {}),
    ("gdp", {"privacy__accountant": "gdp"}, "reports less than is spent", {"privacy__accountant": "pld"}),
    ("rdp", {"privacy__accountant": "rdp"}, "wastes noise", {"privacy__accountant": "pld"}),
    (
        "experts that are not",
        {"privacy__evidence": "noised", "model__experts": 0, "model__attention_experts": 0},
        "counts of experts",
        {"privacy__evidence": "public"},
    ),
    (
        "hospital evidence",
        {"privacy__unit": "hospital", "privacy__evidence": "noised"},
        "beside its change",
        {"privacy__evidence": "public"},
    ),
    (
        "hospital statistics",
        {"privacy__unit": "hospital", "privacy__statistics": "noised"},
        "set it to 'public'",
        {"privacy__statistics": "public"},
    ),
    (
        "hospital evaluation",
        {"privacy__unit": "hospital", "evaluation__epsilon": 1.0},
        "not a hospital",
        {"evaluation__epsilon": 0.0},
    ),
]


@pytest.mark.parametrize(("broken", "says", "remedy"), [b[1:] for b in BROKEN], ids=[b[0] for b in BROKEN])
def test_what_breaks_the_promise_is_refused_and_the_remedy_helps(
    broken: dict[str, object], says: str, remedy: dict[str, object]
) -> None:
    with pytest.raises(ValueError, match=says):
        study(**broken)
    fixed = {k: v for k, v in broken.items() if k != "privacy__noise_seed"} | remedy
    assert study(**fixed).privacy.on


def test_without_privacy_nothing_of_this_is_refused() -> None:
    for name, broken, _, _ in BROKEN:
        if name not in ("noise seed", "gdp", "rdp", "dealt in turn", "evaluation") and "privacy__unit" not in broken:
            study(
                **(
                    {k: v for k, v in broken.items() if k not in ("task__time_edges",)}
                    | {"privacy__unit": "none"}
                    | SAFE_PLAIN(name)
                )
            )


def SAFE_PLAIN(name: str) -> dict[str, object]:  # noqa: N802
    return {"task__kind": "classification", "analysis__attributions": True} if name == "attributions" else {}


def test_a_hospital_may_use_cox() -> None:
    assert study(privacy__unit="hospital", task__loss="cox").task.loss == "cox"


# -- one scale of noise for the whole study ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"privacy__evidence": "noised"},
        {"privacy__statistics": "noised", "evaluation__epsilon": 1.0},
        {"privacy__unit": "hospital"},
        {"splits__only": (0, 1), "splits__refit": True},
        {"privacy__sample_rate": 0.2, "privacy__epsilon": 2.0},
    ],
)
def test_everything_together_comes_to_the_epsilon_that_is_promised(keys: dict[str, object]) -> None:
    s = study(**keys)
    promise = promise_of(s)
    whole = epsilon_of(list(promise.mechanisms.values()), s.privacy.delta)
    assert whole == promise.epsilon <= s.privacy.epsilon
    assert whole > 0.99 * s.privacy.epsilon  # no noise is wasted
    training = promise.mechanisms[TRAINING]
    steps = s.training.rounds * (s.training.local_steps if s.privacy.of_patients else 1)
    assert training.count == steps * folds_of(s)


def test_a_scale_with_too_little_noise_is_not_kept() -> None:
    s = study()
    scale = promise_of(s).scale
    assert kept(s, scale).epsilon <= 8.0
    with pytest.raises(ValueError, match=r"comes to epsilon .* the study promises 8 at delta 1e-05"):
        kept(s, scale / 2)


def test_shares_of_the_budget_go_where_the_study_says() -> None:
    s = study(privacy__evidence="noised", privacy__evidence_share=0.2, privacy__evidence_every=5)
    of = releases(s, 1.0)
    spent = {name: m.count / m.noise**2 for name, m in of.items()}
    assert spent["evidence"] == pytest.approx(0.2)
    assert spent["training"] == pytest.approx(0.8)
    assert of["evidence"].count == 3  # of 15 rounds, every fifth
