"""A coordinator that uses what no signature covers, and what it may repeat: for a second total, a second promise, one patient, a full disk."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from oncofed.client import message_check, reference
from oncofed.client.privacy.ledger import Ledger, ledger_of
from oncofed.client.reference import Reference
from oncofed.client.resident import Resident
from oncofed.common import wire
from oncofed.common.broadcast import HASH, hash_of
from oncofed.common.plan import Plan
from oncofed.common.privacy.releases import promise_of
from oncofed.common.signed_study import identity_text
from oncofed.common.study import Study
from oncofed.server.inquiry import greeting
from test_policy_attacks import COORDINATORS, PRIVATE, Hospital, hospital, lung, signed
from toy_hostile import QUESTION

__all__ = ["hospital"]

EDGES = [0.0, 12.0, 24.0, 60.0]
MASKED = {"privacy__secure_sum": True}


def answer(hospital: Hospital, study: Study, kind: str = wire.STATISTICS, **config: Any) -> dict[str, Any]:
    return hospital.send(wire.request({**greeting(study), **QUESTION, **config}), kind)


def with_beside(study: Study, **panel: str) -> dict[str, Any]:
    """The study as a server sends it that writes what no signature covers into it."""
    told = greeting(study)
    text = json.loads(str(told["study_json"]))
    text["panel"] |= panel
    return told | {"study_json": json.dumps(text)}


# -- what no signature covers ------------------------------------------------------------------------------------------


def test_a_study_keeps_its_own_promise_whatever_is_written_beside_what_was_signed(hospital: Hospital) -> None:
    """A path of the coordinator's own in the study made another study of it: epsilon 2 again, up to the hospital's budget."""
    hospital.policy(COORDINATORS + "epsilon_budget = 8\n")
    study = signed(lung(**(PRIVATE | {"privacy__epsilon": 2.0, "privacy__statistics": "noised"})))
    ask = {**QUESTION, "edges": EDGES, "noise_scale": promise_of(study).scale}
    ledger = Ledger(ledger_of(hospital.folder, hospital.work), "Aachen", 8.0)
    first = hospital.send(wire.request({**greeting(study), **ask}), wire.STATISTICS)
    assert "refusal" not in first
    spent, releases = ledger.spent(), sum(s.releases for s in ledger.studies())
    assert spent > 0
    for panel in ({"file": "a"}, {"file": "b"}, {"names": "c"}):
        again = hospital.send(wire.request({**with_beside(study, **panel), **ask}), wire.STATISTICS)
        assert "refusal" not in again, again
    assert (ledger.spent(), sum(s.releases for s in ledger.studies())) == (spent, releases)
    assert hospital.log[-1]["sha256"] == hospital.log[-4]["sha256"], "the very same noise"


@pytest.mark.parametrize("wrong", [{"panel_hash": "../x"}, {"genes": ["GENE0009"]}, {"panel_hash": "0" * 16}])
def test_a_question_that_names_no_panel_costs_patients_nothing(hospital: Hospital, wrong: dict[str, Any]) -> None:
    hospital.policy(COORDINATORS)
    study = signed(lung(**(PRIVATE | {"privacy__statistics": "noised"})))
    ask = {**QUESTION, "edges": EDGES, "noise_scale": promise_of(study).scale}
    told = hospital.send(wire.request({**greeting(study), **ask, **wrong}), wire.STATISTICS)
    assert "panel" in str(told["refusal"])
    ledger = Ledger(ledger_of(hospital.folder, hospital.work), "Aachen", 8.0)
    assert ledger.spent() == 0
    assert "refusal" not in hospital.send(wire.request({**greeting(study), **ask}), wire.STATISTICS)
    assert ledger.spent() > 0


@pytest.mark.parametrize("panel", [{"file": "a"}, {"names": "b"}])
def test_a_place_in_a_study_has_one_question_whatever_is_written_beside(
    hospital: Hospital, panel: dict[str, str]
) -> None:
    """Otherwise the same sum could be had of all hospitals, and of all but one."""
    study = lung(**MASKED)
    first = answer(hospital, study, bits=20)
    second = hospital.send(wire.request({**with_beside(study, **panel), **QUESTION, "bits": 20}), wire.STATISTICS)
    assert first["sum"] == second["sum"]


def test_an_analysis_has_one_place_for_a_question_however_long_the_server_waits(hospital: Hospital) -> None:
    plans = [Plan(kind="km", secure_sum=True, timeout_s=t, wait_sites_s=t) for t in (10.0, 11.0)]
    assert identity_text(plans[0]) == identity_text(plans[1])
    said = []
    for plan in plans:
        told = {"plan_json": plan.model_dump_json(), "step": "table", "round": 1, "place": 1, "levels": []}
        said.append(hospital.send(wire.request(told), wire.ANALYSE))  # type: ignore[arg-type]
    assert "sum" in said[0], said[0]
    assert said[0]["sum"] == said[1]["sum"]
    assert said[0]["plan"] == said[1]["plan"]


@pytest.mark.parametrize("place", [{"round": 1}, {"phase": "pretrain"}])
@pytest.mark.parametrize("kind", [wire.STATISTICS, wire.EXPLAIN, wire.EVALUATE])
def test_sums_that_have_no_rounds_are_asked_in_one_place(hospital: Hospital, kind: str, place: dict[str, Any]) -> None:
    if kind == wire.EVALUATE and "round" in place:
        pytest.skip("an evaluation has rounds")
    study = lung(pretraining__rounds=1, **MASKED)
    told = hospital.study(study, kind, grid=EDGES, bits=20, **place)
    assert "it is asked once a fold, of phase 'train' and round 0" in told
    assert hospital.study(study) == ""


def rare(hospital: Hospital) -> str:
    """Patients of two cancer types, and one of a type that nobody else has."""
    file = next(hospital.folder.glob("clinical.*"))
    table = pd.read_parquet(file) if file.suffix == ".parquet" else pd.read_csv(file, sep=None, engine="python")
    table["cancer_type"] = ["RARE", *("BRCA" if i % 2 else "LUAD" for i in range(1, len(table)))]
    table.to_parquet(file) if file.suffix == ".parquet" else table.to_csv(
        file, index=False, sep="\t" if file.suffix == ".tsv" else ","
    )
    site = hospital.folder / "site.toml"
    site.write_text("\n".join(line for line in site.read_text().splitlines() if not line.startswith("cancer_types")))
    return str(table.loc[0, "patient"])


def test_cancer_types_of_the_message_single_nobody_out(hospital: Hospital) -> None:
    """Statistics over all types less statistics over all but one of them: the expression of its one patient."""
    rare(hospital)
    types = [str(c) for c in answer(hospital, lung(), wire.HELLO)["cancers"]]
    assert types == ["BRCA", "LUAD", "RARE"]
    study, without = lung(splits__refit=True), [c for c in types if c != "RARE"]
    assert "refusal" not in answer(hospital, study, cancers=types, fold=-1)
    refused = "the cancer types of the message are others than this study's before"
    assert refused in str(answer(hospital, study, cancers=without, fold=-1).get("refusal"))
    # in two parts, and in another question
    assert "refusal" not in answer(hospital, study, cancers=without[:1], fold=-1)
    assert refused in str(answer(hospital, study, cancers=without[1:], fold=-1).get("refusal"))
    assert refused in str(answer(hospital, study, wire.EXPLAIN, cancers=without, fold=-1, grid=EDGES).get("refusal"))
    assert "refusal" not in answer(hospital, study, cancers=types, fold=-1)


def test_a_hospital_whose_patients_have_changed_goes_on(hospital: Hospital) -> None:
    types = [str(c) for c in answer(hospital, lung(), wire.HELLO)["cancers"]]
    assert "refusal" not in answer(hospital, lung(), cancers=types)
    rare(hospital)
    assert "refusal" not in answer(hospital, lung(), cancers=types)


def test_the_same_bytes_of_another_type_are_another_question(hospital: Hospital) -> None:
    study = lung(**MASKED)

    def ask(mean: np.ndarray) -> str:
        content = wire.request({**greeting(study), **QUESTION, "bits": 20}, {"extra": mean})
        return str(hospital.send(content, wire.STATISTICS)["sum"])

    assert ask(np.ones(4)) != ask(np.ones(4).view(np.int64))
    assert ask(np.ones(4)) != ask(np.ones((2, 2)))


def test_an_analysis_costs_no_more_than_it_promised(hospital: Hospital) -> None:
    """It was charged each time it was asked, up to the hospital's whole budget. Asked again it gives the very same answer."""
    hospital.policy("max_epsilon = 1\nepsilon_budget = 8\n")
    plan = Plan(kind="km", epsilon=1.0)
    told = {"step": "table", "round": 1, "levels": []}
    assert hospital.plan(plan, **told) == ""
    first = hospital.log[-1]
    for more, words in (({}, ""), ({"round": 2}, "is in its ledger already"), ({}, "")):
        ask = {"plan_json": plan.model_copy(update={"timeout_s": 3.0}).model_dump_json(), **told, **more}
        again = hospital.send(wire.request(ask), wire.ANALYSE)
        assert words in str(again.get("refusal", ""))
        assert words or hospital.log[-1]["sha256"] == first["sha256"], "the very same noise"
    assert Ledger(ledger_of(hospital.folder, hospital.work), "Aachen", 8.0).spent() < 1.01


# -- a node that is to stop --------------------------------------------------------------------------------------------


def test_numbers_that_would_take_a_hospitals_memory(hospital: Hospital) -> None:
    begin = time.monotonic()
    told = hospital.study(lung(splits__folds=5).changed(splits__folds=40_000_000), wire.STATISTICS)
    assert "wants 40000000 folds" in told
    assert "1001 times, more than 1000" in hospital.study(
        lung(), wire.STATISTICS, edges=[float(i) for i in range(1001)]
    )
    assert "1001 times, more than 1000" in hospital.study(lung(), wire.TRAIN, grid=[float(i) for i in range(1001)])
    assert time.monotonic() - begin < 30
    hospital.policy("min_cell = 1\n")
    levels = [f"cancer_type\t{t}" for t in (*QUESTION["cancers"], *range(499))]
    plan = Plan(kind="km", group="cancer_type")
    told = hospital.send(
        wire.request({"plan_json": plan.model_dump_json(), "step": "table", "round": 1, "levels": levels}), wire.ANALYSE
    ).get("refusal")
    assert "501 groups are compared or kept apart" in str(told)
    assert hospital.study(lung()) == ""


def test_threads_are_at_most_the_machines(hospital: Hospital) -> None:
    before = torch.get_num_threads()
    try:
        assert hospital.study(lung(runtime__threads=10**6)) == ""
        assert torch.get_num_threads() <= (os.cpu_count() or 1)
    finally:
        torch.set_num_threads(before)


def test_a_disk_that_is_nearly_full_takes_no_more(hospital: Hospital, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(hospital.folder)
    monkeypatch.setattr(message_check.shutil, "disk_usage", lambda _: usage._replace(free=900_000_000))
    assert "900 MB are free on the disk of its working folder, its policy keeps 1000" in hospital.study(lung())
    hospital.policy("min_free_mb = 500\n")
    assert hospital.study(lung()) == ""


def test_weights_of_many_studies_do_not_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "MOST_STUDIES", 3)
    for i in range(5):
        weights = {"w": np.full(3, float(i))}
        kept = Reference(tmp_path / f"study-{i}.safetensors", "Aachen", Resident())
        kept.resolved({HASH: hash_of(weights)}, {f"weights/{n}": v for n, v in weights.items()})
        os.utime(kept.file, ns=(i, i))
    assert sorted(f.name for f in tmp_path.iterdir()) == [f"study-{i}.safetensors" for i in (2, 3, 4)]


@pytest.mark.parametrize("key", ["protocol", "package"])
def test_a_message_does_not_command_the_hospitals_terminal(
    hospital: Hospital, key: str, caplog: pytest.LogCaptureFixture
) -> None:
    content = wire.request({**greeting(lung()), **QUESTION})
    content["ask"]["protocol"] = 1  # type: ignore[index]
    content["ask"][key] = "1\x1b[2J\r\nfake line\x9b\u202e"  # type: ignore[index]
    told = hospital.refusal(content, wire.HELLO)
    assert "fake line" in told
    assert told.isprintable()
    assert all(record.getMessage().isprintable() for record in caplog.records if "refused" in record.msg)
    assert hospital.study(lung()) == ""
