"""The statement of a private study over sites: in results.json, on the report's page, and right after a crash."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from oncofed.common import wire
from oncofed.common.privacy.releases import promise_of
from oncofed.common.study import Study
from oncofed.deploy.cli import cli
from oncofed.server.roster import NotEnoughSites
from typer.testing import CliRunner

if TYPE_CHECKING:
    from tests.federation.conftest import Federation

Make = Callable[..., Study]
PRIVATE: dict[str, object] = {
    "privacy__unit": "patient",
    "panel__scale_by": "patient",
    "task__time_edges": (0, 12, 24, 60),
    "aggregation__min_sites": 2,
}


def stated(study: Study) -> dict:  # type: ignore[type-arg]
    return dict(json.loads((Path(study.runtime.out) / "results.json").read_text())["privacy"])


def test_the_statement_is_in_the_results_and_the_report(federation: Federation, small_study: Make) -> None:
    study = small_study(**PRIVATE)
    federation.run(study, lambda kind, phase, round_, site: kind == wire.TRAIN and round_ == 2 and site == "Aachen")
    said, promise = stated(study), promise_of(study)
    sites = said["sites"]
    assert sites["Aachen"]["rounds"] == 1
    assert (
        sites["Aachen"]["epsilon"] < sites["Aachen"]["at_most"] == said["epsilon"]
    )  # it may have answered, and nobody heard
    assert {s["epsilon"] for name, s in sites.items() if name != "Aachen"} == {said["epsilon"]}
    assert said["epsilon"] == pytest.approx(promise.epsilon)
    assert 100 <= said["cost"]["patients"] <= 240
    assert said["cost"]["patients"] % 8 == 0  # four fifths of tens: the fold's share of what is known
    result = CliRunner().invoke(cli, ["study", "report", study.runtime.out])
    assert result.exit_code == 0, result.output
    html = (Path(study.runtime.out) / "report.html").read_text()
    assert '<h2 id="privacy">' in html
    assert "No audit was run" in html


def test_rounds_before_a_crash_are_counted(federation: Federation, small_study: Make) -> None:
    study = small_study(**PRIVATE, training__rounds=3)
    with pytest.raises(NotEnoughSites):
        federation.run(study, lambda kind, phase, round_, site: kind == wire.TRAIN and round_ == 2)
    federation.run(study.changed(runtime__resume=True))
    assert {s["rounds"] for s in stated(study)["sites"].values()} == {3}


def test_a_study_without_privacy_states_nothing(federation: Federation, small_study: Make) -> None:
    assert "privacy" not in federation.run(small_study(training__rounds=1))
