"""Checkpoints: kept by number, known by their SHA-256, and never at the cost of an earlier one."""

from __future__ import annotations

import logging
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from oncofed.common.files import DiskFull, write_text
from oncofed.server.checkpoint import Checkpoints, load_arrays, save_arrays
from safetensors import safe_open
from safetensors.numpy import save_file

ARRAYS = {"a": np.arange(6.0).reshape(2, 3), "empty": np.zeros((0, 2)), "one": np.float32([3.5])}


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    return Checkpoints.of(tmp_path, 0, "train", 3)


def filled(checkpoints: Checkpoints, rounds: int = 4) -> Checkpoints:
    for round_ in range(1, rounds + 1):
        checkpoints.save(round_, {"w": np.full(100, float(round_))}, {"round": round_})
    return checkpoints


def test_what_is_saved_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_arrays(path, ARRAYS, {"curve": [{"round": 1}]})
    arrays, about = load_arrays(path)
    assert about == {"curve": [{"round": 1}]}
    assert {k: (v.shape, v.dtype, v.tobytes()) for k, v in arrays.items()} == {
        k: (v.shape, v.dtype, v.tobytes()) for k, v in ARRAYS.items()
    }


def test_the_last_few_are_kept(checkpoints: Checkpoints) -> None:
    filled(checkpoints, 12)
    assert [f.name for f in checkpoints.files] == [f"round-{r:04d}.safetensors" for r in (12, 11, 10)]
    found = checkpoints.newest()
    assert found is not None
    assert found[2] == {"round": 12}


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-40])


def emptied(file: Path) -> None:
    file.write_bytes(b"")


def flipped(file: Path) -> None:
    whole = bytearray(file.read_bytes())
    whole[-1] ^= 1
    file.write_bytes(bytes(whole))


def described_otherwise(file: Path) -> None:
    """The arrays as they were, the description another: no tool writes that, a bad block might."""
    with safe_open(file, framework="numpy") as f:
        arrays, about = {k: f.get_tensor(k) for k in f.keys()}, f.metadata()  # noqa: SIM118
    save_file(arrays, file, about | {"about": about["about"].replace("4", "7")})


@pytest.mark.parametrize("damage", [cut, emptied, flipped, described_otherwise])
def test_a_damaged_one_is_named_and_the_one_before_is_used(
    checkpoints: Checkpoints, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    damage(filled(checkpoints).files[0])
    with caplog.at_level(logging.ERROR, "oncofed.server"):
        found = checkpoints.newest()
    assert found is not None
    assert (found[0].name, found[2]) == ("round-0003.safetensors", {"round": 3})
    assert found[1]["w"].tolist() == [3.0] * 100
    assert "round-0004.safetensors is damaged" in caplog.text


def test_without_a_whole_one_the_phase_begins_anew(checkpoints: Checkpoints, caplog: pytest.LogCaptureFixture) -> None:
    assert checkpoints.newest() is None
    for file in filled(checkpoints).files:
        cut(file)
    assert checkpoints.newest() is None
    assert "no checkpoint in" in caplog.text


def test_the_one_file_of_earlier_versions_is_read_once(tmp_path: Path) -> None:
    checkpoints = Checkpoints.of(tmp_path, 0, "train", 2)
    old = tmp_path / "checkpoints" / "fold-0-train.safetensors"
    old.parent.mkdir()
    save_file({"w": np.ones(3)}, old, {"about": '{"round": 7}'})
    found = checkpoints.newest()
    assert found is not None
    assert (found[0], found[2]) == (old, {"round": 7})
    checkpoints.save(8, {"w": np.ones(3)}, {"round": 8})
    assert old.exists()  # of a damaged one it is the one before
    checkpoints.save(9, {"w": np.ones(3)}, {"round": 9})
    assert not old.exists()


def test_what_a_killed_server_was_writing_is_cleared_away(checkpoints: Checkpoints) -> None:
    half = filled(checkpoints).folder / "round-0005.safetensors.123.tmp"
    half.write_bytes(b"half")
    found = checkpoints.newest()
    assert found is not None
    assert found[2] == {"round": 4}
    assert not half.exists()


@pytest.mark.parametrize("what", ["arrays", "text"])
def test_without_room_the_error_says_where_and_what_to_do(tmp_path: Path, what: str) -> None:
    """In a process of its own, whose files may not grow beyond 100 kB."""
    checkpoints = filled(Checkpoints.of(tmp_path, 0, "train", 3))
    before = {f.name: f.read_bytes() for f in checkpoints.folder.iterdir()}
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            if what == "arrays":
                checkpoints.save(5, {"w": np.zeros(50_000)}, {"round": 5})
            else:
                write_text(checkpoints.folder / "results.json", "x" * 200_000)
        except DiskFull as error:
            os.write(write, str(error).encode())
        finally:
            os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    with os.fdopen(read) as said:
        words = said.read()
    assert "was not written, the file is too large at" in words
    assert str(checkpoints.folder) in words
    assert "make room there and resume" in words
    assert {f.name: f.read_bytes() for f in checkpoints.folder.iterdir()} == before
