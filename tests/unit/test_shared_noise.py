"""Noise that hospitals share: the total has what was promised, no total has less, and a study that would break it is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oncofed.client.privacy.shared_step import shared_gradients
from oncofed.common import masks, wire
from oncofed.common.blocks import EVIDENCE, Sum
from oncofed.common.errors import Refusal
from oncofed.common.models.build import get_weights
from oncofed.common.noise import LEVELS, SecureNoise
from oncofed.common.privacy.accounting import epsilon_of
from oncofed.common.privacy.releases import TRAINING, promise_of
from oncofed.common.privacy.sharing import SHARED_BITS, Sharing
from oncofed.common.study import Study
from oncofed.server.privacy import cost_of, statement, trust_of
from oncofed.server.roster import NotEnoughSites
from scipy.stats import chi2, kstest
from toy_private import model_of, patients, study_of
from toy_sums import Federation, names_of

RARE = 1e-7
"""Chance that an honest draw fails one side of a test."""

FIVE = Sharing(sites=5, silent=1, colluding=1)
Z = 2.0


def has_deviation(noise: np.ndarray, deviation: float) -> bool:
    """Whether independent Gaussian numbers may have this deviation: by the sum of squares, at `RARE` on each side."""
    total, n = float(np.square(noise / deviation).sum()), noise.size
    return bool(chi2.ppf(RARE, n) < total < chi2.isf(RARE, n))


# -- the total has what was promised -----------------------------------------------------------------------------------


def parts_of(names: list[str], numbers: int, deviation: float) -> tuple[dict[str, Sum], Sum]:
    """What sites send, each a sum of its own with its part of the noise, and the sum without any."""
    rng = np.random.default_rng(0)
    clean = {name: torch.from_numpy(rng.normal(size=numbers)) for name in names}
    parts: dict[str, Sum] = {
        name: {"x": SecureNoise().covered(x, sensitivity=1.0, deviation=deviation).numpy()} for name, x in clean.items()
    }
    quiet = {name: SecureNoise().covered(x, sensitivity=1.0, deviation=0.0).numpy() for name, x in clean.items()}
    return parts, quiet


@pytest.mark.parametrize("lost", [0, 1])
def test_the_total_under_masks_has_the_noise_that_was_promised(tmp_path: Path, lost: int) -> None:
    """Of 5 that share, 1 may be missing and 1 may collude: the least total's honest noise is what was promised, to 200,000 numbers."""
    assert LEVELS == 2.0**SHARED_BITS
    names = names_of(5)
    parts, quiet = parts_of(names, 200_000, FIVE.of_each(Z))
    federation = Federation(tmp_path, names, {(wire.MASKED, n) for n in names[:lost]}, bits=SHARED_BITS)
    got = federation.gather(parts, least=FIVE.least, colluding=FIVE.colluding)
    there = names[lost:]
    assert [a.site for a in got.answers] == there
    # to the last bit the sum of the parts: nothing is rounded after noise was added
    whole = sum(np.rint(parts[n]["x"] * LEVELS).astype(np.int64) for n in there)
    assert (got.integers["x"] == whole).all()
    assert (got.total["x"] * LEVELS == whole).all()
    noise = got.total["x"] - sum(quiet[n] for n in there)
    assert has_deviation(noise, FIVE.of_total(Z, 5 - lost))
    # a colluder takes its own noise off: what is left is at least the promise, and with one missing just that
    known = parts[there[0]]["x"] - quiet[there[0]]
    left = noise - known
    assert has_deviation(left, Z * math.sqrt((5 - lost - 1) / FIVE.honest))
    assert has_deviation(left, Z) == (lost == 1)
    # the test of the test
    assert not has_deviation(left, 0.98 * Z * math.sqrt((5 - lost - 1) / FIVE.honest))
    assert kstest(noise / FIVE.of_total(Z, 5 - lost), "norm").pvalue > RARE


def test_a_step_of_the_product_has_it() -> None:
    """Clipped gradients of one model at five sites, drawn four times: noise on every number, also of blocks without evidence."""
    study = study_of("gene_moe", **SAFE)
    model, batch = model_of(study), patients(9)
    weights = {n: v.copy() for n, v in get_weights(model).items()}
    blocks = model.blocks()
    load = {g: np.full(n, 1.0 / n) for g, n in model.mixtures().items()}
    evidence = np.full(len(blocks.names), 10.0)
    lacking = blocks.names.index("cancer/STAD")
    evidence[lacking] = 0.0

    def step(deviation: float) -> Sum:
        return shared_gradients(
            model, weights, batch, study, load=load, deviation=deviation, evidence=evidence, probe=False
        )

    clean = step(0.0)
    squares = math.fsum(float(np.square(v).sum()) for n, v in clean.items() if n != EVIDENCE)
    assert 0 < squares <= len(batch) ** 2  # in clips: no patient's is longer than one
    noise = []
    for _ in range(4):
        total = [step(FIVE.of_each(Z)) for _ in range(FIVE.honest)]
        for name in clean.keys() - {EVIDENCE}:
            value = sum(one[name] for one in total)
            assert np.array_equal(value * LEVELS, np.rint(value * LEVELS))
            noise.append((value - FIVE.honest * clean[name]).ravel())
    assert has_deviation(np.concatenate(noise), Z)
    rows = [
        n for n, owner in blocks.owners.items() if isinstance(owner, tuple) and "cancer/STAD" in owner and n in clean
    ]
    assert rows
    for name in rows:
        row = blocks.owners[name].index("cancer/STAD")
        assert not clean[name][row].any()
        assert total[0][name][row].all()


def test_shares_are_smaller_and_the_total_is_quieter_than_with_own_noise() -> None:
    s = Sharing(sites=20, silent=2, colluding=1)
    assert (s.least, s.honest) == (18, 17)
    assert s.of_each(1.0) == pytest.approx(1 / math.sqrt(17))
    assert s.of_total(1.0, 18) == pytest.approx(math.sqrt(18 / 17))
    own, shared = study(), study(**SHARED | {"privacy__sharing_sites": 20, "privacy__silent_sites": 2})
    a, b = (cost_of(x, 1000, 20, 2000).per_number for x in (own, shared))
    assert a / b == pytest.approx(math.sqrt(17))


# -- no total has less -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [wire.TRAIN, wire.SHARES, wire.MASKED])
def test_with_more_missing_than_may_be_there_is_no_total(tmp_path: Path, step: str) -> None:
    """Two of ten are missing where one may: masks alone would bear three. The hospitals refuse it, whatever the server wants."""
    names, s = names_of(10), Sharing(10, 1, 1)
    parts, _ = parts_of(names, 5, s.of_each(Z))
    for lost, fine in ((1, True), (2, False)):
        federation = Federation(tmp_path / f"{lost}", names, {(step, n) for n in names[:lost]}, bits=SHARED_BITS)
        if fine:
            assert len(federation.gather(parts, least=s.least, colluding=1).answers) == 9
            continue
        with pytest.raises(
            NotEnoughSites, match=r"8 members.* of a secure sum, wanted 9 .*sharing_sites less privacy.silent_sites"
        ):
            federation.gather(parts, least=s.least, colluding=1)
        assert not any(isinstance(r.config.get("seed_shares"), list) for r in federation.replies.values())


def test_a_server_that_feigns_dropouts_beyond_those_gets_no_shares(tmp_path: Path) -> None:
    names, s = names_of(10), Sharing(10, 1, 1)
    parts, _ = parts_of(names, 5, s.of_each(Z))
    federation = Federation(tmp_path, names, {(wire.UNMASK, n) for n in names}, bits=SHARED_BITS)
    with pytest.raises(NotEnoughSites):
        federation.gather(parts, least=s.least, colluding=1)
    for feigned in (2, 3):
        came, lost = names[: 10 - feigned], names[10 - feigned :]
        with pytest.raises(Refusal, match=f"{10 - feigned} members in the total of a secure sum, wanted 9"):
            federation.site(names[0]).unmask(str(federation.asked[-1][2]["sum"]), {"came": came, "lost": lost})
    told = federation.site(names[0]).unmask(str(federation.asked[-1][2]["sum"]), {"came": names[:9], "lost": names[9:]})
    assert len(told["seed_shares"]) == 9  # type: ignore[arg-type]


def test_colluders_who_could_read_one_hospitals_own_sum_are_too_many(tmp_path: Path) -> None:
    """Of 7 with a threshold of 4 one member who gives both kinds of shares is enough, and 1 is reckoned with."""
    names = names_of(7)
    parts, _ = parts_of(names, 5, 1.0)
    assert 2 * masks.threshold_of(7, 4) - 7 == 1
    federation = Federation(tmp_path / "low", names, bits=SHARED_BITS)
    with pytest.raises(
        NotEnoughSites, match=r"1 of 7 members could, with the server, .*; raise privacy\.secure_threshold"
    ):
        federation.gather(parts, threshold=4, least=6, colluding=1)
    high = Federation(tmp_path / "high", names, bits=SHARED_BITS)
    assert len(high.gather(parts, threshold=5, least=6, colluding=1).answers) == 7


# -- the study ---------------------------------------------------------------------------------------------------------

SAFE: dict[str, Any] = {
    "privacy__unit": "patient",
    "panel__scale_by": "patient",
    "task__time_edges": (0, 12, 24, 60),
    "splits__only": (0,),
    "training__local_steps": 1,
}
SHARED: dict[str, Any] = {"privacy__secure_sum": True, "privacy__noise": "shared", "privacy__sharing_sites": 5}


def study(**keys: Any) -> Study:
    return Study().changed(**(SAFE | keys))


BROKEN: list[tuple[dict[str, Any], str, dict[str, Any]]] = [
    ({"privacy__unit": "none"}, "none covers anybody here.*'patient'", {"privacy__unit": "patient"}),
    ({"privacy__unit": "hospital"}, "share the noise that covers a patient", {"privacy__unit": "patient"}),
    ({"privacy__secure_sum": False}, r"privacy\.secure_sum = true", {"privacy__secure_sum": True}),
    ({"privacy__sharing_sites": 0}, "say it, as the consortium knows it", {"privacy__sharing_sites": 7}),
    ({"privacy__sharing_sites": 3, "privacy__silent_sites": 1}, "lower silent_sites", {"privacy__silent_sites": 0}),
    (
        {"privacy__silent_sites": 2, "privacy__colluding_sites": 3},
        "with 0 whose noise nobody knows",
        {"privacy__colluding_sites": 2},
    ),
    (
        {"privacy__sharing_sites": 7, "privacy__secure_threshold": 4},
        "raise privacy.secure_threshold",
        {"privacy__secure_threshold": 5},
    ),
    (
        {"privacy__sharing_sites": 7, "privacy__secure_threshold": 3},
        "must lie between 4 and 7",
        {"privacy__secure_threshold": 0},
    ),
    ({"training__local_steps": 4}, "take more rounds", {"training__local_steps": 1}),
    (
        {"training__optimizer": "adam"},
        r"aggregation\.optimizer = 'adam'",
        {"training__optimizer": "sgd", "aggregation__optimizer": "adam", "aggregation__learning_rate": 0.01},
    ),
    ({"privacy__evidence": "noised"}, "bounds of its own; set it to 'public'", {"privacy__evidence": "public"}),
    ({"privacy__noise": "own"}, "are of shared noise; leave them out", {"privacy__noise": "shared"}),
]


@pytest.mark.parametrize(("broken", "says", "remedy"), BROKEN, ids=[", ".join(b[0]) for b in BROKEN])
def test_what_breaks_sharing_is_refused_and_the_remedy_helps(
    broken: dict[str, Any], says: str, remedy: dict[str, Any]
) -> None:
    assert study(**SHARED).privacy.sharing == Sharing(5, 0, 1)
    with pytest.raises(ValueError, match=says):
        study(**(SHARED | broken))
    assert study(**(SHARED | broken | remedy)).privacy.sharing is not None


def test_the_account_is_that_of_the_total() -> None:
    """The same noise and the same epsilon as with own noise; what one hospital's part alone would promise is said beside it."""
    own, shared = study(), study(**SHARED | {"privacy__silent_sites": 1})
    assert promise_of(own).deviation == promise_of(shared).deviation
    (one,) = promise_of(shared).mechanisms.values()
    text = trust_of(shared)
    s = shared.privacy.sharing
    assert s is not None
    alone = epsilon_of([type(one)(one.kind, one.noise / math.sqrt(3), one.count)], 1e-5)
    assert f"{alone:.3g} in place of 8" in text
    for words in (
        "5 hospitals share the noise",
        "no more than 1 tell the server",
        "refuses totals of fewer than 4",
        "each adds 0.577",
    ):
        assert words in text
    folds = [
        {
            "fold": 0,
            "curve": [{"evidence": {"trunk": 50.0}}],
            "site_rounds": {"A": 1},
            "site_evidence": {},
            "trained": 9,
        }
    ]
    told = statement(shared, {"sites": ["A"], "folds": folds, "left_out": []})
    assert told["noise"]["each"] == pytest.approx(promise_of(shared).deviation / math.sqrt(3))
    assert told["noise"]["alone"] == pytest.approx(alone)
    assert promise_of(shared).mechanisms[TRAINING].noise == told["deviation"]
    assert "each hospital adds its own noise" in trust_of(own)
