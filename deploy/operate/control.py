"""A coordinator's hand on a run of a real federation: submit it, ask Flower how it is, stop it, read its log."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from oncofed.client.bundle_store import flower_home
from oncofed.common.files import write_text
from oncofed.common.study import Study
from oncofed.deploy.bundle import write_bundle
from oncofed.deploy.engine import QUIET
from oncofed.deploy.loopback import flwr, submit
from oncofed.deploy.operate.state import Follower, RunState
from oncofed.deploy.services.coordinator import CONNECTION, MEMBERS
from oncofed.deploy.services.lock import holder
from oncofed.deploy.started import FILE as SIMULATION
from oncofed.server.run_folder import LOCK

FILE = "flower.json"
OWN_FILES = ("panel.file", "panel.names", "analysis.pathways", "training.start", "runtime.roster")
"""Keys of a study that name files of the coordinator."""

STOPS_S = 30.0
"""How long to wait until Flower has ended the processes of a run."""
LOOKS_S = 15.0
"""Flower is asked so rarely: its command takes a second of a core."""


@dataclass(frozen=True)
class FlowerRun:
    """The run of a folder as Flower knows it: id, connection of Flower's configuration, when it was submitted (unix seconds), and
    ids of the runs that it resumed."""

    run: str
    connection: str
    since: float
    earlier: tuple[str, ...] = ()

    @classmethod
    def read(cls, out: Path) -> FlowerRun | None:
        """The last run that was submitted for a folder; None where none was, or a simulation was started since."""
        if not (out / FILE).exists() or (out / SIMULATION).exists():
            return None
        try:
            told = json.loads((out / FILE).read_text())
            return cls(
                str(told["run"]), str(told["connection"]), float(told["since"]), tuple(map(str, told["earlier"]))
            )
        except (KeyError, TypeError, ValueError):
            raise ValueError(
                f"{out / FILE}: cannot be read; remove it, `flwr list` and `flwr stop` know the run"
            ) from None

    def write(self, out: Path) -> None:
        """Replace what the folder says."""
        write_text(out / FILE, json.dumps(asdict(self), indent=1), durable=True)


@dataclass(frozen=True)
class FlowerState:
    """What Flower says of a run: `pending`, `starting`, `running`, `finished:completed`, `finished:failed` or `finished:stopped`."""

    status: str
    details: str = ""

    @property
    def ended(self) -> bool:
        return self.status.startswith("finished")

    @property
    def good(self) -> bool:
        return self.status == "finished:completed"

    def __str__(self) -> str:
        return f"{self.status} ({self.details})" if self.details else self.status


def at_home(study: Study, out: Path) -> Study:
    """The study with absolute paths: the server's process may work in another folder than the coordinator's shell.

    Raises where a file that it names is missing.
    """
    changes: dict[str, object] = {"runtime__out": str(out.resolve())}
    for key in OWN_FILES:
        section, _, name = key.partition(".")
        named = getattr(getattr(study, section), name)
        if named:
            if not Path(named).is_file():
                raise ValueError(
                    f"{key} = {named}: no such file; correct the study, or run from the folder where it is"
                )
            changes[f"{section}__{name}"] = str(Path(named).resolve())
    return study.changed(**changes)


def among_members(study: Study, connection: str) -> Study:
    """The study among its consortium's members: where it names no roster, the one that the server of this connection goes by."""
    file = flower_home() / MEMBERS
    if study.runtime.roster or connection != CONNECTION or not file.exists():
        return study
    return study.changed(runtime__roster=file.read_text().strip())


def submitted(study: Study, connection: str) -> FlowerRun:
    """Submit a study, and keep the run's id in the folder that is its `runtime.out`.

    A run that is resumed and whose server has died is stopped first: Flower takes it for running for another minute.
    """
    out = Path(study.runtime.out)
    before = FlowerRun.read(out)
    if before is not None:
        if study.runtime.resume and has_died(before, out):
            with contextlib.suppress(RuntimeError):  # its SuperLink no longer knows it
                stopped(before)
        refuse_while_running(before, out)
    earlier = (*before.earlier, before.run) if before and study.runtime.resume else ()
    since, bundle = time.time(), write_bundle(out / "bundle", study.run_config())
    run = FlowerRun(submit(bundle, connection), connection, since, earlier)
    (out / SIMULATION).unlink(missing_ok=True)  # or the folder would go on as that simulation
    run.write(out)
    return run


def has_died(run: FlowerRun, out: Path) -> bool:
    """Whether a run's server has begun in its folder, and its process is no more."""
    lock = out / LOCK
    try:
        begun = lock.stat().st_mtime >= run.since
    except OSError:
        return False
    return begun and holder(lock) is None


def refuse_while_running(run: FlowerRun, out: Path) -> None:
    """Raise where a folder's last run has not ended. One that its SuperLink no longer knows has."""
    try:
        state = asked(run)
    except RuntimeError:
        return
    if not state.ended:
        raise ValueError(
            f"{out}: run {run.run} on '{run.connection}' is {state}; stop it with `oncofed study stop {out}`, or choose another folder"
        )


def asked(run: FlowerRun) -> FlowerState:
    """What Flower says of a run now; raises `RuntimeError` with Flower's reason."""
    found = flwr(None, "list", run.connection, "--run-id", run.run)["runs"][0]
    return FlowerState(str(found["status"]), str(found.get("status-details") or ""))


def ended(run: FlowerRun) -> FlowerState:
    """What Flower says of a run that is about to end; its processes may take a while to."""
    until = time.monotonic() + STOPS_S
    while not (state := asked(run)).ended and time.monotonic() < until:
        time.sleep(1.0)
    return state


def stopped(run: FlowerRun) -> FlowerState:
    """Stop a run, unless it has ended; returns what Flower then says."""
    state = asked(run)
    if state.ended:
        return state
    flwr(None, "stop", run.run, run.connection)
    return ended(run)


def shown_log(run: FlowerRun, *, follow: bool) -> None:
    """Print the log of the run's server as Flower keeps it; raises with Flower's reason."""
    command = [
        str(Path(sys.executable).parent / "flwr"),
        "log",
        run.run,
        run.connection,
        "--stream" if follow else "--show",
    ]
    done = subprocess.run(command, env=os.environ | QUIET, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"flwr log failed ({done.returncode}): {' '.join(done.stderr.split())}")


def agreed(state: RunState, run: FlowerRun, flower: FlowerState | None) -> RunState:
    """The journal's state where it is this run's; it waits until its server writes, and has failed where Flower says so and the
    server's process could not."""
    if state.updated is None or state.updated < run.since:
        state = replace(state, status="waiting", reason="", seconds_left=None) if run.earlier else RunState()
    if flower is None or not flower.ended or flower.good or state.status in ("finished", "failed"):
        return state
    return replace(state, status="failed", reason=f"Flower says {flower}", seconds_left=None)


class Watch:
    """The state of a folder's run, by its journal and, of a real federation, by Flower, which is asked now and then."""

    def __init__(self, out: Path) -> None:
        self.run = FlowerRun.read(out)
        self.follower = Follower(out)
        self.flower: FlowerState | None = None
        self.looks = -LOOKS_S

    def state(self) -> RunState:
        """The state now; raises `ValueError` where the folder holds no run. A SuperLink that is away is asked again later."""
        if self.run is None:
            return self.follower.state()
        try:
            state = self.follower.state()
        except ValueError:  # submitted, and its server has not begun or writes elsewhere
            state = RunState()
        if not (self.flower and self.flower.ended) and time.monotonic() - self.looks >= LOOKS_S:
            with contextlib.suppress(RuntimeError):
                self.flower = asked(self.run)
            self.looks = time.monotonic()
        return agreed(state, self.run, self.flower)
