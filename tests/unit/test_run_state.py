"""The state of a run follows from its journal's good lines, whatever stands between them, and is the same read at once or bit by bit."""

from __future__ import annotations

import json
import re
import tempfile
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oncofed.deploy import cli
from oncofed.deploy.operate.control import FlowerRun, FlowerState, agreed
from oncofed.deploy.operate.state import KEPT, Follower, RunState
from oncofed.deploy.operate.view import lasting, sized, sparkline
from oncofed.server.journal import JOURNAL
from typer.testing import CliRunner

BEGIN = 1_800_000_000.0


def line(second: float, event: str, **about: Any) -> str:
    time = datetime.fromtimestamp(BEGIN + second, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
    return json.dumps({"time": time, "event": event, **about})


def started(second: float, **about: Any) -> str:
    base = {"study": "s", "package": "1", "folds": [0, 1], "rounds": 4, "resume": False, "sites": ["A", "B"]}
    return line(second, "started", **(base | about))


def asked(second: float, round_: int, fold: int | None = 0, kind: str = "train") -> str:
    about = {"kind": kind, "fold": fold, "phase": "train", "round": round_}
    return line(second, "question", **about, sites=2, bytes=200)


def answer(second: float, site: str, round_: int, fold: int = 0) -> str:
    about = {"kind": "train", "fold": fold, "phase": "train", "round": round_}
    return line(second, "answer", site=site, **about, seconds=2.5, bytes=30)


def left_out(second: float, site: str, round_: int, reason: str) -> str:
    return line(second, "left_out", site=site, kind="train", round=round_, reason=reason)


def round_(
    second: float, n: int, fold: int = 0, seconds: float = 10.0, phase: str = "train", loss: float | None = 1.0
) -> str:
    about = {"fold": fold, "phase": phase, "round": n, "seconds": seconds, "sites": ["A", "B"]}
    return line(second, "round", **about, bytes_to_sites=200, bytes_from_sites=60, loss=loss, validation=None)


RUN = [
    line(0, "answer", site="A", kind="query.hello", fold=None, phase="", round=0, seconds=0.1, bytes=0),
    left_out(1, "node 7", 0, "another version"),
    started(2),
    asked(3, 1),
    answer(5, "A", 1),
    answer(6, "B", 1),
    round_(7, 1, seconds=4.0),
    line(8, "checkpoint", fold=0, phase="train", round=1),
    asked(9, 2),
    answer(10, "A", 2),
    left_out(11, "B", 2, "Flower error 5: Node Unavailable"),
    round_(12, 2, seconds=8.0, loss=0.5),
    line(13, "back", site="B"),
    round_(14, 3, seconds=6.0),
]


def write(out: Path, lines: list[str], end: str = "\n") -> Path:
    (out / JOURNAL).write_text("".join(f"{text}\n" for text in lines).removesuffix("\n") + end)
    return out


def test_what_a_journal_adds_up_to(tmp_path: Path) -> None:
    state = RunState.of(write(tmp_path, RUN))
    assert (state.study, state.package, state.status, state.folds) == ("s", "1", "running", (0, 1))
    assert (state.started, state.updated, state.fold, state.phase) == (BEGIN + 2, BEGIN + 14, 0, "train")
    assert (state.rounds_done, state.rounds_planned, state.seconds_left) == (3, 8, 5 * 6.0)  # median of 4, 8, 6
    assert [(r.round, r.loss, r.sites, r.bytes_from_sites) for r in state.rounds] == [
        (1, 1.0, 2, 60),
        (2, 0.5, 2, 60),
        (3, 1.0, 2, 60),
    ]
    a, b, node = state.sites
    assert (a.name, a.last_seen, a.answers, a.seconds, a.bytes_from, a.left_out) == ("A", BEGIN + 10, 3, 2.5, 60, 0)
    assert (b.name, b.last_seen, b.answers, b.left_out, b.reason) == (
        "B",
        BEGIN + 13,
        1,
        1,
        "Flower error 5: Node Unavailable",
    )
    assert (node.name, node.last_seen, node.reason) == ("node 7", None, "another version")
    assert state.left_out[-1] == (BEGIN + 11, "B", "train", 2, "Flower error 5: Node Unavailable")
    assert (state.bytes_to_sites, state.bytes_from_sites) == (400, 90)
    told = state.json()
    assert json.loads(json.dumps(told)) == told
    assert told["sites"][0]["name"] == "A"
    assert told["left_out"][-1][1] == "B"


def test_how_a_run_ends(tmp_path: Path) -> None:
    fold = [line(20, "fold", fold=0, seconds=20.0, test=0.6)]
    state = RunState.of(write(tmp_path, RUN + fold))
    assert (state.rounds_done, state.seconds_left) == (4, 4 * 6.0)  # it stopped early: its rounds do not come
    state = RunState.of(write(tmp_path, [*RUN, *fold, line(30, "finished")]))
    assert (state.status, state.rounds_done, state.seconds_left, state.updated) == ("finished", 8, None, BEGIN + 30)
    state = RunState.of(write(tmp_path, [*RUN, line(30, "failed", reason="too few")]))
    assert (state.status, state.reason, state.rounds_done, state.seconds_left) == ("failed", "too few", 3, None)


def test_a_resumed_run_does_again_what_its_checkpoint_lacks(tmp_path: Path) -> None:
    more = [line(30, "failed", reason="power"), started(100, resume=True, sites=["A", "C"])]
    state = RunState.of(write(tmp_path, RUN + more))
    assert (state.status, state.reason, state.started, state.rounds_done) == ("running", "", BEGIN + 2, 3)
    assert [s.name for s in state.sites] == ["A", "B", "C", "node 7"]
    state = RunState.of(write(tmp_path, [*RUN, *more, round_(101, 2, loss=0.25)]))  # checkpoint 2 was damaged
    assert [(r.round, r.loss) for r in state.rounds] == [(1, 1.0), (2, 0.25)]
    assert state.rounds_done == 2
    # a run whose first rounds had no journal
    assert RunState.of(write(tmp_path, [started(0, resume=True), round_(1, 3)])).rounds_done == 3


def test_rounds_of_all_phases_count(tmp_path: Path) -> None:
    lines = [started(0, rounds=5), *(round_(n, n, phase="pretrain") for n in (1, 2, 3)), round_(4, 1)]
    state = RunState.of(write(tmp_path, lines))
    assert (state.phase, state.rounds_done, state.rounds_planned) == ("train", 4, 10)


def test_a_sum_under_masks_leaves_the_place_as_it_was(tmp_path: Path) -> None:
    state = RunState.of(write(tmp_path, [*RUN, asked(20, 3, fold=None, kind="query.shares")]))
    assert (state.fold, state.phase, state.bytes_to_sites) == (0, "train", 600)


def test_the_last_reasons_are_kept(tmp_path: Path) -> None:
    state = RunState.of(write(tmp_path, [started(0), *(left_out(i, "A", i, f"r{i}") for i in range(1, 100))]))
    assert [r[4] for r in state.left_out] == [f"r{i}" for i in range(100 - KEPT, 100)]
    assert state.sites[0].left_out == 99


def test_a_folder_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no run was started here.*name the folder"):
        RunState.of(tmp_path)
    (tmp_path / "study.toml").write_text("")
    assert RunState.of(tmp_path) == RunState()


JUNK = st.one_of(
    st.just(""),
    st.text(st.characters(exclude_characters="\n\r", exclude_categories=["Cs"]), max_size=30),
    st.sampled_from(
        [
            "[]",
            "null",
            "3",
            "[" * 3000,
            '{"time": "2027-01-01T00:00:00Z"}',
            '{"time": "2027-01-01T00:00:00Z", "event": ["round"]}',
            '{"time": 3, "event": "finished"}',
            '{"time": "yesterday", "event": "finished"}',
            line(5, "finish"),
            line(5, "of"),
            line(5, "at", fold=9, phase="x"),
            line(5, "started", folds="01", rounds=4),
            started(5, rounds=True),
            started(5, folds=[[]]),
            line(5, "round", fold=0),
            round_(5, 9).replace("10.0", "NaN"),
            round_(5, 9).replace("10.0", '"10"'),
            left_out(5, "A", 1, "x").replace('"A"', "[]"),
            line(5, "failed"),
            line(5, "answer", site="A", kind="train", round=1, seconds=-1e999, bytes=3),
            line(5, "question", fold=0, phase=3, bytes=5),
            line(5, "started", study="x", folds=[], rounds=1, resume=False, sites=[]),
            line(5, "answer", site="A", kind="train", round=1, seconds=1.0),
            line(5, "fold", fold="0"),
        ]
    ),
)


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_bad_lines_change_nothing(data: st.DataObject) -> None:
    """Torn, unknown, damaged and repeated lines, anywhere; read in one go, or as the file grows."""
    lines = [text.encode() for text in RUN]
    dirty: list[bytes] = []
    for i, text in enumerate(lines):
        dirty += [j.encode() for j in data.draw(st.lists(JUNK, max_size=2))]
        if data.draw(st.booleans()):
            dirty.append(text[: data.draw(st.integers(0, len(text) - 1))])  # the server was killed here
        dirty.append(text)
        dirty += data.draw(st.lists(st.sampled_from(lines[: i + 1]), max_size=2))
    whole = b"\n".join(dirty) + b"\n" + lines[-1][: data.draw(st.integers(0, len(lines[-1]) - 1))]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        (out / JOURNAL).write_bytes(b"\n".join(lines) + b"\n")
        clean = RunState.of(out)
        (out / JOURNAL).write_bytes(whole)
        assert RunState.of(out) == clean
        follower = Follower(out)
        for cut in sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=4))):
            (out / JOURNAL).write_bytes(whole[:cut])
            follower.state()
        (out / JOURNAL).write_bytes(whole)
        assert follower.state() == clean


def test_a_follower_sees_that_another_run_has_begun(tmp_path: Path) -> None:
    follower = Follower(write(tmp_path, RUN))
    assert follower.state().rounds_done == 3
    write(tmp_path, [started(1000, study="other"), *(asked(1000 + i, 1) for i in range(50))])  # longer than before
    assert (follower.state().study, follower.state().rounds_done) == ("other", 0)
    (tmp_path / JOURNAL).unlink()
    (tmp_path / "study.toml").write_text("")
    assert follower.state() == RunState()


def test_what_flower_says_and_what_the_journal_says() -> None:
    running, done = (
        RunState(status="running", updated=100.0, seconds_left=5.0),
        RunState(status="finished", updated=100.0),
    )
    run = FlowerRun("1", "here", since=50.0)
    failed = FlowerState("finished:failed", "no heartbeat")
    assert agreed(running, run, None) == agreed(running, run, FlowerState("running")) == running
    told = agreed(running, run, failed)
    assert (told.status, told.reason, told.seconds_left) == (
        "failed",
        "Flower says finished:failed (no heartbeat)",
        None,
    )
    assert agreed(done, run, failed) == done
    later = replace(run, since=200.0)  # the journal is an earlier run's
    assert agreed(done, later, None) == RunState()
    assert agreed(done, replace(later, earlier=("0",)), None) == replace(done, status="waiting")
    assert agreed(done, later, failed).status == "failed"


def test_a_run_s_id_is_kept(tmp_path: Path) -> None:
    assert FlowerRun.read(tmp_path) is None
    run = FlowerRun("123", "here", 5.0, ("1", "2"))
    run.write(tmp_path)
    assert FlowerRun.read(tmp_path) == run
    (tmp_path / "flower.json").write_text("{}")
    with pytest.raises(ValueError, match=r"flower\.json: cannot be read; remove it"):
        FlowerRun.read(tmp_path)
    (tmp_path / "run.json").write_text("{}")  # a simulation came after it
    assert FlowerRun.read(tmp_path) is None


def call(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(cli.cli, [str(a) for a in arguments], env={"COLUMNS": "200"})
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def test_a_run_in_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from oncofed.deploy.cli import operate
    from rich.console import Console

    monkeypatch.setattr(operate, "out", Console(width=160))
    write(tmp_path, RUN)
    code, text = call("study", "watch", tmp_path, "--once")
    assert code == 0
    for words in ("running", "3 of 8 rounds", "about 30 s left", "400 B to sites, 90 B from them", "█▁█  1.0000"):
        assert words in text
    assert re.search(r"^B .* 2\.5 s +1 +30 B +1 +Flower error 5: Node Unavailable", text, re.M)
    assert re.search(r"\d\d:\d\d:\d\d  B  train of round 2: Flower error 5: Node Unavailable", text)
    code, text = call("study", "status", tmp_path)
    assert (code, "3 of 8 rounds" in text) == (0, True)
    with pytest.raises(ValueError, match=r"no run of a real federation was submitted.*oncofed study run"):
        call("study", "stop", tmp_path)
    with pytest.raises(ValueError, match="no run of a real federation was submitted"):
        call("study", "logs", tmp_path)
    write(tmp_path, [*RUN, line(30, "failed", reason="too [few] sites")])
    code, text = call("study", "watch", tmp_path)  # follows, and ends with the run
    assert (code, "too [few] sites" in text) == (1, True)
    write(tmp_path, [*RUN, line(30, "finished")])
    code, text = call("study", "watch", tmp_path)
    assert (code, "8 of 8 rounds" in text) == (0, True)
    with pytest.raises(ValueError, match="no run was started here"):
        call("study", "watch", tmp_path / "nowhere")


def test_a_study_that_cannot_be_submitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "none"))
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "study.toml"
    file.write_text("")
    with pytest.raises(ValueError, match=r"Flower's configuration names no SuperLink.*--superlink"):
        call("study", "run", file, "--out", tmp_path / "out")
    file.write_text('[panel]\nfile = "genes.txt"\n')
    with pytest.raises(ValueError, match=r"panel\.file = genes\.txt: no such file"):
        call("study", "run", file, "--out", tmp_path / "out", "--superlink", "here")
    assert not (tmp_path / "out").exists()


def test_words_and_pictures_of_numbers() -> None:
    assert sparkline([1.0, 2.0, 3.0]) == "▁▅█"
    assert sparkline([2.0]) == "▁"
    assert [lasting(s) for s in (-1, 59.9, 61, 3723)] == ["0 s", "59 s", "1 min 1 s", "1 h 2 min"]
    assert [sized(n) for n in (0, 999, 1500, 2_340_000)] == ["0 B", "999 B", "1.5 kB", "2.3 MB"]
