"""The spread of risks and the baselines behind a policy: near the open ones, and nothing of a single patient in them."""

from __future__ import annotations

import numpy as np
import pytest
from oncofed.client.data.cohort import Cohort
from oncofed.client.explain import calibration_sums
from oncofed.common.errors import Refusal
from oncofed.common.survival import TimeGrid, initial_log_baseline

GRID = TimeGrid(tuple(np.arange(0.0, 60.0, 6.0)))


def patients(n: int = 600, seed: int = 0) -> tuple[np.ndarray, Cohort]:
    rng = np.random.default_rng(seed)
    risk = rng.normal(size=n) * 0.7
    died, left = rng.exponential(30 * np.exp(-risk)), rng.uniform(5, 90, n)
    nobody, none = np.zeros(n, dtype=np.int64), np.zeros((n, 0), dtype=np.float32)
    names = np.array([f"p{i}" for i in range(n)])
    event = (died <= left).astype(np.int64)
    return risk, Cohort(none, none, np.minimum(died, left), event, nobody, nobody, names)


def test_baselines_behind_a_policy_are_near_the_open_ones() -> None:
    risk, cohort = patients()
    open_, behind = (calibration_sums(risk, cohort, GRID, 1, least) for least in (1, 11))
    assert behind["events"].sum() == open_["events"].sum()
    a, b = (initial_log_baseline(s["events"], s["weighted_exposure"]) for s in (open_, behind))
    assert np.abs(a - b).max() < 0.15
    assert behind["weighted_exposure"].sum() == pytest.approx(open_["weighted_exposure"].sum(), rel=0.04)


def test_a_patients_own_risk_moves_nothing_but_her_runs_mean() -> None:
    """Two patients of one run who change places in risk are not told apart."""
    risk, cohort = patients(200)
    late = np.argsort(cohort.time)[-2:]
    swapped = risk.copy()
    swapped[late] = risk[late[::-1]]
    told, other = (calibration_sums(r, cohort, GRID, 1, 11) for r in (risk, swapped))
    for name in ("events", "weighted_exposure"):
        np.testing.assert_allclose(told[name], other[name])
    assert not np.allclose(
        calibration_sums(risk, cohort, GRID, 1)["weighted_exposure"],
        calibration_sums(swapped, cohort, GRID, 1)["weighted_exposure"],
    )


def test_risks_that_single_a_patient_out_are_refused() -> None:
    risk, cohort = patients(200)
    risk[17] = 12.0
    with pytest.raises(Refusal, match="outweigh the others of a run"):
        calibration_sums(risk, cohort, GRID, 1, 11)
