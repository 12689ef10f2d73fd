"""Whole studies whose hospitals share the noise: what the total has, what the ledgers say, and what each hospital refuses."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message
from oncofed.client.data.site import SiteFolder
from oncofed.client.members import Identity
from oncofed.common import wire
from oncofed.common.blocks import EVIDENCE, Sum
from oncofed.common.noise import LEVELS, SecureNoise
from oncofed.common.privacy.releases import promise_of
from oncofed.common.privacy.sharing import UNSHARED
from oncofed.common.rates import rates_of
from oncofed.common.study import Study
from oncofed.deploy.audit.setting import open_setting
from oncofed.deploy.comparison.compare import open_study
from oncofed.deploy.simulate import simulate
from oncofed.server.checkpoint import load_arrays
from oncofed.server.report.render import render
from oncofed.server.roster import NotEnoughSites
from oncofed.server.strategy import EvidenceStrategy
from scipy.stats import chi2
from test_private_study import PRIVATE, Hospitals

Make = Callable[..., Study]
ALLOWED = "shared_noise = true\n"
SHARED: dict[str, Any] = PRIVATE | {
    "training__local_steps": 1,
    "privacy__secure_sum": True,
    "privacy__noise": "shared",
    "privacy__sharing_sites": 4,
}


def members(hospitals: Hospitals) -> Hospitals:
    """Each hospital knows the others, by a roster that they agreed on."""
    pairs = zip(hospitals.folders, hospitals.works, strict=True)
    keys = {SiteFolder.open(f).name: Identity.of(w, SiteFolder.open(f).name).public.hex() for f, w in pairs}
    for folder in hospitals.folders:
        (folder / "members.toml").write_text("".join(f'"{name}" = "{key}"\n' for name, key in keys.items()))
    return hospitals


@pytest.fixture
def hospitals(consortium: Path, tmp_path: Path) -> Hospitals:
    return members(Hospitals(consortium, tmp_path / "hospitals", ALLOWED))


def losing(*sites: int, kind: str = wire.MASKED, round_: int = 1) -> Callable[[Message], str | None]:
    """Nodes that fail at one exchange of a round of training."""
    now = [0]

    def fault(message: Message) -> str | None:
        asked = message.metadata.message_type
        if asked in (wire.TRAIN, wire.STATISTICS, wire.EVALUATE):
            now[0] = int(str(wire.read_config(message.content, "ask")["round"])) if asked == wire.TRAIN else 0
        return "error" if (asked, now[0]) == (kind, round_) and message.metadata.dst_node_id - 1000 in sites else None

    return fault


def weights(study: Study) -> Sum:
    return load_arrays(Path(study.runtime.out) / "model-fold-0.safetensors")[0]


def silent(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(SecureNoise, "normal", lambda self, count: torch.zeros(count, dtype=torch.float64))


@pytest.mark.parametrize(
    "keys",
    [
        {"training__schedule": "cosine", "training__rounds": 3},
        {"privacy__statistics": "noised", "task__loss": "weibull"},
        {"model__name": "t_gem", "model__heads": 2, "aggregation__optimizer": "momentum", "aggregation__tau": 5.0},
    ],
    ids=lambda k: ", ".join(k),
)
def test_but_for_noise_the_model_is_that_of_hospitals_with_their_own(
    consortium: Path, tmp_path: Path, small_study: Make, monkeypatch: pytest.MonkeyPatch, keys: dict[str, Any]
) -> None:
    """The server's step on the total is the step that sites take themselves, rate, decay and scale of the sum included."""
    silent(monkeypatch)
    shared = small_study(**(SHARED | keys), runtime__out=str(tmp_path / "shared"))
    own = shared.changed(**UNSHARED, runtime__out=str(tmp_path / "own"))
    told = [simulate(s, consortium).results for s in (own, shared)]
    assert [r["left_out"] for r in told] == [[], []]
    a, b = (weights(s) for s in (own, shared))
    for name in a:
        np.testing.assert_allclose(b[name], a[name], rtol=1e-5, atol=1e-6, err_msg=name)
    with pytest.MonkeyPatch.context() as patch:  # the test of the test: a step of half the rate is another model
        patch.setattr(
            "oncofed.server.noise.rates_of",
            lambda *a: {n: replace(r, learning_rate=r.learning_rate / 2) for n, r in rates_of(*a).items()},
        )
        simulate(shared.changed(runtime__out=str(tmp_path / "half")), consortium)
    half = load_arrays(tmp_path / "half" / "model-fold-0.safetensors")[0]
    assert max(float(np.abs(half[n] - a[n]).max(initial=0.0)) for n in a if n.startswith("weights/")) > 1e-4


def totals(hospitals: Hospitals, study: Study, fault: Any = None) -> list[Sum]:
    """What the server sees of each round of a study."""
    seen: list[Sum] = []
    with pytest.MonkeyPatch.context() as patch:
        take = EvidenceStrategy.take_total

        def listen(self: EvidenceStrategy, summed: Any, round_: int) -> Any:
            seen.append(dict(summed.total))
            return take(self, summed, round_)

        patch.setattr(EvidenceStrategy, "take_total", listen)
        hospitals.run(study, fault)
    return seen


@pytest.mark.parametrize("lost", [(), (1,)])
def test_the_total_of_a_round_has_the_noise_that_the_study_promised(
    consortium: Path, tmp_path: Path, small_study: Make, lost: tuple[int, ...]
) -> None:
    """Against the same round without noise; of four, with one missing and one who colludes, two shares are the promise."""
    study = small_study(**SHARED, privacy__silent_sites=1, training__rounds=1, privacy__secure_threshold=3)
    loud = totals(members(Hospitals(consortium, tmp_path / "loud", ALLOWED)), study, losing(*lost))[0]
    with pytest.MonkeyPatch.context() as patch:
        silent(patch)
        quiet = totals(members(Hospitals(consortium, tmp_path / "quiet", ALLOWED)), study, losing(*lost))[0]
    assert (loud[EVIDENCE] == quiet[EVIDENCE]).all()
    noise = np.concatenate([(loud[n] - quiet[n]).ravel() for n in loud if n != EVIDENCE])
    assert (noise * LEVELS == np.rint(noise * LEVELS)).all()
    deviation = promise_of(study).deviation * math.sqrt((4 - len(lost)) / 2)
    squares = float(np.square(noise / deviation).sum())
    assert noise.size > 5000
    assert chi2.ppf(1e-7, noise.size) < squares < chi2.isf(1e-7, noise.size)


def test_ledger_statement_and_report_say_what_was_promised(hospitals: Hospitals, small_study: Make) -> None:
    study = small_study(**SHARED, privacy__statistics="noised", evaluation__epsilon=1.0)
    results = hospitals.run(study)
    assert results["left_out"] == []
    for i in range(4):
        ledger = hospitals.ledger(i)
        ledger.verify()
        (statement,) = ledger.studies()
        assert statement.unsettled == 0
        assert statement.epsilon == pytest.approx(promise_of(study).epsilon, rel=1e-3)
        assert set(statement.mechanisms) == {
            "train, noise of the total",
            "statistics, noise of the total",
            "evaluation",
        }
    said = results["privacy"]
    assert said["epsilon"] == pytest.approx(promise_of(study).epsilon)
    assert said["noise"]["alone"] > said["epsilon"]
    assert "no hospital's own would do" in said["trust"]
    html = render({"results": results})
    assert "The hospitals put random noise on what they let out together" in html
    assert "of the total, each of 4 hospitals adds" in html


def test_one_may_be_missing_where_the_study_says_so_and_two_may_not(hospitals: Hospitals, small_study: Make) -> None:
    study = small_study(**SHARED, privacy__silent_sites=1)
    results = hospitals.run(study, losing(1))
    assert [x["site"] for x in results["left_out"]] == ["Bergen"]
    assert results["folds"][0]["curve"][0]["sites"] == 3
    with pytest.raises(NotEnoughSites, match="of a secure sum, wanted 3"):
        hospitals.run(study.changed(name="two"), losing(1, 2))


def test_a_hospital_refuses_a_total_of_fewer_whatever_the_server_says(
    consortium: Path, tmp_path: Path, small_study: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that wants no more than masks do: three of four are enough for these, and not for the noise of four."""
    hospitals = members(Hospitals(consortium, tmp_path / "h", ALLOWED))
    from oncofed.server import inquiry

    monkeypatch.setattr(inquiry, "sharing_of", lambda study, kind: None)
    with pytest.raises(NotEnoughSites, match=r"3 members in the total of a secure sum, wanted 4 .*sharing_sites less"):
        hospitals.run(small_study(**SHARED), losing(1))
    assert not any("seed_shares" in line for line in map(json.dumps, hospitals.log()))


def test_a_round_asked_again_has_the_same_noise_and_costs_nothing(hospitals: Hospitals, small_study: Make) -> None:
    study = small_study(**SHARED, training__rounds=3)
    hospitals.run(study)
    once, spent = weights(study), hospitals.ledger().spent()
    hospitals.run(study)
    again = weights(study)
    assert all(once[n].tobytes() == again[n].tobytes() for n in once)
    assert hospitals.ledger().spent() == spent


def test_a_hospital_shares_noise_only_where_it_allows_it(consortium: Path, tmp_path: Path, small_study: Make) -> None:
    hospitals = members(Hospitals(consortium, tmp_path / "h"))
    with pytest.raises(
        NotEnoughSites, match=r"wants all of it added here \(shared_noise\); set privacy\.noise = 'own'"
    ):
        hospitals.run(small_study(**SHARED))
    assert hospitals.run(small_study(**(SHARED | UNSHARED)))["left_out"] == []


def test_nor_with_members_whom_nobody_knows(consortium: Path, tmp_path: Path, small_study: Make) -> None:
    hospitals = Hospitals(consortium, tmp_path / "h", ALLOWED)
    with pytest.raises(
        NotEnoughSites, match=r"it has no members\.toml; a server could be all the others, with a coordinator who signs"
    ):
        hospitals.run(small_study(**SHARED))
    assert hospitals.ledger().spent() == 0.0
    assert members(hospitals).run(small_study(**SHARED))["left_out"] == []


def test_nor_on_another_lattice(hospitals: Hospitals, small_study: Make) -> None:
    def coarse(message: Message) -> None:
        if message.metadata.message_type == wire.TRAIN:
            message.content.config_records["ask"]["bits"] = 40
        return None

    with pytest.raises(NotEnoughSites, match="a sum of 40 fractional bits, shared noise lies on a lattice of 30"):
        hospitals.run(small_study(**SHARED), coarse)
    assert hospitals.ledger().spent() == 0.0


def test_an_audit_and_a_comparison_take_the_hospitals_for_one(consortium: Path, small_study: Make) -> None:
    """What is attacked is the total: one site's steps with all of the noise."""
    study = small_study(**SHARED)
    setting = open_setting(consortium, study)
    assert setting.study.privacy.sharing is None
    assert setting.promise.deviation == promise_of(study).deviation
    assert open_study(study).privacy.unit == "none"
