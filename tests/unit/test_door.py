"""The door: what rests on too few patients stays at the hospital, and everything else leaves as it is."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from oncofed.client.policy import Policy
from oncofed.client.release import Answer, Answered, Door, Release
from oncofed.common import wire
from oncofed.common.blocks import Sum
from oncofed.common.errors import Refusal
from oncofed.common.privacy.accounting import Mechanism

STAMP: wire.Config = {"study": "s", "fold": 0, "phase": "train", "round": 0}


def door(folder: Path, **policy: object) -> Door:
    return Door("Mayo", Policy.model_validate(policy), folder / "log.jsonl")


def released(folder: Path, answer: Answer, kind: str = wire.STATISTICS, **policy: object) -> Sum:
    return wire.read_arrays(door(folder, **policy).release(kind, STAMP, answer))


def table(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape) + 10.0


def test_cells_of_few_patients_are_withheld_and_large_ones_pass_unchanged(tmp_path: Path) -> None:
    total = {"sum": table(4, 5), "power_sum": table(4, 6, 5), "gate": table(4)}
    count = np.array([0, 9, 10, 200])
    out = released(tmp_path, Answer({}, total, 219, dict.fromkeys(total, count)))
    for name, value in out.items():
        np.testing.assert_array_equal(value[1], np.zeros_like(value[1]), err_msg=name)
        np.testing.assert_array_equal(value[[0, 2, 3]], total[name][[0, 2, 3]], err_msg=name)
    assert (total["sum"][1] != 0).all()  # the site's own sum is not touched


def test_the_bound_is_the_hospitals_own(tmp_path: Path) -> None:
    total = {"sum": table(3, 5)}
    cells = {"sum": np.array([4, 5, 50])}
    out = released(tmp_path, Answer({}, total, 59, cells), min_patients=5)
    assert (out["sum"][0] == 0).all()
    np.testing.assert_array_equal(out["sum"][1:], total["sum"][1:])
    out = released(tmp_path, Answer({}, total, 59, cells), min_patients=51)
    assert (out["sum"] == 0).all()


def test_a_cell_with_as_few_patients_as_numbers_in_it_is_withheld(tmp_path: Path) -> None:
    """n sums of one quantity over n patients are n equations for n unknowns."""
    total = {"power_sum": table(3, 5)}
    answer = Answer({}, total, 100, {"power_sum": np.array([13, 14, 15])}, numbers=14)
    out = released(tmp_path, answer, min_patients=2)
    assert (out["power_sum"][:2] == 0).all()
    np.testing.assert_array_equal(out["power_sum"][2], total["power_sum"][2])


def test_arrays_that_are_no_cells_leave_whole(tmp_path: Path) -> None:
    total = {"sum": table(2, 5), "covariate_sum": table(2)}
    out = released(tmp_path, Answer({}, total, 12, {"sum": np.array([3, 9])}))
    assert (out["sum"] == 0).all()
    np.testing.assert_array_equal(out["covariate_sum"], total["covariate_sum"])


def test_a_whole_answer_over_few_patients_is_refused(tmp_path: Path) -> None:
    answer = Answer({}, {"sum": table(5)}, 9)
    with pytest.raises(Refusal, match=r"fewer patients are behind 'query\.statistics' than the 10"):
        released(tmp_path, answer)
    with pytest.raises(Refusal, match="fewer patients are behind 'evaluate' than the 11"):
        released(tmp_path, answer, wire.EVALUATE)
    for policy in ({"min_cell": 9}, {"min_cell": 1}):
        assert set(released(tmp_path, answer, wire.EVALUATE, **policy)) == {"sum"}


def test_a_greeting_holds_no_sum_and_passes(tmp_path: Path) -> None:
    content = door(tmp_path).release(wire.HELLO, STAMP, Answer({"genes": ["TP53"]}))
    assert wire.read_arrays(content) == {}
    told = wire.read_config(content, "from")
    assert (told["site"], told["genes"], told["phase"]) == ("Mayo", ["TP53"], "train")


def test_values_that_are_not_finite_are_refused_also_in_a_cell_that_is_large(tmp_path: Path) -> None:
    total = {"sum": table(2, 5)}
    total["sum"][1, 3] = np.nan
    with pytest.raises(Refusal, match="1 values that are not finite in 'sum'"):
        released(tmp_path, Answer({}, total, 60, {"sum": np.array([30, 30])}))


def test_the_log_holds_the_digest_of_what_left_and_not_of_what_was_withheld(tmp_path: Path) -> None:
    total = {"sum": table(2, 5)}
    out = released(tmp_path, Answer({}, total, 60, {"sum": np.array([3, 57])}))
    (line,) = [json.loads(text) for text in (tmp_path / "log.jsonl").read_text().splitlines()]
    digest = hashlib.sha256(b"sum" + np.ascontiguousarray(out["sum"]).tobytes()).hexdigest()
    assert line["sha256"] == digest
    assert (line["kind"], line["patients"], line["arrays"]) == (wire.STATISTICS, 60, {"sum": [2, 5]})


def test_tables_are_held_against_the_bound_of_cells_and_other_sums_against_that_of_patients(tmp_path: Path) -> None:
    total = {"sum": table(3, 5)}
    answer = Answer({}, total, 60, {"sum": np.array([10, 11, 39])})
    assert (released(tmp_path, answer)["sum"] != 0).all()
    assert (released(tmp_path, answer, wire.ANALYSE)["sum"][0] == 0).all()
    np.testing.assert_array_equal(released(tmp_path, answer, wire.ANALYSE, min_cell=1)["sum"], total["sum"])


def test_cells_that_lie_along_several_axes(tmp_path: Path) -> None:
    """By stratum and cell of time, whatever stands behind: [S, T] beside [S, T, P]."""
    total = {"left": table(2, 3, 4)}
    count = np.array([[3, 20, 0], [30, 5, 11]])
    out = released(tmp_path, Answer({}, total, 69, {"left": count[..., None]}), wire.ANALYSE)["left"]
    small = (count > 0) & (count < 11)
    assert (out[small] == 0).all()
    np.testing.assert_array_equal(out[~small], total["left"][~small])


def test_counts_are_rounded_where_the_hospital_says_so(tmp_path: Path) -> None:
    answer = Answer({}, {"events": np.array([12.0, 13.0, 0.0]), "risk": np.array([0.5])}, 60, counts={"events": 1})
    out = released(tmp_path, answer, wire.ANALYSE, rounding=5)
    assert out["events"].tolist() == [10.0, 15.0, 0.0]
    assert out["risk"].tolist() == [0.5]


def test_noise_is_paid_for_and_nothing_but_counts_leaves_with_it(tmp_path: Path) -> None:
    counts = Answer({"step": "table"}, {"events": np.zeros(500)}, 3, counts={"events": 1}, epsilon=1.0)

    def noised(answer: Answer, study: str, id_: str, question: str = "q", budget: float = 1.5) -> Sum:
        here = door(tmp_path, epsilon_budget=budget)
        here.expect(Release(id_, question, study, "table", (Mechanism("pure", 1.0),), (1.0, 1e-5)))
        return wire.read_arrays(here.release(wire.ANALYSE, STAMP, answer))

    out = noised(counts, "km", "km/1")["events"]
    assert (out < 0).any()
    assert (out > 0).any()
    with pytest.raises(Answered) as again:
        noised(counts, "km", "km/1")
    np.testing.assert_array_equal(wire.read_arrays(again.value.content)["events"], out, "the very same noise")
    with pytest.raises(Refusal, match="is in its ledger already"):
        noised(counts, "km", "km/1", "another question", 8.0)
    with pytest.raises(Refusal, match=r"would come to epsilon 2 .* and it promised 1"):
        noised(counts, "km", "km/2", budget=8.0)
    with pytest.raises(Refusal, match=r"1 of the budget of 1\.5 is spent"):
        noised(counts, "other", "other/1")
    mixed = Answer({}, {"events": np.zeros(5), "risk": np.zeros(5)}, 3, counts={"events": 1}, epsilon=0.1)
    with pytest.raises(Refusal, match=r"tables of counts alone, not \['risk'\]"):
        noised(mixed, "third", "third/1", budget=8.0)
    with pytest.raises(RuntimeError, match="nobody booked"):
        released(tmp_path, counts, wire.ANALYSE)


def test_two_answers_about_neighbouring_patients_do_not_both_leave(tmp_path: Path) -> None:
    def about(count: int) -> Answer:
        group = frozenset(f"p{i}" for i in range(count))
        return Answer({}, {"sum": np.full(3, float(count))}, count, groups=(group,))

    released(tmp_path, about(40), wire.ANALYSE)
    with pytest.raises(Refusal, match="differ from those of an earlier table"):
        released(tmp_path, about(43), wire.ANALYSE)
    released(tmp_path, about(43), wire.ANALYSE, min_cell=1)
    released(tmp_path, about(60), wire.ANALYSE)
    lines = [json.loads(text) for text in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["patients"] for line in lines] == [40, 43, 60]
