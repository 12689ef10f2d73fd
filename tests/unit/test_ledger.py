"""A hospital's ledger: over restarts, crashes, retries and processes at once nothing is released that was not paid for."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest
from oncofed.client.privacy.ledger import Ledger
from oncofed.common.errors import Refusal
from oncofed.common.privacy.accounting import Mechanism, epsilon_of
from oncofed.deploy import cli
from typer.testing import CliRunner

STEPS = Mechanism("sampled_gaussian", 4.0, 5, 0.2)
MOMENTS = Mechanism("gaussian", 8.0)
TABLE = Mechanism("pure", 0.5)
ONE = Mechanism("pure", 1.0)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "work" / "ledger.jsonl"


def ledger(file: Path, budget: float = 8.0, delta: float = 1e-5) -> Ledger:
    return Ledger(file, "Mayo", budget, delta)


def lines(file: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.slow
def test_fifty_rounds_with_a_restart_after_each_cost_what_one_accountant_says(file: Path) -> None:
    from dp_accounting import dp_event
    from dp_accounting.pld.pld_privacy_accountant import PLDAccountant

    ledger(file).reserve("moments", "lung", "statistics", [MOMENTS])
    ledger(file).settle("moments")
    sampled = dp_event.PoissonSampledDpEvent(0.2, dp_event.GaussianDpEvent(4.0))
    accountant = PLDAccountant().compose(dp_event.GaussianDpEvent(8.0))
    for round in range(50):
        ledger(file).reserve(f"train/{round}", "lung", "training", [STEPS])
        ledger(file).settle(f"train/{round}", [4])
        accountant.compose(sampled, 4)
        if round % 10 == 9:
            assert ledger(file).spent() == pytest.approx(accountant.get_epsilon(1e-5), abs=1e-3)
    assert ledger(file).spent(1e-7) == pytest.approx(accountant.get_epsilon(1e-7), abs=1e-3)
    assert ledger(file).spent(1e-7) > ledger(file).spent() > 2.0


def test_what_was_never_settled_counts_in_full(file: Path) -> None:
    ledger(file).reserve("a", "lung", "training", [STEPS.repeated(10), TABLE])
    assert ledger(file).spent() == epsilon_of([STEPS.repeated(10), TABLE], 1e-5)
    ledger(file).settle("a", [7, 0])
    assert ledger(file).spent() == epsilon_of([Mechanism("sampled_gaussian", 4.0, 7, 0.2)], 1e-5)


def test_a_process_killed_before_it_settles_has_paid(file: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path\n"
        "from oncofed.client.privacy.ledger import Ledger\n"
        "from oncofed.common.privacy.accounting import Mechanism\n"
        "Ledger(Path(sys.argv[1]), 'Mayo', 8.0).reserve('a', 'lung', 'table', [Mechanism('pure', 0.5, 3)])\n"
        "print('reserved', flush=True); time.sleep(600)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(file)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "reserved"
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert ledger(file).spent() == epsilon_of([Mechanism("pure", 0.5, 3)], 1e-5) > 1.4
    assert ledger(file).studies()[0].unsettled == 1
    with pytest.raises(Refusal, match="'a' is in its ledger already"):
        ledger(file).reserve("a", "lung", "table", [TABLE])


@pytest.mark.parametrize("settled", [False, True])
def test_an_id_holds_once(file: Path, settled: bool) -> None:
    ledger(file).reserve("a", "lung", "training", [TABLE])
    if settled:
        ledger(file).settle("a", [0])
    before = file.read_bytes()
    with pytest.raises(Refusal, match="site Mayo: the release 'a' is in its ledger already"):
        ledger(file).reserve("a", "breast", "other", [TABLE])
    assert file.read_bytes() == before


def test_beyond_the_budget_nothing_is_written(file: Path) -> None:
    ledger(file, 2.0).charge("lung", "evaluate fold 0", [Mechanism("pure", 1.5)])
    before = file.read_bytes(), file.with_suffix(".head").read_bytes()
    with pytest.raises(
        Refusal, match=r"site Mayo: .*come to epsilon 2\.5 at delta 1e-05; 1\.5 of the budget of 2 is spent"
    ):
        ledger(file, 2.0).charge("lung", "evaluate fold 1", [ONE])
    assert (file.read_bytes(), file.with_suffix(".head").read_bytes()) == before
    ledger(file, 2.0).charge("lung", "evaluate fold 1", [TABLE])
    assert ledger(file, 2.0).spent() == pytest.approx(2.0, abs=1e-3)


def test_the_budget_is_composed_not_added(file: Path) -> None:
    """Fifty steps cost far less than fifty times one."""
    one = Mechanism("gaussian", 20.0)
    assert 50 * epsilon_of([one], 1e-5) > 4 * 1.7
    for i in range(50):
        ledger(file, 1.7).reserve(f"{i}", "lung", "training", [one])
    assert ledger(file, 1.7).spent() == pytest.approx(epsilon_of([Mechanism("gaussian", 20.0, 50)], 1e-5), rel=1e-9)
    with pytest.raises(Refusal, match=r"budget of 1\.7"):
        ledger(file, 1.7).reserve("more", "lung", "training", [one.repeated(50)])


def test_a_study_keeps_its_own_promise(file: Path) -> None:
    cap = (1.0, 1e-6)
    ledger(file).reserve("other", "breast", "table", [Mechanism("pure", 3.0)])
    ledger(file).reserve("a", "lung", "table", [ONE], cap=cap)  # exactly what it promised
    with pytest.raises(Refusal, match=r"study 'lung' would come to epsilon 1\.5 at delta 1e-06 .* promised 1;"):
        ledger(file).reserve("b", "lung", "table", [TABLE], cap=cap)
    assert [x["id"] for x in lines(file)] == ["other", "a"]
    ledger(file).settle("a", [0])
    ledger(file).reserve("b", "lung", "table", [TABLE], cap=cap)
    assert lines(file)[-1]["cap"] == [1.0, 1e-6]


def test_a_promise_is_held_at_its_own_delta(file: Path) -> None:
    release = Mechanism("gaussian", 4.0, 10)
    promise = epsilon_of([release], 1e-5) * 1.01
    assert epsilon_of([release], 1e-9) > promise
    ledger(file).reserve("a", "lung", "training", [release], cap=(promise, 1e-5))
    with pytest.raises(Refusal, match="promised"):
        ledger(file).reserve("b", "breast", "training", [release], cap=(promise, 1e-9))


def test_settling_gives_back_no_more_than_was_reserved_and_once(file: Path) -> None:
    ledger(file).reserve("a", "lung", "training", [STEPS, TABLE])
    before = file.read_bytes()
    for counts in ([6, 1], [5], [5, -1], [5, 1, 1]):
        with pytest.raises(Refusal, match="reserved were"):
            ledger(file).settle("a", counts)
    with pytest.raises(TypeError):
        ledger(file).settle("a", [0.5, 0.5])  # type: ignore[list-item]
    with pytest.raises(Refusal, match="'b' was never reserved"):
        ledger(file).settle("b")
    assert file.read_bytes() == before
    ledger(file).settle("a", [5, 1])
    with pytest.raises(Refusal, match="'a' is settled already"):
        ledger(file).settle("a", [0, 0])
    assert ledger(file).spent() == epsilon_of([STEPS, TABLE], 1e-5)


def test_a_release_without_noise_is_not_for_the_ledger(file: Path) -> None:
    for nothing in ([], [Mechanism("pure", 1.0, 0)]):
        with pytest.raises(ValueError, match="no mechanism with noise"):
            ledger(file).reserve("a", "lung", "training", nothing)
    assert not file.exists()


def test_studies_are_told_apart(file: Path) -> None:
    book = ledger(file)
    book.reserve("a", "lung", "statistics", [MOMENTS])
    book.settle("a")
    book.charge("breast", "evaluation", [TABLE])
    book.reserve("b", "lung", "training", [STEPS])
    book.reserve("c", "lung", "training", [STEPS])
    lung, breast = book.studies()
    assert (lung.study, lung.releases, lung.unsettled) == ("lung", 3, 2)
    assert lung.mechanisms == {"statistics": (MOMENTS,), "training": (STEPS.repeated(2),)}
    assert lung.epsilon == book.spent(study="lung") == epsilon_of([MOMENTS, STEPS.repeated(2)], 1e-5)
    assert (breast.study, breast.releases, breast.unsettled) == ("breast", 1, 0)
    assert book.spent(study="breast") == pytest.approx(0.5, abs=1e-3)
    assert max(lung.epsilon, breast.epsilon) < book.spent() < lung.epsilon + breast.epsilon
    assert lung.first <= lung.last
    assert lung.first[:2] == "20"


def test_an_empty_ledger_has_spent_nothing(file: Path) -> None:
    assert ledger(file).spent() == 0.0
    assert ledger(file).studies() == []
    ledger(file).verify()
    assert not file.parent.exists()


# -- tampering ---------------------------------------------------------------------------------------------------------


def change_number(rows: list[str]) -> list[str]:
    assert '"count": 5' in rows[1]
    return [rows[0], rows[1].replace('"count": 5', '"count": 1'), *rows[2:]]


TAMPERED: dict[str, tuple[Callable[[list[str]], list[str]], str]] = {
    "a changed number": (change_number, "line 2 was changed"),
    "a line removed from the middle": (lambda rows: [rows[0], *rows[2:]], "line 2 was changed, or lines before it"),
    "the first line removed": (lambda rows: rows[1:], "line 1 was changed"),
    "the last line removed": (lambda rows: rows[:-1], "3 lines and ledger.head knows of 4"),
    "all lines removed": (lambda rows: [], "0 lines and ledger.head knows of 4"),
    "lines swapped": (lambda rows: [rows[0], rows[2], rows[1], rows[3]], "line 2 was changed"),
    "a line twice": (lambda rows: [*rows, rows[3]], "line 5 was changed"),
    "nonsense in the middle": (lambda rows: [rows[0], "nonsense", *rows[1:]], "line 2 cannot be read"),
    "the last line cut": (lambda rows: [*rows[:3], rows[3][:40]], "line 4 cannot be read"),
    "a hash left out": (
        lambda rows: [*rows[:3], json.dumps({k: v for k, v in json.loads(rows[3]).items() if k != "hash"})],
        "line 4 has no hash",
    ),
}


@pytest.mark.parametrize("how", TAMPERED)
def test_a_ledger_that_was_tampered_with_lets_nothing_out(file: Path, how: str) -> None:
    ledger(file).reserve("a", "lung", "statistics", [MOMENTS])
    ledger(file).reserve("b", "lung", "training", [STEPS])
    ledger(file).settle("a")
    ledger(file).settle("b", [5])
    ledger(file).verify()
    change, text = TAMPERED[how]
    rows = change(file.read_text().splitlines())
    file.write_text("".join(row + "\n" for row in rows))
    refuses(file, text)


def refuses(file: Path, text: str) -> None:
    """Every use of the ledger says what is wrong and how to mend it, and writes nothing."""
    before = file.read_bytes() if file.exists() else b""
    uses: list[Callable[[], object]] = [
        ledger(file).verify,
        ledger(file).spent,
        ledger(file).studies,
        lambda: ledger(file).settle("b"),
        lambda: ledger(file).charge("lung", "table", [Mechanism("pure", 0.01)]),
    ]
    for use in uses:
        with pytest.raises(Refusal, match=text) as refusal:
            use()
        assert "site Mayo: its ledger ledger.jsonl" in str(refusal.value)
        assert "epsilon_budget" in str(refusal.value)
    assert (file.read_bytes() if file.exists() else b"") == before


def test_a_ledger_without_its_head_lets_nothing_out(file: Path) -> None:
    ledger(file).reserve("b", "lung", "table", [TABLE])
    file.with_suffix(".head").unlink()
    refuses(file, "ledger.head beside it is missing")
    file.with_suffix(".head").write_text('{"lines": ')
    refuses(file, "ledger.head beside it cannot be read")


def test_a_head_without_its_ledger_lets_nothing_out(file: Path) -> None:
    ledger(file).reserve("b", "lung", "table", [TABLE])
    file.unlink()
    with pytest.raises(Refusal, match="it is gone"):
        ledger(file).spent()
    with pytest.raises(Refusal, match=r"0 lines and ledger\.head knows of 1"):
        ledger(file).reserve("c", "lung", "table", [TABLE])


def test_a_ledger_of_another_history_lets_nothing_out(file: Path, tmp_path: Path) -> None:
    """A chain that is whole, and as long, but not the one that the head knows."""
    for folder in (file, tmp_path / "other" / "ledger.jsonl"):
        ledger(folder).reserve("b", folder.parent.name, "table", [TABLE])
    shutil.copy(tmp_path / "other" / "ledger.jsonl", file)
    refuses(file, "line 1 is not the one that ledger.head knows")


def test_an_old_ledger_is_refused_with_what_to_do(file: Path) -> None:
    file.parent.mkdir()
    file.write_text('{"time": "2026-01-01T00:00:00Z", "purpose": "evaluate", "epsilon": 1.5}\n')
    refuses(file, "older version of oncofed, .* add up the epsilons")


def test_a_line_of_a_newer_version_lets_nothing_out(file: Path) -> None:
    from oncofed.client.chain_file import Chain
    from oncofed.client.privacy.ledger import WORDS

    ledger(file).reserve("b", "lung", "table", [TABLE])
    with Chain(file, "Mayo", WORDS).writing() as open_lines:
        open_lines.append({"op": "refund", "id": "b"})
    with pytest.raises(Refusal, match=r"line 2 of its ledger ledger\.jsonl says 'refund'"):
        ledger(file).spent()


# -- crashes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [True, False], ids=["newline", "no newline"])
@pytest.mark.parametrize("tail", [b'{"count": 1, "ha', b"\x00\x00\x00\x00", b"{", b"\xff\xfe{"])
def test_a_line_cut_off_by_a_crash_is_dropped_and_the_rest_holds(file: Path, tail: bytes, whole: bool) -> None:
    ledger(file).reserve("a", "lung", "table", [TABLE])
    torn = tail + b"\n" * whole
    with file.open("ab") as opened:
        opened.write(torn)
    ledger(file).verify()
    spent = ledger(file).spent()
    assert spent == epsilon_of([TABLE], 1e-5)
    assert file.read_bytes().endswith(torn)  # who only looks changes nothing
    ledger(file).reserve("b", "lung", "table", [TABLE])
    assert [x["op"] for x in lines(file)] == ["reserve", "dropped", "reserve"]
    assert lines(file)[1]["bytes"] == len(torn)
    assert ledger(file).spent() == epsilon_of([TABLE.repeated(2)], 1e-5)


@pytest.mark.parametrize("cut", [1, 2, 60, -1])
def test_wherever_a_crash_cuts_a_reservation_the_ledger_opens_again(file: Path, cut: int) -> None:
    """The head is written last, so it does not know the new line."""
    ledger(file).reserve("a", "lung", "table", [TABLE])
    kept, head = file.read_bytes(), file.with_suffix(".head").read_bytes()
    ledger(file).reserve("b", "lung", "table", [TABLE])
    new = file.read_bytes()[len(kept) :]
    file.write_bytes(kept + new[:cut])
    file.with_suffix(".head").write_bytes(head)
    # all but its newline: the line is whole, and counts
    there = 2 if cut == -1 else 1
    assert ledger(file).spent() == epsilon_of([TABLE.repeated(there)], 1e-5)
    ledger(file).reserve("c", "lung", "table", [TABLE])
    assert ledger(file).spent() == epsilon_of([TABLE.repeated(there + 1)], 1e-5)
    assert [x.get("id") for x in lines(file)] == (["a", "b", "c"] if there == 2 else ["a", None, "c"])


def test_a_crash_between_ledger_and_head_loses_nothing(file: Path) -> None:
    ledger(file).reserve("a", "lung", "table", [TABLE])
    head = file.with_suffix(".head").read_bytes()
    ledger(file).reserve("b", "lung", "table", [TABLE])
    ledger(file).settle("b")
    file.with_suffix(".head").write_bytes(head)
    assert ledger(file).spent() == epsilon_of([TABLE.repeated(2)], 1e-5)
    ledger(file).settle("a")
    head_now = {"lines": 4, "hash": lines(file)[-1]["hash"], "bytes": file.stat().st_size}
    assert json.loads(file.with_suffix(".head").read_text()) == head_now


def test_a_head_of_an_older_version_says_how_many_lines_there_are_and_no_more(file: Path) -> None:
    ledger(file).reserve("a", "lung", "table", [TABLE])
    head = json.loads(file.with_suffix(".head").read_text())
    file.with_suffix(".head").write_text(json.dumps({k: head[k] for k in ("lines", "hash")}))
    ledger(file).settle("a")
    assert json.loads(file.with_suffix(".head").read_text())["bytes"] == file.stat().st_size


def test_a_crash_at_the_very_first_line_loses_nothing(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from oncofed.client import chain_file

    written: list[int] = []
    real = chain_file.Chain.write_head

    def crash_at_the_second(self: chain_file.Chain, number: int, last: str, size: int) -> None:
        written.append(number)
        if len(written) == 2:
            raise OSError("power is gone")
        real(self, number, last, size)

    monkeypatch.setattr(chain_file.Chain, "write_head", crash_at_the_second)
    with pytest.raises(OSError, match="power is gone"):
        ledger(file).reserve("a", "lung", "table", [TABLE])
    assert written == [0, 1]  # the head stands before the first line
    monkeypatch.undo()
    assert ledger(file).spent() == epsilon_of([TABLE], 1e-5)
    ledger(file).settle("a")


def test_data_are_on_the_disk_before_they_are_touched(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    real = os.fsync

    def fsync(handle: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name.split(".json")[0].split(".head")[0])
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    ledger(file).reserve("a", "lung", "table", [TABLE])
    # the first head and its folder, the line, the head and its folder
    assert synced == ["ledger", "work", "ledger", "ledger", "work"]


# -- at once -----------------------------------------------------------------------------------------------------------


def reserve_at_once(file: Path, who: int, start: Barrier, won: multiprocessing.Queue[int]) -> None:
    start.wait()
    for i in range(3):
        try:
            ledger(file, 5.0).reserve(f"{who}/{i}", f"study {who}", "table", [ONE])
        except Refusal:
            continue
        won.put(who)


def test_processes_at_once_take_the_budget_once(file: Path) -> None:
    context = multiprocessing.get_context("spawn")
    start, won = context.Barrier(4), context.Queue()
    processes = [context.Process(target=reserve_at_once, args=(file, who, start, won)) for who in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0, 0, 0]
    assert len(lines(file)) == 5
    assert sorted(won.get(timeout=10) for _ in range(5)) == sorted(int(str(x["id"])[0]) for x in lines(file))
    assert won.empty()
    ledger(file).verify()


# -- the command -------------------------------------------------------------------------------------------------------


def test_a_hospital_sees_what_is_spent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    folder = tmp_path / "mayo"
    folder.mkdir()
    (folder / "site.toml").write_text('name = "Mayo"\nexpression_unit = "counts"\n')
    (folder / "policy.toml").write_text("epsilon_budget = 4.0\ndelta_budget = 1e-6\n")
    run = CliRunner().invoke(cli.cli, ["site", "budget", str(folder)])
    assert run.exit_code == 0
    assert "no ledger yet" in run.output
    book = ledger(folder / ".oncofed" / "ledger.jsonl", 4.0, 1e-6)
    book.charge("lung", "evaluation", [ONE])
    book.reserve("a", "lung", "evaluation", [TABLE])
    book.reserve("b", "breast", "statistics", [MOMENTS])
    text = CliRunner().invoke(cli.cli, ["site", "budget", str(folder)]).output
    rows = [[cell.strip() for cell in line.strip("│┃|").split("│")] for line in text.splitlines() if "20" in line]
    assert [row[:3] for row in rows] == [["lung", "2", "1"], ["breast", "1", "1"]]
    assert rows[1][3] == f"{epsilon_of([MOMENTS], 1e-6):.3f}"
    assert f"epsilon {book.spent():.3f} at delta 1e-06" in text
    assert "verified" in text
    left = f"left: {4 - book.spent():.3f}"
    assert left in text
    moved = tmp_path / "elsewhere"
    shutil.move(folder / ".oncofed", moved)
    there = CliRunner().invoke(cli.cli, ["site", "budget", str(folder), "--work-dir", str(moved)])
    assert left in there.output
    (moved / "ledger.head").unlink()
    broken = CliRunner().invoke(cli.cli, ["site", "budget", str(folder), "--work-dir", str(moved)])
    assert isinstance(broken.exception, Refusal)
    assert "ledger.head beside it is missing" in str(broken.exception)
