"""Sums under masks: the total to the last bit whoever drops out, numbers that do not fit, and who may be in it."""

from __future__ import annotations

import dataclasses
import json
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oncofed.client.members import Identity
from oncofed.common import masks, wire
from oncofed.common.blocks import EVIDENCE
from oncofed.common.errors import Refusal
from oncofed.common.study import Study
from oncofed.server.aggregate import UPDATE_BITS
from oncofed.server.roster import NotEnoughSites
from oncofed.server.secure_sum import SecureSum
from toy_sums import QUESTION, SHAPES, Federation, names_of, same, sums_of


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
