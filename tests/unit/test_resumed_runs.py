"""A run that is resumed where Flower takes the one before for running: stopped where its server is dead, refused where it is not."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from oncofed.common.study import Study
from oncofed.deploy.operate import control
from oncofed.deploy.operate.control import FlowerRun, FlowerState, submitted
from oncofed.server.run_folder import LOCK, opened


class Flower:
    """Says that every run is running until somebody stops it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stopped: list[str] = []
        monkeypatch.setattr(control, "submit", lambda *_: "second")
        monkeypatch.setattr(control, "asked", self.asked)
        monkeypatch.setattr(control, "flwr", lambda _, word, run, *__: self.stopped.append(run))

    def asked(self, run: FlowerRun) -> FlowerState:
        return FlowerState("finished:stopped" if run.run in self.stopped else "running")


@pytest.fixture
def study(tmp_path: Path) -> Study:
    """Of a folder whose first run was submitted ten seconds ago, and whose server has begun and is no more."""
    study = Study().changed(runtime__out=str(tmp_path / "out"))
    with opened(study) as out:
        FlowerRun("first", "here", time.time() - 10).write(out)
    return study


def test_a_dead_server_s_run_is_stopped_and_resumed(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    flower = Flower(monkeypatch)
    again = submitted(study.changed(runtime__resume=True), "here")
    assert (again.run, again.earlier, flower.stopped) == ("second", ("first",), ["first"])


def test_a_run_at_work_stays(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its server holds the folder; or has not begun in it, where the lock is an earlier run's; or the study is to start anew."""
    flower, resumed = Flower(monkeypatch), study.changed(runtime__resume=True)
    lock = Path(study.runtime.out) / LOCK
    with opened(resumed), pytest.raises(ValueError, match="run first on 'here' is running; stop it"):
        submitted(resumed, "here")
    with pytest.raises(ValueError, match="run first on 'here' is running; stop it"):
        submitted(study, "here")
    os.utime(lock, (time.time() - 20,) * 2)
    with pytest.raises(ValueError, match="run first on 'here' is running; stop it"):
        submitted(resumed, "here")
    lock.unlink()
    with pytest.raises(ValueError, match="run first on 'here' is running; stop it"):
        submitted(resumed, "here")
    assert flower.stopped == []
