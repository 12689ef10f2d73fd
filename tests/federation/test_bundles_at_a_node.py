"""Bundles of a coordinator at real nodes: only the approved one runs, whatever a bundle names, and the nodes go on."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oncofed.client import bundle_store
from oncofed.client.approval import Approvals, Package
from oncofed.client.data.site import list_sites
from oncofed.client.release_log import ReleaseLog
from oncofed.common import signing
from oncofed.common.plan import Plan
from oncofed.common.signed_study import sign
from oncofed.deploy.bundle import build_bundle, write_bundle
from oncofed.deploy.loopback import Loopback, submit, wait
from toy_hostile import hostile_bundle
from toy_outcomes import deal, rossi

pytestmark = pytest.mark.slow

KEY = bytes(range(32))


@dataclass
class Nodes:
    """A node with a locked folder of bundles alone, or one with the guard before it; both are hospitals that mean it."""

    loopback: Loopback
    site: Path
    home: Path

    def run(self, bundle: Path) -> list[Any]:
        run = submit(bundle, home=self.loopback.home)
        wait(run, home=self.loopback.home, timeout_s=200, logs=self.loopback.root)
        said = bundle / "said.json"
        return list(json.loads(said.read_text())) if said.exists() else []


@pytest.fixture(params=["locked", "guarded"])
def nodes(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Nodes]:
    table = rossi()
    (site,) = list_sites(deal(table, np.zeros(len(table), dtype=int), tmp_path / "sites", "min_cell = 5\n"))
    if request.param == "guarded":
        policy = f'approved_code = true\ncoordinators = ["{signing.public_of(KEY)}"]\n'
        (site / "policy.toml").write_text(policy)
    home = tmp_path / "home-node-0"
    content = build_bundle(tmp_path / "sent").read_bytes()
    Approvals(site, "Site 0").write([Package.installed(), bundle_store.read_bundle(content)], "Dr. Ada Lovelace")
    installed = bundle_store.install(content, home)
    # at the coordinator too, where the bundle that leads astray would leave an empty folder of its name
    shutil.copytree(installed, tmp_path / "home-link" / "apps" / installed.name)
    guard = bundle_store.write_guard(home, site)
    loopback = Loopback(tmp_path, [f'site-dir="{site}" work-dir="{tmp_path / "work"}"'])
    if request.param == "guarded":
        path = os.pathsep.join((str(guard), str(Path(sys.executable).parent), os.environ["PATH"]))
        loopback.commands["node-0"] = ["env", f"PATH={path}", *loopback.commands["node-0"]]
    try:
        with loopback:
            yield Nodes(loopback, site, home)
    finally:
        bundle_store.unlock(installed.parent)


def test_a_bundle_that_nobody_approved_does_not_run_and_the_approved_one_does(
    nodes: Nodes, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    guarded = "guarded" in request.node.name
    if not guarded and not bundle_store.is_immutable(nodes.home / "apps"):
        pytest.skip("the lock needs root and a file system with the immutable flag, or a user other than root")
    plain = hostile_bundle(tmp_path / "plain", "1.0.0")
    ((code, reason),) = nodes.run(plain)
    assert code == 2
    assert ("nobody here approved the Flower bundle" if guarded else "PermissionError") in reason
    assert not (plain / "mark").exists()
    # a version that is a path: it leads out of the locked folder, through the approved one
    (approved,) = (nodes.home / "apps").iterdir()
    version = f"{approved.name.removeprefix('oncofed.oncofed-study.')}/../../escaped"
    astray = hostile_bundle(tmp_path / "astray", version, "oncofed-study")
    ((code, reason),) = nodes.run(astray)
    if guarded:
        assert "nobody here approved the Flower bundle" in reason
        assert not (astray / "mark").exists()
    else:  # why the lock alone does not hold; where Flower has learned better, the guard's reason falls away
        assert (code, (astray / "mark").exists()) == (0, True)
    # the node is still there for the bundle that was approved
    plan = Plan(kind="km", min_sites=1, out=str(tmp_path / "out"), wait_sites_s=60)
    good = write_bundle(tmp_path / "good", {"plan": plan.model_dump_json(), "runtime.signature": sign(plan, KEY)})
    nodes.run(good)
    assert json.loads((tmp_path / "out" / "analysis.json").read_text())["sites"] == ["Site 0"]
    kinds = [line["kind"] for line in ReleaseLog(tmp_path / "work" / "release-log.jsonl", "Site 0").read()]
    assert set(kinds) == {"query.analyse"}
