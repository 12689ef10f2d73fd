"""Whole studies whose weights travel as steps: sites that missed rounds, lost their file or are new, and servers that go back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message
from oncofed.client.app import app as client_app
from oncofed.client.resident import Resident
from oncofed.common import wire
from oncofed.common.blocks import part
from oncofed.common.broadcast import BASE, HASH, LACKS
from oncofed.common.study import Study
from oncofed.deploy.engine import InProcessGrid
from oncofed.server.app import run_study
from oncofed.server.checkpoint import Checkpoints, load_arrays
from oncofed.server.report.render import render

Make = Callable[..., Study]
NODES: list[Any] = [{"partition-id": i, "num-partitions": 4} for i in range(4)]
BERGEN = 1001
CODED: dict[str, Any] = {
    "transport__upload": "int8",
    "transport__download": "int8",
    "training__rounds": 4,
    "training__evaluate_every": 0,
    "training__learning_rate": 0.02,
    "analysis__experts": False,
    "evaluation__tables": False,
}


@pytest.fixture
def sites(consortium: Path, tmp_path: Path) -> Path:
    """Copies of the sites, whose working folders are this test's own."""
    shutil.copytree(consortium, tmp_path / "sites", ignore=shutil.ignore_patterns(".oncofed"))
    return tmp_path / "sites"


@pytest.fixture
def deployed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sites whose memory is a file alone, as if every message had a process of its own."""
    monkeypatch.setattr(Resident, "weights", lambda self, hash_: None)


class Listening:
    """In-process sites; `asked` notes of every question about weights its kind, round and site, and how they travelled.

    `before` is called with the same ahead of the site, and may say that the message is lost.
    """

    def __init__(self, before: Callable[[str, int, int], str | None] = lambda kind, round_, node: None) -> None:
        self.asked: list[tuple[str, int, int, str]] = []
        self.before = before

    def run(self, study: Study, sites: Path) -> dict[str, Any]:
        return run_study(study, InProcessGrid(client_app, NODES, {"sites": str(sites)}, fault=self._listen))

    def _listen(self, message: Message) -> str | None:
        ask, arrays = wire.read_config(message.content, "ask"), wire.read_arrays(message.content)
        kind, round_, node = message.metadata.message_type, int(str(ask.get("round", 0))), message.metadata.dst_node_id
        if HASH in ask:
            how = "step" if BASE in ask else "full" if part("weights/", arrays) else "held"
            self.asked.append((kind, round_, node, how))
        return self.before(kind, round_, node)

    def ways(self, kind: str, round_: int) -> dict[int, list[str]]:
        """How the weights of a round went to each site."""
        return {
            node: [how for k, r, n, how in self.asked if (k, r, n) == (kind, round_, node)]
            for node in range(1000, 1004)
        }


def model_of(study: Study) -> dict[str, bytes]:
    arrays, _ = load_arrays(Path(study.runtime.out) / "model-fold-0.safetensors")
    return {name: value.tobytes() for name, value in arrays.items()}


def held_by(sites: Path, site: str) -> dict[str, bytes]:
    (file,) = (sites / site / ".oncofed" / "weights").iterdir()
    from safetensors.numpy import load_file

    return {name: value.tobytes() for name, value in load_file(file).items()}


def everyone(how: str) -> dict[int, list[str]]:
    return {node: [how] for node in range(1000, 1004)}


ALL = everyone("step")


@pytest.mark.usefixtures("deployed")
def test_weights_go_in_full_once_and_sites_end_with_those_of_the_model(sites: Path, small_study: Make) -> None:
    study, listening = small_study(**CODED), Listening()
    results = listening.run(study, sites)
    assert results["left_out"] == []
    assert [listening.ways("train", r) for r in (1, 2, 3, 4)] == [everyone("full"), ALL, ALL, ALL]
    assert listening.ways("evaluate", 4) == ALL
    assert listening.ways("query.explain", 0) == everyone("held")
    weights = {n.removeprefix("weights/"): v for n, v in model_of(study).items() if n.startswith("weights/")}
    for site in ("aachen", "bergen", "coimbra", "dublin"):
        assert held_by(sites, site) == weights


@pytest.mark.usefixtures("deployed")
def test_a_round_begins_with_the_weights_that_were_scored(sites: Path, small_study: Make) -> None:
    listening = Listening()
    listening.run(small_study(**CODED | {"training__evaluate_every": 1, "splits__validation": 0.2}), sites)
    assert listening.ways("evaluate", 1) == ALL
    assert listening.ways("train", 2) == everyone("held")


@pytest.mark.usefixtures("deployed")
@pytest.mark.parametrize("damage", ["removed", "cut", "flipped"])
def test_a_site_that_lost_its_file_gets_the_weights_in_full_in_the_same_round(
    sites: Path, tmp_path: Path, small_study: Make, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    plain, study = (small_study(**CODED, runtime__out=str(tmp_path / name)) for name in "ab")
    Listening().run(plain, sites)

    def lose(kind: str, round_: int, node: int) -> None:
        (file,) = [*(sites / "bergen" / ".oncofed" / "weights").glob("*")] or [None]
        if (kind, round_, node) == ("train", 3, BERGEN) and listening.ways("train", 3)[BERGEN] == ["step"]:
            assert file is not None
            whole = file.read_bytes()
            middle = len(whole) // 2
            file.write_bytes(
                whole[:middle] + (bytes([whole[middle] ^ 64]) + whole[middle + 1 :] if damage == "flipped" else b"")
            )
            if damage == "removed":
                file.unlink()

    listening = Listening(lose)
    caplog.set_level("INFO", "oncofed.server")
    results = listening.run(study, sites)
    assert results["left_out"] == []
    assert listening.ways("train", 3) == ALL | {BERGEN: ["step", "full"]}
    assert listening.ways("train", 4) == ALL
    assert model_of(study) == model_of(plain)
    assert "Bergen lack the weights of before" in caplog.text
    log = (sites / "bergen" / ".oncofed" / "release-log.jsonl").read_text().splitlines()
    assert sum("lacks" in json.loads(line) for line in log) == 1
    moved = {one["round"]: one for one in results["folds"][0]["bytes_by_round"]}
    assert moved[3]["to_sites"] > moved[4]["to_sites"]
    assert moved[3]["plain_to_sites"] == moved[4]["plain_to_sites"]


@pytest.mark.usefixtures("deployed")
@pytest.mark.parametrize("lost", ["lost", "lost-reply"])
def test_a_site_that_missed_a_round_is_brought_back_in_full(
    sites: Path, tmp_path: Path, small_study: Make, lost: str
) -> None:
    """Whether the question or the answer was lost: the server takes the site to hold what it last answered to."""
    study = small_study(**CODED, runtime__round_timeout_s=0.5)
    listening = Listening(lambda kind, round_, node: lost if (kind, round_, node) == ("train", 2, BERGEN) else None)
    results = listening.run(study, sites)
    assert [p["sites"] for p in results["folds"][0]["curve"]] == [4, 3, 4, 4]
    assert listening.ways("train", 3) == ALL | {BERGEN: ["full"]}
    assert listening.ways("train", 4) == ALL
    weights = {n.removeprefix("weights/"): v for n, v in model_of(study).items() if n.startswith("weights/")}
    assert held_by(sites, "bergen") == held_by(sites, "aachen") == weights


@pytest.mark.usefixtures("deployed")
def test_a_site_that_never_has_them_is_left_out(
    sites: Path, small_study: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = wire.reply

    def reply(site: str, config: wire.Config, arrays: Any = None) -> Any:
        lacks = site == "Bergen" and config.get("round") == 3
        return real(site, {LACKS: "x"}) if lacks else real(site, config, arrays)

    monkeypatch.setattr(wire, "reply", reply)
    results = Listening().run(small_study(**CODED), sites)
    assert [p["sites"] for p in results["folds"][0]["curve"]] == [4, 4, 3, 4]
    assert [x["reason"] for x in results["left_out"]] == ["lacks weights that it was sent in full"]


@pytest.mark.usefixtures("deployed")
@pytest.mark.parametrize(
    ("keys", "damaged"),
    [
        ({}, False),
        ({}, True),
        ({"transport__upload": "bfloat16", "transport__download": "bfloat16"}, True),
        ({"training__evaluate_every": 1, "splits__validation": 0.2, "training__patience": 3}, True),
        ({"aggregation__average_last": 2, "aggregation__optimizer": "adam", "aggregation__learning_rate": 0.02}, False),
        ({"pretraining__rounds": 2}, True),
    ],
)
def test_a_server_that_goes_back_ends_with_the_same_weights(
    sites: Path, tmp_path: Path, small_study: Make, keys: dict[str, Any], damaged: bool
) -> None:
    """To the round before, which all sites but one have answered, or to the one before that."""
    straight, broken = (small_study(**CODED | keys, runtime__out=str(tmp_path / name)) for name in "ab")
    Listening().run(straight, sites)
    for work in sites.glob("*/.oncofed"):  # the sites of the other run are others
        shutil.rmtree(work)

    def stop(kind: str, round_: int, node: int) -> None:
        if (kind, round_, node) == ("train", 4, 1003):
            raise RuntimeError("the machine")

    with pytest.raises(RuntimeError, match="the machine"):
        Listening(stop).run(broken, sites)
    if damaged:
        Checkpoints.of(tmp_path / "b", 0, "train", 3).files[0].write_bytes(b"damaged")
    resumed = Listening()
    results = resumed.run(broken.changed(runtime__resume=True), sites)
    assert results["left_out"] == []
    assert model_of(straight) == model_of(broken)
    assert [one["round"] for one in results["folds"][0]["bytes_by_round"] if one["phase"] == "train"] == [1, 2, 3, 4]


@pytest.mark.usefixtures("deployed")
def test_sums_under_masks_profit_from_what_sites_hold(sites: Path, tmp_path: Path, small_study: Make) -> None:
    """All sites take it for the same question, in full or not: another one would have another sum."""
    keys = CODED | {"transport__upload": "float32", "privacy__secure_sum": True, "aggregation__min_sites": 3}
    coded = small_study(**keys, runtime__out=str(tmp_path / "a"))
    plain = small_study(**keys | {"transport__download": "float32"}, runtime__out=str(tmp_path / "b"))

    def lose(kind: str, round_: int, node: int) -> None:
        if (kind, round_, node) == ("train", 3, BERGEN) and listening.ways("train", 3)[BERGEN] == ["step"]:
            shutil.rmtree(sites / "bergen" / ".oncofed" / "weights")

    listening = Listening(lose)
    first, second = listening.run(coded, sites)["folds"][0], Listening().run(plain, sites)["folds"][0]
    assert listening.ways("train", 3) == ALL | {BERGEN: ["step", "full"]}
    assert [p["sites"] for p in first["curve"]] == [4, 4, 4, 4]
    assert first["curve"][-1]["train_loss"] == pytest.approx(second["curve"][-1]["train_loss"], rel=2e-3)
    assert first["training_bytes"]["to_sites"] < 0.6 * second["training_bytes"]["to_sites"]


@pytest.mark.usefixtures("deployed")
def test_every_model_at_every_site_travels_so(sites: Path, small_study: Make) -> None:
    keys = CODED | {"analysis__cross_site": ("local", "personalised"), "analysis__personal_rounds": 1}
    results = Listening().run(small_study(**keys), sites)
    found = results["folds"][0]["cross_site"]
    assert found["gaps"] == []
    assert all(value is not None for row in found["sums"]["patients"] for value in row)


def test_a_study_that_a_hospital_refuses_leaves_no_weights_there(sites: Path, small_study: Make) -> None:
    (sites / "bergen" / "policy.toml").write_text(
        'allow = ["query.hello", "query.statistics", "evaluate", "query.explain"]'
    )
    results = Listening().run(small_study(**CODED | {"training__rounds": 1}), sites)
    assert [p["sites"] for p in results["folds"][0]["curve"]] == [3]

    def allowed(kind: str, round_: int, node: int) -> None:
        if kind == "train":
            there = (sites / "bergen" / ".oncofed" / "weights").exists()
            assert not there

    shutil.rmtree(sites / "bergen" / ".oncofed" / "weights", ignore_errors=True)
    Listening(allowed).run(small_study(**CODED | {"training__rounds": 2}), sites)


def test_the_report_says_what_each_fold_moved(sites: Path, small_study: Make) -> None:
    results = Listening().run(small_study(**CODED), sites)
    fold = results["folds"][0]
    assert fold["bytes_by_round"][1]["to_sites"] < 0.5 * fold["bytes_by_round"][1]["plain_to_sites"]
    for key in ("to_sites", "from_sites", "plain_to_sites", "plain_from_sites"):
        assert fold["training_bytes"][key] == sum(one[key] for one in fold["bytes_by_round"])
    page = render({"results": results})
    assert f"{fold['training_bytes']['to_sites'] / 1e6:.2f}" in page
    assert f"{fold['training_bytes']['from_sites'] / 1e6:.2f}" in page
