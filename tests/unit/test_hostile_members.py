"""A member that greets or answers in a way that would harm the coordinator or the other members: left out by a name that is one."""

from __future__ import annotations

from typing import Any

import pytest
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from oncofed.common import wire
from oncofed.deploy.engine import InProcessGrid
from oncofed.server.roster import NotEnoughSites, Roster

GREETING: wire.Config = {"genes": ["A"], "cancers": ["BRCA"], "unit_family": "log"}


def roster_of(*members: tuple[str, dict[str, Any]]) -> Roster:
    """A roster over members who greet with these names and words."""
    app = ClientApp()

    @app.query("hello")
    def hello(message: Message, context: Context) -> Message:
        name, told = members[int(context.node_config["i"])]
        return Message(wire.reply(name, GREETING | told), reply_to=message)

    return Roster(InProcessGrid(app, [{"i": i} for i in range(len(members))]), wait_s=1.0, timeout_s=1.0)


HOSTILE: dict[str, tuple[str, dict[str, Any], str]] = {
    "a name that commands a terminal": ("A\x1b[2J", {}, "calls itself"),
    "a name of two lines": ("A\nB", {}, "calls itself"),
    "a name that is a path": ("../../etc/cron.d/x", {}, "calls itself"),
    "a name turned round": ("A\u202eB", {}, "calls itself"),
    "no name": ("", {}, "calls itself"),
    "a long name": ("A" * 81, {}, "calls itself"),
    "more cancer types than a site can be asked about": ("A", {"cancers": [str(i) for i in range(501)]}, "at most 500"),
    "a long cancer type": ("A", {"cancers": ["x" * 201]}, "printable characters, 200"),
    "a cancer type of two lines": ("A", {"cancers": ["x\ny"]}, "printable characters"),
    "a gene that commands a terminal": ("A", {"genes": ["x\x1b[0m"]}, "printable characters"),
    "a refusal that commands a terminal": ("A", {"refusal": "no\x1b[2J\nINFO all is well"}, "INFO all is well"),
    "an endless refusal": ("A", {"refusal": "x" * 10**6}, "xxx ..."),
}


@pytest.mark.parametrize(("name", "told", "words"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_member_is_left_out_and_the_others_go_on(
    name: str, told: dict[str, Any], words: str, caplog: pytest.LogCaptureFixture
) -> None:
    roster = roster_of((name, told), ("Bergen", {}))
    roster.gather(1, {"study_json": "{}"}, quiet_s=0.0)
    assert roster.sites == ["Bergen"]
    (out,) = roster.left_out
    assert words in str(out["reason"])
    assert all(str(value).isprintable() and len(str(value)) < 3100 for value in out.values())
    assert all(record.getMessage().isprintable() for record in caplog.records)


def test_names_of_every_language_are_names() -> None:
    roster = roster_of(("Universitätsklinik <Köln> & 東京", {}))
    roster.gather(1, {"study_json": "{}"}, quiet_s=0.0)
    assert roster.sites == ["Universitätsklinik <Köln> & 東京"]


def test_what_keeps_a_study_from_beginning_is_told_plainly() -> None:
    with pytest.raises(NotEnoughSites) as told:
        roster_of(("A", {"refusal": "no\x1b[2J"})).gather(1, {"study_json": "{}"}, quiet_s=0.0)
    assert str(told.value).isprintable()
