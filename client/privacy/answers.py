"""Answers that were let out, kept to be given again: drawing noise a second time would be a second release."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from oncofed.common.files import replacing
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file


@dataclass(frozen=True)
class KeptAnswers:
    """A folder with one file an answer, named by the SHA-256 of its id; a file that was damaged counts as absent."""

    folder: Path

    def keep(self, id: str, question: str, config: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
        """Write an answer before it leaves; `question` is a digest of what was asked. A later one of the same id takes its place."""
        # copied as C arrays: safetensors would write the memory of a transposed one as it lies
        plain = {name: np.array(value, value.dtype.newbyteorder("="), order="C") for name, value in arrays.items()}
        said = {"id": id, "question": question, "config": dict(config), "arrays": list(plain)}
        text = json.dumps(said)
        with replacing(self._file(id)) as temporary:
            save_file(plain, temporary, {"answer": text, "sha256": _digest(text, plain)})

    def again(self, id: str, question: str) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
        """The very answer to the very question; None where there is none, and where the id belongs to another question."""
        try:
            with safe_open(self._file(id), framework="numpy") as file:
                about = file.metadata() or {}
                text = about["answer"]
                said = json.loads(text)
                arrays = {name: file.get_tensor(name) for name in said["arrays"]}
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            return None
        if about.get("sha256") != _digest(text, arrays) or said["id"] != id or said["question"] != question:
            return None
        return said["config"], arrays

    def _file(self, id: str) -> Path:
        # ids hold slashes
        return self.folder / f"{hashlib.sha256(id.encode()).hexdigest()}.safetensors"


def _digest(text: str, arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256(text.encode())
    for name, value in arrays.items():
        digest.update(f"{name} {value.dtype.str} {value.shape} ".encode())
        digest.update(value.tobytes())
    return digest.hexdigest()
