"""One description of an experiment, from a file and from Flower's run config."""

from __future__ import annotations

from pathlib import Path

import pytest
from oncofed.common.study import Study


def test_survives_every_way_of_travelling() -> None:
    study = Study().changed(
        training__rounds=7, splits__only=[0, 2], cancers=["BRCA", "LUAD"], model__size="tiny", name="a-study"
    )
    assert Study.from_run_config(study.run_config()) == study
    assert Study.from_json(study.model_dump_json()) == study


def test_run_config_has_only_what_flower_can_carry() -> None:
    assert all(isinstance(v, bool | int | float | str) for v in Study().run_config().values())


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
