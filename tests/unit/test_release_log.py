"""The release log: every message that left stands in it, nobody can take a line out unseen, and a crash costs no line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from oncofed.client.policy import Policy
from oncofed.client.release import Answer, Door, Release
from oncofed.client.release_log import ReleaseLog, about, digest
from oncofed.common import wire
from oncofed.common.errors import Refusal
from oncofed.common.privacy.accounting import Mechanism
from oncofed.deploy import cli
from typer.testing import CliRunner

STAMP: wire.Config = {"study": "lung", "fold": 1, "phase": "train", "round": 2}


@pytest.fixture
def log(tmp_path: Path) -> ReleaseLog:
    return ReleaseLog(tmp_path / ".oncofed" / "release-log.jsonl", "Mayo")


def door(log: ReleaseLog, **policy: object) -> Door:
    return Door("Mayo", Policy.model_validate(policy), log.file)


def answer(patients: int = 40) -> Answer:
    total = {"sum": np.array([[3.0, 4.0], [1.0, 1.0]]), "events": np.array([12.0, 3.0])}
    return Answer({"loss": 0.5}, total, patients, {"sum": np.array([30, 3])}, counts={"events": 1})


def test_a_line_says_what_left_and_how_it_was_protected(log: ReleaseLog) -> None:
    content = door(log, rounding=5).release(wire.STATISTICS, STAMP, answer())
    (line,) = log.read()
    left = wire.read_arrays(content)
    assert (line["study"], line["fold"], line["phase"], line["round"]) == ("lung", 1, "train", 2)
    assert (line["kind"], line["patients"]) == (wire.STATISTICS, 40)
    assert line["arrays"] == {"sum": [2, 2], "events": [2]}
    assert line["norms"] == {"sum": 5.0, "events": 11.18}  # of what left: the row of three patients is zeros
    assert line["protection"] == {"withheld": {"sum": 1}, "rounding": 5}
    assert line["bytes"] == 48
    assert line["words"] > 50
    assert line["sha256"] == digest(left)


def test_noise_stands_in_the_line(log: ReleaseLog) -> None:
    counts = Answer({}, {"events": np.array([12.0])}, 3, counts={"events": 1}, epsilon=1.5)
    with pytest.raises(RuntimeError, match="nobody booked"):
        door(log).release(wire.ANALYSE, {"analysis": "km"}, counts)
    booked = door(log)
    booked.expect(Release("km", "?", "km", "analyse", (Mechanism("pure", 1.5),)))
    booked.release(wire.ANALYSE, {"analysis": "km"}, counts)
    assert log.read()[-1]["protection"]["epsilon"] == 1.5


def test_of_a_sum_that_stays_under_masks_the_log_tells_no_norm(log: ReleaseLog) -> None:
    masked = door(log)
    masked.masks.append(lambda total: {"sum": "0" * 64})
    masked.release(wire.TRAIN, STAMP, answer())
    (line,) = log.read()
    assert line["under_masks"] is True
    assert line["protection"]["masks"] is True
    assert line["bytes"] == 0
    assert "norms" not in line
    door(log).release(wire.MASKED, {"sum": "0" * 64, "study": "lung"}, Answer({}, {"a": np.ones(9, np.uint64)}))
    assert "norms" not in log.read()[-1]


def test_refusals_stand_in_it_and_an_endless_one_is_cut(log: ReleaseLog) -> None:
    door(log).refuse("train", "x" * 100_000, "lung")
    (line,) = log.read()
    assert (line["kind"], line["study"]) == ("train", "lung")
    assert 1000 < len(line["refusal"]) < 3000


def many(log: ReleaseLog, count: int = 4) -> list[bytes]:
    for i in range(count):
        log.refused("train", f"reason {i}", "lung" if i % 2 else "breast")
    return log.file.read_bytes().splitlines(keepends=True)


TAMPERED: dict[str, tuple[Callable[[list[bytes]], list[bytes]], str]] = {
    "a line edited": (lambda x: [x[0], x[1].replace(b"reason 1", b"reason 9"), *x[2:]], "line 2 was changed"),
    "the first line removed": (lambda x: x[1:], "line 1 was changed"),
    "a line removed": (lambda x: [x[0], *x[2:]], "line 2 was changed, or lines before it were removed"),
    "two lines exchanged": (lambda x: [x[1], x[0], *x[2:]], "line 1 was changed"),
    "the tail removed": (lambda x: x[:-1], "3 lines and release-log.head knows of 4"),
    "the tail removed within a line": (lambda x: [*x[:-1], x[-1][:-20]], "line 4 cannot be read"),
    "everything removed": (lambda x: [], "0 lines and release-log.head knows of 4"),
    "a line put in": (lambda x: [*x[:2], x[0], *x[2:]], "line 3 was changed"),
    "a line without a hash": (lambda x: [x[0], b'{"kind": "train"}\n', *x[2:]], "line 2 has no hash"),
}


@pytest.mark.parametrize(("change", "words"), TAMPERED.values(), ids=TAMPERED)
def test_tampering_is_seen(log: ReleaseLog, change: Callable[[list[bytes]], list[bytes]], words: str) -> None:
    lines = many(log)
    log.file.write_bytes(b"".join(change(lines)))
    with pytest.raises(
        Refusal, match=f"site Mayo: its release log release-log.jsonl is not as it was written: .*{words}"
    ):
        log.read()


def test_a_log_whose_end_or_head_is_gone_takes_no_more_lines(log: ReleaseLog) -> None:
    lines = many(log)
    for content in (b"".join(lines[:-1]), b""):
        log.file.write_bytes(content)
        with pytest.raises(Refusal, match="knows of"):
            log.refused("train", "more")
        assert log.file.read_bytes() == content
    log.file.unlink()
    with pytest.raises(Refusal, match="knows of"):
        log.refused("train", "more")
    log.file.write_bytes(b"".join(lines))
    log.chain.head.unlink()
    with pytest.raises(Refusal, match=r"release-log\.head beside it is missing"):
        log.refused("train", "more")


@pytest.mark.parametrize("torn", [b'{"kind": "tr', b"\x00\x00", b'{"kind": "train"\n'])
def test_a_line_that_a_crash_cut_off_is_dropped_and_said(log: ReleaseLog, torn: bytes) -> None:
    many(log)
    with log.file.open("ab") as file:
        file.write(torn)
    assert len(log.read()) == 4
    log.refused("train", "after the crash")
    lines = log.read()
    assert [line.get("op", line.get("refusal")) for line in lines[-2:]] == ["dropped", "after the crash"]
    assert lines[-2]["bytes"] == len(torn)


def test_a_crash_between_log_and_head_costs_no_line(log: ReleaseLog) -> None:
    many(log)
    head = log.chain.head.read_bytes()
    many(log, 2)
    log.chain.head.write_bytes(head)
    assert len(log.read()) == 6
    log.refused("train", "after the crash")
    assert len(log.read()) == 7
    # what a crash left behind the head is held against the chain too
    log.chain.head.write_bytes(head)
    log.file.write_bytes(log.file.read_bytes().replace(b"after the crash", b"after the flood"))
    with pytest.raises(Refusal, match="line 7 was changed"):
        log.refused("train", "more")


def test_it_is_on_the_disk_before_it_leaves_and_a_simulated_one_need_not_be(
    log: ReleaseLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name))
    door(log).release(wire.HELLO, STAMP, Answer({}))
    assert "release-log.jsonl" in synced
    synced.clear()
    aside = ReleaseLog(log.file.with_name("simulated") / "release-log.jsonl", "Mayo", simulated=True)
    Door("Mayo", Policy(), aside.file, simulated=True).release(wire.STATISTICS, STAMP, answer())
    assert synced == []
    assert not {"sha256", "norms", "hash"} & set(aside.read()[0])
    # a hospital's own log stays a chain, whoever writes into it
    Door("Mayo", Policy(), log.file, simulated=True).release(wire.STATISTICS, STAMP, answer())
    assert len(log.read()) == 2


def test_processes_write_one_after_the_other(log: ReleaseLog) -> None:
    script = (
        "import sys; from pathlib import Path; from oncofed.client.release_log import ReleaseLog\n"
        "for i in range(10): ReleaseLog(Path(sys.argv[1]), 'Mayo').refused('train', f'{sys.argv[2]} {i}')\n"
    )
    started = [subprocess.Popen([sys.executable, "-c", script, str(log.file), name]) for name in "ab"]
    assert [process.wait(120) for process in started] == [0, 0]
    said = [line["refusal"] for line in log.read()]
    assert sorted(said) == sorted(f"{name} {i}" for name in "ab" for i in range(10))


def test_a_log_of_an_older_version_is_moved_aside_and_named(log: ReleaseLog) -> None:
    log.file.parent.mkdir(parents=True)
    old = '{"time": "2025-01-01T00:00:00Z", "kind": "train"}\n'
    log.file.write_text(old)
    log.refused("train", "new")
    first, second = log.read()
    assert (log.file.parent / first["before"]).read_text() == old
    assert second["refusal"] == "new"


def test_lines_of_a_study_are_found_also_those_of_its_sums(log: ReleaseLog) -> None:
    door(log).release(wire.HELLO, {"study": "lung"}, Answer({"genes": ["A"]}))
    door(log).release(wire.HELLO, {"study": "lung-2"}, Answer({}))
    door(log).release(wire.ANALYSE, {"analysis": "km", "plan": "0"}, Answer({}, {"a": np.ones(3)}, 20))
    door(log).release(wire.MASKED, {"study": "analysis km 0"}, Answer({}, {"a": np.ones(4, np.uint64)}))
    assert [len(list(about(log.read(), name))) for name in ("lung", "lung-2", "km", "k")] == [1, 1, 2, 0]
    assert log.sent("km") > 24 + 32
    assert log.sent("lung") > 0
    assert log.sent("nobody") == 0


def test_the_command_shows_and_verifies(log: ReleaseLog, tmp_path: Path) -> None:
    (tmp_path / "site.toml").write_text('name = "Mayo"\nexpression_unit = "log2"\n')
    many(log)
    door(log).release(wire.STATISTICS, STAMP, answer())

    def call(*more: str) -> tuple[int, str]:
        done = CliRunner(env={"COLUMNS": "80"}).invoke(cli.cli, ["site", "log", str(tmp_path), *more])
        return done.exit_code, done.output + str(done.exception or "")

    code, text = call()
    assert code == 0
    assert "refused: reason 3" in " ".join(text.split())
    assert "verified" in text
    rows = [line for line in text.splitlines() if line.startswith("20")]
    assert len(rows) == len(log.read()), "a line of the terminal each, and what there is to say below"
    assert max(map(len, rows)) <= 80
    code, text = call("--json", "--study", "lung", "--last", "2")
    assert [json.loads(line)["kind"] for line in text.splitlines()] == ["train", wire.STATISTICS]
    assert call("--verify")[0] == 0
    log.file.write_text(log.file.read_text().replace("reason 1", "reason 7"))
    code, text = call("--verify")
    assert code == 1
    assert "line 2 was changed" in text
