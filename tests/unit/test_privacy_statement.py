"""What a study with privacy may claim: counted from the answers that arrived, never below what they cost."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from oncofed.common.privacy.accounting import Mechanism, epsilon_of
from oncofed.common.privacy.releases import EVALUATION, EVIDENCE, STATISTICS, TRAINING, promise_of
from oncofed.common.splits import ALL_PATIENTS
from oncofed.common.study import Study
from oncofed.deploy.cli import cli
from oncofed.server.privacy import cost_of, counted, foretold, membership, statement
from typer.testing import CliRunner

ROUNDS = 6


def study(**keys: object) -> Study:
    base: dict[str, object] = {
        "panel__scale_by": "patient",
        "task__time_edges": (0, 12, 24, 60),
        "privacy__unit": "patient",
        "training__rounds": ROUNDS,
        "training__local_steps": 3,
        "splits__only": [0, 1],
    }
    return Study().changed(**(base | keys))


def ran(
    rounds: dict[str, list[int]], folds: tuple[int, ...] = (0, 1), left_out: tuple[dict[str, Any], ...] = ()
) -> dict[str, Any]:
    """Results of folds in which each site answered so many rounds, with 40 patients."""
    told = []
    for i, fold in enumerate(folds):
        answered = {site: n[i] for site, n in rounds.items() if n[i]}
        evidence = {site: [40.0 * n, 0.0] for site, n in answered.items()}
        curve = [{"round": r + 1} for r in range(ROUNDS)]
        told.append({"fold": fold, "curve": curve, "site_rounds": answered, "site_evidence": evidence, "trained": 500})
    return {"sites": sorted(rounds), "folds": told, "left_out": list(left_out)}


def test_a_site_that_missed_rounds_claims_less() -> None:
    s = study()
    stated = statement(s, ran({"All": [6, 6], "Some": [6, 2], "None": [0, 0]}))
    one = promise_of(s).mechanisms[TRAINING]
    for site, steps in (("All", 36), ("Some", 24)):
        assert stated["sites"][site]["epsilon"] == pytest.approx(
            epsilon_of([Mechanism(one.kind, one.noise, steps)], s.privacy.delta)
        )
    sites = stated["sites"]
    assert sites["None"]["epsilon"] == 0 < sites["Some"]["epsilon"] < sites["All"]["epsilon"] <= 8.0
    assert stated["epsilon"] == sites["All"]["epsilon"]
    assert (sites["Some"]["rounds"], sites["Some"]["planned"]) == (8, 12)
    assert sites["All"]["epsilon"] == pytest.approx(promise_of(s).epsilon)
    assert stated["accountant"]["method"].startswith("exact")
    json.dumps(stated, allow_nan=False)


def test_everything_that_left_is_in_it() -> None:
    """Statistics a fold, counts of evidence at most, a table of two parts a fold that evaluates; the parts alone cost less."""
    s = study(
        privacy__statistics="noised",
        privacy__evidence="noised",
        privacy__evidence_every=4,
        evaluation__epsilon=1.0,
        splits__refit=True,
    )
    folds = (0, 1, ALL_PATIENTS)
    stated = statement(s, ran({"A": [6, 6, 6], "B": [6, 1, 0]}, folds))
    of, delta = promise_of(s).mechanisms, s.privacy.delta

    def cost(steps: int, counts: int) -> float:
        parts = [
            Mechanism("gaussian", of[TRAINING].noise, steps),
            Mechanism("gaussian", of[STATISTICS].noise, 3),
            Mechanism("gaussian", of[EVIDENCE].noise, counts),
            Mechanism("pure", of[EVALUATION].noise, 4),
        ]
        return epsilon_of(parts, delta)

    a, b = stated["sites"]["A"], stated["sites"]["B"]
    assert a["epsilon"] == pytest.approx(cost(54, 6))
    assert b["epsilon"] == pytest.approx(cost(21, 3))
    assert b["training"] < b["epsilon"] < a["epsilon"] <= promise_of(s).epsilon
    assert {m["name"] for m in stated["mechanisms"]} == {TRAINING, STATISTICS, EVIDENCE, EVALUATION}
    assert "dp-accounting" in stated["accountant"]["method"]
    assert "accounted for" in stated["evaluation"]
    x, y = zip(*stated["spent"], strict=True)
    assert x[-1] == 18
    assert list(y) == sorted(y)
    assert y[-1] == pytest.approx(a["epsilon"])


def test_an_answer_that_was_lost_counts_at_most() -> None:
    lost = tuple({"site": "B", "kind": "train", "round": r, "reason": "late"} for r in (3, 4))
    other = ({"site": "B", "kind": "evaluate", "round": 0, "reason": "late"},)
    stated = statement(study(), ran({"A": [5, 5], "B": [6, 4]}, left_out=lost + other))
    b = stated["sites"]["B"]
    assert b["lost"] == 2
    assert b["epsilon"] == stated["sites"]["A"]["epsilon"] < b["at_most"] == stated["epsilon"]
    assert b["at_most"] == pytest.approx(promise_of(study()).epsilon)


def test_a_hospital_that_is_held_out_does_not_train_in_that_fold() -> None:
    s = study(splits__held_out_sites=["A", "B", "C"], splits__only=[], evaluation__epsilon=1.0)
    stated = statement(s, ran({"A": [0, 6, 6], "B": [6, 0, 6], "C": [6, 6, 0]}, (0, 1, 2)))
    of = promise_of(s).mechanisms
    mine = [Mechanism("gaussian", of[TRAINING].noise, 36), Mechanism("pure", of[EVALUATION].noise, 2)]
    assert stated["sites"]["A"]["planned"] == 12
    assert stated["sites"]["A"]["epsilon"] == pytest.approx(epsilon_of(mine, s.privacy.delta))


def test_of_hospitals_it_trusts_the_server() -> None:
    s = study(privacy__unit="hospital", training__local_steps=4)
    lost = ({"site": "B", "kind": "train", "round": 1, "reason": "late"},)  # in no sum
    stated = statement(s, ran({"A": [6, 6], "B": [6, 5]}, left_out=lost))
    assert stated["steps"] == 12
    assert stated["sites"]["B"]["at_most"] == stated["sites"]["B"]["epsilon"] < stated["sites"]["A"]["epsilon"]
    assert "server is trusted" in stated["trust"]
    assert stated["cost"]["drowned"]
    assert "wants hundreds of hospitals" in stated["cost"]["says"]
    assert not any("several hospitals" in line for line in stated["not_covered"])


def test_the_cost_is_that_of_the_patients_who_trained() -> None:
    s = study()
    stated = statement(s, ran({"A": [6, 6], "B": [3, 6], "C": [6, 6]}))
    assert (stated["cost"]["sites"], stated["cost"]["patients"]) == (3, 120)
    assert stated["cost"]["per_number"] == pytest.approx(promise_of(s).deviation * 3**0.5 / 120)
    assert stated["cost"]["over_all"] == pytest.approx(stated["cost"]["per_number"] * 500**0.5)


def test_membership_ends_at_one() -> None:
    assert membership(1.0, 1e-5)["tpr"] == pytest.approx(0.0271929, abs=1e-6)
    assert membership(8.0, 1e-5)["tpr"] == 1.0
    assert "says nothing" in membership(800.0, 1e-5)["says"]
    assert "2.7%" in membership(1.0, 1e-5)["says"]


def test_says_what_nobody_covers() -> None:
    stated = statement(study(), ran({"A": [6, 6]}))
    text = " ".join(stated["not_covered"])
    for word in ("rounded to tens", "genes", "settings", "how long", "several hospitals", "predictions", "release log"):
        assert word in text
    assert "anonymous" in stated["not_anonymous"]
    assert "EDPB Opinion 28/2024" in stated["not_anonymous"]
    assert "no amplification" in stated["sampling"]
    assert "Poisson" in statement(study(privacy__sample_rate=0.5), ran({"A": [6, 6]}))["sampling"]


def test_numbers_that_are_trained() -> None:
    small = study(model__size="tiny", cancers=["BRCA", "LUAD"])
    assert counted(small, 100) > counted(small, 50) > counted(small.changed(training__baselines="frozen"), 50)
    images = Study().changed(model__name="path_gptomic")
    with pytest.raises(ValueError, match="--parameters"):
        counted(images, 100)


# -- the command -------------------------------------------------------------------------------------------------------

TABLES = """
[panel]
scale_by = "patient"
[task]
time_edges = [0, 12, 24, 60]
[privacy]
unit = "{}"
[training]
rounds = 30
[splits]
only = [0]
"""


def ask(tmp_path: Path, unit: str, *arguments: str) -> str:
    file = tmp_path / "study.toml"
    file.write_text(TABLES.format(unit))
    result = CliRunner().invoke(cli, ["study", "privacy", str(file), *arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return re.sub(r"\s+", " ", result.output)


def test_the_command_says_when_noise_drowns_the_signal(tmp_path: Path) -> None:
    text = ask(tmp_path, "hospital", "--sites", "9", "--patients", "3000", "--parameters", "10000")
    s = study(privacy__unit="hospital", training__rounds=30, splits__only=[0])
    cost = cost_of(s, 10_000, 9, 3000)
    assert f"With 9 hospitals the noise on a round's mean is {cost.per_number:.2g} clips a number" in text
    assert f"{cost.over_all:.2g} clips over 10,000 numbers, a change is at most 1" in text
    assert "hospital-level privacy wants hundreds of hospitals" in text
    assert "training.encoder = 'frozen'" in text


def test_the_command_is_content_with_a_small_head(tmp_path: Path) -> None:
    text = ask(tmp_path, "patient", "--sites", "9", "--patients", "3000", "--parameters", "100")
    assert "9 hospitals and 3,000 patients" in text
    assert "drowns" not in text
    assert "What helps" not in text
    assert "training alone" in text
    assert (
        f"sigma of a training step: {promise_of(study(training__rounds=30, training__local_steps=4, splits__only=[0])).deviation:.4g}"
        in text
    )


def test_the_command_counts_the_models_own_numbers(tmp_path: Path) -> None:
    text = ask(tmp_path, "patient", "--sites", "9", "--patients", "3000", "--genes", "40")
    assert f"{counted(study(), 40):,} numbers" in text
    assert "drowns" in text


def test_the_command_wants_a_promise(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"privacy\.unit = 'none'"):
        ask(tmp_path, "none", "--sites", "3", "--patients", "100")


def test_a_drowned_cost_names_what_would_help() -> None:
    s = study()
    words = foretold(s, cost_of(s, 1_000_000, 9, 3000), 9, 3000)
    assert "the noise drowns what one step says" in words
    assert "drowned still" not in words
    assert "drowned still" in foretold(s, cost_of(s, 10_000_000, 9, 3000), 9, 3000)
