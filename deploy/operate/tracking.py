"""Rounds of a run in an experiment tracker, TensorBoard or MLflow: each round once, however often it is called.

What a tracker holds already is read from the tracker itself: nothing beside it can go astray.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from oncofed.deploy.operate.state import RoundState, RunState

EVERY_S = 5.0
VALUES = ("seconds", "sites", "bytes_to_sites", "bytes_from_sites", "loss", "validation")
"""Fields of a round that are tracked; loss and validation where there is one."""
BATCH = 1000
"""Most numbers that MLflow takes at once."""

Key = tuple[int, str, int]
"""Fold, phase, round."""


class Tracker(Protocol):
    """Where rounds go."""

    def known(self, state: RunState) -> set[Key]:
        """Rounds of this run that are there."""
        ...

    def add(self, state: RunState, rounds: Iterable[RoundState]) -> None:
        """Put rounds there, durably when it returns."""
        ...

    def end(self, state: RunState) -> None:
        """Say how the run stands."""
        ...

    def close(self) -> None:
        """Let go of files."""
        ...


def tracked(state: Callable[[], RunState], tracker: Tracker, *, follow: bool, every_s: float = EVERY_S) -> int:
    """Bring the tracker up to date, with `follow` until the run ends; returns the number of rounds that were added."""
    added, known, of = 0, set[Key](), None
    while True:
        now = state()
        if now.started is not None:
            if of != (now.study, now.started):  # another run may begin in the same folder
                of, known = (now.study, now.started), tracker.known(now)
            fresh = [r for r in now.rounds if _key(r) not in known]
            if fresh:
                tracker.add(now, fresh)
            known |= {_key(r) for r in fresh}
            added += len(fresh)
            tracker.end(now)
        if not follow or now.status in ("finished", "failed"):
            return added
        time.sleep(every_s)


def tracker_of(target: str) -> Tracker:
    """The tracker that `tensorboard:DIR` or `mlflow:URI` names; raises with the remedy where its package is missing."""
    kind, _, where = target.partition(":")
    try:
        if kind == "tensorboard" and where:
            return TensorBoard(Path(where))
        if kind == "mlflow" and where:
            return MLflow(where)
    except ImportError as error:
        raise ValueError(
            f"--to {target}: a package is missing ({error}); install it with `pip install 'oncofed[tracking]'`"
        ) from None
    raise ValueError(f"--to {target}: write tensorboard:DIR or mlflow:URI, as in mlflow:sqlite:///mlflow.db")


class TensorBoard:
    """Event files: a folder for the run, in it one a fold, so that folds lie over each other in one picture."""

    def __init__(self, folder: Path) -> None:
        import tensorboard.backend.event_processing.event_accumulator as accumulator
        from torch.utils.tensorboard import SummaryWriter

        self.folder, self._accumulator, self._writer = folder, accumulator, SummaryWriter
        self._open: dict[Path, Any] = {}

    def known(self, state: RunState) -> set[Key]:
        found: set[Key] = set()
        for fold in state.folds:
            folder = self._folder(state, fold)
            if not folder.is_dir():
                continue
            events = self._accumulator.EventAccumulator(str(folder), {self._accumulator.SCALARS: 0}).Reload()
            for tag in events.Tags()[self._accumulator.SCALARS]:
                phase, _, value = tag.rpartition("/")
                # of a round's numbers this is written last: a crash between them leaves a round that is not known
                if value == VALUES[0]:
                    found |= {(fold, phase, e.step) for e in events.Scalars(tag)}
        return found

    def add(self, state: RunState, rounds: Iterable[RoundState]) -> None:
        for r in rounds:
            folder = self._folder(state, r.fold)
            if folder not in self._open:
                self._open[folder] = self._writer(str(folder))
            for name, value in reversed(_values(r)):
                self._open[folder].add_scalar(f"{r.phase}/{name}", value, r.round)
        for writer in self._open.values():
            writer.flush()

    def end(self, state: RunState) -> None:
        """TensorBoard knows no status."""

    def close(self) -> None:
        for writer in self._open.values():
            writer.close()

    def _folder(self, state: RunState, fold: int) -> Path:
        return self.folder / _run_name(state) / f"fold_{fold}"


class MLflow:
    """One MLflow run in the experiment that has the study's name, found again by when the run was started."""

    def __init__(self, uri: str) -> None:
        # before the import: MLflow would tell its makers of its use
        os.environ.update(MLFLOW_DISABLE_TELEMETRY="true", DO_NOT_TRACK="true")
        import mlflow.entities

        self._entities = mlflow.entities
        self.client = mlflow.MlflowClient(tracking_uri=uri)
        self._runs: dict[str, str] = {}
        self._ended = ""

    def known(self, state: RunState) -> set[Key]:
        run = self._run(state)
        found: set[Key] = set()
        for name in self.client.get_run(run).data.metrics:
            fold, _, rest = name.removeprefix("fold_").partition("/")
            phase, _, value = rest.rpartition("/")
            if value == VALUES[0] and fold.isdecimal():
                found |= {(int(fold), phase, m.step) for m in self.client.get_metric_history(run, name)}
        return found

    def add(self, state: RunState, rounds: Iterable[RoundState]) -> None:
        at, metric = int((state.updated or time.time()) * 1000), self._entities.Metric
        numbers = [
            metric(f"fold_{r.fold}/{_named(r.phase)}/{name}", value, at, r.round)
            for r in rounds
            for name, value in reversed(_values(r))
        ]
        for first in range(0, len(numbers), BATCH):
            self.client.log_batch(self._run(state), numbers[first : first + BATCH], synchronous=True)

    def end(self, state: RunState) -> None:
        status = {"finished": "FINISHED", "failed": "FAILED"}.get(state.status, "RUNNING")
        if status == self._ended:
            return
        run = self._run(state)
        if self.client.get_run(run).info.status != status:
            if state.reason:
                self.client.set_tag(run, "oncofed.reason", state.reason)
            if status == "RUNNING":  # it was resumed
                self.client.update_run(run, status)
            else:
                self.client.set_terminated(run, status, int((state.updated or time.time()) * 1000))
        self._ended = status

    def close(self) -> None:
        """Each call has written what it was given."""

    def _run(self, state: RunState) -> str:
        """The id of the MLflow run, which is made where there is none."""
        name = _run_name(state)
        if name in self._runs:
            return self._runs[name]
        title = state.study or "oncofed"
        experiment = self.client.get_experiment_by_name(title)
        number = experiment.experiment_id if experiment else self.client.create_experiment(title)
        found = self.client.search_runs([number], f"tags.`oncofed.run` = '{name}'", max_results=1)
        if found:
            self._runs[name] = found[0].info.run_id
            return self._runs[name]
        run = self.client.create_run(
            number,
            start_time=int((state.started or time.time()) * 1000),
            tags={"oncofed.run": name},
            run_name=name,
        )
        param = self._entities.Param
        about = {"package": state.package, "folds": len(state.folds), "rounds_planned": state.rounds_planned}
        self.client.log_batch(run.info.run_id, params=[param(key, str(value)) for key, value in about.items()])
        self._runs[name] = run.info.run_id
        return self._runs[name]


def _key(r: RoundState) -> Key:
    return r.fold, _named(r.phase), r.round


def _values(r: RoundState) -> list[tuple[str, float]]:
    return [(name, float(value)) for name in VALUES if (value := getattr(r, name)) is not None]


def _run_name(state: RunState) -> str:
    """Study and start: a resumed run keeps it, another run has another."""
    at = datetime.fromtimestamp(state.started or 0.0, UTC).strftime("%Y%m%dT%H%M%S.%fZ")
    return f"{_named(state.study) or 'study'}-{at}"


def _named(text: str) -> str:
    """A name that folders, tags and trackers' names take."""
    return re.sub(r"[^\w.-]+", "_", text, flags=re.ASCII).strip(".")
