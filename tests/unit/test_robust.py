"""Norm bounds, median, trimmed mean and Krum, block by block: against plain definitions, and against bad members."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oncofed.common.blocks import EVIDENCE, Blocks, Sum, weigh
from oncofed.common.exchange import Aggregation
from oncofed.common.study import Study
from oncofed.server.aggregate import Accumulator, mean_by_block
from oncofed.server.robust import LONGEST, Bounded, Guard, krum, lower_median, norms_of, suspects

BLOCKS = Blocks({"w": "trunk", "experts": ("e/0", "e/1"), "b": "trunk"})
SHAPES = {"w": (6, 3), "experts": (2, 4), "b": (), EVIDENCE: (3,)}
RULES = ("norm", "median", "trimmed_mean", "krum")


def settings_of(rule: str, **keys: float) -> Aggregation:
    return Aggregation(robust=rule, min_sites=3, **keys)  # type: ignore[arg-type]


def delta_of(seed: int) -> Sum:
    """Changes that agree on a direction, with noise of each site."""
    rng = np.random.default_rng(seed)
    return {n: (0.1 + 0.02 * rng.normal(size=s)).astype(np.float32) for n, s in SHAPES.items() if n != EVIDENCE}


def members(n: int, evidence: Callable[[int], list[float]] = lambda i: [50.0 + i, 20.0, 5.0 + i]) -> dict[str, Sum]:
    out = {}
    for i in range(n):
        vector = np.array(evidence(i))
        out[f"site {i:02d}"] = weigh(delta_of(i), vector, BLOCKS)
    return out


def together(
    sites: dict[str, Sum], rule: Aggregation, guard: Guard | None = None, order: list[str] | None = None
) -> tuple[Sum, np.ndarray]:
    guard = guard or Guard()
    collector = guard.over(Accumulator(SHAPES), rule, BLOCKS)
    for site in order or list(sites):
        collector.add(sites[site], site)
    assert collector.count == len(sites)
    total = collector.total()
    guard.learn(collector, 1)
    return mean_by_block(total, BLOCKS, rule.tau)


def stacked(sites: dict[str, Sum], name: str, block: int, row: int | None = None) -> np.ndarray:
    """The changes of the sites with evidence in a block, as plain numpy."""
    out = []
    for one in sites.values():
        n = one[EVIDENCE][block]
        if n > 0:
            out.append((one[name] if row is None else one[name][row]).astype(np.float64) / n)
    return np.array(out)


def test_median_is_numpys_over_sites_with_evidence() -> None:
    sites = members(5, lambda i: [50.0 + i, 20.0 * (i != 2), 0.0 if i < 4 else 3.0])
    mean, evidence = together(sites, settings_of("median"))
    np.testing.assert_allclose(mean["w"], np.median(stacked(sites, "w", 0), axis=0), rtol=1e-6)
    np.testing.assert_allclose(mean["b"], np.median(stacked(sites, "b", 0), axis=0), rtol=1e-6)
    np.testing.assert_allclose(mean["experts"][0], np.median(stacked(sites, "experts", 1, 0), axis=0), rtol=1e-6)
    np.testing.assert_allclose(mean["experts"][1], stacked(sites, "experts", 2, 1)[0], rtol=1e-6)
    assert evidence.tolist() == [260.0, 80.0, 3.0]


def test_median_does_not_ask_how_much_evidence() -> None:
    one, other = members(5), members(5, lambda i: [1e4 if i == 1 else 3.0, 20.0, 5.0])
    np.testing.assert_allclose(
        together(one, settings_of("median"))[0]["w"], together(other, settings_of("median"))[0]["w"], rtol=1e-5
    )


@pytest.mark.parametrize(("n", "trim"), [(3, 0.1), (7, 0.1), (10, 0.25), (4, 0.49)])
def test_trimmed_mean_is_scipys(n: int, trim: float) -> None:
    from scipy.stats import trim_mean

    sites = members(n)
    k = suspects(trim, n)
    mean, _ = together(sites, settings_of("trimmed_mean", trim=trim))
    np.testing.assert_allclose(mean["w"], trim_mean(stacked(sites, "w", 0), k / n + 1e-9, axis=0), rtol=1e-6)


def test_krum_is_blanchards() -> None:
    """The site with the least sum of squared distances to its n - f - 2 nearest others, by block."""
    sites = members(7)
    names = list(sites)
    f = suspects(0.25, 7)
    assert f == 2
    mean, _ = together(sites, settings_of("krum", trim=0.25))
    flat = np.concatenate([stacked(sites, "w", 0).reshape(7, -1), stacked(sites, "b", 0)[:, None]], axis=1)
    scores = []
    for i in range(7):
        distances = sorted(((flat[i] - flat[j]) ** 2).sum() for j in range(7) if j != i)
        scores.append(sum(distances[: 7 - f - 2]))
    best = int(np.argmin(scores))
    np.testing.assert_allclose(mean["w"], sites[names[best]]["w"] / sites[names[best]][EVIDENCE][0], rtol=1e-6)


def test_krum_of_few() -> None:
    assert krum([np.array([[3.0]])], 0) == 0
    assert krum([np.array([[3.0], [-1.0]])], 0) == 1  # nobody can tell: the shorter one
    assert krum([np.array([[1.0], [1.1], [9.0]])], 1) == 0


def test_so_many_are_suspect() -> None:
    assert [suspects(0.1, n) for n in (1, 2, 3, 10, 11, 30)] == [0, 0, 1, 1, 2, 3]
    assert [suspects(0.49, n) for n in (3, 4, 5, 10)] == [1, 1, 2, 4]
    assert suspects(0.0, 10) == 0


def test_norms_are_of_the_change_by_block() -> None:
    (one,) = members(1).values()
    delta = delta_of(0)
    expected = np.sqrt((delta["w"].astype(float) ** 2).sum() + float(delta["b"]) ** 2)
    norms = norms_of(one | {EVIDENCE: one[EVIDENCE] * [1, 0, 1]}, BLOCKS)
    np.testing.assert_allclose(norms[0], expected, rtol=1e-6)
    assert np.isnan(norms[1])
    np.testing.assert_allclose(norms[2], np.linalg.norm(delta["experts"][1]), rtol=1e-6)


def test_a_fixed_bound_cuts_each_block_and_keeps_its_direction() -> None:
    sites = members(3)
    guard = Guard()
    mean, evidence = together(sites, settings_of("norm", norm_bound=0.1), guard)
    flat = np.concatenate([mean["w"].ravel(), [mean["b"]]])
    assert np.linalg.norm(flat) <= 0.1 + 1e-6
    free, _ = together(sites, Aggregation())
    whole = np.concatenate([free["w"].ravel(), [free["b"]]])
    assert flat @ whole / np.linalg.norm(flat) / np.linalg.norm(whole) > 0.99
    assert evidence.tolist() == together(sites, Aggregation())[1].tolist()
    rows = guard.found()["rows"]
    assert {(r["site"], r["block"]) for r in rows} == {(s, b) for s in sites for b in BLOCKS.names}
    assert all(r["size"] > r["bound"] == 0.1 for r in rows)


def test_short_changes_pass_a_bound_to_the_last_bit() -> None:
    sites = members(4)
    free, _ = together(sites, Aggregation())
    bounded, _ = together(sites, settings_of("norm", norm_bound=1e3))
    assert all(free[n].tobytes() == bounded[n].tobytes() for n in free)


def test_the_first_round_takes_its_own_bound_and_later_ones_stream() -> None:
    guard, rule = Guard(), settings_of("norm")
    sites = members(5)
    collector = guard.over(Accumulator(SHAPES), rule, BLOCKS)
    assert isinstance(collector, Bounded)
    for site, one in sites.items():
        collector.add(one, site)
    assert collector.inner.count == 0  # held
    collector.total()
    guard.learn(collector, 1)
    norms = np.array([norms_of(one, BLOCKS) for one in sites.values()])
    expected = [LONGEST * lower_median(column) for column in norms.T]
    np.testing.assert_allclose(guard.bounds, expected, rtol=1e-6)
    again = guard.over(Accumulator(SHAPES), rule, BLOCKS)
    assert isinstance(again, Bounded)
    again.add(sites["site 00"], "site 00")
    assert again.inner.count == 1  # added at once, nothing held


def test_a_block_that_appears_later_waits_for_its_bound() -> None:
    guard, rule = Guard(), settings_of("norm")
    together(members(4, lambda i: [50.0, 20.0, 0.0]), rule, guard)
    assert guard.bounds is not None
    assert np.isnan(guard.bounds[2])
    mean, evidence = together(members(4), rule, guard)
    assert evidence[2] == 0
    assert (mean["experts"][1] == 0).all()
    mean, evidence = together(members(4), rule, guard)
    assert evidence[2] > 0
    assert (mean["experts"][1] != 0).all()


def poisoned(kind: str, n: int = 7) -> dict[str, Sum]:
    sites = members(n, lambda i: [50.0, 20.0, 5.0])
    factor = {"100x": 100.0, "flip": -1.0, "flip 100x": -100.0}[kind]
    one = sites["site 03"]
    sites["site 03"] = {n: v if n == EVIDENCE else v * np.float32(factor) for n, v in one.items()}
    return sites


@pytest.mark.parametrize("kind", ["100x", "flip", "flip 100x"])
@pytest.mark.parametrize("rule", RULES)
def test_one_bad_member_of_seven_does_not_move_the_model_far(rule: str, kind: str) -> None:
    """Beside the mean of the good ones: within the spread of the good, but for `norm`, which lets it pull by 3/7 of a change."""
    honest, _ = together({s: o for s, o in poisoned(kind).items() if s != "site 03"}, Aggregation())
    plain, _ = together(poisoned(kind), Aggregation())
    guarded, _ = together(poisoned(kind), settings_of(rule))
    for name in ("w", "experts"):
        size = np.linalg.norm(honest[name])
        off = np.linalg.norm(guarded[name] - honest[name]) / size
        assert off < (3.2 / 7 if rule == "norm" else 0.3), name
        if kind != "flip":
            assert np.linalg.norm(plain[name] - honest[name]) / size > 10


@pytest.mark.parametrize("rule", RULES)
def test_the_bad_member_is_named_with_size_bound_and_reason(rule: str) -> None:
    guard = Guard()
    together(poisoned("flip 100x"), settings_of(rule), guard)
    rows = guard.found()["rows"]
    assert {r["block"] for r in rows if r["site"] == "site 03"} == set(BLOCKS.names)
    assert {r["site"] for r in rows} == {"site 03"}
    assert all(r["size"] > r["bound"] > 0 and r["rounds"] == 1 and r["first_round"] == 1 and r["reason"] for r in rows)
    chosen = guard.found()["chosen"]
    assert ("site 03" not in chosen and sum(chosen.values()) == 3) if rule == "krum" else not chosen


@pytest.mark.parametrize("rule", RULES)
def test_a_flipped_change_of_the_same_length_is_named_where_distance_counts(rule: str) -> None:
    guard = Guard()
    together(poisoned("flip"), settings_of(rule), guard)
    named = {r["site"] for r in guard.found()["rows"]}
    assert named == (set() if rule == "norm" else {"site 03"})


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(RULES), st.permutations([f"site {i:02d}" for i in range(5)]))
def test_order_of_arrival_cannot_matter(rule: str, order: list[str]) -> None:
    a, b = Guard(), Guard()
    first, _ = together(members(5), settings_of(rule), a)
    second, _ = together(members(5), settings_of(rule), b, order)
    assert all(first[n].tobytes() == second[n].tobytes() for n in first)
    assert a.found() == b.found()


@pytest.mark.parametrize("rule", RULES)
def test_a_bad_sum_is_refused_by_name_and_adds_nothing(rule: str) -> None:
    guard = Guard()
    collector = guard.over(Accumulator(SHAPES), settings_of(rule), BLOCKS)
    sites = members(4)
    for site in list(sites)[:3]:
        collector.add(sites[site], site)
    wrong = sites["site 03"] | {"w": np.full((6, 3), np.nan, dtype=np.float32)}
    with pytest.raises(ValueError, match="Mayo: 'w' holds values that are not finite"):
        collector.add(wrong, "Mayo")
    assert collector.count == 3
    total = collector.total()
    good, _ = together({s: sites[s] for s in list(sites)[:3]}, settings_of(rule))
    mean, _ = mean_by_block(total, BLOCKS, 0.0)
    assert all(mean[n].tobytes() == good[n].tobytes() for n in mean)


def test_evidence_without_measure_cannot_stop_a_round() -> None:
    sites = members(4)
    vector = np.array([2e6, 2.0, 2.0])
    for i in (1, 2):
        sites[f"site {i:02d}"] = weigh({n: v * np.float32(0.01) for n, v in delta_of(i).items()}, vector, BLOCKS)
    sites["site 03"] = weigh(delta_of(3), np.array([3e6, 2.0, 2.0]), BLOCKS)
    guard = Guard()
    together(sites, settings_of("norm"), guard)
    assert [r["site"] for r in guard.found()["rows"] if not r["block"]] == ["site 03"]


def test_tau_slows_robust_changes_too() -> None:
    sites = members(3, lambda i: [10.0, 10.0, 10.0])
    free, _ = together(sites, settings_of("median"))
    slowed, _ = together(sites, settings_of("median", tau=30.0))
    np.testing.assert_allclose(slowed["w"], free["w"] / 2, rtol=1e-6)


def test_a_guard_survives_a_checkpoint() -> None:
    for rule in RULES:
        guard, again = Guard(), Guard()
        together(poisoned("100x"), settings_of(rule), guard)
        again.restore(guard.state())
        again.rule = guard.rule
        assert again.found() == guard.found()
        first, second = (together(poisoned("flip"), settings_of(rule), g)[0] for g in (guard, again))
        assert all(first[n].tobytes() == second[n].tobytes() for n in first)
    assert Guard().state() == {}


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (
            {"aggregation__robust": "median"},
            "cannot tell which of two sites is the odd one; set aggregation.min_sites to 3",
        ),
        ({"aggregation__trim": 0.5}, "less than 0.5"),
        (
            {"aggregation__robust": "norm", "model__name": "path_gptomic", "fusion__modulation": "federated"},
            "set it to 'local'",
        ),
    ],
)
def test_choices_that_do_not_go_together(keys: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Study().changed(**keys)


PRIVATE = {"panel__scale_by": "patient", "task__time_edges": (0, 12, 24, 60)}


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"aggregation__robust": "norm"}, "the clip bounds every hospital's change already"),
        ({"transport__upload": "int8"}, "longer than the clip that the noise rests on; use 'float32'"),
    ],
)
def test_hospital_level_privacy_refuses_what_breaks_its_clip(keys: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Study().changed(**PRIVATE, **keys, privacy__unit="hospital")
    Study().changed(**PRIVATE, **keys, privacy__unit="patient")
    Study().changed(**PRIVATE, privacy__unit="hospital", transport__download="bfloat16")


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"aggregation__robust": "norm"}, "privacy.secure_sum hides them from the server; choose one of both"),
        ({"transport__upload": "bfloat16"}, "masks cancel on one scale alone"),
    ],
)
def test_secure_sums_exclude_what_looks_at_one_site(
    keys: dict[str, object], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Study, "secure_sums", property(lambda self: True))
    with pytest.raises(ValueError, match=words):
        Study().changed(**keys)
    assert Study().changed().secure_sums


def test_permutations_of_members_are_alike() -> None:
    """Krum and the others know sites by their changes, not by their place."""
    sites = members(4)
    names = list(sites)
    results = set()
    for order in itertools.permutations(names, 4):
        renamed = {f"site {i:02d}": sites[s] for i, s in enumerate(order)}
        results.add(np.round(together(renamed, settings_of("trimmed_mean"))[0]["w"], 7).tobytes())
    assert len(results) == 1
