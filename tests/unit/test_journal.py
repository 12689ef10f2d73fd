"""The journal holds whole lines, whatever ended the run before, and goes with the files of an earlier run."""

from __future__ import annotations

import errno
import io
import json
import logging
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import pytest
from oncofed.common.study import Study
from oncofed.server.checkpoint import CHECKPOINTS
from oncofed.server.journal import JOURNAL, LONGEST, Journal
from oncofed.server.run_folder import opened

Make = Callable[..., Study]


def events(file: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_line_an_event_at_once(tmp_path: Path) -> None:
    file = tmp_path / JOURNAL
    with Journal.opened(file) as journal:
        journal.write("round", loss=float("nan"), validation=0.5, sites=["A", "B"])
        (event,) = events(file)  # before it is closed
        assert {k: v for k, v in event.items() if k != "time"} == {
            "event": "round",
            "loss": None,
            "validation": 0.5,
            "sites": ["A", "B"],
        }
        time = str(event["time"])
        assert time.endswith("Z")
        assert abs(datetime.fromisoformat(time).timestamp() - file.stat().st_mtime) < 60
        journal.write("left_out", reason="two\nlines" + "x" * 5000)
    assert [e["event"] for e in events(file)] == ["round", "left_out"]
    assert len(str(events(file)[1]["reason"])) == LONGEST


@pytest.mark.parametrize("torn", ['{"time": "2026', "", '{"event": "round"}\n'])
def test_after_a_torn_line_it_goes_on_on_a_fresh_one(tmp_path: Path, torn: str) -> None:
    file = tmp_path / JOURNAL
    file.write_text(torn)
    with Journal.opened(file) as journal:
        journal.write("finished")
    assert file.read_text().startswith(torn)
    whole = file.read_text()[len(torn) :]
    assert json.loads(whole)["event"] == "finished"
    assert whole.startswith("\n") == bool(torn and not torn.endswith("\n"))


def test_a_journal_that_cannot_be_written_costs_the_run_nothing(caplog: pytest.LogCaptureFixture) -> None:
    class Full(io.RawIOBase):
        full = True
        kept = b""

        def write(self, text: bytes) -> int:  # type: ignore[override]
            if self.full:
                raise OSError(errno.ENOSPC, "No space left on device")
            self.kept += text
            return len(text)

    file = Full()
    journal = Journal(file)
    with caplog.at_level(logging.ERROR, "oncofed.server"):
        journal.write("round")
        journal.write("round")
    assert ["the run goes on without it" in r.getMessage() for r in caplog.records] == [True]
    file.full = False
    journal.write("finished")
    assert json.loads(file.kept)["event"] == "finished"
    assert file.kept.startswith(b"\n")  # what came before may have been torn


def test_without_a_file_nothing_is_written() -> None:
    Journal().write("finished")


def test_a_new_start_sets_it_aside_and_a_resumed_one_does_not(small_study: Make, tmp_path: Path) -> None:
    study, out = small_study(), tmp_path / "out"

    def run(name: str, *, resume: bool = False) -> None:
        with opened(study.changed(runtime__resume=resume)), Journal.opened(out / JOURNAL) as journal:
            journal.write(name)

    run("first")
    (out / CHECKPOINTS).mkdir()
    run("resumed", resume=True)
    assert [e["event"] for e in events(out / JOURNAL)] == ["first", "resumed"]
    run("anew")
    assert [e["event"] for e in events(out / JOURNAL)] == ["anew"]
    assert [e["event"] for e in events(out / "earlier" / JOURNAL)] == ["first", "resumed"]
    # "anew" got nowhere: it must not drive the earlier run's checkpoints out
    run("again")
    assert [e["event"] for e in events(out / JOURNAL)] == ["again"]
    assert [e["event"] for e in events(out / "earlier" / JOURNAL)] == ["first", "resumed", "anew"]
    assert (out / "earlier" / CHECKPOINTS).is_dir()
