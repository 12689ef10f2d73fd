"""A federation whose sites name genes differently learns what it learns when all use approved symbols."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from oncofed.client.data.check import check_site
from oncofed.client.data.site import SiteFolder, list_sites
from oncofed.client.new_patients import new_patients
from oncofed.common.gene_names import Gene, GeneNames
from oncofed.common.panel import GenePanel
from oncofed.common.saved import SavedModel
from oncofed.common.study import Study
from oncofed.deploy.simulate import simulate
from toy_genes import write_hgnc
from toy_studies import copy_sites

Make = Callable[..., Study]


GENES = [Gene(f"C1orf{i}", f"ENSG{i:011}", (f"OLD{i}",), (f"KIAA{i}",)) for i in range(100, 160)]
APPROVED = [g.symbol for g in GENES]
IDS = [f"{g.ensembl}.7" for g in GENES]
OTHER = [(g.previous[0], g.aliases[0], g.symbol.upper())[i % 3] for i, g in enumerate(GENES)]


def name_genes(site: Path, genes: list[str]) -> None:
    """Give a synthetic site's genes other names, in whichever format it has them."""
    (file,) = site.glob("expression.*")
    if file.suffix == ".parquet":
        pd.read_parquet(file).set_axis(genes, axis=1).to_parquet(file)
    elif file.suffix == ".csv":
        pd.read_csv(file, index_col=0).set_axis(genes, axis=1).to_csv(file)
    elif file.suffix == ".tsv":
        pd.read_csv(file, sep="\t", index_col=0).set_axis(genes).rename_axis("gene").to_csv(file, sep="\t")
    else:
        data = anndata.read_h5ad(file)
        data.var_names = genes
        data.write_h5ad(file)


def split_a_gene(site: Path, gene: str, alias: str) -> None:
    """A part of a gene's counts in a row of its own, under another of its names; and a column that is no patient's."""
    table = pd.read_csv(site / "expression.tsv", sep="\t", index_col=0)
    table.loc[alias] = table.loc[gene] // 2
    table.loc[gene] -= table.loc[alias]
    table.insert(0, "gene_type", "protein_coding")
    table.to_csv(site / "expression.tsv", sep="\t")


@pytest.fixture
def two_worlds(consortium: Path, tmp_path: Path) -> tuple[Path, Path]:
    """The same patients twice: all sites in approved symbols; Ensembl ids and other names at two of four."""
    approved, mixed = copy_sites(tmp_path / "approved", consortium), copy_sites(tmp_path / "mixed", consortium)
    for site in list_sites(approved):
        name_genes(site, APPROVED)
    for site, genes in zip(list_sites(mixed), (IDS, OTHER, APPROVED, APPROVED), strict=True):
        name_genes(site, genes)
    split_a_gene(mixed / "bergen", OTHER[3], APPROVED[3])
    return approved, mixed


def weights(study: Study) -> dict[str, bytes]:
    model = SavedModel.read(Path(study.runtime.out) / "model-fold-0.safetensors")
    return {name: w.tobytes() for name, w in model.weights.items()}


def test_a_gene_set_panel_over_sites_of_other_names(
    two_worlds: tuple[Path, Path], tmp_path: Path, small_study: Make
) -> None:
    approved, mixed = two_worlds
    sets = tmp_path / "pathways.gmt"
    sets.write_text(
        "\t".join(["ONE", "about", *OTHER[:25]]) + "\n" + "\t".join(["TWO", "about", *APPROVED[20:40], IDS[45]]) + "\n"
    )
    genes = [*APPROVED[:40], APPROVED[45]]
    table = write_hgnc(tmp_path / "hgnc.txt", GENES)
    (tmp_path / "panel.txt").write_text("\n".join(genes))
    plain = small_study(runtime__out=str(tmp_path / "a"), panel__file=str(tmp_path / "panel.txt"))
    named = small_study(runtime__out=str(tmp_path / "b"), panel__file=str(sets), panel__names=str(table))
    simulate(plain, approved)
    done = simulate(named, mixed)
    assert done.results["left_out"] == []
    panel = GenePanel.named(genes, GeneNames.of(GENES))
    assert done.results["panel"]["hash"] == panel.hash
    assert weights(named) == weights(plain)

    table.unlink()  # what is needed of it has travelled with the panel
    model = SavedModel.read(tmp_path / "b" / "model-fold-0.safetensors")
    assert model.panel == panel
    for ours, theirs in zip(list_sites(approved), list_sites(mixed), strict=True):
        expected, _ = new_patients(SiteFolder.open(ours), model)
        got, notes = new_patients(SiteFolder.open(theirs), model)
        np.testing.assert_array_equal(got.x_NG, expected.x_NG)
        assert not any("missing" in note for note in notes)
        assert check_site(theirs, panel).facts["panel"] == "41 of 41 genes"


def test_without_a_panel_the_shared_genes_are_found_under_all_names(
    two_worlds: tuple[Path, Path], tmp_path: Path, small_study: Make
) -> None:
    study = small_study(panel__names=str(write_hgnc(tmp_path / "hgnc.txt", GENES)), training__rounds=1)
    panel = GenePanel.named(sorted(APPROVED), GeneNames.of(GENES))
    assert simulate(study, two_worlds[1]).results["panel"]["hash"] == panel.hash
    with pytest.raises(ValueError, match="the gene panel is empty"):
        simulate(study.changed(panel__names=""), two_worlds[1])


def test_genes_of_no_site_stop_the_study_before_it_trains(
    two_worlds: tuple[Path, Path], tmp_path: Path, small_study: Make
) -> None:
    (tmp_path / "panel.txt").write_text("\n".join([*APPROVED[:30], "NOTAGENE"]))
    study = small_study(panel__file=str(tmp_path / "panel.txt"), training__rounds=1)
    with pytest.raises(ValueError, match=r"1 of the 31 genes of panel.file = .* are at no site: NOTAGENE"):
        simulate(study, two_worlds[0])
    dropped = simulate(study.changed(panel__unknown="drop"), two_worlds[0])
    assert dropped.results["panel"]["hash"] == GenePanel(tuple(APPROVED[:30])).hash
