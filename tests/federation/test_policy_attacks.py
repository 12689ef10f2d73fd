"""A coordinator that asks for more than the hospital's policy allows, or sends what is no question: refused with the reason, before
any data are opened, written into the log, and the node goes on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
from flwr.app import ConfigRecord, Message, RecordDict
from oncofed.client import admission
from oncofed.client.app import app as client_app
from oncofed.client.approval import RUNNING, Approvals, Package, Text
from oncofed.client.bundle_store import Bundle
from oncofed.client.data import read
from oncofed.client.data.site import list_sites
from oncofed.client.release_log import ReleaseLog
from oncofed.common import signing, wire
from oncofed.common.plan import Plan
from oncofed.common.signed_study import sign, with_signature
from oncofed.common.study import Study
from oncofed.deploy.engine import InProcessGrid, run_in_process
from oncofed.server.app import app as server_app
from oncofed.server.inquiry import greeting
from oncofed.server.roster import NotEnoughSites
from toy_hostile import QUESTION, odd_array

KEY, OTHER = bytes(range(32)), bytes(range(1, 33))
PUBLIC = signing.public_of(KEY)
COORDINATORS = f'coordinators = ["{PUBLIC}"]\n'


@dataclass
class Hospital:
    """A real site folder; `opened` counts the tables that were read."""

    folder: Path
    work: Path
    opened: list[str]

    def send(self, content: RecordDict, kind: str) -> dict[str, Any]:
        """What the answer says, `refusal` or not; no message is ever an error of Flower's."""
        node: list[Any] = [{"site-dir": str(self.folder), "work-dir": str(self.work)}]
        grid = InProcessGrid(client_app, node, {}, through_wire=True)
        (reply,) = grid.send_and_receive([Message(content, 1000, kind)])
        assert not reply.has_error(), reply.error
        return wire.read_config(reply.content, "from")

    def refusal(self, content: RecordDict, kind: str) -> str:
        """The refusal, empty where there is an answer. Of a refusal nothing was opened, and the log tells it."""
        self.opened.clear()
        reason = str(self.send(content, kind).get("refusal", ""))
        last = self.log[-1]
        if reason:
            assert (last["kind"], last["refusal"]) == (kind, reason)
            assert not self.opened, "data were opened"
        else:
            assert "refusal" not in last
        return reason

    def study(self, study: Study, kind: str = wire.HELLO, **config: Any) -> str:
        return self.refusal(wire.request({**greeting(study), **QUESTION, **config}), kind)

    def plan(self, plan: Plan, **config: Any) -> str:
        told = {"plan_json": plan.model_dump_json(exclude={"out", "roster", "signature"}), "signature": plan.signature}
        return self.refusal(
            wire.request({**told, "step": "greeting", "round": 1, "levels": [], **config}), wire.ANALYSE
        )

    def policy(self, text: str) -> None:
        (self.folder / "policy.toml").write_text(text)

    @property
    def log(self) -> list[dict[str, Any]]:
        return ReleaseLog(self.work / "release-log.jsonl", "Aachen").read()


@pytest.fixture
def hospital(consortium: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hospital:
    folder = tmp_path / "aachen"
    shutil.copytree(list_sites(consortium)[0], folder, ignore=shutil.ignore_patterns(".oncofed"))
    opened: list[str] = []
    real = read.read_table

    def listen(path: Path, *rest: Any, **more: Any) -> Any:
        opened.append(path.name)
        return real(path, *rest, **more)

    monkeypatch.setattr(read, "read_table", listen)
    return Hospital(folder, tmp_path / "work", opened)


def lung(**keys: Any) -> Study:
    return Study().changed(**({"name": "lung", "training__rounds": 5, "panel__covariates": ["age"]} | keys))


def signed(asked: Any, key: bytes = KEY) -> Any:
    return with_signature(asked, sign(asked, key))


PRIVATE = {
    "privacy__unit": "patient",
    "panel__scale_by": "patient",
    "task__time_edges": (0, 12, 24, 60),
    "privacy__epsilon": 4.0,
    "panel__covariates": [],
}

ASKED_FOR_MORE: dict[str, dict[str, Any]] = {
    "more epsilon": {"privacy__epsilon": 7.0},
    "a larger delta": {"privacy__delta": 1e-3},
    "no privacy at all": {"privacy__unit": "none"},
    "more rounds": {"training__rounds": 6},
    "more local steps": {"training__local_steps": 40},
    "another column": {"panel__covariates": ["age", "sex=female|male"]},
    "fewer patients behind a step": {"training__batch_size": 16},
    "other folds": {"splits__folds": 9},
    "one fold more": {"splits__refit": True},
    "another model": {"model__experts": 3},
    "another seed": {"seed": 1},
    "another name": {"name": "lung2"},
    "noise on no table": {"evaluation__tables": False},
    "its own sites held out": {"splits__held_out_sites": ["Aachen"]},
}


def test_a_signed_study_is_answered_and_how_it_runs_may_change(hospital: Hospital) -> None:
    hospital.policy(COORDINATORS)
    study = signed(lung(**PRIVATE))
    assert hospital.study(study) == ""
    assert hospital.study(study.changed(runtime__threads=1, runtime__resume=True, runtime__out="x")) == ""
    # paths are the coordinator's own and do not travel
    assert hospital.study(study.changed(panel__file="genes.txt", panel__names="names.txt")) == ""


@pytest.mark.parametrize("more", ASKED_FOR_MORE.values(), ids=ASKED_FOR_MORE)
def test_a_study_that_was_changed_after_it_was_signed_is_refused(hospital: Hospital, more: dict[str, Any]) -> None:
    hospital.policy(COORDINATORS)
    study = signed(lung(**(PRIVATE if any(key.startswith("privacy") for key in more) else {})))
    assert "signed by none of the coordinators" in hospital.study(study.changed(**more))


@pytest.mark.parametrize("kind", [wire.HELLO, wire.STATISTICS, wire.TRAIN, wire.EVALUATE, wire.EXPLAIN])
def test_every_question_is_held_against_the_signature(hospital: Hospital, kind: str) -> None:
    hospital.policy(COORDINATORS)
    grid = {"grid": [0.0, 12.0]}
    assert "is not signed" in hospital.study(lung(), kind, **grid)
    assert "signed by none" in hospital.study(signed(lung()).changed(seed=9), kind, **grid)


def test_signatures_that_do_not_hold(hospital: Hospital) -> None:
    study, good = lung(), sign(lung(), KEY)
    of_a_plan = signing.sign(KEY, "oncofed plan", {})
    hospital.policy(COORDINATORS)
    assert "is not signed" in hospital.study(study)
    for wrong in (sign(study, OTHER), good[:-1] + ("0" if good[-1] != "0" else "1"), of_a_plan, "x", "0" * 128):
        assert "signed by none" in hospital.study(study, signature=wrong)
    assert "wants text" in hospital.study(study, signature=7)
    assert hospital.study(study, signature=good) == ""
    # the key is revoked: the hospital takes it out
    hospital.policy(f'coordinators = ["{signing.public_of(OTHER)}"]\n')
    assert "signed by none" in hospital.study(study, signature=good)
    hospital.policy(f'coordinators = ["{signing.public_of(OTHER)}", "{PUBLIC}"]\n')
    assert hospital.study(study, signature=good) == ""


def test_the_pinned_coordinator_may_hand_over_and_the_old_key_then_counts_no_more(hospital: Hospital) -> None:
    hospital.policy('coordinators = ["pinned"]\n')
    old = signed(lung())
    assert "signed by none" in hospital.study(old)  # nothing is pinned yet
    (hospital.folder / "coordinator.pub").write_text(PUBLIC + "\n")
    assert hospital.study(old) == ""
    (hospital.folder / "coordinator.pub").write_text(signing.public_of(OTHER) + "\n")
    assert "signed by none" in hospital.study(old)
    assert hospital.study(signed(lung(), OTHER)) == ""


def test_where_all_sites_are_held_out_in_turn_their_names_may_come_later(hospital: Hospital) -> None:
    hospital.policy(COORDINATORS)
    every = signed(lung(splits__held_out_sites=["all"]))
    assert hospital.study(every) == ""
    assert hospital.study(every.changed(splits__held_out_sites=["Aachen", "Bergen"])) == ""
    some = signed(lung(splits__held_out_sites=["Aachen", "Bergen"]))
    assert hospital.study(some) == ""
    assert "signed by none" in hospital.study(some.changed(splits__held_out_sites=["Aachen"]))


BOUNDS: list[tuple[str, dict[str, Any], str]] = [
    ('studies = ["breast"]', {}, "the study is 'lung', its policy answers breast (studies in"),
    ('tasks = ["classification"]', {}, "wants survival, its policy allows classification (tasks in"),
    ('models = ["t_gem"]', {}, "wants gene_moe, its policy allows t_gem (models in"),
    (
        'modalities = ["rna"]',
        {"model__name": "path_gptomic"},
        "wants pathology, its policy allows rna (modalities",
    ),
    ("modalities = []", {}, "wants rna, its policy allows none (modalities in"),
    ('columns = ["sex"]', {}, "uses the column 'age', its policy allows sex (columns in"),
    (
        'columns = ["age"]\nlabels = ["grade"]',
        {"task__kind": "classification", "task__label": "grade"},
        "uses the column 'grade', its policy allows age (columns in",
    ),
    ("max_rounds = 4", {}, "wants 5 rounds, the site's policy allows 4"),
    ("max_epsilon = 3.5", PRIVATE, "may cost a patient epsilon 4, its policy allows 3.5 (max_epsilon in"),
    ("max_delta = 1e-6", PRIVATE, "delta is 1e-05, its policy allows 1e-06 (max_delta in"),
    ("max_epsilon = 4.5", {"evaluation__epsilon": 1.0}, "may cost a patient epsilon 5, its policy allows 4.5 (max_eps"),
    ("require_privacy = true", {}, "its policy answers 'patient' alone (require_privacy)"),
    ("require_secure_sum = true", {}, "its policy does not (require_secure_sum)"),
    ('allow = ["train"]', {}, "does not answer 'query.hello' (allowed: train)"),
    ("max_incoming_mb = 0.0001", {}, "MB, its policy reads 0.0001 (max_incoming_mb"),
    ('versions = ["9.9"]', {}, "its policy answers with 9.9 (versions in"),
    (f'code = ["{"0" * 64}"]', {}, "answers with other code (code in"),
    ("approved_code = true", {}, "nobody here approved oncofed"),
    ("approved_studies = true", {}, "nobody here approved the study 'lung' as it is asked"),
]


@pytest.mark.parametrize(("policy", "keys", "words"), BOUNDS)
def test_each_bound_of_the_policy(hospital: Hospital, policy: str, keys: dict[str, Any], words: str) -> None:
    hospital.policy(policy + "\n")
    assert words in hospital.study(lung(**keys))
    hospital.policy("")
    assert hospital.study(lung(**({} if keys.get("task__label") else keys))) == "" or "model__name" in keys


PLANS: list[tuple[str, dict[str, Any], str]] = [
    ("exact_times = false", {"times": "exact"}, "its policy does not (exact_times)"),
    ("min_grid_months = 6", {"grid_months": 3.0}, "is finer than the 6 that its policy wants"),
    ('analyses = ["cox"]', {}, "the analysis is 'km', its policy allows cox (analyses in"),
    ('studies = ["curves"]', {}, "the analysis is 'analysis', its policy answers curves (studies in"),
    (
        'columns = ["age"]\nlabels = ["sex"]',
        {"group": "sex"},
        "uses the column 'sex', its policy allows age (columns in",
    ),
    ('columns = ["sex"]', {"kind": "cox", "covariates": ("age",), "ties": "breslow"}, "uses the column 'age', its"),
    ("", {"where": ("sex=male",)}, "does not let values of the column 'sex' be classes"),
    ("max_epsilon = 0.5", {"epsilon": 1.0}, "epsilon = 1, its policy allows 0.5 (max_epsilon in"),
    ("require_privacy = true", {}, "its policy answers none without (require_privacy)"),
    ("approved_studies = true", {}, "nobody here approved the plan 'analysis' as it is asked"),
    (COORDINATORS, {}, "the analysis 'analysis' is not signed"),
]


@pytest.mark.parametrize(("policy", "keys", "words"), PLANS)
def test_each_bound_on_analyses(hospital: Hospital, policy: str, keys: dict[str, Any], words: str) -> None:
    hospital.policy(policy + "\n")
    assert words in hospital.plan(Plan(**({"kind": "km"} | keys)))


@pytest.mark.parametrize(
    "more",
    [
        {"epsilon": 2.0},
        {"times": "exact", "epsilon": 0.0},
        {"grid_months": 1.0},
        {"group": "sex"},
        {"where": ("sex=male",)},
        {"name": "other"},
        {"min_sites": 1},
    ],
)
def test_a_plan_that_was_changed_after_it_was_signed_is_refused(hospital: Hospital, more: dict[str, Any]) -> None:
    hospital.policy(COORDINATORS + 'exact_times = true\nlabels = ["cancer_type", "sex"]\n')
    plan = signed(Plan(kind="km", group="cancer_type", epsilon=1.0))
    assert hospital.plan(plan) == ""
    assert hospital.plan(plan.model_copy(update={"timeout_s": 5.0, "out": "elsewhere"})) == ""
    assert "signed by none" in hospital.plan(plan.model_copy(update=more))
    assert "signed by none" in hospital.plan(plan, signature=sign(plan, OTHER))


def test_only_the_text_that_a_person_approved_is_answered(hospital: Hospital) -> None:
    hospital.policy("approved_studies = true\n")
    approvals = Approvals(hospital.folder, "Aachen")
    approvals.write([Text.of(lung())], "Dr. Ada Lovelace")
    approvals.write([Text.of(Plan(kind="km"))], "Dr. Ada Lovelace")
    assert hospital.study(lung()) == ""
    assert hospital.study(lung(runtime__threads=1)) == ""
    assert hospital.plan(Plan(kind="km")) == ""
    for changed in (lung(training__rounds=6), lung(name="lung2"), lung(splits__folds=4)):
        assert "nobody here approved the study" in hospital.study(changed)
    assert "nobody here approved the plan" in hospital.plan(Plan(kind="km", grid_months=6.0))
    approvals.write([Text.of(lung())], "Dr. Ada Lovelace", "withdraw")
    assert "nobody here approved the study" in hospital.study(lung())
    assert hospital.plan(Plan(kind="km")) == ""
    # a file that somebody edited approves nothing
    file = hospital.folder / "approvals.jsonl"
    file.write_text(file.read_text().replace("Ada", "Eve"))
    assert "file of approvals approvals.jsonl is not as it was written" in hospital.plan(Plan(kind="km"))


def test_only_approved_code_answers(hospital: Hospital, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hospital.policy("approved_code = true\n")
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "home"))
    monkeypatch.delenv(RUNNING, raising=False)
    approvals, bundle = Approvals(hospital.folder, "Aachen"), Bundle("a.b.1", "ab" * 32, "x:app", "y:app", ())
    assert "nobody here approved oncofed" in hospital.study(lung())
    approvals.write([Package.installed()], "Dr. Ada Lovelace")
    assert "runs without the guard" in hospital.study(lung())
    monkeypatch.setenv(RUNNING, bundle.sha256)
    assert "nobody here approved the Flower bundle abababab" in hospital.study(lung())
    approvals.write([bundle], "Dr. Ada Lovelace")
    assert hospital.study(lung()) == ""
    (tmp_path / "home" / "apps" / bundle.folder).mkdir(parents=True)
    assert hospital.study(lung()) == ""
    (tmp_path / "home" / "apps" / "evil.app.1.00000000").mkdir()
    assert "holds 'evil.app.1.00000000', which nobody here approved" in hospital.study(lung())
    (tmp_path / "home" / "apps" / "evil.app.1.00000000").rmdir()
    # another oncofed was installed since
    monkeypatch.setattr("oncofed.client.approval.package_hash", lambda: "0" * 64)
    assert "with the code 0000000000000000, which is installed" in hospital.study(lung())


@pytest.mark.parametrize(
    ("now", "words"),
    [
        ("2026-11-30T12:00:00", "next from Mon 2026-11-30 18:00 CET"),
        ("2026-12-01T05:00:01", "next from Tue 2026-12-01 18:00 CET"),
        ("2026-12-05T10:00:00", "next from Mon 2026-12-07 18:00 CET"),  # of a Saturday; Friday's ended at six
        ("2026-11-30T17:00:00", ""),
        ("2026-12-01T04:59:59", ""),
        ("2026-12-05T04:30:00", ""),
    ],
)
def test_a_closed_node_says_when_it_opens(
    hospital: Hospital, monkeypatch: pytest.MonkeyPatch, now: str, words: str
) -> None:
    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:  # type: ignore[override]
            return datetime.fromisoformat(now).replace(tzinfo=UTC)

    monkeypatch.setattr(admission, "datetime", Clock)
    hospital.policy('hours = ["Mon-Fri 18:00-06:00"]\ntime_zone = "Europe/Berlin"\n')
    told = hospital.study(lung())
    assert words in told
    assert bool(told) == bool(words)


def test_what_leaves_at_once_and_for_a_study_is_bounded(hospital: Hospital) -> None:
    question = wire.request({**greeting(lung()), **QUESTION})
    hospital.policy("max_outgoing_mb = 0.0003\n")
    assert "its policy lets 0.0003 out at once (max_outgoing_mb)" in str(hospital.send(question, wire.STATISTICS))
    hospital.policy("max_study_mb = 1\n")
    assert "refusal" not in hospital.send(question, wire.STATISTICS)
    size = ReleaseLog(hospital.work / "release-log.jsonl", "Aachen").sent("lung")
    assert size > 1000
    hospital.policy(f"max_study_mb = {size * 1.5 / 1e6}\n")
    told = str(hospital.send(question, wire.STATISTICS).get("refusal"))
    assert "would have left for 'lung'" in told
    assert "(max_study_mb)" in told
    assert "refusal" not in hospital.send(wire.request({**greeting(lung(name="breast")), **QUESTION}), wire.STATISTICS)


def changed(**config: Any) -> Callable[[RecordDict], None]:
    def change(content: RecordDict) -> None:
        content["ask"] = ConfigRecord({**content.config_records["ask"], **config})

    return change


def without(key: str) -> Callable[[RecordDict], None]:
    def change(content: RecordDict) -> None:
        del content["ask"][key]  # type: ignore[attr-defined]

    return change


def array(*form: Any) -> Callable[[RecordDict], None]:
    def change(content: RecordDict) -> None:
        content["arrays"] = odd_array(*form)

    return change


def no_ask(content: RecordDict) -> None:
    del content["ask"]


MALFORMED: list[tuple[Callable[[RecordDict], None], str]] = [
    (no_ask, "the message has no part 'ask'"),
    (changed(protocol=1), "speaks oncofed protocol 1"),
    (changed(protocol="x"), "speaks oncofed protocol x"),
    (without("study_json"), "the message's study_json is nothing, 'query.statistics' wants text"),
    (without("fold"), "the message's fold is nothing"),
    (without("cancers"), "the message's cancers is nothing"),
    (without("panel_hash"), "the message's panel_hash is nothing"),
    (changed(fold="0"), "the message's fold is '0', 'query.statistics' wants a whole number"),
    (changed(fold=True), "the message's fold is True"),
    (changed(fold=[0]), "the message's fold is [0]"),
    (changed(round=0.5), "the message's round is 0.5"),
    (changed(cancers="BRCA"), "the message's cancers is 'BRCA'"),
    (changed(cancers=[1, 2]), "the message's cancers is [1, 2]"),
    (changed(cancers=["x"] * 501), "501 cancer types are more than 500"),
    (changed(genes=["x"] * 500_001), "the message's genes has 500001 entries"),
    (changed(powers="yes"), "wants true or false"),
    (changed(edges=[0.0, float("nan")]), "wants finite numbers"),
    (changed(noise_scale=float("nan")), "wants finite numbers"),
    (changed(noise_scale=float("inf")), "wants finite numbers"),
    (changed(extra=b"\0" * 9), "wants no bytes"),
    (changed(study_json="["), "not valid here"),
    (changed(study_json="[" * 200_000), "nested too deep"),
    (changed(study_json="[]"), "not valid here"),
    (changed(study_json="null"), "not valid here"),
    (changed(study_json='{"training": {"learning_rate": NaN}}'), "NaN is no number"),
    (changed(study_json='{"training": {"learning_rate": "x"}}'), "not valid here"),
    (changed(study_json='{"min_cell": 1}'), "min_cell: unknown key"),
    (changed(study_json='{"privacy": {"noise_seed": 1}}'), "noise that can be drawn again protects nobody"),
    *(
        (changed(study_json=json.dumps({"name": n})), "not valid here")
        for n in ("../../x", "a/b", "", "a\nb", "a\0", "é")
    ),
    (changed(panel_hash="../../../../etc/passwd"), "is no panel hash"),
    (changed(panel_hash="0" * 16), "the panel in the message has hash"),
    (changed(genes=["GENE0009"]), "the panel in the message has hash"),
    (array("F32", (2**31, 2**31), b""), "its shape (2147483648, 2147483648) of float32 wants"),
    (array("F32", (2**32, 2**32), b""), "holds 0 bytes"),
    (array("F32", (-1,), b"\0" * 4), "has the shape [-1] at [0, 4], which is none"),
    (array("F32", (3,), b"\0" * 11), "holds 11 bytes, its shape (3,) of float32 wants 12"),
    (array("object", (1,), b"\0" * 8), "only plain numbers travel"),
    (array("f4,f4", (1,), b"\0" * 8), "only plain numbers travel"),
    (array("no type", (1,), b"\0" * 8), "only plain numbers travel"),
    (array("F32", (1,), b"\0" * 4, "numpy.ndarray"), "packed as numpy.ndarray"),
    (array("F32", (1,), np.float32([np.nan]).tobytes()), "'weights/x' has numbers that are not finite"),
    (array("F64", (1,), np.float64([np.inf]).tobytes()), "'weights/x' has numbers that are not finite"),
]


@pytest.mark.parametrize(("change", "words"), MALFORMED)
def test_what_is_no_question_is_refused_with_a_reason(
    hospital: Hospital, change: Callable[[RecordDict], None], words: str
) -> None:
    content = wire.request({**greeting(lung()), **QUESTION})
    change(content)
    reason = hospital.refusal(content, wire.STATISTICS)
    assert words in reason
    assert len(reason) < 2100
    assert str(hospital.folder) not in reason
    assert hospital.study(lung()) == ""  # the node goes on


@pytest.mark.parametrize("kind", [wire.SHARES, wire.MASKED, wire.UNMASK])
@pytest.mark.parametrize("question", ["../../x", "", "0" * 63, 7])
def test_exchanges_of_a_sum_that_is_none(hospital: Hospital, kind: str, question: Any) -> None:
    told = hospital.refusal(wire.request({"sum": question}), kind)
    assert "is no question's digest" in told or "wants text" in told


@pytest.mark.parametrize("kind", ["query", "query.predictions", "train.more"])
def test_a_kind_of_question_that_is_none(hospital: Hospital, kind: str) -> None:
    content = wire.request({**greeting(lung()), **QUESTION})
    assert f"does not know '{kind}'" in hospital.refusal(content, kind)


def test_a_policy_or_a_folder_that_cannot_be_read_lets_nothing_out_and_says_so_in_the_log(hospital: Hospital) -> None:
    for text in ("min_cells = 3", "min_cell = 0", 'hours = ["whenever"]', 'coordinators = ["xyz"]', "["):
        hospital.policy(text)
        told = hospital.study(lung())
        assert "policy.toml cannot be used" in told
        assert "xyz" not in told
    (hospital.folder / "policy.toml").unlink()
    (hospital.folder / "site.toml").unlink()
    assert "site.toml is missing" in hospital.study(lung())


def test_a_log_that_was_shortened_lets_nothing_out(hospital: Hospital) -> None:
    assert hospital.study(lung()) == ""
    assert hospital.study(lung()) == ""
    file = hospital.work / "release-log.jsonl"
    whole = file.read_text()
    file.write_text(whole.splitlines(keepends=True)[0])
    content = wire.request({**greeting(lung()), **QUESTION})
    told = str(hospital.send(content, wire.HELLO).get("refusal"))
    assert "its release log cannot be written or is not as it was written, so nothing leaves" in told
    assert file.read_text() == whole.splitlines(keepends=True)[0]
    file.write_text(whole)
    assert hospital.study(lung()) == ""


def test_a_signed_study_runs_to_its_end_and_the_file_beside_it_brings_the_signature(
    consortium: Path, tmp_path: Path, small_study: Callable[..., Study]
) -> None:
    """Each site is held out in turn: the server puts their names into the study after it was signed."""
    shutil.copytree(consortium, tmp_path / "sites", ignore=shutil.ignore_patterns(".oncofed"))
    folders = list_sites(tmp_path / "sites")
    for folder in folders:
        (folder / "policy.toml").write_text(COORDINATORS + "min_cell = 1\n")
    study = small_study(splits__held_out_sites=["all"], training__evaluate_every=0, training__rounds=1)
    file = tmp_path / "lung.toml"
    file.write_text(tomli_w.dumps(study.model_dump(mode="json")))
    nodes: list[Any] = [{"site-dir": str(f), "work-dir": str(tmp_path / "work" / f.name)} for f in folders]
    with pytest.raises(NotEnoughSites, match="is not signed"):
        run_in_process(server_app, client_app, nodes, Study().run_config() | {"study": str(file)})
    (tmp_path / "lung.toml.sig").write_text(sign(study, KEY) + "\n")
    run_in_process(server_app, client_app, nodes, Study().run_config() | {"study": str(file)})
    results = json.loads((Path(study.runtime.out) / "results.json").read_text())
    assert results["left_out"] == []
    assert results["study"]["splits"]["held_out_sites"] == results["sites"]
    logs = [ReleaseLog(tmp_path / "work" / f.name / "release-log.jsonl", f.name).read() for f in folders]
    trained = [any(line["kind"] == wire.TRAIN for line in log) for log in logs]
    assert trained == [False, True, True, True]  # the first is held out in fold 0
