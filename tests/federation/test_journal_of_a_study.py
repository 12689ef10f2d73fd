"""What a study writes in its journal: events in their order, who was left out and why, and how it goes on when it is resumed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Error, Message
from oncofed.client.app import app as client_app
from oncofed.client.session import Session
from oncofed.common import wire
from oncofed.common.errors import Refusal
from oncofed.common.study import Study
from oncofed.deploy.engine import InProcessGrid
from oncofed.deploy.operate.state import RunState
from oncofed.server import fold
from oncofed.server.app import run_study
from oncofed.server.journal import JOURNAL
from oncofed.server.roster import NODE_GONE, NotEnoughSites

Make = Callable[..., Study]
SITES = ["Aachen", "Bergen", "Coimbra", "Dublin"]
NODES: list[Any] = [{"partition-id": i, "num-partitions": 4} for i in range(4)]
KEYS: dict[str, Any] = {"training__evaluate_every": 0, "analysis__experts": False, "evaluation__tables": False}


def events(study: Study) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(study.runtime.out) / JOURNAL).read_text().splitlines()]


def grid(sites: Path, **rest: Any) -> InProcessGrid:
    return InProcessGrid(client_app, NODES, {"sites": str(sites)}, **rest)


def about(message: Message) -> tuple[str, str, int]:
    """Kind, site and round of a question."""
    round_ = int(str(wire.read_config(message.content, "ask").get("round", 0)))
    return message.metadata.message_type, SITES[message.metadata.dst_node_id % 1000], round_


def test_events_stand_in_their_order(consortium: Path, small_study: Make) -> None:
    study = small_study(**KEYS, splits__only=[0, 1], pretraining__rounds=1, training__rounds=2)
    results = run_study(study, grid(consortium))
    told = events(study)
    assert [e["event"] for e in told[:5]] == ["answer"] * 4 + ["started"]  # the greetings
    assert {k: v for k, v in told[4].items() if k not in ("time", "package")} == {
        "event": "started",
        "study": study.name,
        "folds": [0, 1],
        "rounds": 3,
        "resume": False,
        "sites": SITES,
    }
    assert told[-1]["event"] == "finished"
    assert [e["time"] for e in told] == sorted(e["time"] for e in told)
    steps = [
        (e["event"], e["fold"], e.get("phase"), e.get("round"))
        for e in told
        if e["event"] in ("round", "checkpoint", "fold")
    ]
    rounds = [("pretrain", 1), ("train", 1), ("train", 2)]
    assert steps == [
        step
        for f in (0, 1)
        for step in [*((e, f, *r) for r in rounds for e in ("round", "checkpoint")), ("fold", f, None, None)]
    ]
    train = [e for e in told if e.get("kind") == "train" and (e["fold"], e["phase"], e["round"]) == (0, "train", 2)]
    assert [e["event"] for e in train] == ["question"] + ["answer"] * 4
    assert sorted(e["site"] for e in train[1:]) == SITES
    (round_,) = [e for e in told if e["event"] == "round" and (e["fold"], e["phase"], e["round"]) == (0, "train", 2)]
    curve = results["folds"][0]["curve"][1]
    assert (round_["sites"], round_["loss"]) == (SITES, curve["train_loss"])
    assert round_["bytes_to_sites"] == train[0]["bytes"] > 0
    assert round_["bytes_from_sites"] == sum(e["bytes"] for e in train[1:]) > 0
    assert [e["test"] for e in told if e["event"] == "fold"] == [
        f["curve"][-1]["test_c_index"] for f in results["folds"]
    ]
    state = RunState.of(Path(study.runtime.out))
    assert (state.status, state.rounds_done, state.rounds_planned) == ("finished", 6, 6)
    for key in ("bytes_to_sites", "bytes_from_sites"):
        assert getattr(state, key) == sum(f[key] for f in results["folds"])
    text = (Path(study.runtime.out) / JOURNAL).read_text()
    assert not any(f"{site[:3].upper()}-0" in text for site in SITES)  # no patient


class Troubled(InProcessGrid):
    """In training Aachen's code fails in round 1, Flower's error stands for its app in 2; Bergen refuses in 3, Coimbra's node is
    gone in 4, Dublin says nothing in 5."""

    now = ("", "", 0)

    def _handle(self, message: Message) -> Message | None:
        self.now = about(message)
        if self.now == ("train", "Coimbra", 4):
            reply = Message(Error(NODE_GONE, "Node Unavailable"), reply_to=message)
            reply.metadata.__dict__["_message_id"] = "gone"
            return reply
        return super()._handle(message)


def test_who_is_left_out_shows_with_the_reason(
    consortium: Path, small_study: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults = {("train", "Aachen", 2): "error", ("train", "Dublin", 5): "lost"}
    federation = Troubled(
        client_app, NODES, {"sites": str(consortium)}, fault=lambda message: faults.get(about(message))
    )
    real = Session.training_cohort

    def cohort(self: Session) -> Any:
        if federation.now == ("train", "Aachen", 1):
            raise RuntimeError("patient AAC-0001 is broken")
        if federation.now == ("train", "Bergen", 3):
            raise Refusal("Bergen does not like it")
        return real(self)

    monkeypatch.setattr(Session, "training_cohort", cohort)
    study = small_study(**KEYS, training__rounds=6, runtime__round_timeout_s=0.5)
    results = run_study(study, federation)
    told = events(study)
    left = [(e["site"], e["kind"], e["round"]) for e in told if e["event"] == "left_out"]
    sites = ["Aachen", "Aachen", "Bergen", "Coimbra", "Dublin"]
    assert left == [(site, "train", n + 1) for n, site in enumerate(sites)]
    reasons = [e["reason"] for e in told if e["event"] == "left_out"]
    assert "RuntimeError" in reasons[0]
    assert "AAC-0001" not in reasons[0]  # of an error in a site's code its type alone is told
    assert reasons[1].startswith("Flower error ")
    assert "injected fault" in reasons[1]
    assert reasons[2:] == [
        "Bergen does not like it",
        "Flower error 5: Node Unavailable",
        "no answer within 0.5 s (runtime.round_timeout_s)",
    ]
    assert [
        {k: e[k] for k in ("site", "kind", "round", "reason")} for e in told if e["event"] == "left_out"
    ] == results["left_out"]
    rounds = [e["sites"] for e in told if e["event"] == "round"]
    assert rounds == [[s for s in SITES if s != site] for site in sites] + [SITES]
    state = RunState.of(Path(study.runtime.out))
    assert [(s.name, s.left_out) for s in state.sites] == [("Aachen", 2), ("Bergen", 1), ("Coimbra", 1), ("Dublin", 1)]
    assert [r[4] for r in state.left_out] == reasons


def test_a_resumed_run_goes_on_in_the_same_journal(consortium: Path, small_study: Make) -> None:
    study = small_study(**KEYS, training__rounds=4, aggregation__min_sites=3)

    def fault(message: Message) -> str | None:
        return "error" if about(message)[0] == "train" and about(message)[2] == 3 else None

    with pytest.raises(NotEnoughSites):
        run_study(study, grid(consortium, fault=fault))
    out = Path(study.runtime.out)
    state = RunState.of(out)
    assert (state.status, state.rounds_done) == ("failed", 2)
    assert "0 good answers, aggregation.min_sites = 3" in state.reason
    with (out / JOURNAL).open("a") as file:
        file.write('{"time": "2026-')  # as a killed server leaves it
    run_study(study.changed(runtime__resume=True), grid(consortium))
    state = RunState.of(out)
    assert (state.status, state.reason, [r.round for r in state.rounds]) == ("finished", "", [1, 2, 3, 4])
    lines = (out / JOURNAL).read_text().splitlines()
    assert lines.count('{"time": "2026-') == 1
    started = [e for line in lines if line.endswith("}") and (e := json.loads(line))["event"] == "started"]
    assert [e["resume"] for e in started] == [False, True]
    assert state.started is not None
    run_study(study, grid(consortium))  # anew
    assert [e["event"] for e in events(study)].count("started") == 1
    assert len((out / "earlier" / JOURNAL).read_text().splitlines()) == len(lines)


def test_a_site_that_is_back_is_told(consortium: Path, small_study: Make) -> None:
    class Restarted(InProcessGrid):
        lost = False

        def get_node_ids(self) -> Iterable[int]:
            return [n for n in self._contexts if not (self.lost and n == 1001)]

        def _handle(self, message: Message) -> Message | None:
            if message.metadata.dst_node_id == 1001 and about(message)[2] == 1:
                self.lost = True
                self._contexts[2001] = self._contexts[1001]
                return None
            return super()._handle(message)

    study = small_study(**KEYS, training__rounds=2, runtime__round_timeout_s=0.5)
    run_study(study, Restarted(client_app, NODES, {"sites": str(consortium)}))
    told = events(study)
    assert [e["site"] for e in told if e["event"] == "back"] == ["Bergen"]
    assert [e["sites"] for e in told if e["event"] == "round"] == [["Aachen", "Coimbra", "Dublin"], SITES]


def test_a_study_that_does_not_begin_says_why(consortium: Path, small_study: Make) -> None:
    study = small_study(aggregation__min_sites=5)
    with pytest.raises(NotEnoughSites):
        run_study(study, grid(consortium))
    state = RunState.of(Path(study.runtime.out))
    assert (state.status, state.started, state.rounds_planned) == ("failed", None, 0)
    assert "4 sites take part" in state.reason
    assert [s.name for s in state.sites] == SITES


@pytest.mark.parametrize("stop", [SystemExit(0), KeyboardInterrupt()])
def test_a_server_that_is_told_to_end_says_so(
    consortium: Path, small_study: Make, monkeypatch: pytest.MonkeyPatch, stop: BaseException
) -> None:
    def run(*_: object) -> None:
        raise stop

    study = small_study()
    monkeypatch.setattr(fold.FoldRun, "run", run)
    with pytest.raises(type(stop)):
        run_study(study, grid(consortium))
    state = RunState.of(Path(study.runtime.out))
    assert (state.status, state.reason) == ("failed", "the server's process was told to end")


def test_under_masks_no_more_is_told_than_the_results_say(consortium: Path, small_study: Make) -> None:
    study = small_study(**KEYS, privacy__secure_sum=True)
    results = run_study(study, grid(consortium))
    told = events(study)
    curve = results["folds"][0]["curve"]
    rounds = [e for e in told if e["event"] == "round"]
    assert [(e["sites"], e["loss"]) for e in rounds] == [(p["took_part"], p.get("train_loss")) for p in curve]
    allowed = {"time", "event", "site", "kind", "fold", "phase", "round", "seconds", "bytes"}
    assert all(e.keys() <= allowed for e in told if e["event"] == "answer")
    assert {e["kind"] for e in told if e["event"] == "question" and e["fold"] is None} > {wire.SHARES}
    state = RunState.of(Path(study.runtime.out))
    assert (state.status, state.fold, state.phase) == ("finished", 0, "train")
