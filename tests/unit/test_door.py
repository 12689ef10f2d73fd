"""The door: what rests on too few patients stays at the hospital, and everything else leaves as it is."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from oncofed.client.policy import Policy
from oncofed.client.release import Answer, Door
from oncofed.common import wire
from oncofed.common.blocks import Sum
from oncofed.common.errors import Refusal

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
    with pytest.raises(Refusal, match=r"9 patients behind 'query\.statistics' are fewer than the 10"):
        released(tmp_path, answer)
    assert set(released(tmp_path, answer, wire.EVALUATE)) == {"sum"}
    with pytest.raises(Refusal, match="9 patients behind 'evaluate' are fewer than the 12"):
        released(tmp_path, answer, wire.EVALUATE, min_test_patients=12)


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
