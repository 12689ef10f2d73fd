"""A whole consortium from nothing, with oncofed's own commands, on real patients: a private study under masks that is killed and goes on."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
import tomli_w
from oncofed.client.data.site import list_sites
from oncofed.client.privacy.ledger import Ledger
from oncofed.client.release_log import ReleaseLog
from oncofed.common import wire
from oncofed.common.signed_study import SUFFIX
from oncofed.common.study import Study
from oncofed.server.privacy import PROTECTS
from toy_deployment import Consortium, asked, called, events, without_nginx
from toy_processes import until

WITHOUT = without_nginx()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.rehearsal,
    pytest.mark.skipif(bool(WITHOUT), reason=WITHOUT or "nginx is there"),
]

HOSPITALS = ["Asterand", "International Genomics Consortium", "University of Pittsburgh"]
CANCERS = ["BRCA", "COADREAD", "LUAD"]
GENES = 60
POLICY = """
coordinators = ["pinned"]
require_secure_sum = true
require_privacy = true
approved_code = true
max_epsilon = 7.0
"""


def real_sites(data: Path, root: Path) -> list[Path]:
    """Three hospitals of TCGA, each with all its patients."""
    (root / "pooled").mkdir()
    (root / "pooled" / "expression").symlink_to(data / "tcga" / "expression")
    table = pd.read_csv(data / "tcga" / "clinical.csv")
    table[table["institution"].isin(HOSPITALS)].to_csv(root / "pooled" / "clinical.csv", index=False)
    called("data", "split", root / "pooled", "--out", root / "sites", "--min-patients", 100, "--rest", "drop")
    return list_sites(root / "sites")


@pytest.fixture
def hospitals(real_data: Path, tmp_path: Path) -> Iterator[Consortium]:
    """A consortium whose hospitals ask for signatures, masks, privacy and approved code, at work."""
    made = Consortium(tmp_path, real_sites(real_data, tmp_path))
    try:
        for site in made.sites.values():
            (site / "policy.toml").write_text(POLICY)
        made.approve_bundle()
        made.start_all()
        yield made
    finally:
        made.stop_all()
        made.unlock()


def private_study(here: Consortium, file: Path) -> Study:
    """Under masks, with noise for a patient, and an evaluation that is paid from the same promise."""
    expression = pd.read_parquet(next(iter(here.sites.values())) / "expression.parquet")
    (here.root / "panel.txt").write_text("\n".join(expression.columns[:GENES]) + "\n")
    study = Study().changed(
        name="whole",
        cancers=CANCERS,
        model__size="tiny",
        panel__file=str(here.root / "panel.txt"),
        panel__scale_by="patient",
        task__time_edges=[0, 12, 24, 36, 60],
        training__rounds=3,
        training__local_steps=2,
        aggregation__min_sites=3,
        splits__only=[0],
        evaluation__epsilon=1.0,
        evaluation__risk_bins=8,
        evaluation__time_bins=8,
        privacy__unit="patient",
        privacy__epsilon=6.0,
        privacy__secure_sum=True,
        runtime__threads=1,
        runtime__round_timeout_s=300.0,
        runtime__roster=str(here.folder.path / "roster.json"),
    )
    file.write_text(tomli_w.dumps(study.model_dump(mode="json")))
    return study


def reasons(out: Path) -> list[str]:
    """Why nodes were left out of a run so far."""
    return [e["reason"] for e in events(out) if e["event"] == "left_out"]


class Page(HTMLParser):
    """What stands on a page, and how many elements of each kind; every element of ours that is opened is closed again."""

    VOID = ("meta", "link", "br", "img", "hr", "input", "path", "use", "rect", "line", "circle")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.words, self.count, self.open = "", dict[str, int](), list[str]()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1
        self.open += [] if tag in self.VOID else [tag]

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += f" {' '.join(data.split())}"


def test_a_consortium_from_nothing(hospitals: Consortium, tmp_path: Path) -> None:
    here, out, file = hospitals, tmp_path / "out", tmp_path / "study.toml"
    study = private_study(here, file)
    first = next(iter(here.sites.values()))
    ahead = here.run("site", "preflight", first)
    assert ahead.returncode == 0, ahead.stdout

    # one word of the study is another than was signed: no hospital takes part
    called("study", "sign", file, "--key", here.folder.path / "coordinator.key")
    forged = tmp_path / "forged.toml"
    forged.write_text(tomli_w.dumps(study.changed(seed=1).model_dump(mode="json")))
    signature = file.with_name(file.name + SUFFIX)
    forged.with_name(forged.name + SUFFIX).write_text(signature.read_text())
    here.coordinator("study", "run", forged, "--out", tmp_path / "forged")
    until(lambda: len(reasons(tmp_path / "forged")) == len(HOSPITALS))
    assert all("is signed by none of the coordinators" in reason for reason in reasons(tmp_path / "forged"))
    assert "finished:stopped" in here.coordinator("study", "stop", tmp_path / "forged")

    # the signed one, whose server is killed in round 2
    here.coordinator("study", "run", file, "--out", out)
    until(lambda: asked(out, 2), 600.0)
    server = int((out / ".lock").read_text())
    assert "flwr-serverapp" in Path(f"/proc/{server}/cmdline").read_text()
    os.kill(server, signal.SIGKILL)
    here.coordinator("study", "resume", out, timeout_s=900)

    results = json.loads((out / "results.json").read_text())
    assert "finished" in results
    assert (results["sites"], results["left_out"]) == (HOSPITALS, [])
    assert [p["took_part"] for p in results["folds"][0]["curve"]] == [HOSPITALS] * 3
    assert [e["resume"] for e in events(out) if e["event"] == "started"] == [False, True]
    assert (results["evaluation"]["sites"], results["evaluation"]["epsilon"]) == (HOSPITALS, 1.0)
    assert results["privacy"]["unit"] == "patient"
    assert 0 < results["privacy"]["epsilon"] <= study.privacy.epsilon

    for name, site in here.sites.items():
        work = site / ".oncofed"
        ledger = Ledger(work / "ledger.jsonl", name, 8.0)
        ledger.verify()
        ((spent,), told) = ledger.studies(), results["privacy"]["sites"][name]
        assert (spent.study.split()[0], spent.unsettled) == (study.name, 0)
        # the hospital's own account, and the coordinator's of it
        assert 1.0 < spent.epsilon <= study.privacy.epsilon
        assert spent.epsilon == pytest.approx(told["at_most"], rel=1e-3)
        assert "verified" in called("site", "budget", site)
        assert "verified" in called("site", "log", site, "--verify")
        lines = ReleaseLog(work / "release-log.jsonl", name).read()
        assert any("is signed by none" in line.get("refusal", "") for line in lines), "the forged study"
        summed = [line for line in lines if line.get("arrays")]
        assert {line["kind"] for line in summed if not line.get("under_masks")} == {wire.MASKED}
        assert {wire.TRAIN, wire.EVALUATE} <= {line["kind"] for line in summed}

    called("study", "report", out)
    page = Page((out / "report.html").read_text())
    assert page.open == []
    assert page.count["svg"] >= 2
    for words in (PROTECTS["patient"], "Never call the model anonymous", *HOSPITALS):
        assert words in page.words
