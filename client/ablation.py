"""How much a classifier needs the genes that it is said to rest on: recall of held-out patients without them.

Genes are ranked on training patients, taken out of held-out ones (t_gem.md, section 5, rows 4 and 8), and set to the mean
of the training patients, 0 on the federation's scale.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from oncofed.client.batch import Batch
from oncofed.common.ablation import DRAWS, SHARES, genes_of
from oncofed.common.blocks import Sum
from oncofed.common.models.build import Predictor
from oncofed.common.splits import seed_from


def ablation_sums(model: Predictor, batch: Batch, order_CG: np.ndarray, genes: int, seed: int) -> Sum:
    """`ablation/hits` and `ablation/random [C, 1 + S]`: patients of a class who are still recognised without a share of genes.

    `order_CG` are the genes of each class, the most important first, as far as the largest share; -1 where they are not
    known. Column 0 is without ablation; `random` is the mean over sets of random genes, the same at every site.
    """
    classes = len(order_CG)
    label = batch.cancer_B.cpu().numpy()
    hits, chance = np.zeros((classes, 1 + len(SHARES))), np.zeros((classes, 1 + len(SHARES)))
    known = (order_CG[:, 0] >= 0)[label]

    def add(table: np.ndarray, column: int, x_BG: torch.Tensor, weight: float = 1.0) -> None:
        chosen = replace(batch, x_BG=x_BG).through(model).score.argmax(1).cpu().numpy()
        np.add.at(table[:, column], label[known], weight * (chosen == label)[known])

    with torch.no_grad():
        add(hits, 0, batch.x_BG)
        chance[:, 0] = hits[:, 0]
        for s, share in enumerate(SHARES, start=1):
            count = genes_of(share, genes)
            without = batch.x_BG.clone()
            for c in np.unique(label[known]):
                rows = torch.from_numpy(np.flatnonzero(label == c)).to(without.device)
                without[rows[:, None], torch.from_numpy(order_CG[c, :count].astype(np.int64)).to(without.device)] = 0.0
            add(hits, s, without)
            for d in range(DRAWS):
                drawn = np.random.default_rng(seed_from(seed, "ablation", s, d)).permutation(genes)[:count]
                without = batch.x_BG.index_fill(1, torch.from_numpy(drawn).to(batch.x_BG.device), 0.0)
                add(chance, s, without, 1.0 / DRAWS)
    patients = np.bincount(label[known], minlength=classes).astype(np.float64)
    return {"ablation/hits": hits, "ablation/random": chance, "ablation/patients": patients}
