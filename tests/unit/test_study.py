"""One description of an experiment, from a file and from Flower's run config."""

from __future__ import annotations

from pathlib import Path

import pytest
from oncofed.common.study import PRETRAIN, TRAIN, Study


def test_survives_every_way_of_travelling() -> None:
    study = Study().changed(
        training__rounds=7,
        pretraining__rounds=3,
        splits__only=[0, 2],
        cancers=["BRCA", "LUAD"],
        panel__covariates=["age", "sex=female|male"],
        model__size="tiny",
        name="a-study",
    )
    assert Study.from_run_config(study.run_config()) == study
    assert Study.from_json(study.model_dump_json()) == study


def test_names_with_commas_survive_the_flat_run_config() -> None:
    """Hospitals have them: 'Proteogenex, Inc.' takes part in TCGA."""
    study = Study().changed(splits__held_out_sites=["Proteogenex, Inc.", "Mayo Clinic"])
    assert Study.from_run_config(study.run_config()).splits.held_out_sites == ("Proteogenex, Inc.", "Mayo Clinic")
    one = Study().changed(splits__held_out_sites=["University Health Network, Toronto"])
    assert Study.from_run_config(one.run_config()) == one


def test_run_config_has_only_what_flower_can_carry() -> None:
    assert all(isinstance(v, bool | int | float | str) for v in Study().run_config().values())


def test_phases_have_rounds_and_tables_of_their_own() -> None:
    assert Study().phases == (TRAIN,)
    study = Study().changed(pretraining__rounds=2, pretraining__local_steps=7, training__local_steps=3)
    assert study.phases == (PRETRAIN, TRAIN)
    assert [study.steps(phase).local_steps for phase in study.phases] == [7, 3]


@pytest.mark.parametrize(
    ("kind", "scale_by", "by_cancer"),
    [
        ("survival", "auto", True),
        ("survival", "all", False),
        ("survival", "cancer", True),
        ("classification", "auto", False),
        ("classification", "all", False),
    ],
)
def test_classification_never_holds_genes_against_the_type_that_it_must_tell(
    kind: str, scale_by: str, by_cancer: bool
) -> None:
    assert Study().changed(task__kind=kind, panel__scale_by=scale_by).scale_by_cancer == by_cancer


def test_minus_one_expert_is_the_sizes_own_and_zero_is_none() -> None:
    own = Study().changed(model__size="tiny").model.encoder()
    none = Study().changed(model__size="tiny", model__experts=0, model__attention_experts=0).model.encoder()
    assert (own["experts"], own["attention_experts"], own["width"]) == (4, 3, 16)
    assert (none["experts"], none["attention_experts"], none["width"]) == (0, 0, 16)
    assert Study().changed(model__size="tiny", model__experts=9).model.encoder()["experts"] == 9


def test_hyphens_and_underscores_are_the_same() -> None:
    assert Study.from_run_config({"training.local-steps": 3}).training.local_steps == 3


def test_reads_toml_with_overrides(tmp_path: Path) -> None:
    file = tmp_path / "study.toml"
    file.write_text('name = "nine"\n[training]\nrounds = 5\n[splits]\nonly = [1]\n')
    study = Study.from_toml(file, {"training.rounds": 9})
    assert (study.name, study.training.rounds, study.splits.only) == ("nine", 9, (1,))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"training.round": 3}, "training.round: unknown key; did you mean training.rounds?"),
        ({"training.input_dropout": 0.3}, "did you mean model.input_dropout?"),
        ({"trainig.rounds": 3}, "trainig: unknown key; did you mean training?"),
        ({"aggregation.momentun": 0.3}, "did you mean aggregation.momentum?"),
        ({"training.rounds": 0}, r"training.rounds = 0: .*greater than or equal to 1"),
        ({"aggregation.rule": "mean"}, r"aggregation.rule = 'mean': .*'evidence' or 'fedavg'"),
        ({"model.experts": 2, "model.top_k": 3}, "model.top_k = 3 exceeds model.experts = 2"),
        ({"model.top_k": 1}, "leaves the gate untrained"),
        ({"model.attention_experts": 1}, "model.attention_top_k = 2 exceeds model.attention_experts = 1"),
        ({"model.experts": -2}, "model.experts = -2: .*greater than or equal to -1"),
        ({"task.kind": "classification", "panel.scale_by": "cancer"}, "needs the cancer type that is to be classified"),
        ({"pretraining.critic_step": 3}, "did you mean pretraining.critic_steps?"),
        ({"training.kl": 3}, "did you mean pretraining.kl?"),
        ({"splits.validation": 0.6}, r"splits.validation = 0.6: .*less than or equal to 0.5"),
        ({"splits.only": "0,9"}, "must lie between 0 and 4"),
        ({"name": "../etc"}, "name = '../etc'"),
    ],
)
def test_mistakes_are_named_with_a_remedy(data: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Study.from_run_config(data)


def test_all_mistakes_are_listed_at_once(tmp_path: Path) -> None:
    file = tmp_path / "study.toml"
    file.write_text("sede = 1\n[training]\nrounds = -1\n")
    with pytest.raises(
        ValueError, match=r"(?s)study.toml.*sede: unknown key; did you mean seed.*|training.rounds = -1"
    ):
        Study.from_toml(file)
    with pytest.raises(ValueError, match=r"training\.rounds = -1"):
        Study.from_toml(file)


@pytest.mark.parametrize(("text", "words"), [(None, "cannot be read"), ("a = = 1", "not valid TOML")])
def test_unreadable_files(tmp_path: Path, text: str | None, words: str) -> None:
    file = tmp_path / "study.toml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ValueError, match=words):
        Study.from_toml(file)
