"""A run that was interrupted goes on, and its weights are those of a run that nothing interrupted."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from flwr.app import Message
from oncofed.client.app import app as client_app
from oncofed.client.data.site import list_sites
from oncofed.common.blocks import Sum
from oncofed.common.files import DiskFull
from oncofed.common.study import Study
from oncofed.deploy import cli
from oncofed.deploy.engine import InProcessGrid
from oncofed.deploy.loopback import Loopback
from oncofed.deploy.resume import interrupted
from oncofed.deploy.simulate import simulate
from oncofed.server.app import run_study
from oncofed.server.checkpoint import Checkpoints
from typer.testing import CliRunner

Make = Callable[..., Study]
KEYS: dict[str, Any] = {
    "training__rounds": 4,
    "training__evaluate_every": 1,
    "splits__validation": 0.2,
    "training__patience": 3,
    "training__learning_rate": 0.05,  # the best round is not the last
    "analysis__experts": False,
    "aggregation__optimizer": "adam",
    "aggregation__learning_rate": 0.05,
}

KILLED = """
import os, signal, sys
from oncofed.deploy import cli
from oncofed.server import checkpoint, fold, rounds, strategy

point, now = sys.argv.pop(1), {"round": 0, "added": 0}
die = lambda: os.kill(os.getpid(), signal.SIGKILL)

def round_(self, n, real=rounds.Rounds._round):
    now.update(round=n, added=0)
    real(self, n)
    if (point, n) == ("before saving", 3):
        die()

def add(self, one, source="", real=strategy.Accumulator.add):
    real(self, one, source)
    now["added"] += 1
    if (point, now["round"], now["added"]) == ("inside a round", 3, 2):
        die()

def write(arrays, path, about, real=checkpoint.save_file):
    real(arrays, path, about)
    if point == "while it writes" and "round-0003" in path.name:
        os.truncate(path, path.stat().st_size // 2)
        die()

def save(self, n, *rest, real=checkpoint.Checkpoints.save):
    real(self, n, *rest)
    if (point, n) == ("between rounds", 2):
        die()

rounds.Rounds._round, strategy.Accumulator.add = round_, add
checkpoint.save_file, checkpoint.Checkpoints.save = write, save
if point == "after training":
    fold.FoldRun._save_model = lambda *_: die()
cli.main()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("point", "left"),
    [("between rounds", 2), ("inside a round", 2), ("before saving", 2), ("while it writes", 2), ("after training", 4)],
)
def test_a_server_that_was_killed_goes_on(
    consortium: Path,
    small_study: Make,
    tmp_path: Path,
    model_of: Callable[..., Sum],
    differing: Any,
    point: str,
    left: int,
) -> None:
    """With kill -9; then `oncofed study resume`."""
    straight, broken = (small_study(**KEYS, runtime__out=str(tmp_path / name)) for name in ("a", "b"))
    file = tmp_path / "study.toml"
    file.write_text(tomli_w.dumps(broken.model_dump(mode="json")))
    command = [sys.executable, "-c", KILLED, point, "simulate", str(consortium), "--study", str(file)]
    done = subprocess.run([*command, "--out", str(tmp_path / "b")], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "b" / "model-fold-0.safetensors").exists()
    newest = Checkpoints.of(tmp_path / "b", 0, "train", 3).newest()
    assert newest is not None
    assert newest[0].name == f"round-{left:04d}.safetensors"
    result = CliRunner().invoke(cli.cli, ["study", "resume", str(tmp_path / "b")], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    simulate(straight, consortium)
    assert differing(model_of(straight), model_of(broken)) == []
    curves = [json.loads((tmp_path / x / "results.json").read_text())["folds"][0]["curve"] for x in ("a", "b")]
    assert curves[0] == curves[1]
    assert [p["took_part"] for p in curves[1]] == [["Aachen", "Bergen", "Coimbra", "Dublin"]] * len(curves[1])
    again = CliRunner().invoke(cli.cli, ["study", "resume", str(tmp_path / "b")], catch_exceptions=False)
    assert (again.exit_code, "finished, there is nothing to resume" in again.output.replace("\n", " ")) == (0, True)


def stops_in(round_: int) -> Callable[[Message], str | None]:
    """A server that fails when it asks for a round: an error of the machine, not of a site."""

    def fault(message: Message) -> str | None:
        if (message.metadata.message_type, message.metadata.group_id) == ("train", str(round_)):
            raise RuntimeError("the machine")
        return None

    return fault


def run(study: Study, sites: Path, fault: Callable[[Message], str | None] | None = None) -> dict[str, Any]:
    folders = list_sites(sites)
    nodes: list[Any] = [{"partition-id": i, "num-partitions": len(folders)} for i in range(len(folders))]
    return run_study(study, InProcessGrid(client_app, nodes, {"sites": str(sites)}, fault=fault))


def test_a_damaged_checkpoint_costs_a_round_of_time_and_nothing_else(
    consortium: Path,
    small_study: Make,
    tmp_path: Path,
    model_of: Callable[..., Sum],
    differing: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    straight, broken = (small_study(**KEYS, runtime__out=str(tmp_path / name)) for name in ("a", "b"))
    run(straight, consortium)
    with pytest.raises(RuntimeError, match="the machine"):
        run(broken, consortium, stops_in(4))
    newest = Checkpoints.of(tmp_path / "b", 0, "train", 3).files[0]
    newest.write_bytes(newest.read_bytes()[:1000])
    with caplog.at_level(logging.INFO, "oncofed.server"):
        run(broken.changed(runtime__resume=True), consortium)
    assert "round-0003.safetensors is damaged" in caplog.text
    assert "train resumes after round 2" in caplog.text
    assert differing(model_of(straight), model_of(broken)) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 2 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", disk], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("this machine does not let us mount a small disk")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk_stops_the_run_and_it_goes_on_when_there_is_room(
    consortium: Path, small_study: Make, tmp_path: Path, small_disk: Path, model_of: Callable[..., Sum], differing: Any
) -> None:
    straight, broken = (small_study(**KEYS, runtime__out=str(out)) for out in (tmp_path / "a", small_disk / "out"))
    run(straight, consortium)
    ballast = small_disk / "ballast"

    def fill(message: Message) -> str | None:
        if (message.metadata.message_type, message.metadata.group_id) == ("train", "3") and not ballast.exists():
            room = os.statvfs(small_disk)
            ballast.write_bytes(bytes((room.f_bavail - 8) * room.f_bsize))
        return None

    with pytest.raises(DiskFull) as caught:
        run(broken, consortium, fill)
    assert str(caught.value) == (
        f"round-0003.safetensors was not written, the disk is full at {small_disk}/out/checkpoints/fold-0-train; make room there and "
        "resume: what was written before is whole"
    )
    checkpoints = Checkpoints.of(small_disk / "out", 0, "train", 3)
    assert sorted(f.name for f in checkpoints.folder.iterdir()) == ["round-0001.safetensors", "round-0002.safetensors"]
    with pytest.raises(DiskFull):  # still full: it fails alike, and harms nothing
        run(broken.changed(runtime__resume=True), consortium)
    ballast.unlink()
    run(broken.changed(runtime__resume=True), consortium)
    assert differing(model_of(straight), model_of(broken)) == []


def test_two_servers_do_not_share_a_folder(consortium: Path, small_study: Make) -> None:
    study = small_study()

    def meanwhile(message: Message) -> str | None:
        if message.metadata.group_id == "1":
            with pytest.raises(RuntimeError, match=rf"another run is at work in this folder \(process {os.getpid()}\)"):
                run(study.changed(runtime__resume=True), consortium)
        return None

    assert "finished" in run(study, consortium, meanwhile)


def test_a_run_from_the_start_sets_an_earlier_one_aside(consortium: Path, small_study: Make, tmp_path: Path) -> None:
    longer = small_study(training__rounds=4)
    run(longer, consortium)
    out = Path(longer.runtime.out)
    before = (out / "results.json").read_text()
    shorter = small_study(training__rounds=2)
    with pytest.raises(RuntimeError, match="the machine"):
        run(shorter, consortium, stops_in(2))
    assert (out / "earlier" / "results.json").read_text() == before
    assert not (out / "results.json").exists()
    assert [f.name for f in Checkpoints.of(out, 0, "train", 9).files] == ["round-0001.safetensors"]
    assert len(run(shorter.changed(runtime__resume=True), consortium)["folds"][0]["curve"]) == 2


def test_the_folder_keeps_the_study_that_it_belongs_to(consortium: Path, small_study: Make, tmp_path: Path) -> None:
    study = small_study(panel__covariates=["age", "sex=female|male"], cancers=["BRCA", "LUAD"])
    out = Path(study.runtime.out)
    with pytest.raises(ValueError, match="name the folder that was its"):
        interrupted(out)
    with pytest.raises(RuntimeError, match="the machine"):
        run(study, consortium, stops_in(2))
    assert interrupted(out) == study.changed(runtime__resume=True)
    with pytest.raises(ValueError, match="written by another study"):
        run(study.changed(runtime__resume=True, seed=5), consortium)
    assert interrupted(out) == study.changed(runtime__resume=True)  # the other study has not taken the folder
    run(study.changed(runtime__resume=True), consortium)
    assert interrupted(out) is None


def test_every_held_out_site_is_finished_too(consortium: Path, small_study: Make) -> None:
    study = small_study(splits__held_out_sites="all", training__rounds=1, splits__only=[])
    run(study, consortium)
    assert interrupted(Path(study.runtime.out)) is None


def test_a_real_federation_is_resumed_through_flower(
    consortium: Path, small_study: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = small_study()
    out = Path(study.runtime.out)
    with pytest.raises(RuntimeError, match="the machine"):
        run(study, consortium, stops_in(2))
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "flower"))
    result = CliRunner().invoke(cli.cli, ["study", "resume", str(out)], catch_exceptions=False)
    assert result.exit_code == 0
    assert f"flwr run {out}/bundle -c {out}/bundle/run.toml --stream" in result.output
    assert "resume" not in (out / "study.toml").read_text()
    assert '"runtime.resume" = true' in (out / "bundle" / "run.toml").read_text()
    assert f'"runtime.out" = "{out}"' in (out / "bundle" / "run.toml").read_text()


@pytest.mark.slow
def test_a_configured_connection_resumes_at_once(
    consortium: Path,
    small_study: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model_of: Callable[..., Sum],
    differing: Any,
) -> None:
    """`oncofed study resume` against a SuperLink that runs."""
    keys: dict[str, Any] = {
        "analysis__experts": False,
        "evaluation__tables": False,
        "training__evaluate_every": 0,
        "runtime__wait_sites_s": 300.0,
        "runtime__round_timeout_s": 300.0,
        "aggregation__min_sites": 4,
    }
    straight, broken = (small_study(**keys, runtime__out=str(tmp_path / name)) for name in ("a", "b"))
    run(straight, consortium)
    with pytest.raises(RuntimeError, match="the machine"):
        run(broken, consortium, stops_in(2))
    nodes = [f'site-dir="{f}" work-dir="{tmp_path / "work" / f.name}" simulated=true' for f in list_sites(consortium)]
    with Loopback(tmp_path / "processes", nodes) as loopback:
        monkeypatch.setenv("FLWR_HOME", str(loopback.home))
        result = CliRunner().invoke(cli.cli, ["study", "resume", str(tmp_path / "b")], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert f"flwr run {tmp_path}/b/bundle here -c {tmp_path}/b/bundle/run.toml --stream" in result.output
    assert "finished" in result.output
    assert differing(model_of(straight), model_of(broken)) == []
