"""What a coordinator provisions, held against Flower itself: TLS, authenticated nodes, and a study among members alone."""

from __future__ import annotations

import json
import ssl
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from oncofed.client.consortium import accept_roster
from oncofed.client.data.site import SiteFolder, list_sites
from oncofed.client.enrol import enrol
from oncofed.common.study import Study
from oncofed.deploy import loopback
from oncofed.deploy.bundle import write_bundle
from oncofed.deploy.consortium.folder import CA, KITS, ROSTER, SERVER, SERVER_KEY, SUPEREXEC, Folder, init
from oncofed.deploy.consortium.members import admit, revoke
from oncofed.deploy.loopback import Loopback, submit, wait
from oncofed.deploy.sites.synth import SynthSettings, write_consortium
from toy_consortium import write_settings
from toy_processes import until

pytestmark = [pytest.mark.slow, pytest.mark.rehearsal]


class Secured(Loopback):
    """The same processes with the coordinator's certificates, and a SuperLink that knows nodes by their keys."""

    def __init__(self, root: Path, folder: Path, sites: list[Path]) -> None:
        super().__init__(root, [f'site-dir="{site}"' for site in sites])
        self.ca = folder / CA
        keys = [
            "--ssl-certfile",
            folder / SERVER,
            "--ssl-keyfile",
            folder / SERVER_KEY,
            "--ssl-ca-certfile",
            folder / CA,
        ]
        secret = ["--superexec-auth-secret-file", folder / SUPEREXEC]
        for name, command in self.commands.items():
            command.remove("--insecure")
            if name == "link":
                command += [*keys, *secret, "--enable-supernode-auth"]
            elif name == "exec":
                command += ["--root-certificates", folder / CA, *secret]
            else:
                site = sites[int(name.split("-")[1])]
                command += ["--root-certificates", site / "consortium" / "ca.crt"]
                command += ["--auth-supernode-private-key", site / ".oncofed" / "node.key"]

    def __enter__(self) -> Secured:
        self.home.mkdir(parents=True, exist_ok=True)
        (self.home / "config.toml").write_text(
            f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "{self.url}"\nroot-certificates = "{self.ca}"\n'
        )
        return self

    def register(self, key: Path, name: str) -> None:
        loopback.flwr(self.home, "supernode", "register", key, "--name", name)

    def online(self) -> int:
        nodes = loopback.flwr(self.home, "supernode", "list")["nodes"]
        return sum(n["status"] == "online" for n in nodes)


def test_members_train_and_a_revoked_one_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_consortium(tmp_path / "sites", SynthSettings(sites=4, patients=240, genes=60, cancers=3, genes_per_program=8))
    sites = list_sites(tmp_path / "sites")
    names = [SiteFolder.open(s).name for s in sites]
    folder = init(write_settings(tmp_path / "consortium.toml", members=tuple(names)), tmp_path / "coordinator")
    for site, name in zip(sites, names, strict=True):
        admit(folder, enrol(folder.path / KITS / f"{name}.zip", site).file)
    revoke(folder, names[3])
    for site in sites:
        accept_roster(site, folder.path / ROSTER)

    def healthy(url: str, process: Any, root: Path) -> None:
        context = ssl.create_default_context(cafile=str(folder.path / CA))
        monkeypatch.setattr(
            urllib.request,
            "urlopen",
            lambda u, timeout: real(u.replace("http:", "https:"), timeout=timeout, context=context),
        )
        waited(url, process, root)

    real, waited = urllib.request.urlopen, loopback._wait_healthy
    monkeypatch.setattr(loopback, "_wait_healthy", healthy)
    with Secured(tmp_path / "flower", folder.path, sites) as flower:
        flower.start("link")
        for site, name in zip(sites, names, strict=True):
            flower.register(site / ".oncofed" / "node.pub", name)
        for name in list(flower.commands)[1:]:
            flower.start(name)
        until(lambda: flower.online() == len(names))
        study = Study().changed(
            model__size="tiny",
            training__rounds=1,
            training__evaluate_every=0,
            splits__only=[0],
            evaluation__tables=False,
            analysis__experts=False,
            panel__powers=False,
            aggregation__min_sites=3,
            runtime__threads=1,
            runtime__wait_sites_s=600.0,
            runtime__out=str(tmp_path / "out"),
            runtime__roster=str(Folder.open(folder.path).path / ROSTER),
        )
        wait(
            submit(write_bundle(flower.root / "bundle", study.run_config()), home=flower.home),
            home=flower.home,
            timeout_s=900,
            logs=flower.root,
        )
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    turned_away = {x["site"]: x["reason"] for x in results["left_out"] if x["kind"] == "query.hello"}
    assert turned_away.keys() == {names[3]}
    assert f"{names[3]} is revoked by roster" in turned_away[names[3]]
    assert results["folds"][0]["curve"][-1]["took_part"] == names[:3]
