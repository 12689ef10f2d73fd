"""Folds that sites deal alone, and the gene panel."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oncofed.common.panel import GenePanel
from oncofed.common.splits import deal_folds, seed_from


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 80), st.integers(2, 6), st.integers(0, 1000))
def test_folds_do_not_depend_on_the_order_of_rows(n: int, folds: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    patients = np.array([f"P{i}" for i in range(n)])
    cancer, event = rng.choice(["BRCA", "LUAD"], n), rng.integers(0, 2, n)
    fold = deal_folds(patients, cancer, event, folds=folds, seed=seed, site="s")
    order = rng.permutation(n)
    again = deal_folds(patients[order], cancer[order], event[order], folds=folds, seed=seed, site="s")
    assert (fold[order] == again).all()
    for c in ("BRCA", "LUAD"):
        for e in (0, 1):
            counts = np.bincount(fold[(cancer == c) & (event == e)], minlength=folds)
            assert counts.max() - counts.min() <= 1


def test_sites_with_one_patient_each_still_fill_all_folds() -> None:
    one = [
        deal_folds(np.array(["P"]), np.array(["BRCA"]), np.array([1]), folds=5, seed=0, site=f"site-{i}")[0]
        for i in range(500)
    ]
    counts = np.bincount(one, minlength=5)
    assert counts.min() > 60


def test_seed_changes_the_folds_and_is_stable() -> None:
    patients, cancer, event = np.array([f"P{i}" for i in range(50)]), np.repeat("BRCA", 50), np.zeros(50, int)
    a, b = (deal_folds(patients, cancer, event, folds=5, seed=s, site="s") for s in (0, 1))
    assert (a != b).any()
    assert seed_from("a", 1) == seed_from("a", 1) != seed_from("a1")
    assert 0 <= seed_from("x") < 2**63


def test_panel_hash_tells_order_and_content() -> None:
    assert GenePanel(("A", "B")).hash != GenePanel(("B", "A")).hash
    assert GenePanel(("A", "B")).hash == GenePanel(("A", "B")).hash


def test_panel_of_shared_genes() -> None:
    sites = [["A", "B", "C"], ["C", "B"], ["B", "D"]]
    assert GenePanel.shared(sites, 1.0).genes == ("B",)
    assert GenePanel.shared(sites, 0.6).genes == ("B", "C")


def test_panel_faults(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="empty"):
        GenePanel.shared([["A"], ["B"]], 1.0)
    with pytest.raises(ValueError, match=r"repeats 1 genes, e\.g\. \['A'\]"):
        GenePanel(("A", "A"))
    with pytest.raises(ValueError, match="cannot be read"):
        GenePanel.from_file(tmp_path / "none.txt")
    (tmp_path / "panel.txt").write_text("# comment\nTP53\n\nEGFR \n")
    assert GenePanel.from_file(tmp_path / "panel.txt").genes == ("TP53", "EGFR")
