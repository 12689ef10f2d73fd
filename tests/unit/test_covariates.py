"""Clinical covariates: how a study names them and how a site's columns become numbers."""

from __future__ import annotations

import logging

import numpy as np
import pandas as pd
import pytest
import torch
from oncofed.client.batch import Lens
from oncofed.client.data.cohort import encode_covariates
from oncofed.common.covariates import Covariate, input_names, parse_covariates
from oncofed.common.models.heads import Covariates
from oncofed.common.scaling import moments
from oncofed.common.study import Study
from oncofed.common.survival import TimeGrid
from oncofed.server.statistics import covariate_scale


def rows(**columns: list[object]) -> pd.DataFrame:
    return pd.DataFrame(columns)


def test_a_number_is_one_input_and_levels_are_one_less_than_they_are() -> None:
    covariates = ("age", "sex=female|male", " grade = G1 | G2 | G3 ")
    assert parse_covariates(covariates)[2] == Covariate("grade", ("G1", "G2", "G3"))
    assert input_names(covariates) == ("age", "sex=male", "grade=G2", "grade=G3")
    assert input_names(()) == ()


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["time"], "'time' names no covariate"),
        (["event=0|1"], "'event=0|1' names no covariate"),
        (["cancer_type"], "names no covariate"),
        (["patient"], "names no covariate"),
        (["=a|b"], "names no covariate"),
        (["sex="], "needs two or more different levels"),
        (["sex=male"], "needs two or more different levels"),
        (["sex=male|"], "needs two or more different levels"),
        (["sex=male|Male"], "needs two or more different levels"),
        (["age", "age"], "names a column twice"),
        (["sex=female|male", "sex"], "names a column twice"),
    ],
)
def test_mistakes_are_refused_with_the_text_that_holds_them(texts: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=words.replace("|", r"\|")):
        parse_covariates(texts)
    with pytest.raises(ValueError, match=words.replace("|", r"\|")):
        Study().changed(panel__covariates=texts)


def test_covariates_survive_flowers_flat_run_config() -> None:
    study = Study().changed(panel__covariates=["age", "sex=female|male"])
    assert Study.from_run_config(study.run_config()).panel.covariates == ("age", "sex=female|male")


def test_numbers_are_read_and_what_is_none_is_unknown() -> None:
    table = rows(age=["61", 47.5, "old", None, float("inf")])
    v = encode_covariates(table, ("age",), "Mayo")
    assert v.dtype == np.float32
    np.testing.assert_array_equal(v, np.array([[61.0], [47.5], [np.nan], [np.nan], [np.nan]], dtype=np.float32))


def test_levels_do_not_depend_on_case_or_blanks() -> None:
    table = rows(sex=["Male", "female", " MALE ", "FEMALE"])
    np.testing.assert_array_equal(encode_covariates(table, ("sex=female|male",), "Mayo")[:, 0], [1, 0, 1, 0])
    np.testing.assert_array_equal(encode_covariates(table, ("sex=Male|Female",), "Mayo")[:, 0], [0, 1, 0, 1])


def test_levels_that_are_numbers_survive_missing_values() -> None:
    """pandas reads whole numbers beside an empty cell as 1.0, 2.0."""
    whole, holes = rows(stage=[1, 2, 3]), rows(stage=[1.0, 2.0, np.nan, 3.0])
    np.testing.assert_array_equal(encode_covariates(whole, ("stage=1|2|3",), "Mayo"), [[0, 0], [1, 0], [0, 1]])
    np.testing.assert_array_equal(
        encode_covariates(holes, ("stage=1|2|3",), "Mayo"), [[0, 0], [1, 0], [np.nan] * 2, [0, 1]]
    )


def test_unknown_levels_are_unknown_for_all_inputs_and_told_by_their_number(caplog: pytest.LogCaptureFixture) -> None:
    table = rows(grade=["G1", "G3", "G9", None, "GX"])
    with caplog.at_level(logging.WARNING, "oncofed.client"):
        v = encode_covariates(table, ("grade=G1|G2|G3",), "Mayo")
    np.testing.assert_array_equal(v, [[0, 0], [0, 1], [np.nan] * 2, [np.nan] * 2, [np.nan] * 2])
    (record,) = caplog.records
    assert record.getMessage().startswith("Mayo: 2 values of 'grade' are none of")


def test_a_missing_column_is_unknown_for_all_patients_and_keeps_the_order_of_inputs(
    caplog: pytest.LogCaptureFixture,
) -> None:
    table = rows(age=[60.0, 70.0])
    with caplog.at_level(logging.WARNING, "oncofed.client"):
        v = encode_covariates(table, ("grade=G1|G2|G3", "age"), "Mayo")
    np.testing.assert_array_equal(v, [[np.nan, np.nan, 60.0], [np.nan, np.nan, 70.0]])
    assert "no clinical column 'grade'" in caplog.text


def test_without_covariates_there_are_no_inputs() -> None:
    assert encode_covariates(rows(age=[1.0, 2.0, 3.0]), (), "Mayo").shape == (3, 0)


def test_inputs_are_standardised_by_the_federations_sums_and_unknown_becomes_the_mean() -> None:
    rng = np.random.default_rng(0)
    sites = [rng.normal(62, 11, (n, 1)).astype(np.float32) for n in (30, 50)]
    sites[0][:7] = np.nan
    sums = [moments(v, np.zeros(len(v), dtype=int), 1) for v in sites]
    total = {f"covariate_{k}": (sums[0][k] + sums[1][k])[0] for k in sums[0]}
    scale = covariate_scale(total)
    lens = Lens({}, (scale["covariate_mean"], scale["covariate_sd"]), TimeGrid((0.0, 5.0)))
    known = np.concatenate(sites)
    inputs = lens.covariate_inputs(known)
    assert (inputs[:7] == 0).all()
    np.testing.assert_allclose(inputs[7:], (known[7:] - known[7:].mean()) / known[7:].std(), atol=1e-4)


def test_a_covariate_that_is_nowhere_known_or_everywhere_the_same_stays_finite() -> None:
    scale = covariate_scale(
        {
            "covariate_n": np.array([0.0, 40.0]),
            "covariate_sum": np.array([0.0, 40.0]),
            "covariate_squares": np.array([0.0, 40.0]),
        }
    )
    np.testing.assert_array_equal(scale["covariate_mean"], [0.0, 1.0])
    np.testing.assert_array_equal(scale["covariate_sd"], [1.0, 1.0])


def test_the_branch_is_linear_with_a_shared_part_and_one_of_each_cancer() -> None:
    branch = Covariates(2, 1, 3)
    v, cancer = torch.randn(6, 2), torch.arange(6) % 3
    assert (branch(v, cancer) == 0).all()
    with torch.no_grad():
        branch.shared[:] = torch.tensor([[1.0], [2.0]])
        branch.own[1] = torch.tensor([[10.0], [0.0]])
    expected = v[:, 0] + 2 * v[:, 1] + 10 * v[:, 0] * (cancer == 1)
    torch.testing.assert_close(branch(v, cancer)[:, 0], expected)
    assert Covariates(2, 4, 0).own is None
