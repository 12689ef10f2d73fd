"""A synthetic pan-cancer consortium with known truth, for demonstrations and tests.

Every patient has gene programs: one drives the hazard in all cancers, one more in each cancer alone (the others carry the
program too, without effect). On demand a cancer's own program is also raised there, so that its genes tell the cancer. Sites differ in size, case mix, batch shift, units, file format, and in who has pathology.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from oncofed.client.data.site import SiteDescription, Unit, folder_name, write_description

CITIES = (
    "Aachen",
    "Bergen",
    "Coimbra",
    "Dublin",
    "Eindhoven",
    "Freiburg",
    "Ghent",
    "Helsinki",
    "Innsbruck",
    "Jena",
    "Krakow",
    "Leuven",
)
CANCERS = ("BRCA", "LUAD", "COADREAD", "KIRC", "GBMLGG", "SKCM")
FORMATS: tuple[tuple[Unit, str], ...] = (("log2", "parquet"), ("counts", "tsv"), ("tpm", "csv"), ("log2", "h5ad"))
IMAGE_FEATURES = tuple(
    f"{what} of {cell}"
    for cell in ("tumour", "lymphocytes", "fibroblasts", "plasma cells")
    for what in ("area", "density", "roundness", "spread")
)
"""As a program that reads slides would name them."""


@dataclass(frozen=True, kw_only=True)
class SynthSettings:
    """Size and strength of the consortium; times are in months."""

    sites: int = 6
    patients: int = 900
    genes: int = 240
    cancers: int = 4
    genes_per_program: int = 16
    shared_effect: float = 0.7
    own_effect: float = 0.9
    own_level: float = 0.0
    batch_sd: float = 0.4
    noise_sd: float = 1.0
    follow_up: float = 96.0
    seed: int = 0


def write_consortium(out: Path, s: SynthSettings) -> list[Path]:
    """Write one folder a site and `truth.json`; returns the folders. Refuses to write into a folder that holds sites."""
    if not 1 <= s.sites <= len(CITIES) or not 1 <= s.cancers <= len(CANCERS):
        raise ValueError(
            f"sites must be 1 to {len(CITIES)} and cancers 1 to {len(CANCERS)}, got {s.sites} and {s.cancers}"
        )
    if s.genes < s.genes_per_program * (s.cancers + 1):
        raise ValueError(
            f"genes = {s.genes} cannot hold {s.cancers + 1} programs of {s.genes_per_program}; ask for more genes"
        )
    if out.exists() and any(out.glob("*/site.toml")):
        raise ValueError(f"{out} holds sites already; choose another folder or remove it")
    rng = np.random.default_rng(s.seed)
    cancers, genes = CANCERS[: s.cancers], np.array([f"GENE{i:04d}" for i in range(s.genes)])
    programs = rng.permutation(s.genes)[: s.genes_per_program * (s.cancers + 1)].reshape(s.cancers + 1, -1)
    loading = rng.normal(0.9, 0.2, programs.shape) * rng.choice([-1, 1], programs.shape)
    base = rng.normal(6.0, 1.5, s.genes) + rng.normal(0.0, 0.6, (s.cancers, s.genes))
    hazard = np.exp(rng.uniform(np.log(0.006), np.log(0.03), s.cancers))
    effect = np.zeros((s.cancers, s.cancers + 1))
    effect[:, 0] = s.shared_effect
    effect[np.arange(s.cancers), np.arange(1, s.cancers + 1)] = s.own_effect * rng.choice([-1, 1], s.cancers)
    share = np.linspace(1.0, 3.0, s.sites)  # the largest site holds three times the smallest
    sizes = rng.permutation(share / share.sum()) * s.patients
    folders = []
    for i in range(s.sites):
        n, mix = int(sizes[i]), rng.dirichlet(np.full(s.cancers, 0.6))
        cancer = rng.choice(s.cancers, n, p=mix)
        activity = rng.normal(0.0, 1.0, (n, s.cancers + 1))
        x = base[cancer] + rng.normal(0.0, s.batch_sd, s.genes) + rng.normal(0.0, s.noise_sd, (n, s.genes))
        for p, members in enumerate(programs):
            x[:, members] += activity[:, [p]] * loading[p]
        for c in range(s.cancers):  # log2 units above the other cancers
            x[np.ix_(cancer == c, programs[c + 1])] += s.own_level
        risk = (effect[cancer] * activity).sum(1)
        death = rng.exponential(1.0 / (hazard[cancer] * np.exp(risk)))
        censored = rng.uniform(6.0, s.follow_up, n)
        clinical = pd.DataFrame(
            {
                "patient": [f"{CITIES[i][:3].upper()}-{j:04d}" for j in range(n)],
                "cancer_type": np.array(cancers)[cancer],
                "time": np.maximum(np.minimum(death, censored), 0.1).round(2),
                "event": (death <= censored).astype(int),
                "age": rng.normal(62, 11, n).round(0),
                "sex": rng.choice(["female", "male"], n),
            }
        )
        unit, kind = FORMATS[i % len(FORMATS)]
        expression = pd.DataFrame(
            _in_unit(np.maximum(x, 0.0), unit, rng), index=pd.Index(clinical["patient"], name="patient"), columns=genes
        )
        folder = out / folder_name(CITIES[i])
        write_description(folder, SiteDescription(name=CITIES[i], expression_unit=unit))
        clinical.to_csv(folder / "clinical.csv", index=False)
        _write_expression(folder, expression, kind)
        if i % 3 != 2:  # missing modality: every third site has no pathology, and others lack it for some patients
            image = activity[:, :1] * rng.normal(0.5, 0.2, 16) + rng.normal(0.0, 1.0, (n, 16))
            table = pd.DataFrame(image, index=expression.index, columns=list(IMAGE_FEATURES))
            table[rng.random(n) < 0.8].to_parquet(folder / "pathology.parquet")
        folders.append(folder)
    truth = {
        "cancers": list(cancers),
        "shared_program": genes[programs[0]].tolist(),
        "own_programs": {c: genes[programs[k + 1]].tolist() for k, c in enumerate(cancers)},
        "log_hazard_ratio": {
            c: {"shared": float(effect[k, 0]), "own": float(effect[k, k + 1])} for k, c in enumerate(cancers)
        },
        "events_per_month_at_zero_risk": dict(zip(cancers, hazard.tolist(), strict=True)),
    }
    (out / "truth.json").write_text(json.dumps(truth, indent=1))
    return folders


def _in_unit(log2: np.ndarray, unit: Unit, rng: np.random.Generator) -> np.ndarray:
    """Log2(CPM + 1)-like values as a site of that unit would deliver them."""
    linear = np.exp2(log2) - 1.0
    if unit == "counts":
        depth = rng.uniform(0.5, 1.5, (len(log2), 1)) * 30.0
        return rng.poisson(linear * depth).astype(np.int64)
    return linear.round(3) if unit == "tpm" else log2.astype(np.float32)


def _write_expression(folder: Path, table: pd.DataFrame, kind: str) -> None:
    if kind == "parquet":
        table.to_parquet(folder / "expression.parquet")
    elif kind == "tsv":  # as a sequencing core delivers it: genes in rows
        table.T.rename_axis("gene").to_csv(folder / "expression.tsv", sep="\t")
    elif kind == "csv":
        table.to_csv(folder / "expression.csv")
    else:
        import anndata

        anndata.AnnData(table).write_h5ad(folder / "expression.h5ad")
