"""Ablation of genes: the ranked ones cost recall, random ones do not, and only of patients whose class was ranked."""

from __future__ import annotations

import numpy as np
import torch
from oncofed.client.ablation import ablation_sums
from oncofed.client.batch import Batch
from oncofed.common.ablation import SHARES, genes_of
from oncofed.common.models.build import Sizes, build_model
from oncofed.common.models.t_gem import TGEM
from oncofed.common.study import Study

GENES, OWN = 100, 3


def planted() -> tuple[TGEM, Batch, np.ndarray]:
    """Two classes, each told by three genes of its own: a linear model that knows them, patients, and the true ranking."""
    keys = {"model__name": "t_gem", "model__layers": 0, "model__activation": "none", "task__kind": "classification"}
    model = build_model(Study().changed(**keys), Sizes(GENES, ("A", "B", "C"), 1))
    assert isinstance(model, TGEM)
    label = torch.arange(60) % 2
    x = torch.randn(60, GENES, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.head.linear.weight.zero_()  # type: ignore[union-attr]
        for c in range(2):
            model.head.linear.weight[c, OWN * c : OWN * (c + 1)] = 1.0  # type: ignore[union-attr]
            x[label == c, OWN * c : OWN * (c + 1)] += 4.0
    zeros = torch.zeros(60)
    batch = Batch(x, torch.zeros(60, 0), label, zeros, zeros, torch.zeros(60, 1), zeros.long())
    order = np.array([np.roll(np.arange(GENES), -OWN * c)[: genes_of(SHARES[-1], GENES)] for c in range(3)])
    return model, batch, order


def test_ranked_genes_cost_recall_and_random_ones_hardly() -> None:
    model, batch, order = planted()
    sums = ablation_sums(model, batch, order, GENES, seed=0)
    recall, chance = (sums[f"ablation/{k}"][:2].sum(0) / 60 for k in ("hits", "random"))
    assert recall[0] == chance[0] > 0.95
    assert recall[-1] < 0.8 < 0.9 < chance[3]
    assert sums["ablation/patients"].tolist() == [30, 30, 0]


def test_classes_without_a_ranking_are_left_out() -> None:
    model, batch, order = planted()
    order[1] = -1
    sums = ablation_sums(model, batch, order, GENES, seed=0)
    assert sums["ablation/patients"].tolist() == [30, 0, 0]
    assert not sums["ablation/hits"][1].any()
    assert sums["ablation/hits"][0].any()


def test_random_genes_are_the_same_at_every_site_and_depend_on_the_seed() -> None:
    model, batch, order = planted()
    half = [batch.select(torch.arange(0, 30)), batch.select(torch.arange(30, 60))]
    parts = [ablation_sums(model, b, order, GENES, seed=5)["ablation/random"] for b in half]
    whole = ablation_sums(model, batch, order, GENES, seed=5)["ablation/random"]
    np.testing.assert_allclose(parts[0] + parts[1], whole)
    assert not np.allclose(whole, ablation_sums(model, batch, order, GENES, seed=6)["ablation/random"])


def test_a_share_is_at_least_one_gene() -> None:
    assert [genes_of(s, 50) for s in SHARES] == [1, 1, 1, 2, 5, 10]
