"""Noise that nobody can draw again, on a lattice; and shares of it."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from oncofed.client.privacy.hospital import clipped_change
from oncofed.common.blocks import EVIDENCE, Blocks
from oncofed.common.errors import Refusal
from oncofed.common.noise import LEVELS, SecureNoise
from oncofed.common.privacy.sharing import share_of
from scipy import stats

N = 200_000


def test_normal_numbers_are_normal() -> None:
    """A false alarm once in a million runs: the noise has no seed."""
    z = SecureNoise().normal(N + 1).numpy()
    assert len(z) == N + 1
    assert stats.kstest(z, "norm").pvalue > 1e-6
    assert abs(z.mean()) < 5 / math.sqrt(N)
    assert abs(z.std() - 1) < 5 / math.sqrt(2 * N)
    assert abs(np.corrcoef(z[: N // 2], z[N // 2 : -1])[0, 1]) < 5 / math.sqrt(N // 2)  # both halves of Box and Muller


def test_the_noise_of_a_sum_has_the_deviation_that_is_promised() -> None:
    """Twenty steps: sigma * C within two percent."""
    noise, total = SecureNoise(), torch.randn(5_000)
    added = torch.cat([noise.covered(total, sensitivity=0.4, deviation=4.2) - total for _ in range(20)])
    assert float(added.std()) == pytest.approx(0.4 * 4.2, rel=0.02)
    assert abs(float(added.mean())) < 5 * 0.4 * 4.2 / math.sqrt(100_000)


def test_without_deviation_a_sum_is_truncated_and_never_longer() -> None:
    total = torch.randn(10_000, dtype=torch.float64)
    out = SecureNoise().covered(total, sensitivity=1.0, deviation=0.0)
    assert (out.abs() <= total.abs()).all()
    assert float((out - total).abs().max()) <= 1 / LEVELS


def test_noisy_sums_lie_on_the_lattice_whatever_was_below() -> None:
    for total in (torch.zeros(1000), torch.full((1000,), 1 / 3), torch.randn(1000)):
        steps = SecureNoise().covered(total, sensitivity=0.5, deviation=1.0).double() / (0.5 / LEVELS)
        torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-6)


def test_large_sums_are_covered_piece_by_piece() -> None:
    out = SecureNoise().covered(torch.zeros(3, 700_001), sensitivity=1.0, deviation=1.0)
    assert out.shape == (3, 700_001)
    assert (out != 0).float().mean() > 0.999
    assert float(out[-1, -1000:].std()) == pytest.approx(1.0, rel=0.2)


def test_two_processes_with_one_seed_draw_other_noise() -> None:
    program = (
        "import torch, numpy, random; torch.manual_seed(0); numpy.random.seed(0); random.seed(0)\n"
        "from oncofed.common.noise import SecureNoise; print(SecureNoise().normal(3).tolist())"
    )
    runs = [
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True) for _ in range(2)
    ]
    assert runs[0].stdout != runs[1].stdout
    torch.manual_seed(0)
    a = SecureNoise().normal(3)
    torch.manual_seed(0)
    assert not torch.equal(a, SecureNoise().normal(3))


def test_a_poisson_sample_takes_each_by_herself() -> None:
    noise = SecureNoise()
    counts = np.array([len(noise.chosen(400, 0.25)) for _ in range(2000)])
    assert counts.mean() == pytest.approx(100, abs=5 * math.sqrt(75 / 2000))
    assert counts.std() == pytest.approx(math.sqrt(75), rel=0.12)  # a fixed number would have none
    assert len(noise.chosen(50, 1.0)) == 50


def test_shares_of_noise_add_up_when_some_are_silent() -> None:
    """Five sites, one silent, deviation 2: what is left has 2, all of them 2.236 (privacy.md, 4.3)."""
    share = share_of(2.0, 5, 1)
    noise = SecureNoise()
    parts = torch.stack([noise.normal(100_000) * share for _ in range(5)])
    assert float(parts[:4].sum(0).std()) == pytest.approx(2.0, rel=0.02)
    assert float(parts.sum(0).std()) == pytest.approx(2.236, rel=0.02)
    with pytest.raises(ValueError, match="silent = 5"):
        share_of(1.0, 5, 5)


# -- a hospital's change -----------------------------------------------------------------------------------------------

BLOCKS = Blocks({"a": "trunk", "b": ("expert/0", "expert/1")})


def change(scale: float, patients: float = 7.0) -> dict[str, np.ndarray]:
    a, b = np.full((3, 3), scale, np.float32), np.full((2, 4), scale, np.float32)
    return {EVIDENCE: np.full(3, patients), "a": a * patients, "b": b * patients, "branches": np.ones((1, 1))}


def test_a_hospitals_change_is_cut_as_one_vector() -> None:
    out = clipped_change(change(2.0), BLOCKS, 0.5, "Bergen")
    assert set(out) == {EVIDENCE, "a", "b"}  # nothing else is told
    assert (out[EVIDENCE] == 1).all()
    whole = np.concatenate([out["a"].ravel(), out["b"].ravel()]).astype(np.float64)
    assert np.linalg.norm(whole) <= 0.5
    assert np.linalg.norm(whole) == pytest.approx(0.5, rel=1e-5)
    small = clipped_change(change(0.01), BLOCKS, 0.5, "Bergen")
    np.testing.assert_allclose(small["a"], 0.01, rtol=1e-6)


def test_a_zero_change_stays_zero_and_one_that_is_not_finite_is_refused() -> None:
    assert not clipped_change(change(0.0), BLOCKS, 0.5, "Bergen")["a"].any()
    for bad in (np.nan, np.inf):
        with pytest.raises(Refusal, match=r"Bergen.*not finite"):
            clipped_change(change(bad), BLOCKS, 0.5, "Bergen")


def test_a_change_that_weighs_blocks_by_what_the_hospital_has_is_no_hospital_change() -> None:
    uneven = change(1.0) | {EVIDENCE: np.array([7.0, 3.0, 7.0])}
    with pytest.raises(ValueError, match="alike"):
        clipped_change(uneven, BLOCKS, 0.5, "Bergen")
