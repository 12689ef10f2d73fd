"""A coordinator that asks for too much, and a site that answers what it should not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from oncofed.client.app import app as client_app
from oncofed.client.data.cohort import cohort_key, open_cohort
from oncofed.client.data.site import SiteFolder
from oncofed.common import wire
from oncofed.common.panel import GenePanel
from oncofed.common.scaling import Scaling
from oncofed.common.study import Study
from oncofed.deploy.comparison.compare import common_patients, difference
from oncofed.deploy.engine import InProcessGrid
from oncofed.deploy.sites.synth import SynthSettings, write_consortium
from oncofed.server.app import run_study
from oncofed.server.checkpoint import load_arrays
from oncofed.server.inquiry import greeting
from oncofed.server.roster import NotEnoughSites

NODES = [{"partition-id": i, "num-partitions": 4} for i in range(4)]
Make = Callable[..., Study]


def ask(consortium: Path, study: Study, kind: str = wire.STATISTICS, **config: Any) -> str:
    """Ask one site directly, as a coordinator with its own code would; returns the refusal, or '' when it answers."""
    grid = InProcessGrid(client_app, NODES[:1], {"sites": str(consortium)})
    panel = GenePanel(("GENE0000", "GENE0001"))
    base = {"fold": 0, "round": 0, "panel_hash": panel.hash, "genes": list(panel.genes), "cancers": ["BRCA", "LUAD"]}
    message = Message(wire.request({**greeting(study), **base, **config}), 1000, kind)
    (reply,) = grid.send_and_receive([message])
    assert not reply.has_error()
    return str(wire.read_config(reply.content, "from").get("refusal", ""))


def test_the_honest_question_is_answered(consortium: Path, small_study: Make) -> None:
    assert ask(consortium, small_study()) == ""


@pytest.mark.parametrize(
    ("keys", "config", "words"),
    [
        ({"training__batch_size": 1, "training__local_steps": 1}, {}, "rests on 1 patients"),
        ({"splits__folds": 1000}, {}, "wants 1000 folds"),
        ({"training__local_steps": 10**6}, {}, "wants 1000000 local steps"),
        ({"pretraining__rounds": 600, "training__rounds": 600}, {}, "wants 1200 rounds"),
        ({"pretraining__rounds": 1, "pretraining__local_steps": 10**6}, {}, "wants 1000000 local steps"),
        (
            {"pretraining__rounds": 1, "pretraining__local_steps": 3, "pretraining__batch_size": 3},
            {},
            "rests on 9 patients",
        ),
        ({}, {"fold": 77}, "fold 77, phase 'train', round 0 is not part of the study"),
        ({}, {"fold": -1}, "fold -1, phase 'train', round 0 is not part"),
        ({}, {"phase": "pretrain"}, "phase 'pretrain', round 0 is not part"),
        ({"pretraining__rounds": 1}, {"phase": "pretrain", "round": 2}, "phase 'pretrain', round 2 is not part"),
        ({}, {"round": 999999}, "round 999999 is not part"),
        ({}, {"panel_hash": "../../../../etc/passwd"}, "is no panel hash"),
        ({}, {"panel_hash": "0123456789abcdef"}, "the panel in the message has hash"),
        ({}, {"study_json": "{}x"}, "not valid here"),
        ({}, {"study_json": '{"name": "../../x"}'}, "not valid here"),
    ],
)
def test_a_site_refuses_what_would_single_out_patients_or_leave_its_folder(
    consortium: Path, small_study: Make, keys: dict[str, Any], config: dict[str, Any], words: str
) -> None:
    assert words in ask(consortium, small_study(**keys), **config)


@pytest.mark.parametrize("question", ["moments", "powers"])
def test_a_site_keeps_the_expression_of_cancers_with_few_patients_to_itself(
    consortium: Path, small_study: Make, question: str
) -> None:
    """A sum over one patient is the patient: cells of fewer than 10 (of powers: 15) training patients leave as zeros."""
    study, panel, cancers = small_study(), GenePanel(("GENE0000", "GENE0001")), ("BRCA", "COADREAD", "LUAD")
    seen = set()
    for i, folder in enumerate(sorted(p for p in consortium.iterdir() if p.is_dir())):
        site = SiteFolder.open(folder)
        key = cohort_key(site, study, panel, cancers)
        cohort = open_cohort(key, site, folder / ".oncofed", panel)
        count = np.bincount(cohort.cancer[cohort.fold != 0], minlength=3)
        one = np.ones((3, 2))
        config = {"fold": 0, "round": 0, "panel_hash": panel.hash, "genes": list(panel.genes), "cancers": list(cancers)}
        arrays = None
        if question == "powers":
            config, arrays = config | {"powers": True}, Scaling(one * 7, one * 2, one, one * 0, one).arrays()
        grid = InProcessGrid(client_app, [NODES[i]], {"sites": str(consortium)})
        content = wire.request({**greeting(study), **config}, arrays)
        (reply,) = grid.send_and_receive([Message(content, 1000, wire.STATISTICS)])
        sums = wire.read_arrays(reply.content)
        few = count < (10 if question == "moments" else 15)
        for name in ("n", "sum") if question == "moments" else ("n", "power_sum"):
            assert (sums[name][few] == 0).all(), name
            assert (sums[name][~few] != 0).all(), name
        seen |= set(few.tolist())
    assert seen == {True, False}  # there are both kinds of cells


def test_a_clinical_table_without_header_does_not_leave_in_the_refusal(tmp_path: Path, small_study: Make) -> None:
    folders = write_consortium(
        tmp_path / "sites", SynthSettings(sites=2, patients=120, genes=60, cancers=3, genes_per_program=8)
    )
    table = pd.read_csv(folders[0] / "clinical.csv")
    table.to_csv(folders[0] / "clinical.csv", index=False, header=False)
    reason = ask(tmp_path / "sites", small_study(), wire.HELLO)
    assert "lacks columns" in reason
    assert str(table.patient[0]) not in reason
    assert str(table.time[0]) not in reason
    log = (folders[0] / ".oncofed" / "release-log.jsonl").read_text()
    assert "lacks columns" in log  # what left is written down, refusals too


def answering(change: Callable[[str, RecordDict], None]) -> ClientApp:
    app = ClientApp()

    def wrap(message: Message, context: Context) -> Message:
        reply = client_app(message, context)
        if context.node_config["partition-id"] == 1:
            change(message.metadata.message_type, reply.content)
        return reply

    app.query("hello")(wrap)
    app.query("statistics")(wrap)
    app.query("explain")(wrap)
    app.train()(wrap)
    app.evaluate()(wrap)
    return app


def in_training(change: Callable[[RecordDict], None]) -> Callable[[str, RecordDict], None]:
    return lambda kind, content: change(content) if kind == wire.TRAIN else None


def no_loss(content: RecordDict) -> None:
    del content["from"]["loss"]


def nan_loss(content: RecordDict) -> None:
    content["from"]["loss"] = float("nan")


def text_seconds(content: RecordDict) -> None:
    content["from"]["seconds"] = "x"


def smallest_integers(content: RecordDict) -> None:
    content["arrays"] = wire.pack_arrays({k: np.full(v.shape, -(2**63)) for k, v in wire.read_arrays(content).items()})


def other_name(content: RecordDict) -> None:
    content["from"]["site"] = "Aachen"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (no_loss, "the answer's loss is None"),
        (nan_loss, "the answer's loss is nan"),
        (text_seconds, "the answer's seconds is 'x'"),
        (smallest_integers, "has dtype int64"),
        (other_name, "answers in the name of 'Aachen'"),
    ],
)
def test_a_bad_answer_costs_its_site_the_round_and_nobody_else(
    consortium: Path, small_study: Make, change: Callable[[RecordDict], None], words: str
) -> None:
    app = answering(in_training(change))
    results = run_study(small_study(), InProcessGrid(app, NODES, {"sites": str(consortium)}))
    assert [p["sites"] for p in results["folds"][0]["curve"]] == [3, 3]
    assert {x["site"] for x in results["left_out"]} == {"Bergen"}
    assert all(words in x["reason"] for x in results["left_out"])


def test_a_greeting_without_genes_keeps_its_site_out(consortium: Path, small_study: Make) -> None:
    def change(kind: str, content: RecordDict) -> None:
        if kind == wire.HELLO:
            del content["from"]["genes"]

    results = run_study(small_study(), InProcessGrid(answering(change), NODES, {"sites": str(consortium)}))
    assert results["sites"] == ["Aachen", "Coimbra", "Dublin"]
    assert len(results["left_out"]) == 1  # and it is not asked again at every question


def test_a_node_that_never_greets_does_not_hold_up_the_others(consortium: Path, small_study: Make) -> None:
    grid = InProcessGrid(
        client_app,
        NODES,
        {"sites": str(consortium)},
        fault=lambda m: "lost" if m.metadata.dst_node_id == 1001 else None,
    )
    grid.all_present = False  # as a network would: nobody knows who else may come
    results = run_study(small_study(runtime__wait_sites_s=0.6), grid)
    assert results["sites"] == ["Aachen", "Coimbra", "Dublin"]
    assert ["no answer to the greeting" in x["reason"] for x in results["left_out"]] == [True]


def test_resume_keeps_the_scale_that_the_weights_were_learned_on(
    consortium: Path, small_study: Make, monkeypatch: Any
) -> None:
    study = small_study(training__rounds=3, training__evaluate_every=0)

    def stops(m: Message) -> str | None:
        return "error" if m.metadata.group_id == "2" and m.metadata.message_type == "train" else None

    with pytest.raises(NotEnoughSites):
        run_study(study, InProcessGrid(client_app, NODES, {"sites": str(consortium)}, fault=stops))
    checkpoint, _ = load_arrays(Path(study.runtime.out) / "checkpoints" / "fold-0-train" / "round-0001.safetensors")

    def absent(m: Message) -> str | None:
        return "error" if m.metadata.message_type == "query.statistics" and m.metadata.dst_node_id == 1000 else None

    run_study(
        study.changed(runtime__resume=True), InProcessGrid(client_app, NODES, {"sites": str(consortium)}, fault=absent)
    )
    model, _ = load_arrays(Path(study.runtime.out) / "model-fold-0.safetensors")
    for name in ("mean", "sd", "power", "centre", "spread"):
        np.testing.assert_array_equal(model[f"scaling/{name}"], checkpoint[f"frame/scaling/{name}"])


def predictions(site_rows: int = 30) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    n = 4 * site_rows
    return pd.DataFrame(
        {
            "site": np.repeat(["A", "B", "C", "D"], site_rows),
            "patient": np.tile([str(i) for i in range(site_rows)], 4),  # the same numbers at every hospital
            "fold": 0,
            "cancer_type": "BRCA",
            "split": "test",
            "time_months": rng.exponential(size=n),
            "event": rng.integers(0, 2, n),
            "risk": rng.normal(size=n),
        }
    )


def test_a_method_does_not_differ_from_itself_in_another_order() -> None:
    table = predictions()
    gap = difference(table, table.sample(frac=1.0, random_state=3), seed=0)
    assert gap == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_methods_are_cut_to_the_patients_that_all_scored() -> None:
    table = predictions()
    cut = common_patients({"a": table, "b": table[table["site"] != "C"]})
    assert set(cut["a"]["site"]) == set(cut["b"]["site"]) == {"A", "B", "D"}
    with pytest.raises(ValueError, match="30 differ"):
        difference(table, table[table["site"] != "C"], seed=0)


def test_leading_zeros_keep_their_patients(tmp_path: Path) -> None:
    from oncofed.client.data.read import read_clinical, read_expression
    from oncofed.client.data.site import SiteDescription, SiteFolder, write_description

    names = [f"{i:04d}" for i in range(985, 1015)]
    write_description(tmp_path, SiteDescription(name="Zeros", expression_unit="log2"))
    pd.DataFrame({"patient": names, "cancer_type": "BRCA", "time": 5.0, "event": 1}).to_csv(
        tmp_path / "clinical.csv", index=False
    )
    pd.DataFrame(1.0, index=pd.Index(names, name="id"), columns=["A", "B"]).to_csv(tmp_path / "expression.csv")
    site = SiteFolder.open(tmp_path)
    clinical = read_clinical(site)
    assert read_expression(site, pd.Index(clinical["patient"])).index.tolist() == names
