"""A newcomer's path through the command line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from oncofed.deploy import cli
from oncofed.deploy.comparison import survival
from typer.testing import CliRunner

runner = CliRunner()


def call(*arguments: str) -> tuple[int, str]:
    result = runner.invoke(cli.cli, list(arguments))
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def test_from_nothing_to_a_report(tmp_path: Path) -> None:
    sites, out = str(tmp_path / "sites"), tmp_path / "out"
    code, text = call("data", "synth", "--out", sites, "--sites", "3", "--patients", "240", "--genes", "90")
    assert code == 0
    assert "3 sites" in text
    code, text = call("site", "check", str(tmp_path / "sites" / "aachen"))
    assert code == 0
    assert "ready" in text
    keys = (
        "model.size=tiny",
        "training.rounds=2",
        "training.evaluate_every=1",
        "splits.folds=3",
        "training.learning_rate=0.01",
    )
    arguments = [part for key in keys for part in ("-s", key)]
    code, text = call("simulate", sites, "--compare", "pooled,local,ridge,fedavg", "--out", str(out), *arguments)
    assert code == 0
    assert str(out / "report.html") in text.replace("\n", "")
    comparison = json.loads((out / "comparison.json").read_text())
    assert list(comparison["methods"]) == ["federated", "pooled", "local", "ridge", "fedavg"]
    assert set(comparison["differences"]) == {"pooled", "local", "ridge", "fedavg"}
    for method in comparison["methods"].values():
        c = method["c_index"]
        assert 0 <= c["low"] <= c["value"] <= c["high"] <= 1
    patients = sum(sum(row) for row in comparison["cohort"]["patients"])
    assert patients == sum(row["patients"] for row in comparison["sites"])
    html = (out / "report.html").read_text()
    assert html.count("<svg") == 10
    assert not re.search(r"(src|href)=\"(?!#|data:)", html)  # one file, nothing fetched
    assert "AAC-0" not in html  # no patient
    assert "AAC-0" not in (out / "comparison.json").read_text()
    (out / "report.html").unlink()
    code, text = call("study", "report", str(out))  # what a coordinator without the sites' folders can draw
    assert code == 0
    html = (out / "report.html").read_text()
    assert html.count("<svg") == 9
    assert "AAC-0" not in html


def test_ablations_fill_a_table(tmp_path: Path) -> None:
    sites, out = str(tmp_path / "sites"), tmp_path / "out"
    call("data", "synth", "--out", sites, "--sites", "3", "--patients", "150", "--genes", "90")
    keys = ("model.size=tiny", "training.rounds=1", "training.evaluate_every=0", "splits.only=0", "splits.folds=3")
    arguments = [part for key in keys for part in ("-s", key)]
    names = "dense perceptron of equal size,FedAvg instead of evidence"
    code, text = call("ablate", sites, "--out", str(out), "--only", names, *arguments)
    assert code == 0
    assert "FedAvg instead" in text
    result = json.loads((out / "ablations.json").read_text())
    assert list(result["methods"]) == ["as it is", *names.split(",")]
    whole, dense = (result["methods"][n]["cost"]["parameters"] for n in ("as it is", "dense perceptron of equal size"))
    assert dense / whole == pytest.approx(1.0, abs=0.05)
    assert (out / "ablations.svg").exists()
    with pytest.raises(ValueError, match="no ablation of this study; it has with pre-training, no attention"):
        call("ablate", sites, "--out", str(out), "--only", "no gate", *arguments)


def test_site_check_says_no_with_exit_code_1(tmp_path: Path) -> None:
    code, text = call("site", "check", str(tmp_path))
    assert code == 1
    assert "site.toml is missing" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("simulate", "{tmp}/none"), "no site folder"),
        (("simulate", "{tmp}/none", "-s", "training.round=3"), "did you mean training.rounds"),
        (("simulate", "{tmp}/none", "-s", "training.rounds"), "write key=value"),
        (("simulate", "{tmp}/none", "--study", "{tmp}/none.toml"), "cannot be read"),
        (("data", "split", "{tmp}/none", "--out", "{tmp}/x"), "no clinical.csv"),
        (("study", "check", "{tmp}/none.toml"), "cannot be read"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_1(
    arguments: tuple[str, ...],
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.argv", ["oncofed", *(a.format(tmp=tmp_path) for a in arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 1
    printed = capsys.readouterr().err
    assert words in printed.replace("\n", " ")
    assert "Traceback" not in printed


def test_unknown_method_is_refused_before_any_work(tmp_path: Path) -> None:
    call("data", "synth", "--out", str(tmp_path / "sites"), "--sites", "2", "--patients", "60", "--genes", "90")
    known = ",".join(survival.METHODS)
    assert known.startswith("pooled,local,ridge,")
    with pytest.raises(ValueError, match=f"--compare polled: unknown; choose from {known}"):
        call("simulate", str(tmp_path / "sites"), "--compare", "polled", "--out", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_study_file_can_be_checked(tmp_path: Path) -> None:
    file = tmp_path / "study.toml"
    file.write_text('name = "mine"\n[training]\nrounds = 3\n')
    code, text = call("study", "check", str(file))
    assert code == 0
    assert json.loads(text)["training"]["rounds"] == 3
