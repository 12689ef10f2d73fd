"""The networks of a study as plain numbers for results and report, and as files for other tools."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
from oncofed.common.files import replacing, write_text
from oncofed.common.saved import SavedModel
from oncofed.server.genes import file_stems, read_models
from oncofed.server.network import (
    DEGREES,
    QUANTILE,
    SHARE,
    TOP,
    Edge,
    Hub,
    Network,
    agreement,
    edge_rows,
    graph,
    has_networks,
    hubs,
    networks_of,
    pooled_edges,
)

FOLDER = "network"

SHOWN = 15
"""Hubs of a class in the results and in the report."""

EDGES_OF_A_HUB = 8
"""Edges of each of them that are drawn."""


def summarise(runs: Sequence[Sequence[SavedModel]]) -> dict[str, Any]:
    """By class hubs, agreement between models, how far the network can be trusted, and the edges to draw."""
    found = networks_of(runs)
    return {
        "share": SHARE,
        "quantile": QUANTILE,
        "top": TOP,
        "layers": int(next((n[0].weight.shape[0] for n in found.values() if n), 0)),
        "classes": {
            name: _class_summary(networks, runs, c) for c, (name, networks) in enumerate(found.items()) if networks
        },
        "withheld": [name for name, networks in found.items() if not networks],
    }


def _class_summary(networks: list[Network], runs: Sequence[Sequence[SavedModel]], c: int) -> dict[str, Any]:
    """`covered`: at most this share of all attribution lies between the network's genes. `error`: of completeness, by layer."""
    genes, nodes = runs[0][0].panel.genes, hubs(networks)
    told = [m.explanation for models in runs for m in models if m.explanation["network/patients"][c] > 0]
    total = sum(float(e["network/total"][c]) for e in told)
    change = np.sum([e["network/change"][c] for e in told], axis=0)
    error = np.sum([e["network/error"][c] for e in told], axis=0)
    return {
        "models": len(networks),
        "genes": len(networks[0].genes),
        "null_networks": sum(len(n.largest) for n in networks),
        "edges": float(np.mean([n.edges for n in networks])),
        "covered": sum(float(e["network/covered"][c]) for e in told) / total if total > 0 else None,
        "error": [float(e / d) if d > 0 else None for e, d in zip(error, change, strict=True)],
        "agreement": agreement(networks),
        "significant": sum(h.p["degree"] is not None and h.p["degree"] < 0.05 for h in nodes),
        "hubs": [hub_row(hub, genes) for hub in nodes[:SHOWN]],
        "drawn": _drawn(networks, nodes[:SHOWN], genes),
    }


def hub_row(hub: Hub, genes: Sequence[str]) -> dict[str, Any]:
    """A hub as plain numbers, gene by name."""
    return {
        "gene": genes[hub.gene],
        **hub.degree,
        "weighted_degree": hub.weighted_degree,
        **{"p" if kind == "degree" else f"p_{kind}": hub.p[kind] for kind in DEGREES},
        "stability": hub.stability,
    }


def _drawn(networks: list[Network], shown: Sequence[Hub], genes: Sequence[str]) -> list[list[Any]]:
    """The strongest edges of each hub: source, target, layer, mean weight."""
    pooled = sorted(pooled_edges(networks).items(), key=lambda item: (-item[1][0], item[0]))
    chosen: dict[Edge, tuple[float, int]] = {}
    for hub in shown:
        own = [item for item in pooled if hub.gene in item[0][:2]][:EDGES_OF_A_HUB]
        chosen |= dict(own)
    return [[genes[source], genes[target], layer, weight] for (source, target, layer), (weight, _) in chosen.items()]


def write_networks(folders: Sequence[Path]) -> tuple[dict[str, Any], list[Path]]:
    """Write `network/` into the first of `folders`, finished runs of one study that differ in their seed.

    `<CLASS>.graphml` over all models, `<CLASS>.tsv` with the edges of each, `hubs.csv`, `stability.json`. Returns the
    summary and the files. Raises `ValueError` where a run holds no networks, or the runs do not fit together.
    """
    runs = [_with_networks(folder) for folder in folders]
    studies = [run[0].study for run in runs]
    rest = [s.model_dump(exclude={"seed", "name", "runtime"}) for s in studies]
    seeds = [s.seed for s in studies]
    if any(r != rest[0] for r in rest) or len(set(seeds)) < len(seeds):
        raise ValueError(
            f"{', '.join(map(str, folders))}: runs that are held together must be of one study that differs in its seed alone; theirs "
            f"are {seeds}" + ("" if len(set(seeds)) < len(seeds) else ", and other settings differ")
        )
    genes, target = runs[0][0].panel.genes, folders[0] / FOLDER
    found, stems = networks_of(runs), file_stems(runs[0][0].cancers)
    files, rows = [], []
    for name, networks in found.items():
        if not networks:
            continue
        nodes = hubs(networks)
        rows += [{"class": name} | hub_row(hub, genes) for hub in nodes]
        file = target / f"{stems[name]}.graphml"
        with replacing(file) as temporary:
            nx.write_graphml(graph(networks, nodes, genes), temporary)
        files += [file, _write_edges(target / f"{stems[name]}.tsv", networks, genes)]
    summary = summarise(runs)
    files += [_write_hubs(target / "hubs.csv", rows), target / "stability.json"]
    stability = {
        name: {"models": c["models"], "null_networks": c["null_networks"], **c["agreement"]}
        for name, c in summary["classes"].items()
    }
    write_text(files[-1], json.dumps({"top": TOP, "classes": stability, "withheld": summary["withheld"]}, indent=1))
    return summary, files


def _with_networks(folder: Path) -> list[SavedModel]:
    models = read_models(folder)
    if not models or not all(has_networks(m) for m in models):
        raise ValueError(
            f"{folder}: the study did not ask for networks; set analysis.network_genes = 100, say, beside model.name = "
            "'t_gem' and analysis.attributions = true, and run it again with runtime.resume = true: rounds that are done stay done"
        )
    return models


def _write_edges(file: Path, networks: Sequence[Network], genes: Sequence[str]) -> Path:
    """An edge a row by tabs, for Cytoscape and the like."""
    with replacing(file) as temporary, temporary.open("w", newline="") as stream:
        writer = csv.writer(stream, delimiter="\t", lineterminator="\n")
        writer.writerow(("source", "target", "layer", "weight", "fold", "run"))
        for n in networks:
            for (source, target, layer), weight in edge_rows(n):
                writer.writerow((genes[source], genes[target], layer, f"{weight:.6g}", n.fold, n.run))
    return file


def _write_hubs(file: Path, rows: Iterable[dict[str, Any]]) -> Path:
    columns = ("class", "gene", *DEGREES, "weighted_degree", "p", "p_in_degree", "p_out_degree", "stability")
    with replacing(file) as temporary, temporary.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, columns)
        writer.writeheader()
        for row in rows:
            writer.writerow({k: _short(v) for k, v in row.items()})
    return file


def _short(value: Any) -> Any:
    """A value that is not known is empty."""
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else value
