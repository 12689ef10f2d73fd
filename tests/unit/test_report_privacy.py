"""The report's privacy page: with an audit and without, for patients and for hospitals, whatever a site is called."""

from __future__ import annotations

import json
import math
import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from oncofed.common.splits import ALL_PATIENTS
from oncofed.common.study import Study
from oncofed.deploy.comparison.present import write_comparison
from oncofed.server.privacy import statement
from oncofed.server.report.privacy import attacks, audited, bounds, cases, read_audit, sections, view
from oncofed.server.report.render import render

ROC = {"fpr": [0.001, 0.01, 0.1, 1.0], "tpr": [0.0, 0.03, 0.2, 1.0]}


def results(sites: tuple[str, ...] = ("Aachen", "Bergen"), rounds: int = 4, **keys: object) -> dict[str, Any]:
    """As of a finished run with privacy, of a fold that is no evaluation."""
    base: dict[str, object] = {
        "panel__scale_by": "patient",
        "task__time_edges": (0, 12, 24, 60),
        "privacy__unit": "patient",
        "training__rounds": rounds,
        "splits__only": [0],
    }
    study = Study().changed(**(base | keys))
    fold = {
        "fold": 0,
        "curve": [{"round": r + 1, "sites": len(sites), "evidence": {}} for r in range(rounds)],
        "site_rounds": dict.fromkeys(sites, rounds) | {sites[0]: rounds - 1},
        "site_evidence": {site: [40.0 * rounds] for site in sites},
        "blocks": ["trunk"],
        "trained": 100,
        "bytes_to_sites": 1,
        "bytes_from_sites": 1,
    }
    told: dict[str, Any] = {
        "study": study.model_dump(mode="json"),
        "package": "0",
        "started": "2026-01-01T00:00:00Z",
        "sites": list(sites),
        "cancers": ["BRCA"],
        "panel": {"genes": 3, "hash": "0" * 16},
        "beside": {},
        "folds": [fold],
        "left_out": [],
    }
    return told | {"privacy": statement(study, told)}


def span(value: float) -> dict[str, float]:
    return {"value": value, "low": value / 2, "high": value * 2}


def audit(told: dict[str, Any]) -> dict[str, Any]:
    """As `oncofed audit` writes it."""
    study = {k: v for k, v in told["study"].items() if k != "runtime"}
    p = study["privacy"]
    attack = {name: {"auc": span(0.5), "tpr": span(0.013), "roc": ROC} for name in ("lira", "rmia", "loss")}
    kinds = {
        "unprotected": {"correlation": 0.97, "of_another": 0.2},
        "protected": {"correlation": 0.11, "of_another": 0.1},
    }
    return {
        "claim": {key: p[key] for key in ("unit", "epsilon", "delta")},
        "study": study,
        "sensitivity": {"patients": 40, "clips": [1.0, 0.1], "largest": [0.999, 0.4], "passed": True},
        "canary": {
            "steps": 50,
            "canaries": 900,
            "epsilon": 4.0,
            "epsilon_lower": 3.2,
            "epsilon_lower_gate": 2.9,
            "epsilon_lower_one_run": 1.3,
            "false_alarm": 1e-5,
            "passed": True,
        },
        "membership": {
            "epsilon": 5.0,
            "delta": 1e-5,
            "bound": 1.0,
            "bound_gaussian": 0.3,
            "private": attack,
            "plain": attack,
        },
        "inversion": {
            "patients": 6,
            "policy": {"patients": 6, "refused": True},
            "one": kinds,
            "lone_expert": kinds | {"sites": 0.5},
        },
        "gate": {"passed": True, "failed": [], "alarms": []},
    }


def text_of(html: str) -> str:
    start = html.index('<h2 id="privacy">')
    part = html[start : html.index("<h2>Answers that were left out")]
    return unescape(re.sub(r"\s+", " ", re.sub(r"<svg.*?</svg>|<[^>]*>", " ", part, flags=re.DOTALL)))


def test_without_an_audit_it_says_so() -> None:
    told = results()
    html = render({"results": told})
    text = text_of(html)
    assert "No audit was run" in text
    assert "oncofed audit" in text
    for site, row in told["privacy"]["sites"].items():
        assert f"{site} {row['rounds']} of 4 {row['training']:.3f} {row['epsilon']:.3f}" in text
    assert "Never call the model anonymous" in text
    assert all(line in text for line in told["privacy"]["not_covered"])
    assert 'href="#privacy"' in html


def test_an_audit_stands_beside_the_claim() -> None:
    told = results()
    text = text_of(render({"results": told}, audit(told)))
    assert "No audit" not in text
    assert "another claim" not in text
    assert "at least 3.2" in text
    assert "0.999 clips" in text
    assert "1.3 % [0.7 %, 2.6 %]" in text
    assert "its noise 30.0 %" in text
    assert "the only patient of a hospital 0.97 0.11 0.10" in text
    assert "lets no update of 6 patients out" in text
    assert "passed" in text
    assert "failed" not in text
    assert set(sections(told, audit(told))) == {"privacy_spent", "privacy_bounds", "privacy_attacks"}


def test_a_failed_gate_is_said_first() -> None:
    told = results()
    found = audit(told) | {"gate": {"passed": False, "failed": ["canaries show <more>"], "alarms": ["one run shows 9"]}}
    html = render({"results": told}, found)
    assert "The audit failed" in html
    assert "canaries show &lt;more&gt;" in html
    assert "one run shows 9" in html


def test_an_audit_of_another_study_is_told_apart() -> None:
    told = results()
    other = results(privacy__epsilon=2.0)
    longer = results(rounds=5)
    for found in (audit(other), audit(longer)):
        assert audited(told, found)["of_another"]
        assert "another claim" in text_of(render({"results": told}, found))
    assert not audited(told, audit(told))["of_another"]


@pytest.mark.parametrize(
    "found",
    [
        {},
        {"checks": {}},
        {"checks": None, "claim": 3, "gate": [], "canary": "none"},
        {"canary": {"epsilon": 4.0, "epsilon_lower": math.inf, "passed": False}},
        {"membership": {"bound": 1.0, "private": {"lira": {"auc": None, "tpr": {}}}}},
        {"membership": {"bound_gaussian": 1.0, "plain": {"rmia": {"tpr": 0.02, "interval": [0.01, 0.03]}}}},
        {"inversion": {"one": {"protected": {"correlation": None}}}},
    ],
)
def test_what_an_audit_lacks_is_left_out(found: dict[str, Any]) -> None:
    told = results()
    assert "Audit" in text_of(render({"results": told}, found))


def test_short_audits_are_read_as_well() -> None:
    """Single numbers with an interval beside them, checks in a table of their own."""
    found = {
        "checks": {
            "canary": {"claimed": 4.0, "eps_lower": 3.0, "one_run_lower": 1.0},
            "membership": {"private": {"lira": {"auc": 0.6, "tpr": 0.02, "interval": [0.01, 0.04]}}},
            "inversion": {"cases": [{"what": "one patient", "protected": True, "correlation": 0.1}]},
        }
    }
    assert bounds(found) == {"claimed": 4.0, "lower": 3.0, "one_run": 1.0}
    (one,) = attacks(found)
    assert one["tpr"] == {"value": 0.02, "low": 0.01, "high": 0.04}
    assert cases(found["checks"]["inversion"])[0]["covered"] == 0.1


def test_of_hospitals() -> None:
    told = results(privacy__unit="hospital")
    text = text_of(render({"results": told}))
    assert "The coordinator put random noise on every round's sum" in text
    assert "server is trusted" in text
    assert "no audit yet of what is promised of hospitals" in text
    assert "oncofed site budget" not in text


def test_names_of_sites_are_no_html() -> None:
    html = render({"results": results(("<script>alert(1)</script>", "B & $C$"))})
    assert "<script>" not in html
    assert "&lt;script&gt;" in html


def test_lost_answers_have_a_column() -> None:
    told = results()
    told["privacy"]["sites"]["Aachen"] |= {"lost": 1, "at_most": 7.9}
    text = text_of(render({"results": told}))
    assert "with lost answers" in text
    assert "7.900 (1 lost)" in text


def test_of_many_sites_those_with_the_largest_epsilon_are_shown() -> None:
    sites = tuple(f"S{i:02d}" for i in range(50))
    told = results(sites)
    shown = view(told, None)
    assert shown is not None
    assert (len(shown["rows"]), shown["more"]) == (40, 10)
    assert "S00" not in dict(shown["rows"])  # it missed a round


def test_a_run_without_privacy_has_no_page() -> None:
    told = results()
    del told["privacy"]
    assert sections(told, None) == {}
    assert "privacy" not in re.sub(r"<pre>.*?</pre>", "", render({"results": told}), flags=re.DOTALL)


def test_the_same_numbers_give_the_same_picture() -> None:
    told = results()
    assert sections(told, audit(told)) == sections(told, audit(told))


def test_an_audit_in_the_folder_is_read(tmp_path: Path) -> None:
    told = results()
    assert read_audit(tmp_path) is None
    (tmp_path / "audit.json").write_text(json.dumps(audit(told)))
    report = write_comparison({"results": told}, tmp_path)
    assert "planted canaries" in report.read_text()
    for broken in ("{", "[]"):
        (tmp_path / "audit.json").write_text(broken)
        with pytest.raises(ValueError, match="oncofed audit"):
            read_audit(tmp_path)


def test_a_refit_alone_is_drawn() -> None:
    told = results()
    told["folds"][0]["fold"] = ALL_PATIENTS
    assert '<h2 id="privacy">' in render({"results": told})


def test_a_private_run_has_no_empty_picture_of_learning() -> None:
    from oncofed.server.report.pictures import learning_curves

    assert learning_curves([{"curve": [{"round": 1, "sites": 2}]}]) == ""
    assert "<svg" in learning_curves([{"curve": [{"round": 1, "train_loss": 1.0}, {"round": 2, "train_loss": 0.9}]}])
