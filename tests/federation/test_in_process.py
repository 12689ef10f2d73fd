"""A whole study over in-process sites: it learns, repeats itself, and survives faulty sites."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from oncofed.client.app import app as client_app
from oncofed.common import wire
from oncofed.common.blocks import EVIDENCE
from oncofed.common.study import Study
from oncofed.deploy.engine import InProcessGrid
from oncofed.deploy.simulate import simulate
from oncofed.server.app import run_study
from oncofed.server.checkpoint import load_arrays
from oncofed.server.roster import NotEnoughSites

Make = Callable[..., Study]
NODES = [{"partition-id": i, "num-partitions": 4} for i in range(4)]


def run(study: Study, consortium: Path, **grid: object) -> dict:  # type: ignore[type-arg]
    app = grid.pop("client", client_app)
    return run_study(study, InProcessGrid(app, NODES, {"sites": str(consortium)}, **grid))  # type: ignore[arg-type]


def model_bytes(study: Study) -> dict[str, bytes]:
    arrays, _ = load_arrays(Path(study.runtime.out) / "model-fold-0.safetensors")
    return {k: v.tobytes() for k, v in arrays.items()}


def tampering(change: Callable[[str, RecordDict], None]) -> ClientApp:
    """The ClientApp with a site whose answers are changed on their way out."""
    app = ClientApp()

    def wrap(kind: str) -> Callable[[Message, Context], Message]:
        def answer(message: Message, context: Context) -> Message:
            reply = client_app(message, context)
            if context.node_config["partition-id"] == 1:
                change(kind, reply.content)
            return reply

        return answer

    app.query("hello")(wrap("hello"))
    app.query("statistics")(wrap("statistics"))
    app.query("explain")(wrap("explain"))
    app.train()(wrap("train"))
    app.evaluate()(wrap("evaluate"))
    return app


def test_learns_what_the_consortium_hides(consortium: Path, tmp_path: Path, small_study: Make) -> None:
    study = small_study(
        training__rounds=12,
        training__optimizer="sgd",
        training__learning_rate=0.02,
        training__evaluate_every=0,
        analysis__experts=False,
        splits__only=[],
    )
    done = simulate(study, consortium)
    first, last = (done.results["folds"][0]["curve"][i]["train_loss"] for i in (0, -1))
    assert last < first
    totals = np.sum(
        [[f["evaluation"]["concordant"], f["evaluation"]["comparable"]] for f in done.results["folds"]], axis=0
    )
    assert (totals[0] / totals[1]).mean() > 0.56
    test = done.predictions[done.predictions["split"] == "test"]
    assert test["patient"].is_unique
    assert len(test) == len(done.predictions) / 5


def test_same_seed_same_weights_whatever_the_order(consortium: Path, tmp_path: Path, small_study: Make) -> None:
    a = small_study(runtime__out=str(tmp_path / "a"))
    b = small_study(runtime__out=str(tmp_path / "b"))
    c = small_study(runtime__out=str(tmp_path / "c"), seed=1)
    run(a, consortium)
    run(b, consortium, order=lambda ids: ids[::-1], through_wire=True)
    run(c, consortium)
    assert model_bytes(a) == model_bytes(b)
    assert model_bytes(a) != model_bytes(c)


def test_resumed_study_equals_an_uninterrupted_one(consortium: Path, tmp_path: Path, small_study: Make) -> None:
    keys = {"training__rounds": 4, "aggregation__optimizer": "adam", "aggregation__learning_rate": 0.01}
    straight = small_study(runtime__out=str(tmp_path / "a"), **keys)
    run(straight, consortium)
    broken = small_study(runtime__out=str(tmp_path / "b"), **keys, aggregation__min_sites=4)
    straight_equivalent = small_study(runtime__out=str(tmp_path / "c"), **keys, aggregation__min_sites=4)
    run(straight_equivalent, consortium)
    with pytest.raises(NotEnoughSites, match="round 3: 3 good answers"):
        run(
            broken,
            consortium,
            fault=lambda m: "error" if m.metadata.group_id == "3" and m.metadata.dst_node_id == 1002 else None,
        )
    run(broken.changed(runtime__resume=True), consortium)
    assert model_bytes(broken) == model_bytes(straight_equivalent) == model_bytes(straight)
    other = broken.changed(runtime__resume=True, training__local_steps=9)
    with pytest.raises(ValueError, match="written by another study"):
        run(other, consortium)


@pytest.mark.parametrize(
    ("fault", "words"),
    [("error", "Flower error 2: .*injected fault"), ("lost", "no answer within"), ("lost-reply", "no answer within")],
)
def test_a_failing_site_is_left_out_of_its_round_by_name(
    consortium: Path, small_study: Make, fault: str, words: str
) -> None:
    study = small_study(training__evaluate_every=0, runtime__round_timeout_s=0.5)
    results = run(
        study,
        consortium,
        fault=lambda m: fault if m.metadata.dst_node_id == 1001 and m.metadata.group_id == "1" else None,
    )
    assert [p["sites"] for p in results["folds"][0]["curve"]] == [3, 4]
    (entry,) = results["left_out"]
    assert (entry["site"], entry["kind"], entry["round"]) == ("Bergen", "train", 1)
    import re

    assert re.search(words, entry["reason"])


def poison(kind: str, content: RecordDict) -> None:
    if kind == "train":
        arrays = {k: v.copy() for k, v in wire.read_arrays(content).items()}
        arrays["encoder.latent.weight"][0, 0] = np.nan
        content["arrays"] = wire.pack_arrays(arrays)


def reshape(kind: str, content: RecordDict) -> None:
    if kind == "train":
        arrays = wire.read_arrays(content)
        content["arrays"] = wire.pack_arrays(arrays | {"encoder.latent.weight": arrays["encoder.latent.weight"][:, :3]})


def rename(kind: str, content: RecordDict) -> None:
    if kind == "train":
        arrays = wire.read_arrays(content)
        arrays.pop(EVIDENCE)
        content["arrays"] = wire.pack_arrays(arrays)


def other_panel(kind: str, content: RecordDict) -> None:
    if kind == "train":
        content["from"]["panel_hash"] = "0123456789abcdef"


def explode(kind: str, content: RecordDict) -> None:
    if kind == "train":
        arrays = {k: v.copy() for k, v in wire.read_arrays(content).items()}
        arrays["encoder.latent.weight"][0, 0] = 1e8
        content["arrays"] = wire.pack_arrays(arrays)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (poison, "'encoder.latent.weight' holds values that are not finite"),
        (reshape, r"'encoder.latent.weight' has shape \(8, 3\), wanted \(8, 16\)"),
        (rename, "other arrays than the model"),
        (other_panel, "answers {'panel_hash': '0123456789abcdef'}"),
        (explode, "reaches 1e\\+08, too large"),
    ],
)
def test_a_bad_sum_is_refused_and_the_round_goes_on(
    consortium: Path, small_study: Make, change: Callable[[str, RecordDict], None], words: str
) -> None:
    results = run(small_study(training__evaluate_every=0), consortium, client=tampering(change))
    assert [p["sites"] for p in results["folds"][0]["curve"]] == [3, 3]
    assert {x["site"] for x in results["left_out"]} == {"Bergen"}
    import re

    assert all(re.search(words, x["reason"]) for x in results["left_out"])


def test_a_refused_site_leaves_no_trace_in_the_weights(consortium: Path, tmp_path: Path, small_study: Make) -> None:
    poisoned = small_study(runtime__out=str(tmp_path / "a"), training__evaluate_every=0)
    failed = small_study(runtime__out=str(tmp_path / "b"), training__evaluate_every=0)
    run(poisoned, consortium, client=tampering(poison))
    run(
        failed,
        consortium,
        fault=lambda m: "error" if m.metadata.dst_node_id == 1001 and m.metadata.message_type == "train" else None,
    )
    assert model_bytes(poisoned) == model_bytes(failed)


def test_a_site_of_another_protocol_never_joins(consortium: Path, small_study: Make) -> None:
    def old(kind: str, content: RecordDict) -> None:
        content["from"]["protocol"] = 0

    results = run(small_study(), consortium, client=tampering(old))
    assert results["sites"] == ["Aachen", "Coimbra", "Dublin"]
    assert "speaks oncofed protocol 0" in results["left_out"][0]["reason"]
    assert "install the same oncofed version" in results["left_out"][0]["reason"]


def test_a_server_of_another_protocol_gets_no_answer(
    consortium: Path, small_study: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = wire.request
    monkeypatch.setattr(wire, "request", lambda c, a=None: _aged(real(c, a)))
    with pytest.raises(NotEnoughSites, match="the server speaks oncofed protocol 0"):
        run(small_study(runtime__wait_sites_s=0.5), consortium)


def _aged(content: RecordDict) -> RecordDict:
    content["ask"]["protocol"] = 0
    return content


def test_too_few_sites_stop_the_study_with_the_reasons(consortium: Path, small_study: Make) -> None:
    with pytest.raises(NotEnoughSites, match=r"4 sites take part after 0 s, wanted 9 \(min_sites\)"):
        run(small_study(aggregation__min_sites=9, runtime__wait_sites_s=0.5), consortium)


def test_an_exception_at_a_site_does_not_tell_its_text(
    consortium: Path, small_study: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def leak(self: object) -> None:
        raise KeyError("TCGA-SECRET-01")

    monkeypatch.setattr("oncofed.client.answers.train", leak)
    with pytest.raises(NotEnoughSites) as caught:
        run(small_study(), consortium)
    assert "KeyError while answering 'train'; the site's own log has the details" in str(caught.value)
    assert "SECRET" not in str(caught.value)


def test_a_policy_is_the_hospitals_own(tmp_path: Path, small_study: Make) -> None:
    from oncofed.deploy.sites.synth import SynthSettings, write_consortium

    folders = write_consortium(
        tmp_path / "sites", SynthSettings(sites=4, patients=240, genes=60, cancers=3, genes_per_program=8)
    )
    (folders[0] / "policy.toml").write_text("min_patients = 100\nmin_cell = 1\n")
    (folders[1] / "policy.toml").write_text("max_rounds = 1\n")
    results = run(small_study(), tmp_path / "sites")
    reasons = {x["site"]: x["reason"] for x in results["left_out"]}
    assert "than the 100 that its policy wants" in reasons["Aachen"]
    assert "the study wants 2 rounds, the site's policy allows 1" in reasons["Bergen"]
    assert "Bergen" not in results["sites"]


def test_everything_that_leaves_is_in_the_release_log(tmp_path: Path, small_study: Make) -> None:
    from oncofed.deploy.sites.synth import SynthSettings, write_consortium

    folders = write_consortium(
        tmp_path / "sites", SynthSettings(sites=4, patients=240, genes=60, cancers=3, genes_per_program=8)
    )
    results = run(small_study(training__evaluate_every=0), tmp_path / "sites")
    lines = [json.loads(line) for line in (folders[0] / ".oncofed" / "release-log.jsonl").read_text().splitlines()]
    asked = [
        "query.hello",
        "query.statistics",
        "query.statistics",
        "train",
        "train",
        "evaluate",
        "query.explain",
        "evaluate",
    ]
    assert [line["kind"] for line in lines] == asked
    sent = sum(
        json.loads(line)["bytes"]
        for f in folders
        for line in (f / ".oncofed" / "release-log.jsonl").read_text().splitlines()
    )
    assert sent == results["folds"][0]["bytes_from_sites"]


def test_units_that_cannot_share_a_scale_are_refused_with_names(tmp_path: Path, small_study: Make) -> None:
    from oncofed.deploy.sites.synth import SynthSettings, write_consortium

    folders = write_consortium(
        tmp_path / "sites", SynthSettings(sites=4, patients=240, genes=60, cancers=3, genes_per_program=8)
    )
    (folders[0] / "site.toml").write_text('name = "Aachen"\nexpression_unit = "zscore"\n')
    with pytest.raises(ValueError, match="log-expression: Bergen, Coimbra, Dublin; zscore: Aachen"):
        run(small_study(), tmp_path / "sites")


def test_a_gene_that_a_site_lacks_gets_the_federations_mean(tmp_path: Path, small_study: Make) -> None:
    import pandas as pd
    from oncofed.deploy.sites.synth import SynthSettings, write_consortium

    folders = write_consortium(
        tmp_path / "sites", SynthSettings(sites=4, patients=240, genes=60, cancers=3, genes_per_program=8)
    )
    table = pd.read_parquet(folders[0] / "expression.parquet").drop(columns=["GENE0003", "GENE0007"])
    table.to_parquet(folders[0] / "expression.parquet")
    strict = run(small_study(), tmp_path / "sites")
    assert strict["panel"]["genes"] == 58
    loose = run(small_study(panel__min_site_share=0.7), tmp_path / "sites")
    assert loose["panel"]["genes"] == 60
    assert loose["left_out"] == []


def test_two_nodes_of_one_name_are_not_counted_twice(consortium: Path, small_study: Make) -> None:
    grid = InProcessGrid(client_app, [*NODES, NODES[0]], {"sites": str(consortium)})
    results = run_study(small_study(), grid)
    assert len(results["sites"]) == 4
    assert "a second node calls itself Aachen" in results["left_out"][0]["reason"]


def test_a_real_node_never_takes_its_data_folder_from_the_study(consortium: Path, small_study: Make) -> None:
    grid = InProcessGrid(client_app, [{}], {"sites": str(consortium)})
    with pytest.raises(NotEnoughSites, match="the node has no data"):
        run_study(small_study(aggregation__min_sites=1, runtime__wait_sites_s=0.5), grid)


def test_refit_trains_on_everybody(consortium: Path, small_study: Make) -> None:
    study = small_study(splits__refit=True, training__rounds=1)
    results = run(study, consortium)
    assert [f["fold"] for f in results["folds"]] == [0, -1]
    assert "evaluation" not in results["folds"][1]
    _, about = load_arrays(Path(study.runtime.out) / "model.safetensors")
    assert len(about["genes"]) == 60
    assert about["cancers"] == ["BRCA", "COADREAD", "LUAD"]


@pytest.mark.parametrize(
    "keys",
    [
        {"aggregation__rule": "fedavg"},
        {"training__prox_mu": 0.1},
        {"aggregation__optimizer": "yogi", "aggregation__learning_rate": 0.01},
        {"task__loss": "cox"},
        {"training__optimizer": "sgd", "training__batch_size": 0},
        {"model__dispatch": "dense"},
        {"model__expert_dtype": "bfloat16"},
        {"model__cancer_head": 0.0, "model__gate_sees_cancer": False, "model__shared_expert": False},
        {"model__experts": 0, "model__attention_experts": 0},
        {"model__experts": 1, "model__top_k": 1, "model__attention_experts": 1, "model__attention_top_k": 1},
        {"panel__scale_by": "all", "panel__powers": False},
        {"training__optimizer": "adam", "training__schedule": "cosine"},
        {"task__kind": "classification", "panel__covariates": ["age"]},
        {"analysis__attributions": True, "analysis__experts": False, "analysis__steps": 2},
    ],
)
def test_every_choice_of_the_study_runs(consortium: Path, small_study: Make, keys: dict[str, object]) -> None:
    results = run(small_study(**keys), consortium)
    assert results["left_out"] == []
    assert np.isfinite(results["folds"][0]["curve"][-1]["train_loss"])


def test_the_run_config_may_name_a_study_file(consortium: Path, tmp_path: Path) -> None:
    from oncofed.deploy.engine import run_in_process
    from oncofed.server.app import app as server_app

    file = tmp_path / "study.toml"
    file.write_text('name = "from-file"\n[model]\nsize = "tiny"\n[training]\nrounds = 1\n[splits]\nonly = [0]\n')
    config = Study().run_config() | {"study": str(file), "sites": str(consortium), "runtime.out": str(tmp_path / "out")}
    run_in_process(server_app, client_app, NODES, config)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["study"]["name"] == "from-file"
    assert len(results["folds"][0]["curve"]) == 1
