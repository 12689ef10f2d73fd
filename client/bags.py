"""Bags of tiles: read from their files when a batch needs them, never all at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from oncofed.client.data.beside import SEPARATOR
from oncofed.client.data.slides import load_bag
from oncofed.common.splits import seed_from
from torch import Tensor


@dataclass(frozen=True)
class Bags:
    """Files of the slides of B patients, as a cohort holds them `[B]`; empty for a patient without slides."""

    slides: np.ndarray
    width: int
    most: int
    device: torch.device

    def select(self, rows: Tensor) -> Bags:
        return Bags(self.slides[rows.cpu().numpy()], self.width, self.most, self.device)

    def load(self, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Tiles `[T, P]` and the row of the patient whom each belongs to `[T]`; in training at most `most` of a patient."""
        seed = (
            None if generator is None else int(torch.randint(2**62, (1,), generator=generator, device=generator.device))
        )
        parts: list[np.ndarray] = [np.zeros((0, self.width), dtype=np.float32)]
        owner: list[int] = []
        for row, text in enumerate(self.slides.tolist()):
            paths = slide_paths(text)
            if not paths:
                continue
            rng = None if seed is None else np.random.default_rng(seed_from(seed, text))
            bag = load_bag(paths, self.most if rng is not None else 0, rng)
            parts.append(bag)
            owner += [row] * len(bag)
        tiles = torch.from_numpy(np.concatenate(parts)).to(self.device)
        return tiles, torch.tensor(owner, dtype=torch.int64, device=self.device)


def slide_paths(text: str) -> Sequence[Path]:
    """The files of a patient's slides."""
    return [Path(name) for name in text.split(SEPARATOR) if name]
