"""Weights as steps from those that sites hold: the same bits on both sides, near to the server's own, and who is sent what."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.app import RecordDict
from oncofed.client.reference import Lacking, Reference
from oncofed.client.resident import Resident
from oncofed.common import wire
from oncofed.common.blocks import Sum, part, under
from oncofed.common.broadcast import BASE, HASH, WEIGHTS, code_step, hash_of, take_step
from oncofed.common.compression import BFLOAT16, INT8, SCALE, nbytes
from oncofed.common.errors import Refusal
from oncofed.common.study import Study
from oncofed.server.broadcast import Broadcast

SHAPES = {"w": (60, 70), "experts": (3, 20, 33), "bias": (7,), "still": (30, 30), "zero": ()}


def weights(seed: int = 0) -> Sum:
    rng = np.random.default_rng(seed)
    return {n: rng.normal(0, 1, s).astype(np.float32) for n, s in SHAPES.items()} | {"steps": np.arange(3)}


def moved(before: Sum, seed: int, size: float = 1e-3) -> Sum:
    """Weights after a round; one array has not moved."""
    rng = np.random.default_rng(seed)
    after = {n: v + rng.normal(0, size, v.shape).astype(v.dtype) if n != "still" else v for n, v in before.items()}
    return after | {"steps": before["steps"] + 1}


def broadcast(kind: str = "int8") -> Broadcast:
    return Broadcast.of(Study().changed(transport__download=kind))


def sent_to(one: Broadcast, weights_: Sum, **holds: str) -> dict[str, tuple[wire.Config, Sum]]:
    written = one.contents({"round": 3}, under(WEIGHTS, weights_) | {"load/e": np.ones(2)}, holds)
    return {s: (wire.read_config(c, "ask"), wire.read_arrays(c)) for s, c in written.items()}


@pytest.fixture
def site(tmp_path):  # type: ignore[no-untyped-def]
    """A site that handles each question in a process of its own."""
    return lambda: Reference(tmp_path / "weights" / "study.safetensors", "Mayo", Resident())


@pytest.mark.parametrize("kind", ["int8", "bfloat16"])
def test_a_step_leads_to_within_one_level_of_the_change(kind: str) -> None:
    held, wanted = weights(), moved(weights(), 1)
    coded = code_step(held, wanted, kind, np.random.default_rng(0))
    after = take_step(held, coded)
    assert {n: (v.dtype, v.shape) for n, v in after.items()} == {n: (v.dtype, v.shape) for n, v in held.items()}
    for name in ("w", "experts"):
        most = float(np.abs(wanted[name] - held[name]).max())
        assert 0 < np.abs(after[name] - wanted[name]).max() <= most * 2.0**-6 + 1e-6
    for name in ("bias", "zero", "steps"):  # too small, or no float32: as they are
        assert after[name].tobytes() == wanted[name].tobytes()
    assert after["still"] is held["still"]
    assert not any(name.endswith("still") for name in coded)
    large = nbytes({n: held[n] for n in ("w", "experts")})
    coded_large = nbytes({n: v for n, v in coded.items() if "/" in n})
    assert coded_large / large < {"int8": 0.256, "bfloat16": 0.501}[kind]
    assert {n.partition("/")[0] + "/" for n in coded if "/" in n} == ({INT8, SCALE} if kind == "int8" else {BFLOAT16})


@pytest.mark.parametrize("kind", ["int8", "bfloat16"])
def test_the_reference_follows_the_weights_and_errors_do_not_add_up(kind: str) -> None:
    one, now = broadcast(kind), weights()
    for round_ in range(30):
        now = moved(now, round_)
        told = one.meet(now)
        off = max(float(np.abs(told[n] - now[n]).max()) for n in ("w", "experts"))
        # the first weights are in bfloat16; later a step holds the last one's error beside the change
        assert off < (0.04 if round_ == 0 else 1e-3 if round_ == 1 else 1e-4)


@pytest.mark.parametrize("kind", ["int8", "bfloat16"])
def test_sites_hold_the_same_bits_whatever_they_are_sent(kind: str, site) -> None:  # type: ignore[no-untyped-def]
    one, now, held = broadcast(kind), weights(), ""
    for round_ in range(4):
        now = moved(now, round_)
        told = one.meet(now)
        sent = sent_to(one, told, Mayo=held, new="", late="0" * 64)
        assert (BASE in sent["Mayo"][0]) == (round_ > 0)
        for who, at in (
            ("Mayo", site()),
            ("new", Reference(site().file.with_name(f"new-{round_}"), "new", Resident())),
        ):
            arrays = at.resolved(*sent[who])
            assert {n: v.tobytes() for n, v in part(WEIGHTS, arrays).items()} == {
                n: v.tobytes() for n, v in told.items()
            }
            assert arrays["load/e"].tolist() == [1, 1]
        held = one.hash
        again = sent_to(one, told, Mayo=held)["Mayo"]
        assert part(WEIGHTS, again[1]) == {}
        assert hash_of(part(WEIGHTS, site().resolved(*again))) == one.hash
        whole, step = nbytes(part(WEIGHTS, sent["new"][1])), nbytes(part(WEIGHTS, sent["Mayo"][1]))
        assert sent["late"][1].keys() == sent["new"][1].keys()
        assert step < (0.55 if kind == "bfloat16" or not round_ else 0.3) * nbytes(now)
        assert whole < 0.55 * nbytes(now) if not round_ else whole == nbytes(now)


def test_a_question_asked_again_or_after_a_resume_is_about_the_same_reference() -> None:
    one, first, second = broadcast(), weights(), moved(weights(), 1)
    one.meet(first)
    saved, stands_for = (
        dict(sorted(one.reference.items())),
        one.stands_for,
    )  # as a file brings them back: in another order
    told = one.meet(second)
    assert one.meet(second) is told
    assert one.meet(told) is told
    resumed = broadcast()
    resumed.restore(saved, stands_for)
    assert hash_of(resumed.meet(first)) == hash_of(saved)
    assert hash_of(resumed.meet(second)) == hash_of(told)
    assert BASE in sent_to(resumed, resumed.reference, Mayo=hash_of(saved))["Mayo"][0]
    other = broadcast()
    other.begin()
    assert hash_of(other.meet(second)) != hash_of(told)  # begun there, it is in bfloat16
    plain = broadcast("float32")
    plain.restore(saved, stands_for)
    assert plain.meet(second) is second
    assert not plain.reference


def test_other_weights_go_to_all_in_full_and_are_then_known() -> None:
    one, other = broadcast(), weights(9)
    one.meet(weights())
    held = one.hash
    ask, arrays = sent_to(one, other, Mayo=held)["Mayo"]
    assert BASE not in ask
    assert {n: v.tobytes() for n, v in part(WEIGHTS, arrays).items()} == {n: v.tobytes() for n, v in other.items()}
    assert part(WEIGHTS, sent_to(one, dict(other), Mayo=str(ask[HASH]))["Mayo"][1]) == {}


def question(one: Broadcast, held: str) -> tuple[wire.Config, Sum]:
    return sent_to(one, one.reference, Mayo=held)["Mayo"]


def test_a_site_says_what_it_lacks(site) -> None:  # type: ignore[no-untyped-def]
    one = broadcast()
    one.meet(weights())
    first = one.hash
    with pytest.raises(Lacking, match="Mayo"):  # no file
        site().resolved(*question(one, first))
    site().resolved(*question(one, ""))
    whole = site().file.read_bytes()
    middle = len(whole) // 2  # inside a large array
    one.meet(moved(weights(), 1))
    step = question(one, first)
    for damaged in (b"", b"damaged", whole[:-5], whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]):
        site().file.write_bytes(damaged)
        with pytest.raises(Lacking):
            site().resolved(*step)
        with pytest.raises(Lacking):
            site().resolved({HASH: first}, {})
    site().file.write_bytes(whole)
    with pytest.raises(Lacking):  # a step that does not fit
        site().resolved(step[0], {n: v[:, :-1] if n == f"{WEIGHTS}{INT8}w" else v for n, v in step[1].items()})
    with pytest.raises(Lacking):
        site().resolved(step[0] | {BASE: one.hash}, step[1])
    assert site().file.read_bytes() == whole
    site().resolved(*step)
    site().resolved(*step)  # asked again: it holds them already
    one.meet(moved(weights(), 2))
    with pytest.raises(Lacking):
        site().resolved(step[0] | {HASH: one.hash}, step[1])


def test_weights_of_another_hash_are_refused_and_the_file_stays(site) -> None:  # type: ignore[no-untyped-def]
    one = broadcast()
    one.meet(weights())
    ask, arrays = question(one, "")
    site().resolved(ask, arrays)
    before = site().file.read_bytes()
    with pytest.raises(Refusal, match="Mayo: the weights in the message do not have the hash") as refused:
        site().resolved(ask | {HASH: "0" * 64}, arrays)
    assert not isinstance(refused.value, Lacking)
    assert site().file.read_bytes() == before


def test_one_message_serves_all_who_hold_the_same() -> None:
    one = broadcast()
    one.meet(weights())
    first = one.hash
    told = one.meet(moved(weights(), 1))
    written: dict[str, RecordDict] = one.contents({}, under(WEIGHTS, told), {"a": first, "b": first, "c": "", "d": "x"})
    assert written["a"] is written["b"]
    assert written["c"] is written["d"]
    assert written["a"] is not written["c"]
