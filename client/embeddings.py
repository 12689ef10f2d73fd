"""Expression to frozen embeddings, one vector a patient: scGPT, then MLP-A where the checkpoint's folder holds one.

Shapes: N patients, G genes of the study's panel.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from oncofed.client.device import choose_device
from oncofed.common.models.scgpt import SMOOTHING, ScGPT, ScGPTSettings, fingerprint, load_scgpt
from oncofed.common.models.smoothing import Smoother, load_smoother
from oncofed.common.models.tokens import Tokeniser
from oncofed.common.panel import GenePanel
from oncofed.common.progress import progress_bar

BATCH = 32
"""At the published size (8 heads, 1200 tokens) attention alone holds 46 MB a patient where it is not fused."""


class Embedder:
    """A frozen network that turns expression on one panel of genes into vectors; keeps nothing on disk.

    `fingerprint` changes when a file of the checkpoint does, `notes` say what a user should know of panel and smoothing.
    """

    def __init__(
        self,
        network: ScGPT,
        tokeniser: Tokeniser,
        smoother: Smoother | None,
        *,
        width: int,
        fingerprint: str,
        notes: tuple[str, ...],
        device: torch.device,
    ) -> None:
        self.width = width
        self.fingerprint = fingerprint
        self.notes = notes
        self._network = network.to(device)
        self._tokeniser = tokeniser
        self._smoother = None if smoother is None else smoother.to(device)
        self._device = device

    @classmethod
    def open(cls, folder: Path, genes: tuple[str, ...], *, device: str = "auto") -> Embedder:
        """Load the checkpoint in `folder` for a panel of genes.

        Raises `ValueError` where a file of it is missing, broken or of another checkpoint, `Refusal` where the panel does not fit.
        """
        checkpoint = load_scgpt(folder)
        tokeniser = Tokeniser(checkpoint.vocab, checkpoint.settings, genes)
        notes, smoother, width = [], None, checkpoint.settings.embsize
        if tokeniser.unknown:
            notes.append(
                f"scGPT does not know {len(tokeniser.unknown)} of the panel's {len(genes)} genes, e.g. {', '.join(tokeniser.unknown[:3])}"
            )
        path = folder / SMOOTHING
        if path.exists():
            smoother, origin = load_smoother(path)
            if origin.checkpoint != fingerprint(folder, smoothing=False) or smoother.widths[0] != width:
                raise ValueError(
                    f"{path}: trained on another checkpoint than the one in its folder; run `oncofed smooth` again, or remove it "
                    "to use scGPT's own embedding"
                )
            if origin.panel != GenePanel(tuple(sorted(tokeniser.genes))).hash:
                notes.append("the smoothing was trained on other genes than the study's panel")
            width = smoother.widths[-1]
        return cls(
            checkpoint.network,
            tokeniser,
            smoother,
            width=width,
            fingerprint=fingerprint(folder),
            notes=tuple(notes),
            device=choose_device(device),
        )

    @torch.no_grad()
    def embed(self, x_NG: np.ndarray) -> np.ndarray:
        """Embeddings `[N, width]`, float32, of expression `[N, G]`, NaN where a patient has none.

        A gene at NaN is absent, as one at 0 is. Raises `Refusal` on negative values.
        """
        result = np.full((len(x_NG), self.width), np.nan, dtype=np.float32)
        rows = np.flatnonzero(self._tokeniser.measured(x_NG))
        with progress_bar(visible=len(rows) > BATCH) as bar:
            for batch in bar.track(
                [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)], description="embedding RNA"
            ):
                e_ND = self._network(*self._tokeniser.encode(x_NG[batch]).to(self._device))
                result[batch] = (e_ND if self._smoother is None else self._smoother(e_ND)).cpu().numpy()
        return result


def identify(folder: Path) -> tuple[str, int]:
    """Fingerprint of a checkpoint's folder and the width of its embeddings, without loading the network."""
    smoothing = folder / SMOOTHING
    width = load_smoother(smoothing)[0].widths[-1] if smoothing.exists() else ScGPTSettings.read(folder).embsize
    return fingerprint(folder), width
