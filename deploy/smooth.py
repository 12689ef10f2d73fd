"""`oncofed smooth`: train stage 1 of Path-GPTOmic on single cells, or on bulk tissue, and put it beside the checkpoint.

Shapes: N cells or patients, G genes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from oncofed.client.data.cohort import clinical_by_patient, expression_of
from oncofed.client.data.read import read_expression
from oncofed.client.data.site import SiteFolder, list_sites
from oncofed.client.data.units import FAMILY, harmonise
from oncofed.client.device import choose_device
from oncofed.common.models.scgpt import SMOOTHING, Checkpoint, fingerprint, load_scgpt
from oncofed.common.models.smoothing import Mixture, Origin, held_out_error, save_smoother, train_smoother
from oncofed.common.models.tokens import Tokeniser
from oncofed.common.panel import GenePanel
from oncofed.common.progress import progress_bar
from oncofed.common.splits import seed_from

HELD_OUT = 0.1
CELLS_AT_ONCE = 500
"""Cells are dense, over all genes of the file, only for so long as their library size is taken."""


@dataclass(frozen=True)
class Samples:
    """Expression `[N, G]` on a linear scale (per million), NaN where a gene was not measured, and a label each."""

    x_NG: np.ndarray
    labels: np.ndarray
    genes: tuple[str, ...]

    def select(self, rows: np.ndarray) -> Samples:
        return Samples(self.x_NG[rows], self.labels[rows], self.genes)

    def expressed(self) -> Samples:
        """Those with any expression at all: the others are no sample of their label."""
        rows = np.nan_to_num(self.x_NG).any(axis=1)
        if not rows.any():
            raise ValueError(
                f"no sample expresses any of {len(self.genes)} genes, e.g. {list(self.genes[:3])}; use the symbols of the panel in the tables"
            )
        return self.select(rows)


@dataclass(frozen=True)
class Smoothed:
    """What was written and whether it learned: `error` against `baseline` on held-out mixtures (smoothing.held_out_error)."""

    file: Path
    curve: tuple[float, ...]
    error: float
    baseline: float
    classes: tuple[str, ...]
    samples: int
    genes: int


def smooth(
    checkpoint_folder: Path,
    *,
    cells: Path | None = None,
    label: str = "cell_type",
    symbols: str = "",
    sites: Path | None = None,
    panel: Path | None = None,
    steps: int = 2000,
    batch: int = 32,
    mixed: int = 2,
    concentration: float = 1.0,
    learning_rate: float = 1e-3,
    seed: int = 0,
    device: str = "auto",
    target: Path | None = None,
) -> Smoothed:
    """Train MLP-A and write `smoothing.safetensors` into the checkpoint's folder, or to `target`.

    `cells` is an `.h5ad` with raw counts in X and the cell type in `obs[label]`, gene symbols in `var[symbols]` or, without
    it, as names of `var`. `sites` is a site folder, or a folder of them, whose patients are mixed with their cancer type as
    label (ours, not the paper's). `panel` names the study's genes. Raises `ValueError` with the remedy for a user's mistake.

    Patients in `sites` must take no part in the study: what they teach here, every fold's model would know of its test
    patients. And the file is trained without privacy: whoever gets it gets something of them.
    """
    source = cells or sites
    if source is None or (cells and sites):
        raise ValueError("name either cells (an .h5ad of single cells) or sites (folders of bulk RNA), and not both")
    mixture = Mixture(mixed, concentration)
    chosen = choose_device(device)
    checkpoint = load_scgpt(checkpoint_folder)
    wanted = GenePanel.from_file(panel).genes if panel else None
    samples = (
        _cells(source, label, symbols, wanted, checkpoint) if cells else _bulk(source, wanted, checkpoint)
    ).expressed()
    learn, held = _split(samples, seed)
    with progress_bar() as bar:
        task = bar.add_task("smoothing", total=steps)
        trained = train_smoother(
            checkpoint,
            learn.x_NG,
            learn.labels.tolist(),
            samples.genes,
            steps=steps,
            batch=batch,
            mixture=mixture,
            learning_rate=learning_rate,
            seed=seed,
            device=chosen,
            progress=lambda step: bar.update(task, completed=step + 1),
        )
    error, baseline = held_out_error(
        trained, checkpoint, held.x_NG, held.labels.tolist(), samples.genes, batch=batch, mixture=mixture, seed=seed
    )
    origin = Origin(
        checkpoint=fingerprint(checkpoint_folder, smoothing=False),
        panel=GenePanel(tuple(sorted(samples.genes))).hash,
        trained_on=f"cells by {label}" if cells else "bulk RNA by cancer type",
        classes=trained.classes,
        samples_mixed=mixed,
    )
    file = target or checkpoint_folder / SMOOTHING
    save_smoother(file, trained.smoother, origin)
    return Smoothed(file, trained.curve, error, baseline, trained.classes, len(samples.labels), len(samples.genes))


def _cells(path: Path, label: str, symbols: str, wanted: tuple[str, ...] | None, checkpoint: Checkpoint) -> Samples:
    import anndata  # slow to import and needed for this source only

    try:
        data = anndata.read_h5ad(path)
    except Exception as error:  # h5py, anndata and zarr raise what they like on a broken file
        raise ValueError(f"{path}: cannot be read as h5ad ({type(error).__name__}); export it again") from None
    if label not in data.obs or (symbols and symbols not in data.var) or data.X is None:
        raise ValueError(
            f"{path}: needs counts in X, a column {label!r} in obs and gene symbols in var; obs has {list(data.obs.columns[:12])}, "
            f"var has {list(data.var.columns[:12])}: name them with --label and --symbols"
        )
    data = data[data.obs[label].notna().to_numpy()]
    names = data.var[symbols].astype(str) if symbols else data.var_names.astype(str)
    twice = sorted({g for g in names[names.duplicated()] if g in checkpoint.vocab})
    if twice:
        raise ValueError(
            f"{path}: {len(twice)} genes stand twice, e.g. {twice[:3]}; add up the counts of each gene's columns"
        )
    if not any(g in checkpoint.vocab for g in names):
        raise ValueError(
            f"{path}: scGPT knows none of its {len(names)} genes, e.g. {list(names[:3])}; name a column of var that holds gene symbols "
            f"with --symbols, var has {list(data.var.columns[:12])}"
        )
    genes = Tokeniser(checkpoint.vocab, checkpoint.settings, wanted or tuple(names)).genes
    column = {g: i for i, g in enumerate(names)}
    measured = np.array([g in column for g in genes])
    columns = [column[g] for g in genes if g in column]
    x_NG = np.full((data.n_obs, len(genes)), np.nan, dtype=np.float32)
    for start in range(0, data.n_obs, CELLS_AT_ONCE):
        rows = slice(start, start + CELLS_AT_ONCE)
        part = data.X[rows]
        counts = np.asarray(part.toarray() if hasattr(part, "toarray") else part, dtype=np.float64)
        if not (np.isfinite(counts).all() and (counts >= 0).all() and (counts == np.floor(counts)).all()):
            raise ValueError(f"{path}: X does not hold counts (whole numbers, 0 or more); put the raw counts there")
        x_NG[rows, measured] = _linear(harmonise(counts, "counts")[:, columns])
    return Samples(x_NG, data.obs[label].astype(str).to_numpy(), genes)


def _bulk(root: Path, wanted: tuple[str, ...] | None, checkpoint: Checkpoint) -> Samples:
    folders = [root] if (root / "site.toml").exists() else list_sites(root)
    sites = [SiteFolder.open(folder) for folder in folders]
    scored = [s.name for s in sites if FAMILY[s.description.expression_unit] != FAMILY["counts"]]
    if scored:
        raise ValueError(
            f"sites {scored[:3]} hold z-scores, which cannot be mixed or binned; use counts, tpm or log2 expression"
        )
    tables = [clinical_by_patient(s, outcome=False) for s in sites]
    if wanted is None:
        wanted = GenePanel.shared(
            (read_expression(s, t.index).columns for s, t in zip(sites, tables, strict=True)), 1.0
        ).genes
    panel = GenePanel(Tokeniser(checkpoint.vocab, checkpoint.settings, wanted).genes)
    values, labels = [], []
    for site, table in zip(sites, tables, strict=True):
        patients, x_NG = expression_of(site, table.index, table.index[table["cancer_type"].notna()], panel)
        if (x_NG < 0).any():
            raise ValueError(
                f"site {site.name}: negative expression, impossible for a logarithm of x + 1; correct expression_unit"
            )
        values.append(_linear(x_NG))
        labels.append(table.loc[patients, "cancer_type"].to_numpy(dtype=str))
    return Samples(np.concatenate(values), np.concatenate(labels), panel.genes)


def _linear(log_NG: np.ndarray) -> np.ndarray:
    """Undo log2(x + 1): mixing tissue adds molecules, not logarithms."""
    return np.exp2(log_NG) - 1.0


def _split(samples: Samples, seed: int) -> tuple[Samples, Samples]:
    """Samples to learn from and samples to measure on, a tenth of each label."""
    order = np.random.default_rng(seed_from(seed, "held-out samples")).permutation(len(samples.labels))
    held = np.zeros(len(order), dtype=bool)
    for name in np.unique(samples.labels):
        rows = order[samples.labels[order] == name]
        held[rows[: round(HELD_OUT * len(rows))]] = True
    if not held.any():
        raise ValueError(
            f"{len(order)} samples of {len(np.unique(samples.labels))} labels: too few to keep some of a label aside; give 10 or more a label"
        )
    return samples.select(~held), samples.select(held)
