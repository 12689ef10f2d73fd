"""Whole studies with differential privacy over sites that keep ledgers, as hospitals do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from flwr.app import Message
from oncofed.client.app import app as client_app
from oncofed.client.data.site import SiteFolder, list_sites
from oncofed.client.greeting import known_patients
from oncofed.client.privacy import train
from oncofed.client.privacy.ledger import Ledger
from oncofed.common import wire
from oncofed.common.privacy.accounting import epsilon_of
from oncofed.common.privacy.releases import promise_of
from oncofed.common.saved import SavedModel
from oncofed.common.study import Study
from oncofed.deploy.engine import InProcessGrid
from oncofed.deploy.public_start import fit_start
from oncofed.deploy.simulate import simulate
from oncofed.server.app import run_study
from oncofed.server.checkpoint import load_arrays
from oncofed.server.roster import NotEnoughSites

Make = Callable[..., Study]
PRIVATE: dict[str, Any] = {
    "privacy__unit": "patient",
    "panel__scale_by": "patient",
    "task__time_edges": (0, 12, 24, 60),
    "training__local_steps": 2,
}


class Hospitals:
    """Copies of the consortium's sites, each with a work folder of its own and the default policy or another."""

    def __init__(self, consortium: Path, root: Path, policy: str = "") -> None:
        shutil.copytree(consortium, root / "sites", ignore=shutil.ignore_patterns(".oncofed"))
        self.folders = list_sites(root / "sites")
        self.works = [root / "work" / f.name for f in self.folders]
        self.messages: list[tuple[str, int, str]] = []
        self.kept: list[Message] = []
        for folder in self.folders if policy else []:
            (folder / "policy.toml").write_text(policy)

    def grid(self, fault: Callable[[Message], str | None] | None = None) -> InProcessGrid:
        nodes: list[Any] = [
            {"site-dir": str(f), "work-dir": str(w)} for f, w in zip(self.folders, self.works, strict=True)
        ]

        def listen(message: Message) -> str | None:
            ask = wire.read_config(message.content, "ask")
            self.messages.append(
                (message.metadata.message_type, message.metadata.dst_node_id - 1000, str(ask.get("round", "")))
            )
            return fault(message) if fault else None

        return InProcessGrid(client_app, nodes, {}, fault=listen)

    def run(self, study: Study, fault: Callable[[Message], str | None] | None = None) -> dict[str, Any]:
        return run_study(study, self.grid(fault))

    def ledger(self, i: int = 0) -> Ledger:
        return Ledger(self.folders[i] / ".oncofed" / "ledger.jsonl", self.folders[i].name, 100.0)

    def log(self, i: int = 0) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.works[i] / "release-log.jsonl").read_text().splitlines()]


@pytest.fixture
def hospitals(consortium: Path, tmp_path: Path) -> Hospitals:
    return Hospitals(consortium, tmp_path / "hospitals")


def weights(study: Study) -> dict[str, bytes]:
    arrays, _ = load_arrays(Path(study.runtime.out) / "model-fold-0.safetensors")
    return {k: v.tobytes() for k, v in arrays.items() if k.startswith("weights/")}


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"privacy__evidence": "noised", "training__rounds": 3, "privacy__evidence_every": 2},
        {"privacy__statistics": "noised", "task__loss": "weibull"},
        {"privacy__sample_rate": 0.5, "task__loss": "discrete_time"},
        {"model__name": "t_gem", "model__heads": 2},
        {"task__kind": "classification", "task__class_prior": "none", "task__time_edges": ()},
        {"evaluation__epsilon": 1.0},
        {"splits__refit": True, "training__rounds": 1},
    ],
    ids=lambda k: ", ".join(k) or "plain",
)
def test_the_ledger_of_a_hospital_comes_to_what_the_study_promised(
    hospitals: Hospitals, small_study: Make, keys: dict[str, Any]
) -> None:
    study = small_study(**(PRIVATE | keys))
    results = hospitals.run(study)
    assert results["left_out"] == []
    promise = promise_of(study)
    for i in range(4):
        ledger = hospitals.ledger(i)
        ledger.verify()
        (statement,) = ledger.studies()
        assert statement.unsettled == 0
        assert statement.epsilon == pytest.approx(promise.epsilon, rel=1e-3)  # every round was answered
        assert statement.epsilon <= study.privacy.epsilon
    curve = results["folds"][0]["curve"]
    assert all("train_loss" not in point for point in curve)
    assert not any("test_loss" in point for point in curve)


def test_nothing_leaves_without_noise(hospitals: Hospitals, small_study: Make) -> None:
    """By the hospital's own log: greetings, the panel's arrival, noisy rounds; no loss, no count of patients, no time."""
    study = small_study(**PRIVATE)
    replies: list[Message] = []
    grid = hospitals.grid()
    ask = grid.pull_messages

    def pull(ids: Any) -> Any:
        got = list(ask(ids))
        replies.extend(got)
        return got

    grid.pull_messages = pull  # type: ignore[method-assign]
    run_study(study, grid)
    assert replies
    names = [SiteFolder.open(f).name for f in hospitals.folders]
    for reply in replies:
        told = wire.read_config(reply.content, "from")
        assert not {"loss", "missing_genes"} & set(told)
        assert told.get("seconds", 0.0) == 0.0
        if "patients" in told:  # one number a site, whatever part of its patients a study sees
            known = known_patients(
                SiteFolder.open(hospitals.folders[names.index(str(told["site"]))]), hospitals.works[0]
            )
            assert known % 10 == 0
            assert told["patients"] == round(0.8 * known)
    kinds = {line["kind"] for line in hospitals.log()}
    assert kinds == {wire.HELLO, wire.STATISTICS, wire.TRAIN, wire.EVALUATE}
    summed = [line for line in hospitals.log() if line["arrays"]]
    assert {line["kind"] for line in summed} == {wire.TRAIN}
    assert (hospitals.works[0] / "predictions" / study.name / "fold-0.csv").exists()  # the hospital's own


def test_noise_is_other_noise_every_time(consortium: Path, tmp_path: Path, small_study: Make) -> None:
    """Same study, same seed, same sites: the weights differ; what has no noise is the same."""
    runs = []
    for i in range(2):
        study = small_study(**PRIVATE, runtime__out=str(tmp_path / f"out-{i}"))
        simulate(study, consortium)
        runs.append(SavedModel.read(tmp_path / f"out-{i}" / "model-fold-0.safetensors"))
    a, b = (r.weights["encoder.shared.weight"] for r in runs)
    assert not np.array_equal(a, b)
    spread = float((a - b).std())
    promise = promise_of(small_study(**PRIVATE))
    # four sites' own noise, two steps, two rounds, at the rate of the study
    patients = 90 * 4 / 4  # about what a site's share comes to; only the order is held
    expected = promise.deviation * 0.002 / patients * np.sqrt(2 * 4 / 4) * np.sqrt(1 / 4)
    assert 0.1 * expected < spread < 10 * expected


def test_a_study_over_the_hospitals_budget_is_refused_before_data_are_touched(
    consortium: Path, tmp_path: Path, small_study: Make
) -> None:
    hospitals = Hospitals(consortium, tmp_path / "h", "epsilon_budget = 2.0\n")
    with pytest.raises(NotEnoughSites, match=r"budget of 2 .*epsilon_budget in policy\.toml"):
        hospitals.run(small_study(**PRIVATE))
    assert all(hospitals.ledger(i).spent() <= 2.0 for i in range(4))
    (asked,) = {line["refusal"] for line in hospitals.log() if "budget" in line.get("refusal", "")}
    assert "Ask for a smaller epsilon" in asked


def test_the_coordinator_cannot_raise_the_budget_or_take_less_noise(hospitals: Hospitals, small_study: Make) -> None:
    """A message whose scale of noise comes to more than the study in it promises, or a study that promises a thousand."""
    study = small_study(**PRIVATE)
    scale = promise_of(study).scale

    def less_noise(message: Message) -> None:
        if message.metadata.message_type == wire.TRAIN:
            message.content.config_records["ask"]["noise_scale"] = scale / 10
        return None

    with pytest.raises(NotEnoughSites, match="the study promises 8 at delta 1e-05"):
        hospitals.run(study, less_noise)
    assert hospitals.ledger().spent() == 0.0
    with pytest.raises(NotEnoughSites, match="budget of 8"):
        hospitals.run(small_study(**PRIVATE, privacy__epsilon=1000.0))
    assert hospitals.ledger().spent() == 0.0


def test_a_study_without_privacy_cannot_follow_under_the_same_promise(hospitals: Hospitals, small_study: Make) -> None:
    """What a private study must not ask is refused at the site, whatever the coordinator's own code lets through."""
    study = small_study(**PRIVATE)
    hospitals.run(study)
    model = SavedModel.read(Path(study.runtime.out) / "model-fold-0.safetensors")
    from oncofed.common.blocks import under
    from oncofed.server.inquiry import greeting

    base = {
        **greeting(study),
        "fold": 0,
        "round": 2,
        "phase": "train",
        "panel_hash": model.panel.hash,
        "cancers": list(model.cancers),
        "grid": list(model.grid.starts),
        "noise_scale": promise_of(study).scale,
    }
    arrays = under("weights/", model.weights) | {
        "covariate_mean": np.zeros(0),
        "covariate_sd": np.zeros(0),
        **model.scales["rna"].arrays(),
    }
    for kind, more in (
        (wire.EXPLAIN, {}),
        (wire.EVALUATE, {}),
        (wire.EVALUATE, {"final": True}),
        (wire.EVALUATE, {"table": True}),
    ):
        (reply,) = hospitals.grid().send_and_receive([Message(wire.request({**base, **more}, arrays), 1000, kind)])
        told = wire.read_config(reply.content, "from")
        assert "promises privacy.unit = 'patient'" in str(told.get("refusal", "")), (kind, more)
        assert "arrays" not in reply.content.array_records


def test_a_round_that_is_asked_again_gets_the_same_answer_and_costs_nothing(
    hospitals: Hospitals, small_study: Make
) -> None:
    """The server is killed after round 2 was answered and before it was saved, and resumes."""
    study = small_study(**PRIVATE, training__rounds=3)

    class Killed(Exception):
        pass

    def kill(message: Message) -> None:
        ask = wire.read_config(message.content, "ask")
        if message.metadata.message_type == wire.TRAIN and ask["round"] == 3:
            raise Killed
        return None

    with pytest.raises(Killed):
        hospitals.run(study, kill)
    checkpoint = Path(study.runtime.out) / "checkpoints" / "fold-0-train" / "round-0002.safetensors"
    spent = hospitals.ledger().spent()
    stored = checkpoint.read_bytes()
    hospitals.run(study.changed(runtime__resume=True))
    once = weights(study)
    # again from the same checkpoint: round 3 has been answered, and is answered alike
    checkpoint.write_bytes(stored)
    for later in range(3, study.training.rounds + 1):
        checkpoint.with_name(f"round-{later:04d}.safetensors").unlink()
    before = hospitals.ledger().spent()
    hospitals.run(study.changed(runtime__resume=True))
    assert weights(study) == once
    assert hospitals.ledger().spent() == before > spent
    assert before <= study.privacy.epsilon
    assert any(line["kind"].endswith("again") for line in hospitals.log())


def test_another_question_under_the_same_round_is_refused(hospitals: Hospitals, small_study: Make) -> None:
    """Weights of the coordinator's choice in a round that was answered: it would be a second release."""
    study = small_study(**PRIVATE)
    hospitals.run(study)
    spent = hospitals.ledger().spent()

    def other(message: Message) -> None:
        if message.metadata.message_type == wire.TRAIN:
            message.content.config_records["ask"]["probe"] = 1
        return None

    with pytest.raises(NotEnoughSites, match="is in its ledger already"):
        hospitals.run(study, other)
    assert hospitals.ledger().spent() == spent


def test_one_more_patient_moves_nobody_else_between_training_and_test(consortium: Path, small_study: Make) -> None:
    from oncofed.common.splits import deal_alone, deal_folds

    names = np.array([f"P{i}" for i in range(60)])
    cancer, event = np.array(["A", "B"] * 30), np.arange(60) % 2
    whole = deal_alone(names, folds=5, seed=0)
    dealt = deal_folds(names, cancer, event, folds=5, seed=0, site="s")
    moved = []
    for i in range(60):
        rest = np.arange(60) != i
        np.testing.assert_array_equal(whole[rest], deal_alone(names[rest], folds=5, seed=0))
        again = deal_folds(names[rest], cancer[rest], event[rest], folds=5, seed=0, site="s")
        moved.append(bool((dealt[rest] != again).any()))
    assert any(moved)  # what a stratified deal would do
    assert np.bincount(whole, minlength=5).min() >= 4


def test_hospital_level_privacy_covers_the_total_and_tells_nothing_of_a_site(
    hospitals: Hospitals, small_study: Make
) -> None:
    study = small_study(
        **(
            PRIVATE
            | {"privacy__unit": "hospital", "task__loss": "cox", "training__batch_size": 0, "privacy__clip": 0.01}
        )
    )
    changes: list[dict[str, np.ndarray]] = []
    grid = hospitals.grid()
    ask = grid.pull_messages

    def pull(ids: Any) -> Any:
        got = list(ask(ids))
        changes.extend(
            wire.read_arrays(m.content) for m in got if m.metadata.message_type == wire.TRAIN and not m.has_error()
        )
        return got

    grid.pull_messages = pull  # type: ignore[method-assign]
    results = run_study(study, grid)
    assert len(changes) == 8
    for one in changes:
        assert (one["evidence"] == 1.0).all()
        norm = np.sqrt(sum(float(np.square(v, dtype=np.float64).sum()) for k, v in one.items() if k != "evidence"))
        assert 0 < norm <= 0.01
    assert hospitals.ledger().studies() == []  # the noise is the server's: no hospital pays
    assert results["folds"][0]["curve"][0]["evidence"]["trunk"] == 4.0
    first, _ = load_arrays(Path(study.runtime.out) / "checkpoints" / "fold-0-train" / "round-0002.safetensors")
    moved = first["weights/encoder.shared.weight"].astype(np.float64)
    assert moved.std() == pytest.approx(promise_of(study).deviation * 0.01 / 4 * np.sqrt(2), rel=0.2)


# -- starting from a public model --------------------------------------------------------------------------------------


@pytest.fixture
def start(consortium: Path, tmp_path: Path) -> tuple[Path, Study]:
    model, file = fit_start(consortium, tmp_path / "start", features=16, epsilon=8.0)
    return model, Study.from_toml(
        file, {"runtime.out": str(tmp_path / "out"), "runtime.threads": 1, "training.rounds": 3}
    )


def test_a_private_study_starts_where_the_public_model_stands(
    start: tuple[Path, Study], consortium: Path, tmp_path: Path
) -> None:
    model, study = start
    hospitals = Hospitals(consortium, tmp_path / "h")
    results = hospitals.run(study)
    assert results["left_out"] == []
    saved, public = SavedModel.read(Path(study.runtime.out) / "model-fold-0.safetensors"), SavedModel.read(model)
    assert saved.panel.lines == public.panel.lines
    for name, value in public.weights.items():
        moved = not np.array_equal(saved.weights[name], value)
        assert moved == (name in ("head.shared", "head.own")), name
    assert saved.grid == public.grid
    trained = [line for line in hospitals.log() if line["kind"] == wire.TRAIN]
    assert set(trained[0]["arrays"]) == {"evidence", "head.shared", "head.own"}  # the encoder does not travel back
    assert hospitals.ledger().spent() <= 8.0


def test_the_public_model_predicts_the_public_patients(start: tuple[Path, Study], consortium: Path) -> None:
    """Its encoder is linear in ranks, and its heads know the outcome: far better than chance where it was fitted."""
    from oncofed.client.predict import predict
    from oncofed.common.metrics import concordance_index

    values = []
    for folder in list_sites(consortium):
        p = predict(start[0], folder)
        clinical = next(folder.glob("clinical.*"))
        table = (pd.read_csv(clinical) if clinical.suffix == ".csv" else pd.read_parquet(clinical)).set_index("patient")
        rows = table.loc[p.cohort.patient]
        time, event = rows["time"].to_numpy(dtype=float), rows["event"].to_numpy(dtype=float)
        for c in np.unique(p.cohort.cancer):
            of = p.cohort.cancer == c
            values.append(concordance_index(p.score[of], time[of], event[of]))
    assert np.nanmean(values) > 0.62


def test_pull_and_mean_of_the_last_rounds(start: tuple[Path, Study], consortium: Path, tmp_path: Path) -> None:
    """Full pull leaves the start; a mean of the last rounds survives a restart."""
    model, study = start
    held = study.changed(aggregation__pull=0.999999, name="held", runtime__out=str(tmp_path / "held"))
    simulate(held, consortium)
    a = SavedModel.read(tmp_path / "held" / "model-fold-0.safetensors").weights
    b = SavedModel.read(model).weights
    np.testing.assert_allclose(a["head.shared"], b["head.shared"], atol=1e-4)
    plain = study.changed(
        privacy__unit="none",
        training__rounds=4,
        aggregation__average_last=2,
        runtime__out=str(tmp_path / "plain"),
        training__batch_size=0,
    )
    simulate(plain, consortium)
    whole = weights(plain)
    broken = plain.changed(runtime__out=str(tmp_path / "broken"))

    def kill(message: Message) -> None:
        if wire.read_config(message.content, "ask").get("round") == 4:
            raise KeyboardInterrupt
        return None

    hospitals = Hospitals(consortium, tmp_path / "again")
    with pytest.raises(KeyboardInterrupt):
        hospitals.run(broken, kill)
    hospitals.run(broken.changed(runtime__resume=True))
    assert weights(broken) == whole


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"panel__covariates": ("age",)}, r"panel\.covariates"),
        ({"model__width": 12}, r"does not fit the study's .*take over its \[model\] table"),
        ({"cancers": ("BRCA",)}, "cancers"),
        ({"training__start": "nowhere.safetensors"}, "not a model that a study has saved"),
    ],
)
def test_a_start_that_does_not_fit_is_refused(
    start: tuple[Path, Study], consortium: Path, keys: dict[str, Any], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        simulate(start[1].changed(**keys), consortium)


def test_a_noised_evidence_withholds_few_and_stays_within_the_rounded_count(
    consortium: Path, tmp_path: Path, small_study: Make
) -> None:
    # so little noise that a count is off by less than a patient: what is asked here does not hang on what is drawn
    keys = {"privacy__evidence": "noised", "privacy__epsilon": 500.0, "privacy__evidence_share": 0.45}
    drawn = []
    for again in ("first", "second"):
        hospitals = Hospitals(consortium, tmp_path / again, "epsilon_budget = 1000.0")
        results = hospitals.run(small_study(**PRIVATE, **keys, training__rounds=2))
        blocks = results["folds"][0]["blocks"]
        # the second round uses the first one's counts
        drawn.append({s: np.array(e) / 2 for s, e in results["folds"][0]["site_evidence"].items()})
    at = [b.startswith("expert/") for b in blocks]
    for site, one_round in drawn[0].items():
        trunk, experts = one_round[blocks.index("trunk")], one_round[at]
        assert trunk == trunk.round()
        assert (experts <= trunk).all()
        assert ((experts == 0) | (experts >= 10)).all()
        # a patient's shares add up to one, and each expert that is withheld has fewer than ten: a fold's patients lie between
        assert 0.7 * trunk < experts.sum() + 11 * (experts == 0).sum()
        assert experts.sum() < trunk + 10
        other = drawn[1][site][at]
        told = (experts > 0) & (other > 0) & (experts < trunk) & (other < trunk)
        assert (experts[told] != other[told]).all()  # noise
        assert np.abs(experts[told] - other[told]).max(initial=0.0) < 10
    assert any((one_round[at] > 0).any() for one_round in drawn[0].values())


def test_epsilon_of_what_a_ledger_holds_is_that_of_the_mechanisms(hospitals: Hospitals, small_study: Make) -> None:
    study = small_study(**PRIVATE)
    hospitals.run(study)
    (statement,) = hospitals.ledger().studies()
    parts = [m for ms in statement.mechanisms.values() for m in ms]
    assert epsilon_of(parts, 1e-5) == pytest.approx(statement.epsilon)


# -- several modalities ------------------------------------------------------------------------------------------------


@pytest.fixture
def fused(consortium: Path, tmp_path: Path, small_study: Make) -> tuple[Hospitals, Study]:
    """Hospitals, one with images of nine patients alone, and a private study that starts from a model of both modalities."""
    public = small_study(
        model__name="path_gptomic", fusion__modulation="none", splits__refit=True, runtime__out=str(tmp_path / "public")
    )
    simulate(public, consortium)
    hospitals = Hospitals(consortium, tmp_path / "hospitals")
    first = hospitals.folders[0]
    images = next(first.glob("pathology.*"))
    table = pd.read_parquet(images) if images.suffix == ".parquet" else pd.read_csv(images, index_col=0)
    few = table.iloc[:9]
    few.to_parquet(images) if images.suffix == ".parquet" else few.to_csv(images)
    private = public.changed(
        privacy__unit="patient",
        training__start=str(tmp_path / "public" / "model.safetensors"),
        runtime__out=str(tmp_path / "private"),
        splits__refit=False,
    )
    return hospitals, private


def test_few_patients_with_a_modality_count_as_they_do_anywhere(
    fused: tuple[Hospitals, Study], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bound on their number would switch the modality off for all of them when one leaves: many clips, unpaid."""
    hospitals, study = fused
    seen: list[int] = []
    real = train.train_privately

    def listen(model: Any, weights: Any, batch: Any, *rest: Any, **keys: Any) -> Any:
        seen.append(int(batch.has["pathology"].sum()))
        return real(model, weights, batch, *rest, **keys)

    monkeypatch.setattr(train, "train_privately", listen)
    results = hospitals.run(study)
    assert results["left_out"] == []
    assert 0 < seen[0] < 10  # Aachen's nine, less those who are held out
    blocks = results["folds"][0]["blocks"]
    evidence = {site: np.array(v) for site, v in results["folds"][0]["site_evidence"].items()}
    images = blocks.index("pathology")
    assert evidence["Aachen"][images] == evidence["Aachen"][blocks.index("rna")]  # by the file that is there
    assert evidence["Coimbra"][images] == 0  # which has no file of images


def test_a_site_may_declare_the_cancer_types_that_it_treats(hospitals: Hospitals, small_study: Make) -> None:
    """Then one patient of a rare type neither shows in the greeting nor in what stands behind the type's rows."""
    file = hospitals.folders[1] / "site.toml"
    file.write_text('cancer_types = ["BRCA", "LUAD"]\n' + file.read_text())
    study = small_study(**PRIVATE)
    results = hospitals.run(study)
    blocks = results["folds"][0]["blocks"]
    mine = np.array(results["folds"][0]["site_evidence"]["Bergen"])
    behind = {b: mine[blocks.index(b)] for b in blocks if b.startswith("cancer/")}
    assert {b for b, n in behind.items() if n} == {"cancer/BRCA", "cancer/LUAD"}


# -- a coordinator who asks cleverly -----------------------------------------------------------------------------------


def question(study: Study, model: SavedModel, **more: Any) -> dict[str, Any]:
    from oncofed.server.inquiry import greeting

    return {
        **greeting(study),
        "fold": 0,
        "round": 1,
        "phase": "train",
        "panel_hash": model.panel.hash,
        "cancers": list(model.cancers),
        "grid": list(model.grid.starts),
        "noise_scale": promise_of(study).scale,
        **more,
    }


def arrays_of(model: SavedModel) -> dict[str, np.ndarray]:
    from oncofed.common.blocks import under

    load = {"load/expert": np.full(4, 0.25), "load/attention": np.full(3, 1 / 3)}
    return {
        **under("weights/", model.weights),
        **load,
        "covariate_mean": np.zeros(0),
        "covariate_sd": np.zeros(0),
        **model.scales["rna"].arrays(),
    }


@pytest.fixture
def trained(hospitals: Hospitals, small_study: Make) -> tuple[Hospitals, Study, SavedModel]:
    study = small_study(**PRIVATE, privacy__epsilon=4.0)
    hospitals.run(study)
    return hospitals, study, SavedModel.read(Path(study.runtime.out) / "model-fold-0.safetensors")


def told(
    hospitals: Hospitals, kind: str, ask: dict[str, Any], arrays: dict[str, np.ndarray]
) -> tuple[dict[str, Any], Any]:
    (reply,) = hospitals.grid().send_and_receive([Message(wire.request(ask, arrays), 1000, kind)])
    return wire.read_config(reply.content, "from"), wire.read_arrays(reply.content)


def test_a_site_answers_alike_whoever_is_in_the_part_that_is_asked_for(
    trained: tuple[Hospitals, Study, SavedModel],
) -> None:
    """Cancer types, folds and seeds are the coordinator's: counts and refusals by part would tell who is in it."""
    hospitals, study, model = trained
    counts = set()
    for i, (cancers, seed) in enumerate([(["BRCA"], 1), (["UVM"], 2), (["BRCA", "LUAD"], 3), (list(model.cancers), 4)]):
        part = study.changed(seed=seed, privacy__epsilon=0.01, name=f"part-{i}")
        by_cancer = ("gate.cancer", "head.own", "head.log_baseline")
        few = {n: v[: len(cancers)] if n.endswith(by_cancer) else v for n, v in arrays_of(model).items()}
        ask = question(part, model, cancers=cancers)
        config, arrays = told(hospitals, wire.TRAIN, ask, few)
        assert "refusal" not in config, config
        assert np.abs(arrays["encoder.shared.weight"]).sum() > 0  # noise, of nobody as of many
        counts.add(config["patients"])
    assert len(counts) == 1


def test_a_patient_whose_risk_is_no_number_does_not_show(
    trained: tuple[Hospitals, Study, SavedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that make the risk infinite for some patients alone would turn a failed answer into a question about them."""
    hospitals, study, model = trained
    asked = study.changed(evaluation__epsilon=0.5, privacy__epsilon=1.0, name="asked")
    weights = arrays_of(model)
    weights["weights/head.shared"] = np.full_like(
        weights["weights/head.shared"], 3e38
    )  # finite, or the door refuses it
    edges = {
        "evaluation/risk_edges": np.tile(np.linspace(-2, 2, 7), (len(model.cancers), 1)),
        "evaluation/time_edges": np.array([12.0, 24.0]),
    }
    config, arrays = told(hospitals, wire.EVALUATE, question(asked, model, table=True, round=0), weights | edges)
    assert "refusal" not in config, config
    assert set(arrays) == {"table", "pairs"}


def test_what_goes_wrong_after_the_payment_is_told_in_one_sentence(
    trained: tuple[Hospitals, Study, SavedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    hospitals, study, model = trained

    def fail(*args: Any, **keys: Any) -> None:
        raise ValueError("patient P7 is odd")

    monkeypatch.setattr(train, "train_privately", fail)
    again = study.changed(name="again", privacy__epsilon=0.5)
    config, _ = told(hospitals, wire.TRAIN, question(again, model), arrays_of(model))
    assert str(config["refusal"]).endswith("no answer to 'train'; its engineer finds the reason in the site's own log")
    assert any(s.unsettled == 1 for s in hospitals.ledger().studies())  # and counts in full


def test_two_nodes_of_one_site_have_one_budget(trained: tuple[Hospitals, Study, SavedModel], tmp_path: Path) -> None:
    hospitals, study, _ = trained
    hospitals.works = [tmp_path / "another" / f.name for f in hospitals.folders]
    with pytest.raises(NotEnoughSites, match="budget of 8"):
        hospitals.run(study.changed(name="another", privacy__epsilon=7.9))


def test_evidence_of_another_study_of_the_same_name_is_not_taken(hospitals: Hospitals, small_study: Make) -> None:
    keys = PRIVATE | {"privacy__evidence": "noised", "privacy__epsilon": 2.0, "training__rounds": 2}
    hospitals.run(small_study(**keys))
    hospitals.run(small_study(**keys, model__experts=3))
    files = list((hospitals.works[0] / "evidence").glob("*.npy"))
    assert len(files) == 2
    assert len({len(np.load(f)) for f in files}) == 2


def test_shares_of_experts_that_are_no_numbers_count_nothing() -> None:
    import torch
    from oncofed.client.privacy.evidence import _bounded

    share = torch.tensor([[float("nan"), 1.0], [float("inf"), -1.0], [0.25, 0.75], [3.0, 3.0]])
    cut = _bounded(share)
    assert torch.isfinite(cut).all()
    assert (cut >= 0).all()
    assert (cut.sum(1) <= 1 + 1e-6).all()
    torch.testing.assert_close(cut[2], share[2])


def test_one_patients_cell_does_not_change_what_the_others_say() -> None:
    from oncofed.client.data.cohort import encode_covariates

    rows = pd.DataFrame({"stage": [1.0, 2.0, np.nan, 3.0]})
    odd = pd.DataFrame({"stage": [1.0, 2.0, np.nan, 3.0, 2.5]})
    a, b = (encode_covariates(r, ("stage=1|2|3",), "s") for r in (rows, odd))
    np.testing.assert_array_equal(a, b[:4])
    assert np.isfinite(a[[0, 1, 3]]).all()
    assert np.isnan(b[4]).all()
