"""Whole studies whose sums are added under masks, over sites with work folders of their own."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message
from oncofed.client.data.site import SiteFolder
from oncofed.common import wire
from oncofed.common.privacy.releases import promise_of
from oncofed.common.study import Study
from oncofed.deploy.simulate import simulate
from oncofed.server.app import run_study
from oncofed.server.checkpoint import load_arrays
from oncofed.server.report.render import render
from oncofed.server.roster import NotEnoughSites
from test_private_study import PRIVATE, Hospitals

Make = Callable[..., Study]
OPEN = "min_cell = 1\n"
"""A policy that lets tables of risk and time out."""


def weights(study: Study, fold: int = 0) -> dict[str, bytes]:
    arrays, _ = load_arrays(Path(study.runtime.out) / f"model-fold-{fold}.safetensors")
    return {k: v.tobytes() for k, v in arrays.items()}


def listened(hospitals: Hospitals, study: Study, fault: Any = None) -> tuple[dict[str, Any], list[Message]]:
    """A study's results and every reply."""
    grid, replies = hospitals.grid(fault), []
    ask = grid.pull_messages

    def pull(ids: Any) -> Any:
        got = list(ask(ids))
        replies.extend(got)
        return got

    grid.pull_messages = pull  # type: ignore[method-assign]
    return run_study(study, grid), replies


@pytest.mark.parametrize(
    "keys",
    [
        {"training__rounds": 3, "splits__validation": 0.2, "training__patience": 2},
        {"splits__refit": True, "analysis__attributions": True, "aggregation__rule": "fedavg"},
        {"task__kind": "classification", "analysis__attributions": True, "analysis__ablation": True},
        {"pretraining__rounds": 1, "training__first_layer": "slow"},
    ],
    ids=lambda k: ", ".join(k),
)
def test_the_model_is_that_of_clear_sums_to_the_last_bit(
    consortium: Path, tmp_path: Path, small_study: Make, keys: dict[str, Any]
) -> None:
    """Weights, scale and explanation, and what is measured of them; of no site any part."""
    clear = small_study(**keys, runtime__out=str(tmp_path / "clear"))
    secure = clear.changed(privacy__secure_sum=True, runtime__out=str(tmp_path / "secure"))
    told = [Hospitals(consortium, tmp_path / s.runtime.out, OPEN).run(s) for s in (clear, secure)]
    assert told[1]["left_out"] == []
    assert weights(clear) == weights(secure)
    a, b = (r["folds"][0] for r in told)
    assert a["evaluation"] == b["evaluation"]
    assert a.get("ablation") == b.get("ablation")
    for x, y in zip(a["curve"], b["curve"], strict=True):
        assert x.pop("train_loss") == pytest.approx(y.pop("train_loss"))
        assert x == y
    assert (set(a["site_evidence"]), b["site_evidence"]) == (set(b["site_rounds"]), {})
    if "evaluation" in told[0]:
        one, other = (r["evaluation"] for r in told)
        assert other["by_site"] == []
        assert {k: v for k, v in one.items() if k != "by_site"} == {k: v for k, v in other.items() if k != "by_site"}
    assert render({"results": told[1]})


def test_no_reply_holds_a_sum_in_clear(hospitals: Hospitals, small_study: Make) -> None:
    """Arrays leave as words under masks alone; beside them no loss and no exact count; the hospital's log says whose total it was."""
    study = small_study(privacy__secure_sum=True)
    results, replies = listened(hospitals, study)
    assert results["left_out"] == []
    kinds: dict[str, int] = {}
    for reply in replies:
        kind, told = reply.metadata.message_type, wire.read_config(reply.content, "from")
        kinds[kind] = kinds.get(kind, 0) + 1
        assert ("arrays" in reply.content.array_records) == (kind == wire.MASKED)
        assert not {"loss"} & set(told)
        if kind == wire.TRAIN:
            assert told["patients"] % 8 == 0  # type: ignore[operator]  # four fifths of tens, as everyone may know them
            assert told["seconds"] == 0.0
        if kind == wire.MASKED:
            assert all(v.dtype == np.uint64 for v in wire.read_arrays(reply.content).values())
    assert kinds[wire.SHARES] == kinds[wire.MASKED] == kinds[wire.UNMASK]
    assert kinds[wire.MASKED] == kinds[wire.TRAIN] + kinds[wire.STATISTICS] + kinds[wire.EVALUATE] + kinds[wire.EXPLAIN]
    names = [SiteFolder.open(f).name for f in hospitals.folders]
    totals = [line for line in hospitals.log() if line["kind"] == wire.UNMASK]
    assert totals
    assert all(line["members"] == names for line in totals)
    lines = [line for line in hospitals.log() if line.get("under_masks")]
    sent = [line for line in hospitals.log() if line["kind"] == wire.MASKED]
    assert len(lines) == len(sent)
    assert all(
        a["arrays"].keys() == b["arrays"].keys() and a["sha256"] != b["sha256"]
        for a, b in zip(lines, sent, strict=True)
    )


@pytest.fixture
def hospitals(consortium: Path, tmp_path: Path) -> Hospitals:
    return Hospitals(consortium, tmp_path / "hospitals", OPEN)


@pytest.mark.parametrize(
    ("how", "kind"),
    [
        ("error", wire.TRAIN),
        ("lost", wire.SHARES),
        ("error", wire.MASKED),
        ("lost-reply", wire.MASKED),
        ("lost", wire.UNMASK),
        ("lost-reply", wire.UNMASK),
    ],
)
def test_a_hospital_that_fails_between_exchanges_does_not_spoil_the_round(
    hospitals: Hospitals, small_study: Make, tmp_path: Path, how: str, kind: str
) -> None:
    """The second hospital fails in round 2, at one exchange; the model is that of clear sums over those in the total."""
    exchanges = (wire.TRAIN, wire.SHARES, wire.MASKED, wire.UNMASK)

    def failing(*kinds: str) -> Callable[[Message], str | None]:
        rounds: list[int] = [0]

        def fault(message: Message) -> str | None:
            asked = message.metadata.message_type
            if asked == wire.TRAIN:
                rounds[0] = int(str(wire.read_config(message.content, "ask")["round"]))
            elif asked not in exchanges:
                rounds[0] = 0
            return how if rounds[0] == 2 and asked in kinds and message.metadata.dst_node_id == 1001 else None

        return fault

    keys = {"training__evaluate_every": 0, "runtime__round_timeout_s": 0.5, "evaluation__tables": False}
    secure = small_study(privacy__secure_sum=True, **keys)
    results = hospitals.run(secure, failing(kind))
    assert [(x["site"], x["kind"], x["round"]) for x in results["left_out"]] == [("Bergen", kind, 2)]
    clear = small_study(**keys, runtime__out=str(tmp_path / "clear"))
    # one that is lost at the last exchange is in the total
    clear_ones = Hospitals(Path(hospitals.folders[0]).parent, tmp_path / "again", OPEN)
    clear_ones.run(clear, None if kind == wire.UNMASK else failing(wire.TRAIN))
    assert weights(clear) == weights(secure)


def test_two_of_four_lost_stop_the_round_and_nothing_is_known(hospitals: Hospitals, small_study: Make) -> None:
    def fault(message: Message) -> str | None:
        return "error" if message.metadata.message_type == wire.MASKED and message.metadata.dst_node_id < 1002 else None

    with pytest.raises(
        NotEnoughSites, match=r"2 good answers to 'query\.masked' of a secure sum, wanted 3 .* nothing is known"
    ):
        hospitals.run(small_study(privacy__secure_sum=True), fault)
    assert not any(kind == wire.UNMASK for kind, _, _ in hospitals.messages)


def test_a_killed_study_resumes_with_the_same_hospitals_and_no_others(
    hospitals: Hospitals, small_study: Make, tmp_path: Path
) -> None:
    study = small_study(privacy__secure_sum=True, training__rounds=3)

    class Killed(Exception):
        pass

    def kill(message: Message) -> None:
        ask = wire.read_config(message.content, "ask")
        if message.metadata.message_type == wire.TRAIN and ask["round"] == 3:
            raise Killed
        return None

    with pytest.raises(Killed):
        hospitals.run(study, kill)

    def without(message: Message) -> str | None:
        return "error" if message.metadata.dst_node_id == 1001 and message.metadata.message_type != wire.HELLO else None

    with pytest.raises(NotEnoughSites, match="another total, of Aachen, Coimbra, Dublin, would tell"):
        hospitals.run(study.changed(runtime__resume=True), without)
    hospitals.run(study.changed(runtime__resume=True))
    whole = study.changed(runtime__out=str(tmp_path / "whole"), name="another")
    hospitals.run(whole)
    assert weights(study) == weights(whole)


def test_patient_level_privacy_under_masks_costs_what_was_promised(hospitals: Hospitals, small_study: Make) -> None:
    study = small_study(**PRIVATE, privacy__secure_sum=True, privacy__evidence="noised", evaluation__epsilon=1.0)
    results, replies = listened(hospitals, study)
    assert results["left_out"] == []
    assert all(("arrays" in r.content.array_records) == (r.metadata.message_type == wire.MASKED) for r in replies)
    promise = promise_of(study)
    for i in range(4):
        ledger = hospitals.ledger(i)
        ledger.verify()
        (statement,) = ledger.studies()
        assert statement.unsettled == 0
        assert statement.epsilon == pytest.approx(promise.epsilon, rel=1e-3)
    assert all("train_loss" not in point for point in results["folds"][0]["curve"])
    assert results["privacy"]
    assert "epsilon" in render({"results": results})


def test_a_private_round_asked_again_gives_the_same_noise_and_costs_nothing(
    hospitals: Hospitals, small_study: Make
) -> None:
    study = small_study(**PRIVATE, privacy__secure_sum=True, training__rounds=3)
    hospitals.run(study)
    once, spent = weights(study), hospitals.ledger().spent()
    hospitals.run(study)
    assert weights(study) == once
    assert hospitals.ledger().spent() == spent


def test_hospital_level_privacy_under_masks(hospitals: Hospitals, small_study: Make) -> None:
    study = small_study(**(PRIVATE | {"privacy__unit": "hospital"}), privacy__secure_sum=True)
    results = hospitals.run(study)
    assert results["left_out"] == []
    assert results["folds"][0]["curve"][0]["evidence"]["trunk"] == 4.0
    assert results["privacy"]


def test_what_sites_see_of_modalities_adds_up_under_masks(consortium: Path, tmp_path: Path, small_study: Make) -> None:
    keys = {"model__name": "path_gptomic", "fusion__modulation": "federated", "privacy__secure_sum": True}
    secure = small_study(**keys, runtime__out=str(tmp_path / "secure"))
    clear = secure.changed(privacy__secure_sum=False, runtime__out=str(tmp_path / "clear"))
    told = [simulate(study, consortium).results for study in (clear, secure)]
    assert weights(clear) == weights(secure)
    assert told[1]["folds"][0]["curve"][0]["branches"] == told[0]["folds"][0]["curve"][0]["branches"]
    assert render({"results": told[1]})


def test_a_hospital_may_answer_sums_under_masks_alone(consortium: Path, tmp_path: Path, small_study: Make) -> None:
    hospitals = Hospitals(consortium, tmp_path / "h", OPEN + "require_secure_sum = true\nmin_members = 4\n")
    with pytest.raises(NotEnoughSites, match=r"set privacy\.secure_sum = true"):
        hospitals.run(small_study())
    assert hospitals.run(small_study(privacy__secure_sum=True))["left_out"] == []


def test_three_of_a_consortium_that_wants_four_are_too_few(consortium: Path, tmp_path: Path, small_study: Make) -> None:
    hospitals = Hospitals(consortium, tmp_path / "h", "min_members = 4\n")

    def fault(message: Message) -> str | None:
        return (
            "error" if message.metadata.message_type == wire.MASKED and message.metadata.dst_node_id == 1003 else None
        )

    with pytest.raises(NotEnoughSites, match="3 members in the total of a secure sum, wanted 4"):
        hospitals.run(small_study(privacy__secure_sum=True), fault)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ray", "superlink"])
def test_engines_give_the_same_total(consortium: Path, tmp_path: Path, small_study: Make, engine: Any) -> None:
    """Real processes, one for each message of a site: what an exchange needs of the one before lies in files."""
    shutil.copytree(consortium, tmp_path / "sites", ignore=shutil.ignore_patterns(".oncofed"))
    keys = {"training__rounds": 1, "training__evaluate_every": 0, "panel__powers": False, "evaluation__tables": False}
    keys |= {"runtime__wait_sites_s": 120.0, "runtime__round_timeout_s": 120.0}
    clear = small_study(**keys, runtime__out=str(tmp_path / "clear"))
    simulate(clear, tmp_path / "sites")
    secure = clear.changed(privacy__secure_sum=True, runtime__out=str(tmp_path / "secure"))
    results = simulate(secure, tmp_path / "sites", engine).results
    assert results["left_out"] == []
    assert weights(clear) == weights(secure)
