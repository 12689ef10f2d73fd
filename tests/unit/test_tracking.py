"""Rounds of a run in TensorBoard and MLflow, read back with what those have for it."""

from __future__ import annotations

import os
import sys
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from oncofed.deploy.operate.state import Follower, RunState
from oncofed.deploy.operate.tracking import tracked, tracker_of
from toy_journal import write_journal


def track(out: Path, target: str, **how: Any) -> int:
    with closing(tracker_of(target)) as tracker:
        return tracked(Follower(out).state, tracker, follow=how.pop("follow", False), **how)


def scalars(folder: Path) -> dict[tuple[str, str], list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

    found = {}
    for fold in sorted(folder.glob("*/fold_*")):
        events = EventAccumulator(str(fold), {SCALARS: 0}).Reload()
        for tag in events.Tags()[SCALARS]:
            found[fold.name, tag] = [(e.step, e.value) for e in events.Scalars(tag)]
    return found


def mlflow_runs(uri: str, study: str = "pan-cancer-1") -> list[tuple[Any, dict[str, list[tuple[int, float]]]]]:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name(study)
    return [
        (
            run,
            {
                name: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)]
                for name in run.data.metrics
            },
        )
        for run in client.search_runs([experiment.experiment_id])
    ]


@pytest.fixture(scope="module")
def mlflow_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One database for all: MLflow takes seconds to lay its tables."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"


def test_tensorboard_has_each_round_once(tmp_path: Path) -> None:
    out, board = write_journal(tmp_path / "out", done=4), tmp_path / "board"
    target = f"tensorboard:{board}"
    assert track(out, target) == 4
    assert track(out, target) == 0
    state = RunState.of(out)
    extend(out, 9)
    assert track(out, target) == 5
    assert track(out, target) == 0
    found = scalars(board)
    assert [step for step, _ in found["fold_0", "training/seconds"]] == [1, 2, 3, 4, 5]
    assert [step for step, _ in found["fold_1", "training/loss"]] == [1, 2, 3, 4]
    assert found["fold_0", "training/loss"][0] == (1, pytest.approx(state.rounds[0].loss))
    assert found["fold_0", "training/bytes_to_sites"][0] == (1, 6_000_000)
    assert {tag for _, tag in found} == {
        f"training/{v}" for v in ("seconds", "sites", "bytes_to_sites", "bytes_from_sites", "loss", "validation")
    }


def extend(out: Path, done: int) -> None:
    """The same run, further on: its journal with the start that it had."""
    from oncofed.server.journal import JOURNAL

    first = (out / JOURNAL).read_text().splitlines()[0]
    (out / JOURNAL).unlink()
    write_journal(out, done=done)
    (out / JOURNAL).write_text("\n".join([first, *(out / JOURNAL).read_text().splitlines()[1:]]) + "\n")


def test_hidden_losses_are_not_tracked(tmp_path: Path) -> None:
    out, board = write_journal(tmp_path / "out", loss=False), tmp_path / "board"
    assert track(out, f"tensorboard:{board}") == 7
    assert track(out, f"tensorboard:{board}") == 0
    assert ("fold_0", "training/loss") not in scalars(board)


def test_another_run_in_the_folder_is_another_run_in_the_tracker(tmp_path: Path) -> None:
    out, board = write_journal(tmp_path / "out"), tmp_path / "board"
    track(out, f"tensorboard:{board}")
    (out / "journal.jsonl").unlink()
    write_journal(out)
    assert track(out, f"tensorboard:{board}") == 7
    assert len(list(board.iterdir())) == 2


def test_names_of_studies_stay_within_the_folder(tmp_path: Path) -> None:
    out = write_journal(tmp_path / "out", study="../../../out of here")
    track(out, f"tensorboard:{tmp_path / 'board'}")
    assert {p.name for p in tmp_path.iterdir()} == {"out", "board"}
    (run,) = (tmp_path / "board").iterdir()
    assert run.name.startswith("_.._.._out_of_here-")


@pytest.mark.slow
def test_mlflow_has_each_round_once(tmp_path: Path, mlflow_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK"):
        monkeypatch.setenv(name, "false")
    out, uri = write_journal(tmp_path / "out", done=4), mlflow_uri
    assert track(out, f"mlflow:{uri}") == 4
    assert track(out, f"mlflow:{uri}") == 0
    ((run, _),) = mlflow_runs(uri)
    assert run.info.status == "RUNNING"
    assert run.data.params == {"package": "0.1.0", "folds": "2", "rounds_planned": "10"}
    extend(out, 10)
    with (out / "journal.jsonl").open("a") as journal:
        journal.write('{"time": "2030-01-01T00:00:00Z", "event": "finished"}\n')
    assert track(out, f"mlflow:{uri}") == 6
    assert track(out, f"mlflow:{uri}") == 0
    ((run, values),) = mlflow_runs(uri)
    assert run.info.status == "FINISHED"
    assert [step for step, _ in values["fold_1/training/loss"]] == [1, 2, 3, 4, 5]
    assert values["fold_0/training/loss"][0] == (1, pytest.approx(RunState.of(out).rounds[0].loss))
    assert len(values) == 12
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == os.environ["DO_NOT_TRACK"] == "true"
    assert {p.name for p in tmp_path.iterdir()} == {"out"}, "nothing is left where it is called"


@pytest.mark.slow
def test_mlflow_says_why_a_run_failed(tmp_path: Path, mlflow_uri: str) -> None:
    out = write_journal(tmp_path / "out", study="another", end="too few sites")
    track(out, f"mlflow:{mlflow_uri}")
    ((run, _),) = mlflow_runs(mlflow_uri, "another")
    assert (run.info.status, run.data.tags["oncofed.reason"]) == ("FAILED", "too few sites")


def test_following_ends_with_the_run(tmp_path: Path) -> None:
    out, board = write_journal(tmp_path / "out", done=2), tmp_path / "board"
    added: list[int] = []
    thread = threading.Thread(
        target=lambda: added.append(track(out, f"tensorboard:{board}", follow=True, every_s=0.02)), daemon=True
    )
    thread.start()
    thread.join(0.5)
    assert thread.is_alive()
    with (out / "journal.jsonl").open("a") as journal:
        journal.write('{"time": "2030-01-01T00:00:00Z", "event": "finished"}\n')
    thread.join(20)
    assert added == [2]


@pytest.mark.parametrize("target", ["", "tensorboard", "tensorboard:", "wandb:x", "/a/folder"])
def test_what_names_no_tracker_is_refused(target: str) -> None:
    with pytest.raises(ValueError, match="tensorboard:DIR or mlflow:URI"):
        tracker_of(target)


@pytest.mark.parametrize(("target", "package"), [("tensorboard:x", "tensorboard"), ("mlflow:sqlite:///x", "mlflow")])
def test_a_missing_package_is_named_with_the_remedy(target: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n == package or n.startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"{package}.*pip install 'oncofed\[tracking\]'"):
        tracker_of(target)
