"""Whole studies whose changes travel in fewer bytes, or are held against each other: what they learn, send, refuse and report."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from oncofed.client.app import app as client_app
from oncofed.client.transport import Remainder
from oncofed.common import wire
from oncofed.common.blocks import EVIDENCE, Sum
from oncofed.common.compression import BFLOAT16, INT8, SCALE, Coding
from oncofed.common.study import Study
from oncofed.deploy.engine import InProcessGrid
from oncofed.server.app import run_study
from oncofed.server.checkpoint import load_arrays
from oncofed.server.report.render import render
from oncofed.server.roster import NotEnoughSites

Make = Callable[..., Study]
NODES: list[Any] = [{"partition-id": i, "num-partitions": 4} for i in range(4)]
QUIET: dict[str, Any] = {"training__evaluate_every": 0, "analysis__experts": False, "evaluation__tables": False}
INT8_BOTH: dict[str, Any] = {"transport__upload": "int8", "transport__download": "int8"}


@pytest.fixture
def sites(consortium: Path, tmp_path: Path) -> Path:
    """Copies of the sites, whose working folders are this test's own."""
    import shutil

    shutil.copytree(consortium, tmp_path / "sites", ignore=shutil.ignore_patterns(".oncofed"))
    return tmp_path / "sites"


def run(study: Study, sites: Path, **grid: Any) -> dict[str, Any]:
    app = grid.pop("client", client_app)
    return run_study(study, InProcessGrid(app, NODES, {"sites": str(sites)}, **grid))


def model_of(study: Study) -> Sum:
    return load_arrays(Path(study.runtime.out) / "model-fold-0.safetensors")[0]


def bytes_of(study: Study) -> dict[str, bytes]:
    return {name: value.tobytes() for name, value in model_of(study).items()}


def tampering(change: Callable[[Sum], Sum], *, who: int = 1) -> ClientApp:
    """The ClientApp with a site whose training sums are changed on their way out."""
    app = ClientApp()

    def answer(message: Message, context: Context) -> Message:
        reply = client_app(message, context)
        if message.metadata.message_type == "train" and context.node_config["partition-id"] == who:
            arrays = {n: v.copy() for n, v in wire.read_arrays(reply.content).items()}
            reply.content["arrays"] = wire.pack_arrays(change(arrays))
        return reply

    for name in ("hello", "statistics", "explain"):
        app.query(name)(answer)
    app.train()(answer)
    app.evaluate()(answer)
    return app


@pytest.mark.parametrize(
    "keys", [{}, {"model__name": "path_gptomic"}, {"pretraining__rounds": 1}, {"aggregation__optimizer": "adam"}]
)
def test_with_the_defaults_a_study_is_what_it_was(
    sites: Path, tmp_path: Path, small_study: Make, keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit: as when sums go through no coding at all."""
    study = small_study(runtime__out=str(tmp_path / "a"), **QUIET, **keys)
    all_blocks = small_study(runtime__out=str(tmp_path / "b"), **QUIET, **keys, transport__only_evidence=False)
    plain = small_study(runtime__out=str(tmp_path / "c"), **QUIET, **keys)
    with_results, whole = run(study, sites), run(all_blocks, sites)
    monkeypatch.setattr(Coding, "pack", lambda self, total, blocks, draws, dropped=None: (total, {}))
    monkeypatch.setattr(Coding, "unpack", lambda self, arrays, blocks, shapes, site: arrays)
    without = run(plain, sites)
    assert bytes_of(study) == bytes_of(all_blocks) == bytes_of(plain)
    for fold, other in zip(with_results["folds"], without["folds"], strict=True):
        assert fold["curve"] == other["curve"]
        assert fold["site_evidence"] == other["site_evidence"]
        assert fold["evaluation"] == other["evaluation"]
        assert fold["bytes_from_sites"] <= other["bytes_from_sites"]
    assert whole["folds"][0]["bytes_from_sites"] == without["folds"][0]["bytes_from_sites"]
    for folder in ("remainders", "weights"):
        assert not (sites / "aachen" / ".oncofed" / folder).exists()


@pytest.mark.parametrize(
    ("keys", "up", "down"),
    [
        ({"transport__upload": "int8"}, 0.45, 1.0),
        ({"transport__upload": "bfloat16"}, 0.6, 1.0),
        ({"transport__upload": "bfloat16", "transport__download": "bfloat16"}, 0.6, 0.7),
        (INT8_BOTH, 0.45, 0.5),
        (INT8_BOTH | {"pretraining__rounds": 2}, 0.45, 0.55),
        (INT8_BOTH | {"model__name": "path_gptomic"}, 0.5, 0.55),
        (INT8_BOTH | {"aggregation__optimizer": "adam", "aggregation__learning_rate": 0.02}, 0.45, 0.5),
    ],
)
def test_a_coded_study_learns_as_well_with_fewer_bytes(
    sites: Path, tmp_path: Path, small_study: Make, keys: dict[str, Any], up: float, down: float
) -> None:
    """Of this tiny model many arrays are too small to be coded: of a real one int8 takes a quarter."""
    base = {**QUIET, "training__rounds": 8, "training__learning_rate": 0.02}
    other = {k: v for k, v in keys.items() if not k.startswith("transport")}
    coded = run(small_study(runtime__out=str(tmp_path / "a"), **base, **keys), sites)["folds"][0]
    plain = run(small_study(runtime__out=str(tmp_path / "b"), **base, **other), sites)["folds"][0]
    assert coded["curve"][-1]["train_loss"] < coded["curve"][0]["train_loss"]
    assert coded["curve"][-1]["train_loss"] == pytest.approx(plain["curve"][-1]["train_loss"], rel=2e-3)
    moved = coded["training_bytes"]
    assert moved["from_sites"] / moved["plain_from_sites"] < up
    assert moved["to_sites"] / moved["plain_to_sites"] <= down
    assert moved["plain_from_sites"] == plain["training_bytes"]["plain_from_sites"]
    assert moved["plain_to_sites"] == plain["training_bytes"]["to_sites"]


def test_a_coded_study_repeats_itself_whatever_the_order_and_resumes(
    sites: Path, tmp_path: Path, small_study: Make
) -> None:
    keys = {**QUIET, **INT8_BOTH, "training__rounds": 4, "aggregation__min_sites": 4}
    a, b, c = (small_study(runtime__out=str(tmp_path / name), **keys) for name in "abc")
    run(a, sites)
    run(b, sites, order=lambda ids: ids[::-1], through_wire=True)
    with pytest.raises(NotEnoughSites, match="round 3: 3 good answers"):
        run(
            c,
            sites,
            fault=lambda m: "error" if m.metadata.group_id == "3" and m.metadata.dst_node_id == 1002 else None,
        )
    run(c.changed(runtime__resume=True), sites)  # three sites answer round 3 once more
    assert bytes_of(a) == bytes_of(b) == bytes_of(c)


def test_a_question_that_is_repeated_gets_the_same_bytes(sites: Path, small_study: Make) -> None:
    asked: list[tuple[Message, Sum]] = []
    app = ClientApp()

    def answer(message: Message, context: Context) -> Message:
        reply = client_app(message, context)
        if message.metadata.message_type == "train" and context.node_config["partition-id"] == 0:
            again = client_app(message, context)
            first, second = (wire.read_arrays(r.content) for r in (reply, again))
            assert {n: v.tobytes() for n, v in first.items()} == {n: v.tobytes() for n, v in second.items()}
            asked.append((message, first))
        return reply

    for name in ("hello", "statistics", "explain"):
        app.query(name)(answer)
    app.train()(answer)
    app.evaluate()(answer)
    run(small_study(**QUIET, **INT8_BOTH, training__rounds=3), sites, client=app)
    assert len(asked) == 3
    names = asked[0][1].keys()
    assert INT8 + "encoder.branches.trunk.hidden.weight" in names or any(n.startswith(INT8) for n in names)
    first, later = (wire.read_arrays(message.content) for message, _ in asked[:2])
    assert any(n.startswith(f"weights/{BFLOAT16}") for n in first)
    assert any(n.startswith(f"weights/{INT8}") for n in later)
    assert not any(n.startswith(f"weights/{BFLOAT16}") for n in later)


def coded_name(arrays: Sum) -> str:
    return next(n for n in sorted(arrays) if n.startswith(INT8)).removeprefix(INT8)


def no_scale(arrays: Sum) -> Sum:
    return {n: v for n, v in arrays.items() if n != SCALE + coded_name(arrays)}


def bad_scale(arrays: Sum) -> Sum:
    arrays[SCALE + coded_name(arrays)][0, 0] = np.inf
    return arrays


def short(arrays: Sum) -> Sum:
    name = INT8 + coded_name(arrays)
    return arrays | {name: arrays[name][:, :-1]}


def uncoded(arrays: Sum) -> Sum:
    name = coded_name(arrays)
    kept = {n: v for n, v in arrays.items() if n not in (INT8 + name, SCALE + name)}
    return kept | {name: arrays[INT8 + name].astype(np.float32)}


def other_coding(arrays: Sum) -> Sum:
    return {n.replace(INT8, "zip9/"): v for n, v in arrays.items()}


def no_number(arrays: Sum) -> Sum:
    arrays[EVIDENCE][0] = np.nan
    return arrays


def huge(arrays: Sum) -> Sum:
    arrays[SCALE + coded_name(arrays)][...] = 3e38
    return arrays


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (no_scale, r"'scale/.*'\] are missing, as transport.upload = 'int8' writes them"),
        (bad_scale, "must hold finite scales of 0 or more"),
        (short, r"'int8/.*' has shape \(.*\), wanted"),
        (uncoded, "are missing, as transport.upload = 'int8'"),
        (other_coding, "are missing, as transport.upload = 'int8'"),
        (no_number, "'evidence' must be"),
        (huge, "not finite|too large for a sum"),
    ],
)
def test_an_answer_in_another_coding_is_left_out_by_name(
    sites: Path, small_study: Make, change: Callable[[Sum], Sum], words: str
) -> None:
    results = run(small_study(**QUIET, **INT8_BOTH), sites, client=tampering(change))
    assert [p["sites"] for p in results["folds"][0]["curve"]] == [3, 3]
    assert {x["site"] for x in results["left_out"]} == {"Bergen"}
    assert all(re.search(words, x["reason"]) for x in results["left_out"])
    assert "Bergen" in render({"results": results})


def times(factor: float) -> Callable[[Sum], Sum]:
    return lambda arrays: {n: v if n == EVIDENCE else v * np.float32(factor) for n, v in arrays.items()}


@pytest.mark.parametrize("rule", ["norm", "median", "trimmed_mean", "krum"])
def test_a_tampering_site_does_not_lead_a_robust_study_and_is_named(
    sites: Path, tmp_path: Path, small_study: Make, rule: str
) -> None:
    base = {**QUIET, "training__rounds": 4, "aggregation__min_sites": 3}
    honest = small_study(runtime__out=str(tmp_path / "honest"), **base)
    plain = small_study(runtime__out=str(tmp_path / "plain"), **base)
    robust = small_study(runtime__out=str(tmp_path / "robust"), **base, aggregation__robust=rule)
    run(honest, sites)
    run(plain, sites, client=tampering(times(-50.0)))
    results = run(robust, sites, client=tampering(times(-50.0)))
    first, bad, good = (model_of(s)["weights/encoder.latent.weight"] for s in (honest, plain, robust))
    assert np.linalg.norm(good - first) < 0.1 * np.linalg.norm(bad - first)
    found = results["folds"][0]["robust"]
    assert found["rule"] == rule
    worst = max(found["rows"], key=lambda row: row["size"] / row["bound"])
    assert (worst["site"], worst["rounds"]) == ("Bergen", 4)
    page = render({"results": results})
    assert "Changes that were cut or left out" in page
    assert worst["reason"] in page


def test_a_robust_study_resumes_as_if_it_had_not_stopped(sites: Path, tmp_path: Path, small_study: Make) -> None:
    keys = {**QUIET, "training__rounds": 4, "aggregation__min_sites": 4, "aggregation__robust": "norm"}
    a, b = (small_study(runtime__out=str(tmp_path / name), **keys) for name in "ab")
    straight = run(a, sites)
    with pytest.raises(NotEnoughSites):
        run(
            b,
            sites,
            fault=lambda m: "error" if m.metadata.group_id == "3" and m.metadata.dst_node_id == 1002 else None,
        )
    resumed = run(b.changed(runtime__resume=True), sites)
    assert bytes_of(a) == bytes_of(b)
    assert straight["folds"][0]["robust"] == resumed["folds"][0]["robust"]


def test_int8_and_a_robust_rule_go_together(sites: Path, small_study: Make) -> None:
    study = small_study(**QUIET, **INT8_BOTH, aggregation__robust="median", aggregation__min_sites=3)
    results = run(study, sites)
    assert results["left_out"] == []
    page = render({"results": results})
    assert re.search(r"Rounds of training took [0-9.]+ % of the bytes of float32 models in full", page)


def test_noise_of_privacy_comes_before_the_coding(sites: Path, small_study: Make) -> None:
    study = small_study(
        **QUIET,
        **INT8_BOTH,
        privacy__unit="patient",
        panel__scale_by="patient",
        task__time_edges=(0, 12, 24, 60),
        training__local_steps=2,
    )
    results = run(study, sites)
    assert results["left_out"] == []
    moved = results["folds"][0]["training_bytes"]
    assert moved["from_sites"] < 0.5 * moved["plain_from_sites"]


def test_the_report_is_silent_where_nothing_was_chosen(sites: Path, small_study: Make) -> None:
    page = render({"results": run(small_study(**QUIET, transport__only_evidence=False), sites)})
    assert "of the bytes of float32 models" not in page
    assert "cut or left out" not in page


def test_remainders_are_of_the_round_before(tmp_path: Path) -> None:
    kept = Remainder(tmp_path / "remainders" / "study-0-train")
    of = {r: {"w": np.full(3, float(r), dtype=np.float32)} for r in range(1, 9)}
    assert kept.at(1) == {}
    kept.keep(1, of[1])
    assert kept.at(2)["w"].tolist() == [1, 1, 1]
    kept.keep(2, of[2])
    kept.keep(2, of[2])
    assert kept.at(2)["w"].tolist() == [1, 1, 1]  # asked again
    assert kept.at(3)["w"].tolist() == [2, 2, 2]
    kept.keep(5, of[5])  # two rounds without this site
    assert kept.at(5)["w"].tolist() == [2, 2, 2]
    assert kept.at(6)["w"].tolist() == [5, 5, 5]
    assert kept.at(1) == {}  # begun anew
    kept.keep(1, of[1])
    assert kept.at(2)["w"].tolist() == [1, 1, 1]
    for file in (tmp_path / "remainders").iterdir():
        file.write_bytes(b"damaged")
    assert kept.at(2) == {}
    kept.keep(3, of[3])
    assert kept.at(4)["w"].tolist() == [3, 3, 3]


def test_a_content_without_arrays_is_no_change(sites: Path) -> None:
    assert wire.read_arrays(RecordDict()) == {}
