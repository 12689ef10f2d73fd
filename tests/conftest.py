"""Fixtures that several kinds of test share."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

for key, value in {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}.items():
    os.environ[key] = value
os.environ.pop("COLUMNS", None)  # set in test processes that run side by side; a test of a wide terminal says so itself

from oncofed.common.study import Study  # noqa: E402
from oncofed.deploy.sites.synth import SynthSettings, write_consortium  # noqa: E402

BEGAN = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--within", type=float, metavar="SECONDS", help="leave out, and say so, what has not begun after so long"
    )


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A slow machine must not lose a whole run because of its last tests."""
    within = item.config.getoption("--within")
    if within is not None and time.monotonic() - BEGAN > within:
        pytest.skip(f"left out: no time was left ({within:.0f} s)")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Random inputs are the same in every run: a patient at a top-k boundary would make a test a lottery."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def consortium(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four small synthetic sites in four units and formats; read-only by agreement."""
    out = tmp_path_factory.mktemp("consortium") / "sites"
    write_consortium(out, SynthSettings(sites=4, patients=240, genes=60, cancers=3, genes_per_program=8))
    return out


@pytest.fixture
def small_study(tmp_path: Path) -> Callable[..., Study]:
    """A study that trains in a second; keywords override (`training__rounds=3`)."""

    def make(**dotted: object) -> Study:
        base = {
            "model__size": "tiny",
            "training__rounds": 2,
            "training__evaluate_every": 1,
            "splits__only": [0],
            "runtime__threads": 1,
            "runtime__out": str(tmp_path / "out"),
            "runtime__wait_sites_s": 2.0,
            "runtime__round_timeout_s": 2.0,
        }
        return Study().changed(**(base | dotted))

    return make


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data that ONCOFED_DATA names."""
    folder = os.environ.get("ONCOFED_DATA", "")
    if not folder or not Path(folder).is_dir():
        pytest.skip("ONCOFED_DATA does not name a folder of real data")
    return Path(folder)
