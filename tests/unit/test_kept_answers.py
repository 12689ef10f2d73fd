"""An answer that was let out is given again as it was, and to the same question alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from oncofed.client.privacy.answers import KeptAnswers

CONFIG = {"study": "s", "round": 3, "loss": 0.1 + 0.2, "noisy": True, "cancers": ["BRCA", "LUAD"], "shares": [1 / 3]}


@pytest.fixture
def kept(tmp_path: Path) -> KeptAnswers:
    return KeptAnswers(tmp_path / "answers")


def test_a_retry_gets_the_very_same_bytes(kept: KeptAnswers) -> None:
    rng = np.random.default_rng(0)
    arrays = {
        "w": rng.normal(size=(4, 3)).astype(np.float32).T,  # not as C lays arrays out
        "a": rng.normal(size=5),
        "counts": rng.integers(-5, 5, (2, 0, 3)),
        "one": np.array(7.5),
        "big": np.arange(4, dtype=">f8"),
        "nan": np.array([np.nan, -0.0, np.inf]),
        "flags": np.array([True, False]),
    }
    kept.keep("study/train/0/3", "digest", CONFIG, arrays)
    found = KeptAnswers(kept.folder).again("study/train/0/3", "digest")
    assert found is not None
    config, again = found
    assert config == CONFIG
    assert list(again) == list(arrays)
    for name, value in arrays.items():
        assert again[name].shape == value.shape
        assert again[name].dtype == value.dtype.newbyteorder("=")
        assert again[name].tobytes() == value.astype(value.dtype.newbyteorder("=")).tobytes()


def test_an_answer_may_hold_no_array(kept: KeptAnswers) -> None:
    kept.keep("a", "q", CONFIG, {})
    assert kept.again("a", "q") == (CONFIG, {})


def test_another_question_or_id_gets_nothing(kept: KeptAnswers) -> None:
    kept.keep("study/0", "q", CONFIG, {"x": np.ones(2)})
    assert kept.again("study/0", "other") is None
    assert kept.again("study/1", "q") is None
    assert kept.again("study/0", "q") is not None


def test_a_file_of_another_id_is_not_taken_for_it(kept: KeptAnswers) -> None:
    kept.keep("a", "q", {}, {"x": np.ones(2)})
    (file,) = kept.folder.iterdir()
    kept.keep("b", "q", {}, {"x": np.zeros(2)})
    (other,) = set(kept.folder.iterdir()) - {file}
    other.replace(file)
    assert kept.again("a", "q") is None


def test_ids_stay_in_the_folder(kept: KeptAnswers) -> None:
    for id in ("../../out", "a/b/c", "/etc/x", ""):
        kept.keep(id, "q", {"id": id}, {})
        assert kept.again(id, "q") == ({"id": id}, {})
    assert len(list(kept.folder.iterdir())) == 4
    assert all(f.suffix == ".safetensors" for f in kept.folder.iterdir())


@pytest.mark.parametrize("harm", ["cut", "emptied", "a byte of an array", "a byte of the text", "gone"])
def test_a_damaged_answer_counts_as_absent(kept: KeptAnswers, harm: str) -> None:
    kept.keep("a", "q", {"word": "colon"}, {"x": np.arange(8.0)})
    assert kept.again("a", "q") is not None
    (file,) = kept.folder.iterdir()
    raw = bytearray(file.read_bytes())
    if harm == "cut":
        file.write_bytes(raw[:-3])
    elif harm == "emptied":
        file.write_bytes(b"")
    elif harm == "a byte of an array":
        raw[-1] ^= 1
        file.write_bytes(raw)
    elif harm == "a byte of the text":
        assert raw.count(b"colon") == 1
        file.write_bytes(raw.replace(b"colon", b"colan"))
    else:
        file.unlink()
    assert kept.again("a", "q") is None
