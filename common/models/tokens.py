"""Expression as scGPT reads it: one token a gene that a sample expresses, its value binned within the sample.

The published pipeline draws 1200 genes at random where a sample has more, which in bulk RNA is always, and breaks ties at
random. Here the genes are the study's panel and ties are broken by the gene, so the same sample is always the same tokens.
Shapes: N samples, G genes of the panel, L tokens (<cls> first), n values of one sample.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from oncofed.common.errors import Refusal
from oncofed.common.models.scgpt import CLS, ScGPTSettings
from torch import Tensor


class Tokens(NamedTuple):
    """What `ScGPT` takes: `ids` and `values` `[N, L]` (int64, float32), `padding` `[N, L]`, True where there is no token."""

    ids: Tensor
    values: Tensor
    padding: Tensor

    def to(self, device: torch.device | str) -> Tokens:
        return Tokens(*(t.to(device) for t in self))


class Tokeniser:
    """Turns expression on a panel of genes into tokens; `genes` are those of the panel that scGPT knows, `unknown` the rest.

    Raises `Refusal` where it knows none of them, does not know all though `strict`, or knows more than fit a sequence.
    """

    def __init__(
        self, vocab: Mapping[str, int], settings: ScGPTSettings, genes: tuple[str, ...], *, strict: bool = False
    ) -> None:
        known = np.array([gene in vocab for gene in genes], dtype=bool)
        self.panel = genes
        self.genes = tuple(gene for gene in genes if gene in vocab)
        self.unknown = tuple(gene for gene in genes if gene not in vocab)
        self._columns = np.flatnonzero(known)
        if not self.genes:
            raise Refusal(
                f"scGPT knows none of the panel's {len(genes)} genes, e.g. {list(genes[:3])}; its vocabulary holds gene symbols "
                "(TP53), not Ensembl or Entrez ids: rename the genes"
            )
        if strict and self.unknown:
            raise Refusal(
                f"scGPT does not know {len(self.unknown)} of the panel's {len(genes)} genes, e.g. {list(self.unknown[:3])}; "
                "use current gene symbols, or leave these genes out of the panel"
            )
        room = settings.max_seq_len - 1
        if len(self.genes) > room:
            raise Refusal(
                f"scGPT knows {len(self.genes)} genes of the panel, but its sequence has room for {room}; name a panel file "
                f"(panel.file) with at most {room} genes, e.g. the most variable ones of a public data set"
            )
        self._settings = settings
        self._ids = np.array([vocab[gene] for gene in self.genes], dtype=np.int64)
        self._pad, self._cls = vocab[settings.pad_token], vocab[CLS]
        # One draw for each gene, whatever the panel or the sample. RandomState's stream never changes between versions of
        # numpy (NEP 19), so that all sites break ties alike.
        self._tie = np.random.RandomState(0).random_sample(len(vocab))[self._ids]

    def measured(self, x_NG: np.ndarray) -> np.ndarray:
        """Booleans `[N]`: whose expression `[N, G]` has a value for any gene that scGPT knows."""
        return np.isfinite(self._known(x_NG)).any(axis=1)

    def encode(self, x_NG: np.ndarray) -> Tokens:
        """Tokens of expression `[N, G]` in the panel's order; genes at 0 or not finite are absent, as for scGPT.

        Any scale with 0 for "not expressed" gives the same tokens (counts, TPM, their logarithms). Raises `Refusal` on
        negative values.
        """
        if (x_NG < 0).any():
            raise Refusal(
                "negative expression cannot be binned: scGPT needs 0 to mean 'not expressed', which z-scores do not have; "
                "deliver counts, tpm or log2 expression"
            )
        x_NG = self._known(x_NG)
        present_NG = np.isfinite(x_NG) & (x_NG != 0)
        shape = (len(x_NG), 1 + int(present_NG.sum(1).max(initial=0)))
        ids_NL = np.full(shape, self._pad, dtype=np.int64)
        values_NL = np.full(shape, self._settings.pad_value, dtype=np.float32)
        padding_NL = np.ones(shape, dtype=bool)
        for n, present_G in enumerate(present_NG):
            end = 1 + int(present_G.sum())
            ids_NL[n, 0], ids_NL[n, 1:end] = self._cls, self._ids[present_G]
            values_NL[n, 1:end] = bins(x_NG[n, present_G], self._tie[present_G], self._settings.n_bins)
            padding_NL[n, :end] = False
        return Tokens(*map(torch.from_numpy, (ids_NL, values_NL, padding_NL)))

    def _known(self, x_NG: np.ndarray) -> np.ndarray:
        if x_NG.ndim != 2 or x_NG.shape[1] != len(self.panel):
            raise ValueError(
                f"expression of shape {x_NG.shape}, but the panel has {len(self.panel)} genes; give [N, genes]"
            )
        return x_NG[:, self._columns]


def bins(x_n: np.ndarray, tie_n: np.ndarray, n_bins: int) -> np.ndarray:
    """Bins 1 to n_bins - 1 of a sample's values among each other; `tie_n` in [0, 1) places values that span several bins.

    scGPT (preprocess.py, `_digitize`): edges e_k are the quantiles k / (n_bins - 2) of the values, right = #{e_k < x},
    left = #{e_k <= x}, bin = ceil(U (right - left) + left). Edge k lies at the rank k (n - 1) / (n_bins - 2) between the
    sorted values, so counting edges is counting ranks: in whole numbers no rounding of an interpolated edge moves a value
    to the next bin, and the bins are the same on every monotone scale.
    """
    if not len(x_n):
        return np.zeros(0)
    ordered = np.sort(x_n)
    first_n = np.searchsorted(ordered, x_n, side="left")
    last_n = np.searchsorted(ordered, x_n, side="right") - 1
    gaps, span = n_bins - 2, len(x_n) - 1
    if span == 0:  # one value: all edges fall on it
        left_n, right_n = np.full(1, gaps + 1), np.zeros(1, dtype=np.int64)
    else:
        left_n, right_n = last_n * gaps // span + 1, -(-first_n * gaps // span)
    return np.ceil(tie_n * (right_n - left_n) + left_n)
