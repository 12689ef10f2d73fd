"""Disclosure control: who may show, how fine time may be, what two tables may tell together, and what noise costs."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oncofed.client.disclosure import shown, spread_cells
from oncofed.client.noise import geometric
from oncofed.client.released import ReleasedGroups, tells_of_few
from oncofed.common.errors import Refusal

NAMES = np.array([f"patient-{i}" for i in range(200)])


def grouped(*sizes: int) -> np.ndarray:
    return np.repeat(np.arange(len(sizes)), sizes)


@given(sizes=st.lists(st.integers(0, 40), min_size=1, max_size=6), least=st.integers(1, 15), seed=st.integers(0, 99))
@settings(max_examples=150, deadline=None)
def test_no_group_of_few_shows_and_those_left_out_are_never_few(sizes: list[int], least: int, seed: int) -> None:
    group = np.random.default_rng(seed).permutation(grouped(*sizes))
    other = np.random.default_rng(seed + 1).integers(0, 2, len(group))
    keep = shown([group, other], NAMES[: len(group)] if len(group) <= 200 else np.arange(len(group)), least)
    for values in (group, other):
        counts = np.bincount(values[keep]) if keep.any() else np.zeros(1)
        assert not ((counts > 0) & (counts < least)).any()
    out = len(keep) - keep.sum()
    assert out == 0 or out >= min(least, len(keep))


def test_three_patients_of_a_cancer_take_others_with_them() -> None:
    """Were only the three left out, the site's size would tell that they are three."""
    group = grouped(40, 3)
    keep = shown([group], NAMES[:43], 11)
    assert not keep[40:].any()
    assert 43 - keep.sum() == 11
    # the same others, whoever else is asked about: no two tables differ by chance
    assert (shown([group], NAMES[:43], 11) == keep).all()


def test_a_site_of_few_shows_nobody() -> None:
    assert not shown([np.zeros(10)], NAMES[:10], 11).any()
    assert shown([np.zeros(10)], NAMES[:10], 1).all()


@given(cell=st.lists(st.integers(0, 30), min_size=0, max_size=120), least=st.integers(1, 15), seed=st.integers(0, 99))
@settings(max_examples=150, deadline=None)
def test_no_cell_of_time_is_anybodys_own(cell: list[int], least: int, seed: int) -> None:
    cells, rng = np.array(cell, dtype=np.int64), np.random.default_rng(seed)
    group, event = rng.integers(0, 2, (2, len(cells)))
    runs = spread_cells(cells, event, group, NAMES[: len(cells)], least)
    out, shared = runs.cell, runs.shared
    for g in np.unique(group):
        mine = group == g
        assert (shared[mine] >= min(least, mine.sum())).all()
        assert cells[mine].min() <= out[mine].min()
        assert out[mine].max() <= cells[mine].max()


def test_within_a_run_all_that_is_told_is_how_many() -> None:
    """Whoever of a run dies first, and when, changes nothing that leaves."""
    rng = np.random.default_rng(0)
    event = np.array([1] * 6 + [0] * 6)
    first = np.concatenate([[0], rng.integers(0, 10, 10), [9]])
    second = rng.permutation(first)  # the mean leaves as well
    tables = []
    for cells in (first, second):
        runs = spread_cells(cells, event, np.zeros(12), NAMES[:12], 11)
        out, shared = runs.cell, runs.shared
        assert (shared == 12).all()
        tables.append(np.stack([np.bincount(out[event == e], minlength=10) for e in (0, 1)]))
    np.testing.assert_array_equal(*tables)


def test_runs_change_times_least() -> None:
    """Eleven at the start and eleven at the end are two runs, and a crowd keeps its own cell."""
    cells = np.repeat([0, 1, 20, 21, 40], [6, 5, 5, 6, 50])
    runs = spread_cells(cells, np.zeros(72), np.zeros(72), NAMES[:72], 11)
    out, shared = runs.cell, runs.shared
    assert (out[cells == 40] == 40).all()
    assert shared.tolist() == [11] * 22 + [50] * 50
    assert set(out[:11]) <= {0, 1}
    assert set(out[11:22]) <= {20, 21}


def test_what_is_told_of_a_run_adds_up_and_keeps_its_mean() -> None:
    rng = np.random.default_rng(0)
    cells, group, value = rng.geometric(0.15, 200), rng.integers(0, 2, 200), rng.normal(size=200)
    runs = spread_cells(cells, np.zeros(200), group, NAMES, 11)
    by_run = np.bincount(runs.run, value, len(runs.low))
    told = runs.spread(by_run, 2, cells.max() + 1)
    for g in (0, 1):
        assert told[g].sum() == pytest.approx(value[group == g].sum())
    for r in range(len(runs.low)):
        mine = runs.run == r
        assert runs.share[r].sum() == pytest.approx(1.0)
        assert runs.share[r] @ np.arange(runs.low[r], runs.high[r] + 1) == pytest.approx(cells[mine].mean(), abs=1e-6)
        assert runs.cell[mine].mean() == pytest.approx(cells[mine].mean(), abs=0.35)
        assert (runs.shared_by(2, cells.max() + 1)[runs.group[r], runs.low[r] : runs.high[r] + 1] == mine.sum()).all()


def test_without_a_rule_cells_stay() -> None:
    cells = np.array([3, 1, 2])
    assert spread_cells(cells, np.zeros(3), np.zeros(3), NAMES[:3], 1).cell.tolist() == [3, 1, 2]


def test_two_tables_that_differ_by_three_patients_are_not_both_released(tmp_path: Path) -> None:
    memory = ReleasedGroups(tmp_path / "released", "Mayo")
    everybody = frozenset(NAMES[:60].tolist())
    memory.check([everybody], 11, "query.analyse")
    memory.check([everybody], 11, "query.analyse")  # another step about the same patients
    with pytest.raises(Refusal, match=r"site Mayo: .* fewer than the 11 that its policy wants") as refused:
        memory.check([everybody - frozenset(NAMES[:3].tolist())], 11, "query.analyse")
    assert "patient-" not in str(refused.value)
    # neither is one that swaps a patient for another
    with pytest.raises(Refusal):
        memory.check([everybody - {NAMES[0]} | {NAMES[100]}], 11, "query.analyse")
    memory.check([everybody - frozenset(NAMES[:11].tolist())], 11, "query.analyse")


def test_groups_of_one_table_are_held_against_each_other(tmp_path: Path) -> None:
    memory = ReleasedGroups(tmp_path / "released", "Mayo")
    whole, part = frozenset(NAMES[:40].tolist()), frozenset(NAMES[:37].tolist())
    with pytest.raises(Refusal):
        memory.check([whole, part], 11, "query.analyse")
    assert not list((tmp_path / "released" / "patients").iterdir())


def test_a_refused_question_is_not_remembered(tmp_path: Path) -> None:
    memory = ReleasedGroups(tmp_path / "released", "Mayo")
    memory.check([frozenset(NAMES[:40].tolist())], 11, "a")
    near = frozenset(NAMES[:38].tolist())
    with pytest.raises(Refusal):
        memory.check([near], 11, "b")
    with pytest.raises(Refusal):
        memory.check([near], 11, "b")


def test_two_messages_at_once_do_not_both_pass_the_memory(tmp_path: Path) -> None:
    memory = ReleasedGroups(tmp_path / "released", "Mayo")

    def ask(missing: int) -> bool:
        try:
            memory.check([frozenset(NAMES[:60].tolist()) - {NAMES[missing]}], 11, "x")
        except Refusal:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(ask, range(16))) == 1


def test_patients_are_told_on_one_grid_whatever_group_they_are_in(tmp_path: Path) -> None:
    memory = ReleasedGroups(tmp_path / "released", "Mayo")
    memory.same_grid(frozenset(NAMES[:40].tolist()), "3.0 months", "x")
    memory.same_grid(frozenset(NAMES[:40].tolist()), "3.0 months", "x")
    memory.same_grid(frozenset(NAMES[50:90].tolist()), "2.0 months", "x")
    with pytest.raises(Refusal, match="on another; keep to the first"):
        memory.same_grid(frozenset(NAMES[30:70].tolist()), "3.0 months", "x")


def test_questions_are_counted_by_patient(tmp_path: Path) -> None:
    memory = ReleasedGroups(tmp_path / "released", "Mayo")
    memory.count(frozenset(NAMES[:40].tolist()), 2, "x")
    memory.count(frozenset(NAMES[20:60].tolist()), 2, "x")
    with pytest.raises(Refusal, match="answered 2 times about some of these patients"):
        memory.count(frozenset(NAMES[39:80].tolist()), 2, "x")
    memory.count(frozenset(NAMES[100:140].tolist()), 2, "x")


def test_three_tables_of_large_groups_do_not_tell_of_the_one_who_is_in_none_but_the_first(tmp_path: Path) -> None:
    """All, all of kind A, all of kind B: what is left is one patient of kind C."""
    memory = ReleasedGroups(tmp_path / "released", "Mayo")
    everybody, a, b = (frozenset(NAMES[rows].tolist()) for rows in (slice(0, 81), slice(0, 40), slice(40, 80)))
    memory.check([everybody], 11, "x")
    memory.check([a], 11, "x")
    with pytest.raises(Refusal, match="earlier tables together would tell of fewer patients"):
        memory.check([b], 11, "x")


def test_margins_of_two_groupings_tell_of_no_small_cell_between_them(tmp_path: Path) -> None:
    """By sex and by kind are two tables; how many women are of a kind is no combination of them."""
    memory = ReleasedGroups(tmp_path / "released", "Mayo")
    kinds = [frozenset(NAMES[i : i + 20].tolist()) for i in (0, 20, 40)]
    women = frozenset(NAMES[[*range(15), *range(20, 25), *range(40, 50)]].tolist())
    memory.check(kinds, 11, "x")
    memory.check([women, frozenset(NAMES[:60].tolist()) - women], 11, "x")


def test_nobody_is_in_more_tables_than_the_hospital_says(tmp_path: Path) -> None:
    memory = ReleasedGroups(tmp_path / "released", "Mayo")
    for i in range(3):
        memory.check([frozenset(NAMES[20 * i : 20 * i + 80].tolist())], 11, "x", most=3)
    with pytest.raises(Refusal, match=r"3 tables were answered already \(max_tables"):
        memory.check([frozenset(NAMES[60:140].tolist())], 11, "x", most=3)
    memory.check([frozenset(NAMES[120:160].tolist())], 11, "x", most=3)


@given(groups=st.lists(st.sets(st.integers(0, 9), min_size=1), min_size=1, max_size=5))
@settings(max_examples=100, deadline=None)
def test_what_is_told_of_few_is_what_some_weights_on_the_tables_make(groups: list[set[int]]) -> None:
    """Held against weights from -1 to 1: whatever a plain difference tells, the audit tells as well."""
    from itertools import product

    sets = [frozenset(map(str, g)) for g in groups]
    rows = np.array([[float(str(p) in s) for p in range(10)] for s in sets])
    sums = np.array(list(product((-1.0, 0.0, 1.0), repeat=len(sets)))) @ rows
    indicator = np.isin(sums, (0.0, 1.0)).all(1) & (sums.sum(1) > 0)
    found = bool((sums[indicator].sum(1) < 3).any())
    if found:
        assert tells_of_few(sets, 3)
    if all(len(s) >= 3 for s in sets) and len(sets) == 1:
        assert not tells_of_few(sets, 3)


def test_noise_is_unbiased_has_its_variance_and_goes_below_zero() -> None:
    epsilon = 0.5
    noisy = geometric(np.zeros((40, 1000)), epsilon, 1)
    p = np.exp(-epsilon)
    variance = 2 * p / (1 - p) ** 2
    assert abs(noisy.mean()) < 5 * np.sqrt(variance / noisy.size)
    assert noisy.var() == pytest.approx(variance, rel=0.08)
    assert (noisy < 0).any()
    assert np.array_equal(noisy, np.rint(noisy))


def test_noise_scales_with_sensitivity() -> None:
    assert geometric(np.zeros(20000), 1.0, 10).var() == pytest.approx(
        2 * np.exp(-0.1) / (1 - np.exp(-0.1)) ** 2, rel=0.1
    )


def test_no_seed_gives_the_noise_again() -> None:
    np.random.seed(0)
    first = geometric(np.zeros(200), 0.1, 1)
    np.random.seed(0)
    assert not np.array_equal(first, geometric(np.zeros(200), 0.1, 1))


def test_fractions_get_no_noise_of_whole_numbers() -> None:
    with pytest.raises(ValueError, match="fractions"):
        geometric(np.array([0.5]), 1.0, 1)
