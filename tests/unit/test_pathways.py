"""Pathways: sets on the panel, z and p against random sets, q, and what the files say."""

from __future__ import annotations

import csv
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from oncofed.common.panel import GenePanel
from oncofed.common.pathways import members, pathways_on
from oncofed.server import genes, pathways
from oncofed.server.pathways import random_orders, score_sets
from toy_explanations import CLASSES, PANEL, gene_sets, write_gmt, write_run


def benjamini_hochberg(p: np.ndarray) -> np.ndarray:
    """q of each p as the paper defines it: the smallest false discovery rate at which it is found."""
    m = len(p)
    return np.array([min(1.0, min(m * t / (p <= t).sum() for t in p if t >= one)) for one in p])


def test_sets_keep_what_the_panel_holds() -> None:
    panel = GenePanel(("TP53", "EGFR", "KRAS", "CCN2", "MYC"))
    sets = {"all": ("TP53", "EGFR", "KRAS", "BRAF"), "two": ("TP53", "MYC"), "old": ("CTGF", "MYC", "p53", "EGFR")}
    assert {k: v.tolist() for k, v in members(sets, panel).items()} == {"all": [0, 1, 2]}
    named = GenePanel(panel.genes, (("p53",), (), (), ("CTGF",), ()))
    assert {k: v.tolist() for k, v in members(sets, named).items()} == {"all": [0, 1, 2], "old": [0, 1, 3, 4]}
    with pytest.raises(
        ValueError, match=r"none of its 1 sets has 3 genes in the panel; .* such as TP53, .* such as ENSG1"
    ):
        members({"ids": ("ENSG1", "ENSG2", "ENSG3")}, panel)


def test_mean_and_variance_are_those_of_all_sets() -> None:
    """z against every set of three of eight genes, by hand."""
    value = np.random.default_rng(0).normal(size=8)
    sets = [np.array(s) for s in combinations(range(8), 3)]
    scores = score_sets(value[None], sets, random_orders(8, 3, seed=0))
    means = np.array([value[s].mean() for s in sets])
    np.testing.assert_allclose(scores.z, (means - means.mean()) / means.std(), atol=1e-12)
    assert np.isnan(scores.sd).all()
    distance = np.abs(means - means.mean())
    exact = np.array([(distance >= d - 1e-12).mean() for d in distance])
    np.testing.assert_allclose(scores.p, exact, atol=0.06)


def test_p_is_uniform_where_a_set_is_random() -> None:
    rng = np.random.default_rng(0)
    sets = [rng.choice(300, rng.integers(5, 40), replace=False) for _ in range(400)]
    scores = score_sets(rng.standard_t(3, size=(1, 300)), sets, random_orders(300, 40, seed=1))
    assert 0.02 < (scores.p < 0.05).mean() < 0.09
    assert 0.45 < scores.p.mean() < 0.55
    assert scores.q.min() > 0.05
    np.testing.assert_allclose(scores.q, benjamini_hochberg(scores.p))


def test_a_set_that_is_the_whole_panel_says_nothing() -> None:
    value = np.random.default_rng(0).normal(size=(2, 20))
    scores = score_sets(value, [np.arange(20), np.arange(5)], random_orders(20, 20, seed=0))
    assert (scores.z[0], scores.p[0]) == (0.0, 1.0)
    flat = score_sets(np.ones((1, 20)), [np.arange(5)], random_orders(20, 5, seed=0))
    assert (flat.z[0], flat.p[0]) == (0.0, 1.0)


def test_planted_programs_stand_out_in_their_class_alone(tmp_path: Path) -> None:
    models = genes.read_models(write_run(tmp_path / "out", withheld=(5,)))
    sets = pathways_on(PANEL, write_gmt(tmp_path / "sets.gmt"))
    assert len(sets) == len(gene_sets()) - 1
    found = pathways.score_classes(models, sets)
    assert list(found) == list(CLASSES[:5])
    for name, s in found.items():
        mine = list(sets).index(f"PROGRAM_OF_{name}")
        assert s.z.argmax() == mine
        assert s.z[mine] > 5
        assert np.flatnonzero(s.q < 0.05).tolist() == [mine]
        assert s.p[mine] == pytest.approx(1 / (pathways.DRAWS + 1))
        assert 0 < s.sd[mine] < s.mean[mine]
    told = pathways.summarise(models, sets, count=4)
    assert (len(told["sets"]), told["all_sets"]) == (4, len(sets))
    assert all(s["name"].startswith("PROGRAM") for s in told["sets"])


def test_the_file_holds_every_class_and_set(tmp_path: Path) -> None:
    out, gmt = write_run(tmp_path / "out", folds=1), write_gmt(tmp_path / "sets.gmt")
    assert pathways.write_pathways(out) is None  # neither the study nor the command names sets
    written = pathways.write_pathways(out, gmt)
    assert written is not None
    with written[1].open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(CLASSES) * (len(gene_sets()) - 1)
    assert tuple(rows[0]) == pathways.COLUMNS
    assert rows[0]["set"] == "PROGRAM_OF_BRCA"
    assert rows[0]["sd"] == ""  # one fold
    again = written[1].read_bytes()
    pathways.write_pathways(out, gmt)
    assert written[1].read_bytes() == again
