"""Faults with real processes: each is killed, stopped or cut off, and the weights are held against an undisturbed run's."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from oncofed.client.data.site import list_sites
from oncofed.common.study import Study
from oncofed.deploy.bundle import write_bundle
from oncofed.deploy.loopback import Loopback, submit, wait
from oncofed.deploy.sites.synth import SynthSettings, write_consortium
from oncofed.server.checkpoint import Checkpoints
from safetensors.numpy import load_file
from toy_processes import answering, in_session, until
from toy_undisturbed import undisturbed, weights

pytestmark = pytest.mark.slow

SITES = ("Aachen", "Bergen")
TIMEOUT_S = 45.0
LOCAL_STEPS = 200
"""So many that a process is at work when a signal reaches it, also where a machine is fast."""


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("faults") / "sites"
    write_consortium(out, SynthSettings(sites=2, patients=120, genes=60, cancers=3, genes_per_program=8))
    return out


def study(out: Path, **keys: object) -> Study:
    base = {
        "model__size": "tiny",
        "training__rounds": 3,
        "training__local_steps": LOCAL_STEPS,
        "training__evaluate_every": 0,
        "aggregation__min_sites": 1,
        "aggregation__optimizer": "momentum",  # whose state a resumed run must bring back
        "splits__only": [0],
        "panel__powers": False,
        "analysis__experts": False,
        "evaluation__tables": False,
        "runtime__threads": 1,
        "runtime__round_timeout_s": TIMEOUT_S,
        "runtime__out": str(out),
    }
    return Study().changed(**(base | keys))


class Watched:
    """A federation of real processes on loopback."""

    def __init__(self, root: Path, sites: Path) -> None:
        nodes = [
            f'site-dir="{folder}" work-dir="{root / "work" / folder.name}" simulated=true'
            for folder in list_sites(sites)
        ]
        self.loopback = Loopback(root, nodes)

    def submit(self, run: Study, bundle: str) -> str:
        return submit(write_bundle(self.loopback.root / bundle, run.run_config()), home=self.loopback.home)

    def wait(self, run: str) -> None:
        wait(run, home=self.loopback.home, timeout_s=400, logs=self.loopback.root)

    def processes(self, name: str, program: str = "") -> list[int]:
        return in_session(self.loopback.processes[name].process.pid, program)

    def training(self, out: Path, round_: int, node: str) -> list[int]:
        """Wait until a node's process answers a round: it has begun after the checkpoint of the round before, or after the statistics."""
        if round_ > 1:
            before = out / "checkpoints" / "fold-0-train" / f"round-{round_ - 1:04d}.safetensors"
            since = until(lambda: before.exists() and before.stat().st_mtime)
        else:
            folds, now = self.loopback.root / "work", time.time()

            def counted() -> list[float]:
                return [t for f in folds.glob("*/folds/*.txt") if (t := f.stat().st_mtime) > now]

            since = max(until(lambda: len(found := counted()) == len(SITES) and found))
        session = self.loopback.processes[node].process.pid
        return list(until(lambda: answering(session, since), pause_s=0.02))


@pytest.fixture(scope="module")
def watched(sites: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    federation = Watched(tmp_path_factory.mktemp("processes"), sites)
    with federation.loopback:
        yield federation


def test_sites_that_are_killed_and_stopped(watched: Watched, sites: Path, tmp_path: Path) -> None:
    """Bergen is killed in round 2 and started again, Aachen stands still in round 3; both come back, and only those rounds differ."""
    out, keys = tmp_path / "out", {"training__rounds": 5}
    run = watched.submit(study(out, **keys), "bundle-sites")
    watched.training(out, 2, "node-1")
    watched.loopback.kill("node-1")
    watched.loopback.start("node-1")
    watched.training(out, 3, "node-0")
    stopped = watched.processes("node-0")
    try:
        for process in stopped:
            os.kill(process, signal.SIGSTOP)
        until(lambda: (out / "checkpoints" / "fold-0-train" / "round-0003.safetensors").exists())
    finally:
        for process in stopped:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGCONT)
    watched.wait(run)
    results = json.loads((out / "results.json").read_text())
    took_part = {p["round"]: p["took_part"] for p in results["folds"][0]["curve"]}
    assert (took_part[1], took_part[2], took_part[3]) == (list(SITES), ["Aachen"], ["Bergen"])
    # a site whose heartbeat stopped is asked again in the round after its return
    assert "Aachen" in took_part[4] + took_part[5]
    missing = {(site, round_) for round_, there in took_part.items() for site in SITES if site not in there}
    assert missing <= {("Bergen", 2), ("Aachen", 3), ("Aachen", 4)}
    assert weights(out) == undisturbed(study(out, **keys), list_sites(sites), tmp_path / "same", missing)


def test_a_killed_site_gets_the_weights_in_full_where_others_get_steps(
    watched: Watched, sites: Path, tmp_path: Path
) -> None:
    """Bergen is killed in round 2: it holds the weights of round 1, or of round 2, and is not taken to hold them."""
    keys = {"training__rounds": 4, "transport__upload": "int8", "transport__download": "int8"}
    out = tmp_path / "out"
    run = watched.submit(study(out, **keys), "bundle-steps")
    watched.training(out, 2, "node-1")
    watched.loopback.kill("node-1")
    watched.loopback.start("node-1")
    watched.wait(run)
    results = json.loads((out / "results.json").read_text())
    took_part = {p["round"]: p["took_part"] for p in results["folds"][0]["curve"]}
    assert took_part[2] == ["Aachen"]
    assert took_part[4] == list(SITES)
    missing = {(site, round_) for round_, there in took_part.items() for site in SITES if site not in there}
    assert weights(out) == undisturbed(study(out, **keys), list_sites(sites), tmp_path / "same", missing)
    for site in SITES:  # they ended with the model's own weights
        (file,) = (watched.loopback.root / "work" / site.lower() / "weights").iterdir()
        assert {f"weights/{n}": v.tobytes() for n, v in load_file(file).items()}.items() <= weights(out).items()
    moved = {one["round"]: one for one in results["folds"][0]["bytes_by_round"]}
    back = min(r for r in (3, 4) if took_part[r] == list(SITES))
    assert moved[back]["to_sites"] > moved[back]["plain_to_sites"] / 2
    if back == 3:
        assert moved[4]["to_sites"] < moved[4]["plain_to_sites"] / 2


def test_a_killed_superlink_and_a_killed_server(watched: Watched, sites: Path, tmp_path: Path) -> None:
    """SuperLink is killed in round 1 and comes back with its database; the server dies in round 3."""
    out = tmp_path / "out"
    run = watched.submit(study(out), "bundle-server")
    watched.training(out, 1, "node-0")
    watched.loopback.kill("link")
    time.sleep(3)
    watched.loopback.start("link")
    watched.training(out, 2, "node-1")
    watched.training(out, 3, "node-0")
    for process in watched.processes("exec", "flwr-serverapp"):
        os.kill(process, signal.SIGKILL)
    assert not (out / "results.json").exists()
    assert Checkpoints.of(out, 0, "train", 3).files[0].name == "round-0002.safetensors"
    again = watched.submit(study(out, runtime__resume=True), "bundle-again")
    assert again != run
    watched.wait(again)
    results = json.loads((out / "results.json").read_text())
    assert [p["took_part"] for p in results["folds"][0]["curve"]] == [list(SITES)] * 3
    assert weights(out) == undisturbed(study(out), list_sites(sites), tmp_path / "same")
