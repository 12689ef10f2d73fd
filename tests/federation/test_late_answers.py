"""Answers that come too late do not count, and a site that comes back as another node takes part again."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message
from oncofed.client.app import app as client_app
from oncofed.common import wire
from oncofed.common.blocks import Sum
from oncofed.common.study import Study
from oncofed.deploy.engine import InProcessGrid
from oncofed.server import roster
from oncofed.server.app import run_study

Make = Callable[..., Study]
NODES: list[Any] = [{"partition-id": i, "num-partitions": 4} for i in range(4)]
BERGEN, BACK = 1001, 2001


def question(message: Message) -> tuple[str, int]:
    """Kind and round of a message from the server."""
    return message.metadata.message_type, int(str(wire.read_config(message.content, "ask").get("round", 0)))


class LateGrid(InProcessGrid):
    """Bergen's answer to round 1 of training is kept back until round 2 has been asked for."""

    held: Message | None = None
    second = False

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        messages = list(messages)
        self.second = self.second or any(question(m) == (wire.TRAIN, 2) for m in messages)
        return super().push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        ids = list(message_ids)
        if self.second and self.held is not None and self.held.metadata.reply_to_message_id in ids:
            reply, self.held = self.held, None
            return [reply]
        for identifier in ids:
            waiting = self._pending.get(identifier)
            if waiting and question(waiting) == (wire.TRAIN, 1) and waiting.metadata.dst_node_id == BERGEN:
                (self.held,) = super().pull_messages([identifier])
                ids.remove(identifier)
                break
        return super().pull_messages(ids) if ids else []


class RestartedGrid(InProcessGrid):
    """Bergen is lost in round 1 and comes back under another node id; the old one is listed for a while."""

    lost = False

    def __init__(self, sites: Path, *, listed: bool) -> None:
        super().__init__(client_app, NODES, {"sites": str(sites)}, fault=self._fault)
        self.listed = listed

    def _fault(self, message: Message) -> str | None:
        if message.metadata.dst_node_id == BERGEN and question(message) == (wire.TRAIN, 1):
            self.lost = True
            self._contexts[BACK] = self._contexts[BERGEN]
            return "lost"
        return None

    def get_node_ids(self) -> Iterable[int]:
        gone = {BERGEN} if self.lost and not self.listed else set()
        return [n for n in self._contexts if n not in gone]


def took_part(results: dict[str, Any]) -> list[list[str]]:
    return [p["took_part"] for p in results["folds"][0]["curve"]]


ALL = ["Aachen", "Bergen", "Coimbra", "Dublin"]
OTHERS = ["Aachen", "Coimbra", "Dublin"]


def test_an_answer_after_the_deadline_is_ignored_and_said_once(
    consortium: Path,
    small_study: Make,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    model_of: Callable[..., Sum],
    differing: Any,
) -> None:
    keys: dict[str, Any] = {"training__rounds": 3, "training__evaluate_every": 0, "runtime__round_timeout_s": 0.5}
    late, lost = (small_study(**keys, runtime__out=str(tmp_path / name)) for name in ("late", "lost"))
    with caplog.at_level(logging.WARNING, "oncofed.server"):
        results = run_study(late, LateGrid(client_app, NODES, {"sites": str(consortium)}))
    assert took_part(results) == [OTHERS, ALL, ALL]
    said = [r.getMessage() for r in caplog.records if "came after its deadline" in r.getMessage()]
    assert said == ["Bergen: answer to 'train' of round 1 came after its deadline: ignored"]

    def fault(message: Message) -> str | None:
        return "lost" if message.metadata.dst_node_id == BERGEN and question(message) == (wire.TRAIN, 1) else None

    run_study(lost, InProcessGrid(client_app, NODES, {"sites": str(consortium)}, fault=fault))
    assert differing(model_of(late), model_of(lost)) == []


@pytest.mark.parametrize("listed", [True, False])
def test_a_site_that_comes_back_as_another_node_takes_part_again(
    consortium: Path, small_study: Make, listed: bool
) -> None:
    study = small_study(training__rounds=3, training__evaluate_every=0, runtime__round_timeout_s=0.5)
    results = run_study(study, RestartedGrid(consortium, listed=listed))
    assert took_part(results) == [OTHERS, ALL, ALL]
    assert [x["reason"] for x in results["left_out"]] == ["no answer within 0.5 s (runtime.round_timeout_s)"]


def test_a_name_is_not_given_away_while_its_node_answers(consortium: Path, small_study: Make) -> None:
    """A second node of the name is refused, and gets it when the first has gone."""

    class Doubled(InProcessGrid):
        asked = 0

        def get_node_ids(self) -> Iterable[int]:
            return [n for n in self._contexts if not (n == BERGEN and self.asked >= 2)]

        def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
            messages = list(messages)
            self.asked = max([self.asked, *(question(m)[1] for m in messages)])
            return super().push_messages(messages)

    grid = Doubled(client_app, [*NODES, NODES[1]], {"sites": str(consortium)})
    results = run_study(small_study(training__rounds=3, training__evaluate_every=0), grid)
    assert took_part(results) == [ALL, ALL, ALL]
    assert ["a second node calls itself Bergen" in str(x["reason"]) for x in results["left_out"]] == [True]
    assert roster.RETRY_S > 60
