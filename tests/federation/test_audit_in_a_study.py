"""The audit of a small private study over synthetic hospitals, from the command line to its files."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from oncofed.common import wire
from oncofed.common.noise import SecureNoise
from oncofed.deploy import cli
from typer.testing import CliRunner

runner = CliRunner()

KEYS = (
    "model.size=tiny",
    "panel.scale_by=patient",
    "task.loss=discrete_time",
    "task.time_edges=[0, 12, 24, 60]",
    "training.rounds=4",
    "training.local_steps=2",
    "training.learning_rate=0.05",
    "training.weight_decay=0.0",
    "splits.only=[0]",
    "privacy.unit=patient",
    "runtime.threads=1",
)


def call(sites: Path, out: Path, *arguments: str) -> tuple[int, str]:
    keys = [part for key in KEYS for part in ("-s", key)]
    result = runner.invoke(cli.cli, ["audit", str(sites), "--out", str(out), *keys, *arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def test_an_honest_study_passes_and_leaves_numbers_and_a_picture(consortium: Path, tmp_path: Path) -> None:
    """Fails by chance in one of 15,000 runs, as noise has no seed."""
    code, text = call(consortium, tmp_path, "--models", "8")
    assert code == 0
    assert "passed: no attack shows more than is claimed" in text
    assert max(map(len, text.splitlines()[:-1])) <= 80
    result = json.loads((tmp_path / "audit.json").read_text())
    claim = result["claim"]
    assert (claim["unit"], claim["epsilon"], claim["delta"]) == ("patient", 8.0, 1e-5)
    assert claim["package"] == wire.package_version()
    assert claim["epsilon_of_a_fold"] == pytest.approx(8.0, rel=1e-3)
    assert len(result["sites"]) == 4
    assert result["gate"] == {"passed": True, "failed": [], "alarms": []}
    assert max(result["sensitivity"]["largest"]) <= 1.000001
    assert result["canary"]["steps"] == 8
    assert 4 < result["canary"]["epsilon_lower"] < 9
    members = result["membership"]
    for kind in ("private", "plain"):
        for attack in ("lira", "rmia", "loss"):
            assert 0 <= members[kind][attack]["auc"]["low"] <= members[kind][attack]["auc"]["high"] <= 1
            assert len(members[kind][attack]["roc"]["tpr"]) == len(members[kind][attack]["roc"]["fpr"])
    assert result["inversion"]["one"]["unprotected"]["correlation"] > 0.999
    assert result["inversion"]["one"]["protected"]["correlation"] < 0.5
    assert "policy" not in result["inversion"]
    assert result["sensitivity"]["single"]["passed"]
    assert result["canary"]["wrong"] == []
    assert "without noise" in text
    assert (tmp_path / "audit.svg").read_text().startswith("<svg")
    written = (tmp_path / "audit.json").read_text() + text
    assert not re.search(r"[A-Z]{3}-\d{4}", written)  # no patient


def test_noise_ten_times_too_small_fails_the_release(
    consortium: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = SecureNoise.covered

    def tenth(self: SecureNoise, total: torch.Tensor, *, sensitivity: float, deviation: float) -> torch.Tensor:
        return honest(self, total, sensitivity=sensitivity, deviation=deviation / 10)

    monkeypatch.setattr(SecureNoise, "covered", tenth)
    code, text = call(consortium, tmp_path, "--checks", "canary")
    assert code == 1
    assert "failed canaries show epsilon" in text
    result = json.loads((tmp_path / "audit.json").read_text())
    assert result["canary"]["epsilon_lower"] > 8 * result["claim"]["epsilon"]
    assert "membership" not in result


def test_one_site_alone_and_mistakes(consortium: Path, tmp_path: Path) -> None:
    code, _ = call(consortium, tmp_path, "--checks", "sensitivity", "--site", "Bergen")
    assert code == 0
    result = json.loads((tmp_path / "audit.json").read_text())
    assert result["sites"] == ["Bergen"]
    with pytest.raises(ValueError, match="--site Nowhere: not in the federation; its sites are Aachen, Bergen"):
        call(consortium, tmp_path, "--site", "Nowhere")
    with pytest.raises(ValueError, match=r"privacy\.unit = 'none': an audit attacks what is promised of a patient"):
        call(consortium, tmp_path, "-s", "privacy.unit=none")


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["piecewise_exponential", "weibull", "discrete_time"])
@pytest.mark.parametrize("model", ["gene_moe", "t_gem"])
def test_models_and_losses_that_the_product_has(consortium: Path, tmp_path: Path, model: str, loss: str) -> None:
    keys = ("-s", f"model.name={model}", "-s", f"task.loss={loss}", "-s", "privacy.sample_rate=0.3")
    code, _ = call(consortium, tmp_path, "--models", "8", *keys)
    assert code == 0
    classes = ("-s", "task.kind=classification", "-s", "task.class_prior=none", "-s", f"model.name={model}")
    assert call(consortium, tmp_path, "--models", "8", *classes)[0] == 0
