"""Words of a hospital that a terminal would obey reach neither the log nor the results."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from oncofed.common import wire
from oncofed.common.errors import one_line
from oncofed.deploy.engine import InProcessGrid
from oncofed.server.roster import NotEnoughSites, Roster

ESCAPE = "\x1b]52;c;ZXZpbA==\x1b\\"
"""Writes the clipboard of whoever sees it in a terminal."""
GREETING: wire.Config = {"genes": ["TP53"], "cancers": ["BRCA"], "unit_family": "log"}


def site(answer: Callable[[str], tuple[str, wire.Config]]) -> InProcessGrid:
    """A federation of one site, which answers a kind of message with a name and a config."""
    app = ClientApp()

    def reply(kind: str) -> Callable[[Message, Context], Message]:
        def handle(message: Message, context: Context) -> Message:
            name, config = answer(kind)
            return Message(wire.reply(name, config, {}), reply_to=message)

        return handle

    app.query("hello")(reply("hello"))
    app.train()(reply("train"))
    return InProcessGrid(app, [{"partition-id": 0, "num-partitions": 1}], {})


def test_a_refusal_is_one_line_without_escapes(caplog: pytest.LogCaptureFixture) -> None:
    def answer(kind: str) -> tuple[str, wire.Config]:
        return "A", GREETING if kind == "hello" else {"refusal": f"no{ESCAPE}\x9b2J\nB left out\u202e: x"}

    roster = Roster(site(answer), 2.0, 2.0)
    roster.gather(1, {})
    with caplog.at_level(logging.WARNING, "oncofed.server"):
        assert list(roster.ask(wire.TRAIN, {}, None, round_=1)) == []
    (entry,) = roster.left_out
    assert entry["reason"] == "no\ufffd]52;c;ZXZpbA==\ufffd\\\ufffd2J B left out\ufffd: x"
    assert str(entry["reason"]) in caplog.text
    assert not {"\x1b", "\x9b", "\u202e"} & set(caplog.text)


@pytest.mark.parametrize("key", ["site", "unit_family", "images"])
def test_a_greeting_that_cannot_be_shown_is_refused(key: str) -> None:
    told = GREETING | ({key: f"log{ESCAPE}"} if key != "site" else {})
    roster = Roster(site(lambda kind: (f"A{ESCAPE}" if key == "site" else "A", told)), 2.0, 2.0)
    with pytest.raises(NotEnoughSites) as error:
        roster.gather(1, {})
    assert roster.hellos == {}
    (entry,) = roster.left_out
    assert ("calls itself" if key == "site" else f"the greeting's {key} = ") in str(entry["reason"])
    assert "\x1b" not in f"{error.value}{entry}"
    assert str(entry["site"]).isprintable()


def test_plain_words_stay_as_they_are() -> None:
    text = "site Universit\u00e4tsklinikum \u65e5\u672c: fewer than 11 patients (min_cell)"
    assert one_line(text) == text
