"""Sums under masks without Flower: what comes out, what is refused, and what a server that cheats gets."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oncofed.client.members import Identity
from oncofed.client.secure_sum import SecureSums
from oncofed.common import masks, shamir, wire
from oncofed.common.blocks import EVIDENCE, Sum
from oncofed.common.errors import Refusal
from oncofed.common.study import Study
from oncofed.server.aggregate import UPDATE_BITS, Accumulator
from oncofed.server.roster import Answer, NotEnoughSites, Roster
from oncofed.server.secure_sum import SecureSum, SecureTotal
from scipy.stats import chi2

QUESTION = hashlib.sha256(b"a round").hexdigest()
SHAPES: dict[str, tuple[int, ...]] = {EVIDENCE: (3,), "weight": (7, 5), "bias": (5,)}
Ask = tuple[str, wire.Config]


class Federation:
    """Sites with work folders of their own, and a server that asks them by calls. `faults` are (kind, site) that get no answer.

    Every call makes its site's objects anew, as a process that handles one message does.
    """

    def __init__(
        self, root: Path, names: list[str], faults: set[tuple[str, str]] | None = None, least: int = 3
    ) -> None:
        self.root, self.names, self.faults, self.least = root, names, faults or set(), least
        self.asked: list[tuple[str, str, wire.Config]] = []
        self.replies: dict[tuple[str, str], Any] = {}
        self.roster = Roster(grid=None, wait_s=1, timeout_s=1)  # type: ignore[arg-type]
        self.roster.hellos = {i: {"site": n, "identity": self.identity(n).public.hex()} for i, n in enumerate(names)}
        self.tamper: Callable[[str, str, wire.Config], wire.Config] = lambda kind, site, ask: ask

    def site(self, name: str) -> SecureSums:
        folder = self.root / name
        folder.mkdir(parents=True, exist_ok=True)
        return SecureSums(folder / "work", folder, name, self.least)

    def identity(self, name: str) -> Identity:
        return Identity.of(self.root / name / "work", name)

    def begin(
        self, sums: Mapping[str, Sum], question: str = QUESTION, slot: str = "slot", **keys: Any
    ) -> Iterator[Answer]:
        for name, total in sums.items():
            if (wire.TRAIN, name) in self.faults:
                continue
            try:
                config = self.site(name).begin(question, slot, "study", total, UPDATE_BITS, keys.get("threshold", 0))
            except Refusal as error:
                self.roster.leave_out(name, wire.TRAIN, 1, str(error))
                continue
            yield Answer(name, config, {}, 0)

    def exchange(self, kind: str, config: wire.Config, each: Mapping[str, wire.Config]) -> Iterator[Answer]:
        for name in each:
            if (kind, name) in self.faults:
                continue
            ask = self.tamper(kind, name, {**config, **each[name]})
            self.asked.append((kind, name, ask))
            try:
                answer = self.answer(kind, name, ask)
            except Refusal as error:
                self.roster.leave_out(name, kind, 1, str(error))
                continue
            self.replies[kind, name] = answer
            yield answer

    def answer(self, kind: str, name: str, ask: wire.Config) -> Answer:
        site, question = self.site(name), str(ask["sum"])
        if kind == wire.MASKED:
            return Answer(name, {}, site.masked(question, ask), 0)
        return Answer(name, site.share(question, ask) if kind == wire.SHARES else site.unmask(question, ask), {}, 0)

    def gather(self, sums: Mapping[str, Sum], threshold: int = 0, min_sites: int = 2, **keys: Any) -> SecureTotal:
        shapes = {n: v.shape for n, v in next(iter(sums.values())).items()}
        summed = SecureSum(self.roster, self.exchange, wire.TRAIN, 1, shapes, UPDATE_BITS, min_sites, threshold)
        return summed.gather(self.begin(sums, threshold=threshold, **keys))

    def last(self, kind: str, name: str) -> wire.Config:
        return next(dict(ask) for k, n, ask in reversed(self.asked) if (k, n) == (kind, name))


def names_of(count: int) -> list[str]:
    return [f"site {chr(65 + i)}" for i in range(count)]


def sums_of(names: list[str], seed: int = 0, shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> dict[str, Sum]:
    rng = np.random.default_rng(seed)
    out = {}
    for name in names:
        out[name] = {n: (100 * rng.normal(size=s)).astype(np.float32) for n, s in shapes.items()}
        out[name][EVIDENCE] = np.abs(rng.normal(size=shapes[EVIDENCE]))
    return out


def plain(sums: Mapping[str, Sum]) -> tuple[dict[str, np.ndarray], Sum]:
    """The accumulator's integers and total."""
    accumulator = Accumulator({n: v.shape for n, v in next(iter(sums.values())).items()}, UPDATE_BITS)
    for name, one in sums.items():
        accumulator.add(one, name)
    return accumulator._total, accumulator.total()


def same(got: SecureTotal, sums: Mapping[str, Sum], names: list[str]) -> None:
    integers, total = plain({n: sums[n] for n in names})
    assert [answer.site for answer in got.answers] == names
    for name, value in integers.items():
        assert got.integers[name].tobytes() == value.tobytes(), name
        assert got.total[name].tobytes() == total[name].tobytes(), name


@pytest.fixture
def five(tmp_path: Path) -> Federation:
    return Federation(tmp_path, names_of(5))


# -- the total -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sites", [3, 5, 20])
@pytest.mark.parametrize("step", [wire.TRAIN, wire.SHARES, wire.MASKED, wire.UNMASK])
def test_the_total_is_the_plain_integer_sum_whoever_drops_out(tmp_path: Path, sites: int, step: str) -> None:
    """From 0 to n - t sites lost at each step (before keys: as many as leave three); one fewer than t stops the sum."""
    names, sums = names_of(sites), sums_of(names_of(sites))
    t = masks.threshold_of(sites)
    spare = sites - 3 if step == wire.TRAIN else sites - t
    for lost in sorted({0, 1, spare // 2, spare}):
        if lost > spare:
            continue
        gone = names[1 : 1 + lost]
        federation = Federation(tmp_path / str(lost), names, {(step, name) for name in gone})
        got = federation.gather(sums)
        # who is lost at the last step is in the total: the others have shares enough
        same(got, sums, names if step == wire.UNMASK else [n for n in names if n not in gone])
    federation = Federation(tmp_path / "few", names, {(step, name) for name in names[: spare + 1]})
    with pytest.raises(NotEnoughSites, match=r"good answers to .* of a secure sum, wanted"):
        federation.gather(sums)


def test_sites_lost_at_every_step_of_one_sum(tmp_path: Path) -> None:
    names, sums = names_of(20), sums_of(names_of(20))
    faults = {(wire.TRAIN, names[0]), (wire.SHARES, names[3]), (wire.SHARES, names[19]), (wire.MASKED, names[7])}
    faults |= {(wire.MASKED, names[12]), (wire.UNMASK, names[1])}
    got = Federation(tmp_path, names, faults).gather(sums)
    same(got, sums, [n for i, n in enumerate(names) if i not in (0, 3, 7, 12, 19)])


def test_a_zero_update_and_negative_numbers(five: Federation) -> None:
    sums = sums_of(five.names)
    sums[five.names[0]] = {n: np.zeros_like(v) for n, v in sums[five.names[0]].items()}
    sums[five.names[1]]["weight"] = -np.abs(sums[five.names[1]]["weight"]) * 1000
    same(five.gather(sums), sums, five.names)


def test_nothing_secret_is_left_and_files_are_the_owners_alone(five: Federation) -> None:
    seen: list[int] = []

    def look(kind: str, site: str, ask: wire.Config) -> wire.Config:
        for file in (five.root / site).rglob("*"):
            if file.is_file() and file.name not in ("identity.pub", "pinned-members.json"):
                seen.append(stat.S_IMODE(file.stat().st_mode))
        return ask

    five.tamper = look
    five.gather(sums_of(five.names))
    assert set(seen) == {0o600}
    for name in five.names:
        left = {f.name for f in (five.root / name / "work" / "secure-sums").rglob("*") if f.is_file()}
        assert left == {f"{QUESTION}.json", "slot.question"}
        told = json.loads((five.root / name / "work" / "secure-sums" / "ended" / f"{QUESTION}.json").read_text())
        assert set(told) == {"came", "lost", "seed_shares", "key_shares"}  # what the server has


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e10])
def test_a_number_that_is_none_or_too_large_is_refused_by_name(five: Federation, value: float) -> None:
    sums = sums_of(five.names)
    sums[five.names[2]]["bias"][3] = value
    rest = [n for n in five.names if n != five.names[2]]
    same(five.gather(sums), sums, rest)
    (left,) = five.roster.left_out
    says = "too large for a sum over" if value == 1e10 else "holds values that are not finite"
    assert left["site"] == five.names[2]
    assert says in str(left["reason"])
    assert "'bias'" in str(left["reason"])


def test_what_fits_alone_and_not_together_is_refused_when_the_members_are_known(five: Federation) -> None:
    """2^62 / 2^40 = 4.2e6 over all sites: 2e6 is too much for each of five, though not for one."""
    sums = sums_of(five.names)
    sums[five.names[4]]["weight"][0, 0] = 2e6
    same(five.gather(sums), sums, five.names[:4])
    (left,) = five.roster.left_out
    assert left["kind"] == wire.SHARES
    assert "'weight' reaches 2e+06, too large for a sum over 5 sites" in str(left["reason"])


def test_evidence_below_zero_and_odd_bits_are_refused(five: Federation) -> None:
    one = sums_of(five.names)[five.names[0]]
    site = five.site(five.names[0])
    with pytest.raises(Refusal, match="evidence below zero"):
        site.begin(QUESTION, "slot", "study", one | {EVIDENCE: np.array([-1.0])}, 40, 0)
    for bits in (None, -1, 53, True, 40.0):
        with pytest.raises(Refusal, match="fractional bits"):
            site.begin(QUESTION, "slot", "study", one, bits, 0)  # type: ignore[arg-type]


# -- who is in it --------------------------------------------------------------------------------------------------------


def test_fewer_than_three_or_than_the_policy_wants_are_refused(tmp_path: Path) -> None:
    with pytest.raises(NotEnoughSites, match="wanted 3"):
        Federation(tmp_path / "two", names_of(2)).gather(sums_of(names_of(2)))
    careful = Federation(tmp_path / "four", names_of(4), least=5)
    with pytest.raises(NotEnoughSites, match="4 members of a secure sum, wanted 5"):
        careful.gather(sums_of(names_of(4)))
    with pytest.raises(NotEnoughSites, match="wanted 6"):
        Federation(tmp_path / "five", names_of(5)).gather(sums_of(names_of(5)), min_sites=6)


def test_a_threshold_of_half_is_refused_by_both_sides(tmp_path: Path) -> None:
    assert [masks.threshold_of(n) for n in (3, 4, 5, 6, 10, 20)] == [3, 3, 4, 5, 7, 14]
    names, sums = names_of(6), sums_of(names_of(6))
    with pytest.raises(NotEnoughSites, match="must lie between 4 and 6"):
        Federation(tmp_path / "server", names).gather(sums, threshold=3)
    federation = Federation(tmp_path / "site", names)
    ok = Federation(tmp_path / "ok", names, {(wire.MASKED, names[0]), (wire.MASKED, names[1])})
    same(ok.gather(sums, threshold=4), sums, names[2:])
    # a server that goes on with too low a threshold: the sites hold theirs against the members
    with pytest.raises(NotEnoughSites, match="must lie between 4 and 6"):
        SecureSum(federation.roster, federation.exchange, wire.TRAIN, 1, SHAPES, UPDATE_BITS, 2, 0).gather(
            federation.begin(sums, threshold=3)
        )


def test_a_wrong_signature_is_left_out_by_the_server_and_refused_by_the_sites(five: Federation) -> None:
    sums, victim = sums_of(five.names), five.names[1]

    def swapped(kind: str, site: str, ask: wire.Config) -> wire.Config:
        """The server puts a mask key of its own in a member's place, for everybody else."""
        if kind == wire.SHARES and site != victim:
            keys = list(ask["mask_keys"])  # type: ignore[arg-type]
            keys[1] = masks.public_key(masks.new_private_key()).hex()
            return ask | {"mask_keys": keys}
        return ask

    five.tamper = swapped
    with pytest.raises(NotEnoughSites, match=f"the keys of '{victim}' are not signed by its identity"):
        five.gather(sums)
    five.tamper = lambda kind, site, ask: ask
    begun = list(five.begin(sums))
    begun[0] = dataclasses.replace(begun[0], config=begun[0].config | {"signature": "00" * 64})
    summed = SecureSum(five.roster, five.exchange, wire.TRAIN, 1, SHAPES, UPDATE_BITS, 2, 0)
    same(summed.gather(begun), sums, five.names[1:])
    assert "not signed by the identity of its greeting" in str(five.roster.left_out[-1]["reason"])


def test_a_signature_of_another_question_is_none(five: Federation) -> None:
    """Keys that were signed for an earlier round cannot be used again."""
    sums = sums_of(five.names)
    old = next(five.begin(sums, question="1" * 64, slot="earlier")).config
    begun = list(five.begin(sums))
    begun[0] = dataclasses.replace(begun[0], config=old | {"sum": QUESTION})
    summed = SecureSum(five.roster, five.exchange, wire.TRAIN, 1, SHAPES, UPDATE_BITS, 2, 0)
    same(summed.gather(begun), sums, five.names[1:])


def test_a_member_with_another_identity_than_before_is_refused(five: Federation) -> None:
    sums, stranger = sums_of(five.names), five.names[3]
    five.gather(sums)
    (five.root / stranger / "work" / "identity.key").unlink()
    anew = Federation(five.root, five.names)
    with pytest.raises(NotEnoughSites, match=r"'site D' has the identity .*, pinned-members.json says"):
        anew.gather(sums, question="2" * 64, slot="next")


def test_a_roster_lets_nobody_else_in(five: Federation) -> None:
    sums = sums_of(five.names)
    lines = {n: five.identity(n).public.hex() for n in five.names}
    for name in five.names:
        text = "".join(f'"{n}" = "{key}"\n' for n, key in lines.items())
        (five.root / name / "members.toml").write_text(text)
    same(five.gather(sums), sums, five.names)
    for name in five.names:
        assert not (five.root / name / "work" / "pinned-members.json").exists()
        text = "".join(f'"{n}" = "{key}"\n' for n, key in lines.items() if n != "site E")
        (five.root / name / "members.toml").write_text(text)
    with pytest.raises(NotEnoughSites, match=r"'site E' is not in its members.toml"):
        five.gather(sums, question="2" * 64, slot="next")
    (five.root / "site A" / "members.toml").write_text('"site A" = "no hex"\n')
    with pytest.raises(NotEnoughSites, match=r"its members.toml cannot be used"):
        five.gather(sums, question="3" * 64, slot="third")


def test_a_lost_identity_is_refused_with_a_remedy(tmp_path: Path) -> None:
    Identity.of(tmp_path, "A")
    (tmp_path / "identity.key").write_text("not a key")
    with pytest.raises(Refusal, match=r"send the new identity\.pub to all members"):
        Identity.of(tmp_path, "A")


# -- a server that cheats --------------------------------------------------------------------------------------------------


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


# -- pieces ----------------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(data=st.data(), secret=st.binary(min_size=32, max_size=32), shares=st.integers(1, 12))
def test_any_threshold_of_shares_gives_the_secret(data: st.DataObject, secret: bytes, shares: int) -> None:
    threshold = data.draw(st.integers(1, shares))
    parts = shamir.split(secret, shares, threshold)
    holders = data.draw(st.sets(st.integers(0, shares - 1), min_size=threshold, max_size=shares))
    weights = shamir.weights_at_zero(sorted(holders))
    assert shamir.combine(dict(enumerate(parts)), weights) == secret


@settings(max_examples=20, deadline=None)
@given(secret=st.binary(min_size=32, max_size=32), other=st.binary(min_size=32, max_size=32))
def test_fewer_shares_fit_any_secret(secret: bytes, other: bytes) -> None:
    """With t - 1 shares there is a last one for every secret: they say nothing."""
    parts = shamir.split(secret, 4, 3)
    weights = shamir.weights_at_zero([0, 1, 2])
    known = sum(int.from_bytes(parts[k], "big") * weights[k] for k in (0, 1))
    last = (int.from_bytes(other, "big") - known) * pow(weights[2], -1, shamir.PRIME) % shamir.PRIME
    fits = {0: parts[0], 1: parts[1], 2: last.to_bytes(shamir.SHARE_BYTES, "big")}
    assert shamir.combine(fits, weights) == other


@pytest.mark.parametrize(("shares", "threshold", "secret"), [(3, 4, b"x"), (3, 0, b"x"), (3, 2, bytes(33))])
def test_a_sharing_that_cannot_be_is_refused(shares: int, threshold: int, secret: bytes) -> None:
    with pytest.raises(ValueError, match="wanted a threshold"):
        shamir.split(secret, shares, threshold)


def test_masks_are_those_of_chacha20_and_cancel() -> None:
    """The first words of RFC 8439's stream of key 0 (appendix A.1, vector 1), and a mask taken away again."""
    words = np.zeros(150_000, dtype=np.uint64)
    masks.add_mask(words, bytes(32))
    assert words[:2].tobytes().hex() == "76b8e0ada0f13d90405d6ae55386bd28"
    masks.add_mask(words, bytes(32), -1)
    assert not words.any()


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"analysis__cross_site": ("local",)}, r"analysis\.cross_site"),
        ({"splits__held_out_sites": ("A", "B")}, r"splits\.held_out_sites"),
        ({"privacy__secure_threshold": 2}, "set it to 3 or more"),
        ({"privacy__secure_sum": False, "privacy__secure_threshold": 5}, "is of such sums"),
    ],
)
def test_a_study_that_needs_one_hospitals_sums_is_refused(keys: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Study().changed(**({"privacy__secure_sum": True} | keys))
