"""What a server that cheats gets of sums under masks: no total, or the same."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from oncofed.common import masks, shamir, wire
from oncofed.common.blocks import EVIDENCE, Sum
from oncofed.common.errors import Refusal
from oncofed.server.aggregate import UPDATE_BITS
from oncofed.server.roster import Answer, NotEnoughSites
from oncofed.server.secure_sum import SecureSum
from scipy.stats import chi2
from toy_sums import QUESTION, SHAPES, Federation, names_of, same, sums_of


@pytest.fixture
def five(tmp_path: Path) -> Federation:
    return Federation(tmp_path, names_of(5))


def test_what_leaves_a_site_looks_uniform(tmp_path: Path) -> None:
    """Chi-square of the bytes of one site's masked zeros, at each place in a word: 8 tests at 1e-6, so one false alarm in 125,000."""
    shapes = {EVIDENCE: (1,), "weight": (200_000,)}
    federation, sums = Federation(tmp_path, names_of(3)), sums_of(names_of(3), shapes=shapes)
    sums["site B"]["weight"][:] = 0.0
    federation.gather(sums)
    words = federation.replies[wire.MASKED, "site B"].arrays["weight"]
    for place in range(8):
        counts = np.bincount(words.view(np.uint8).reshape(-1, 8)[:, place], minlength=256)
        statistic = float(np.square(counts - words.size / 256).sum() / (words.size / 256))
        assert statistic < chi2.isf(1e-6, 255)
    assert np.unique(words).size == words.size


def test_an_own_mask_alone_hides_a_site_whose_pair_masks_are_known(five: Federation) -> None:
    """A site feigned lost whose sum has come: its pair masks can be taken off, and what is left is still uniform."""
    sums = sums_of(five.names, shapes={EVIDENCE: (1,), "weight": (50_000,)})
    five.faults = {(wire.UNMASK, n) for n in five.names}
    with pytest.raises(NotEnoughSites):
        five.gather(sums)
    victim = "site C"
    state = json.loads((five.root / victim / "work" / "secure-sums" / QUESTION / "state.json").read_text())
    members = {n: masks.Member(*map(bytes.fromhex, parts)) for n, parts in state["members"].items()}
    words = masks.flatten(five.replies[wire.MASKED, victim].arrays)
    for other in five.names:
        if other != victim:
            seed = masks.pair_seed(
                bytes.fromhex(state["mask"]), members[other].mask, masks.context_of(QUESTION, members)
            )
            masks.add_mask(words, seed, -masks.pair_sign(victim, other))
    counts = np.bincount(words.view(np.uint8), minlength=256)
    expected = words.size * 8 / 256
    assert float(np.square(counts - expected).sum() / expected) < chi2.isf(1e-6, 255)
    masks.add_mask(words, bytes.fromhex(state["seed"]), -1)  # the test of the test
    counts = np.bincount(words.view(np.uint8), minlength=256)
    assert float(np.square(counts - expected).sum() / expected) > 1e6


def unmasked_by(federation: Federation, sums: Mapping[str, Sum]) -> None:
    """All but the last exchange."""
    federation.faults = {(wire.UNMASK, n) for n in federation.names}
    with pytest.raises(NotEnoughSites):
        federation.gather(sums)


def test_a_feigned_dropout_gets_shares_of_one_kind_alone(five: Federation) -> None:
    sums, (a, b, c, d, e) = sums_of(five.names), five.names
    unmasked_by(five, sums)
    everybody: wire.Config = {"came": five.names, "lost": []}
    without_c: wire.Config = {"came": [a, b, d, e], "lost": [c]}
    five.site(a).unmask(QUESTION, everybody)
    with pytest.raises(
        Refusal,
        match="it has answered this question for the total of site A, site B, site C, site D, site E; another total",
    ):
        five.site(a).unmask(QUESTION, without_c)
    # the same again is the same again
    assert five.site(a).unmask(QUESTION, everybody) == five.site(a).unmask(QUESTION, everybody)
    with pytest.raises(Refusal, match="the total is said to be without it"):
        five.site(c).unmask(QUESTION, without_c)
    for ask, says in (
        ({"came": five.names, "lost": [c]}, "both in the total and lost"),
        ({"came": [a, b, c, d], "lost": []}, "are not those who shared"),
        ({"came": [*five.names, "site F"], "lost": []}, "are not those who shared"),
        ({"came": [a, b, d], "lost": [c, e]}, "3 members in the total of a secure sum, wanted 4"),
        ({"came": [b, a, c, d, e], "lost": []}, "named twice"),
    ):
        with pytest.raises(Refusal, match=says):
            five.site(b).unmask(QUESTION, ask)  # type: ignore[arg-type]
    told = five.site(b).unmask(QUESTION, without_c)
    assert [len(told["seed_shares"]), len(told["key_shares"])] == [4, 1]  # type: ignore[arg-type]
    # of C: the server now has a seed share of A and a key share of B, and needs four of a kind: no split of five gives both
    t = masks.threshold_of(5)
    assert 2 * t > 5


def test_fewer_shares_than_the_threshold_say_nothing(five: Federation) -> None:
    secret = os.urandom(32)
    shares = shamir.split(secret, 5, 4)
    few = {k: shares[k] for k in (0, 1, 2)}
    with pytest.raises(ValueError, match="give no secret"):
        shamir.combine(few, shamir.weights_at_zero(list(few)))


def test_a_question_that_has_ended_gives_the_same_total_again_and_no_other(five: Federation) -> None:
    sums = sums_of(five.names)
    same(five.gather(sums), sums, five.names)
    replayed = {kind: five.last(kind, "site A") for kind in (wire.SHARES, wire.MASKED)}
    for kind, ask in replayed.items():
        with pytest.raises(Refusal, match="no sum of question"):
            five.answer(kind, "site A", ask)
    same(five.gather(sums), sums, five.names)  # a server that was killed asks again
    for kind, ask in replayed.items():
        with pytest.raises(Refusal, match="no sum of question"):
            five.answer(kind, "site A", ask)
    five.faults = {(wire.TRAIN, "site C")}
    with pytest.raises(NotEnoughSites, match="another total, of site A, site B, site D, site E, would tell"):
        five.gather(sums)
    five.faults = set()
    with pytest.raises(NotEnoughSites, match="this place in the study had another question"):
        five.gather(sums, question="3" * 64)


def test_keys_of_an_earlier_attempt_are_refused(five: Federation) -> None:
    sums = sums_of(five.names)
    unmasked_by(five, sums)
    old = {kind: five.last(kind, "site A") for kind in (wire.SHARES, wire.MASKED)}
    list(five.begin(sums))
    with pytest.raises(Refusal, match="do not hold the keys that it gave"):
        five.answer(wire.SHARES, "site A", old[wire.SHARES])
    with pytest.raises(Refusal, match="secrets of this sum are not shared yet"):
        five.answer(wire.MASKED, "site A", old[wire.MASKED])
    with pytest.raises(Refusal, match="it has sent no sum under masks"):
        five.site("site A").unmask(QUESTION, {"came": five.names, "lost": []})


def test_each_exchange_is_answered_for_one_set_of_members(five: Federation) -> None:
    sums = sums_of(five.names)
    unmasked_by(five, sums)
    shares, masked = five.last(wire.SHARES, "site A"), five.last(wire.MASKED, "site A")
    for kind, ask in ((wire.SHARES, shares), (wire.MASKED, masked)):
        first, again = five.replies[kind, "site A"], five.answer(kind, "site A", ask)
        assert first.config == again.config
        assert {n: v.tobytes() for n, v in first.arrays.items()} == {n: v.tobytes() for n, v in again.arrays.items()}
    fewer = {k: v[:-1] if isinstance(v, list) else v for k, v in shares.items()}
    with pytest.raises(Refusal, match="shared already, among other members"):
        five.answer(wire.SHARES, "site A", fewer)
    fewer = {k: v[:-1] if isinstance(v, list) else v for k, v in masked.items()}
    with pytest.raises(Refusal, match="it has sent this sum already, masked for other members"):
        five.answer(wire.MASKED, "site A", fewer)


def test_a_sealed_share_opens_for_its_recipient_alone(five: Federation) -> None:
    def swap(kind: str, site: str, ask: wire.Config) -> wire.Config:
        if kind == wire.MASKED and site == "site A":
            sealed = list(ask["sealed"])  # type: ignore[arg-type]
            return ask | {"sealed": [sealed[1], sealed[0], *sealed[2:]]}
        return ask

    five.tamper = swap
    sums = sums_of(five.names)
    same(five.gather(sums), sums, five.names[1:])
    assert "what site B has sealed for site A does not open" in str(five.roster.left_out[0]["reason"])


def test_altered_shares_are_noticed(five: Federation) -> None:
    answer = five.answer

    def lie(kind: str, name: str, ask: wire.Config) -> Answer:
        told = answer(kind, name, ask)
        if kind == wire.UNMASK and name == "site B":
            shares = list(told.config["seed_shares"])  # type: ignore[arg-type]
            shares[0] = "00" * shamir.SHARE_BYTES
            return dataclasses.replace(told, config=told.config | {"seed_shares": shares})
        return told

    five.answer = lie  # type: ignore[method-assign]
    with pytest.raises(NotEnoughSites, match="site A's seed"):
        five.gather(sums_of(five.names))


def test_a_sum_in_clear_is_not_taken(five: Federation) -> None:
    sums = sums_of(five.names)
    begun = list(five.begin(sums))
    begun[0] = dataclasses.replace(begun[0], arrays=sums["site A"])
    summed = SecureSum(five.roster, five.exchange, wire.TRAIN, 1, SHAPES, UPDATE_BITS, 2, 0)
    same(summed.gather(begun), sums, five.names[1:])
