"""Networks of genes from what attention contributes to a class: which gene the model uses to read which, and the hubs.

An edge runs from the gene that is looked at (key) to the gene that looks (query): influence flows that way. Each network
stands beside null networks of the same class, of patients of other classes attributed towards it. In each layer a network is
divided by its own mean size of an entry: the log-probability is flat where a class is recognised and steep elsewhere, so
sizes cannot be compared, shapes can. T-GEM's authors divide by the largest entry; one outlier would then hide all other
edges. Shapes: L layers, K genes of a class's network, D null networks of one model.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

import networkx as nx
import numpy as np
from oncofed.common.blocks import Sum
from oncofed.common.saved import SavedModel

SHARE = 0.001
"""At most this share of all pairs of genes of the panel, over layers, becomes an edge."""

QUANTILE = 0.999
"""An edge is larger than this share of the null networks' entries."""

TOP = 10
"""Hubs whose agreement between models is measured."""

DEGREES = ("degree", "in_degree", "out_degree")
"""The counts of edges, over layers; each has a null of its own."""


@dataclass(frozen=True)
class Network:
    """One class in one model.

    `genes [K]`: indices into the panel. `weight [L, K, K]`: the edges, query by key, 0 where there is none, and 1 the
    strongest. `threshold`: what an edge exceeds, in mean sizes of an entry. `count [3, K]`
    and `strength [3, K]`: number and summed weight of each gene's edges, in the order of `DEGREES`. Of the null networks
    `largest [D, 3]`, the largest of each count, and `null_top`, the first hubs of each.
    """

    fold: int
    run: int
    genes: np.ndarray
    weight: np.ndarray
    threshold: float
    count: np.ndarray
    strength: np.ndarray
    largest: np.ndarray
    null_top: tuple[frozenset[int], ...]

    @property
    def edges(self) -> int:
        return int(np.count_nonzero(self.weight))

    @property
    def top(self) -> frozenset[int]:
        """The first hubs, as indices into the panel."""
        return _top(self.genes, self.count[0], self.strength[0])


def has_networks(model: SavedModel) -> bool:
    return "network/edges" in model.explanation


def networks_of(runs: Sequence[Sequence[SavedModel]]) -> dict[str, list[Network]]:
    """By class the networks of all models of one run or several; models in which a class was withheld have none of it.

    Raises where the runs' panels or classes differ: their genes could not be told to be the same.
    """
    first = runs[0][0]
    for number, models in enumerate(runs, 1):
        for m in models:
            if m.panel.hash != first.panel.hash or m.cancers != first.cancers:
                what = "classes" if m.panel.hash == first.panel.hash else "gene panel"
                raise ValueError(
                    f"run {number}, fold {m.fold}: its {what} differ from the first run's; compare runs of one study that "
                    "differ in their seed alone"
                )
    found = {}
    for c, name in enumerate(first.cancers):
        each = [
            network_of(m.explanation, c, len(m.panel), fold=m.fold, run=number)
            for number, models in enumerate(runs, 1)
            for m in models
        ]
        found[name] = [network for network in each if network is not None]
    return found


def network_of(explanation: Sum, c: int, panel: int, *, fold: int = 0, run: int = 1) -> Network | None:
    """The network of class `c` in a model of `panel` genes; None where the class was withheld or nothing was attributed.

    Edges are positive, at most `SHARE` of all L * panel^2 pairs, and above the `QUANTILE` of the null networks' entries.
    The same threshold makes the null networks' edges, whose degrees the class's hubs are held against.
    """
    if not explanation["network/patients"][c] > 0:
        return None
    own_LKK = _scaled(explanation["network/edges"][c])
    if not own_LKK.any():
        return None
    genes = np.rint(explanation["network/genes"][c]).astype(np.int64)
    drawn = np.flatnonzero(explanation["network/null_patients"][:, c] > 0)
    null = [_scaled(explanation["network/null"][d, c]) for d in drawn]
    threshold = _cut(own_LKK, int(SHARE * len(own_LKK) * panel**2))
    if null:
        pairs = ~np.eye(len(genes), dtype=bool)
        threshold = max(threshold, float(np.quantile(np.stack([n[:, pairs] for n in null]), QUANTILE)))
    weight = _edges(own_LKK, threshold)
    weight /= max(float(weight.max()), 1e-12)  # nothing is left where no entry is positive
    count, strength = _degrees(weight)
    largest, tops = np.zeros((len(null), len(DEGREES))), []
    for d, entries in enumerate(null):
        null_count, null_strength = _degrees(_edges(entries, threshold))
        largest[d] = null_count.max(1)
        tops.append(_top(genes, null_count[0], null_strength[0]))
    return Network(fold, run, genes, weight, threshold, count, strength, largest, tuple(tops))


def _scaled(sum_LKK: np.ndarray) -> np.ndarray:
    """Without genes' attention to themselves, each layer by its mean size of an entry; that also turns sums into means."""
    k = sum_LKK.shape[1]
    pairs = sum_LKK * ~np.eye(k, dtype=bool)
    size = np.abs(pairs).sum((1, 2), keepdims=True) / max(k * (k - 1), 1)
    return np.divide(pairs, size, out=np.zeros_like(pairs), where=size > 0)


def _cut(entries_LKK: np.ndarray, most: int) -> float:
    """The value that at most `most` entries exceed; never below 0."""
    if most >= entries_LKK.size:
        return 0.0
    place = entries_LKK.size - most - 1
    return max(0.0, float(np.partition(entries_LKK, place, axis=None)[place]))


def _edges(entries_LKK: np.ndarray, threshold: float) -> np.ndarray:
    return np.where(entries_LKK > threshold, entries_LKK, 0.0)


def _degrees(weight_LKK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Number and summed weight of each gene's edges `[3, K]`, in the order of `DEGREES`."""

    def three(value_LKK: np.ndarray) -> np.ndarray:
        into, out_of = value_LKK.sum((0, 2)), value_LKK.sum((0, 1))
        return np.stack([into + out_of, into, out_of])

    return three((weight_LKK > 0).astype(np.float64)), three(weight_LKK)


def _top(genes: np.ndarray, count: np.ndarray, strength: np.ndarray) -> frozenset[int]:
    """The `TOP` genes of highest degree, of equal ones the stronger; genes without an edge are no hubs."""
    order = np.lexsort((-strength, -count))[:TOP]
    return frozenset(genes[order[count[order] > 0]].tolist())


@dataclass(frozen=True)
class Hub:
    """A gene in the network of a class: mean degrees and weighted degree over models.

    `p`, by degree: how often, with one added above and below, the LARGEST degree of a null network reaches the gene's; so it
    holds for all genes at once. The mean over models is held against single null networks, which is cautious. None without
    null networks. `stability`: share of the models in which the gene is among the first `TOP` hubs.
    """

    gene: int
    degree: dict[str, float]
    weighted_degree: float
    p: dict[str, float | None]
    stability: float


def hubs(networks: Sequence[Network]) -> list[Hub]:
    """All genes with an edge in any model, the highest mean degree first."""
    count: dict[int, np.ndarray] = defaultdict(lambda: np.zeros(len(DEGREES)))
    strength: dict[int, float] = defaultdict(float)
    for n in networks:
        for k in np.flatnonzero(n.count[0]).tolist():
            count[int(n.genes[k])] += n.count[:, k] / len(networks)
            strength[int(n.genes[k])] += float(n.strength[0, k]) / len(networks)
    largest = np.concatenate([n.largest for n in networks])
    found = []
    for gene, mean in count.items():
        # a tolerance, since a mean of whole numbers may miss one by a digit
        reached = (largest >= mean - 1e-9).sum(0)
        p = [float((1 + r) / (1 + len(largest))) if len(largest) else None for r in reached]
        found.append(
            Hub(
                gene=gene,
                degree=dict(zip(DEGREES, mean.tolist(), strict=True)),
                weighted_degree=strength[gene],
                p=dict(zip(DEGREES, p, strict=True)),
                stability=sum(gene in n.top for n in networks) / len(networks),
            )
        )
    return sorted(found, key=lambda h: (-h.degree["degree"], -h.weighted_degree, h.gene))


def agreement(networks: Sequence[Network]) -> dict[str, float | None]:
    """Mean over pairs of models of the share (Jaccard) of first hubs in common, and of null networks of the same models.

    None with one model, or where there is no null. Folds share training patients, so they agree more than seeds on new ones.
    """
    null = [
        _jaccard(x, y)
        for a, b in combinations(networks, 2)
        for x, y in zip(a.null_top, b.null_top, strict=False)  # a draw may be withheld in one of them
    ]
    own = [_jaccard(a.top, b.top) for a, b in combinations(networks, 2)]
    return {"jaccard": _mean(own), "by_chance": _mean(null)}


def _jaccard(a: frozenset[int], b: frozenset[int]) -> float:
    return len(a & b) / len(a | b) if a or b else 0.0


def _mean(values: Iterable[float]) -> float | None:
    known = list(values)
    return float(np.mean(known)) if known else None


Edge = tuple[int, int, int]
"""Source and target, as indices into the panel, and layer, counted from 1."""


def edge_rows(network: Network) -> list[tuple[Edge, float]]:
    """Edges with their weights, the strongest first; key to query."""
    layer, query, key = np.nonzero(network.weight)
    weight = network.weight[layer, query, key]
    order = np.argsort(-weight, kind="stable")
    source, target = network.genes[key[order]].tolist(), network.genes[query[order]].tolist()
    return list(zip(zip(source, target, (layer[order] + 1).tolist(), strict=True), weight[order].tolist(), strict=True))


def pooled_edges(networks: Sequence[Network]) -> dict[Edge, tuple[float, int]]:
    """Over models: the mean weight, 0 where an edge is missing, and in how many models it is."""
    total: dict[Edge, list[float]] = defaultdict(list)
    for n in networks:
        for edge, weight in edge_rows(n):
            total[edge].append(weight)
    return {edge: (sum(weights) / len(networks), len(weights)) for edge, weights in total.items()}


def graph(networks: Sequence[Network], nodes: Sequence[Hub], genes: Sequence[str]) -> nx.MultiDiGraph:
    """A class over its models, key to query: edges with `layer`, `weight` and `models`, nodes with what makes them hubs."""
    whole = nx.MultiDiGraph(models=len(networks))
    for hub in nodes:
        p = hub.p["degree"]
        known = {"weighted_degree": hub.weighted_degree, "stability": hub.stability} | ({} if p is None else {"p": p})
        whole.add_node(genes[hub.gene], **hub.degree, **known)
    for n, ((source, target, layer), (weight, models)) in enumerate(pooled_edges(networks).items()):
        # a key of its own becomes the edge's id in GraphML, which some readers want to be unique
        whole.add_edge(genes[source], genes[target], key=f"e{n}", layer=layer, weight=weight, models=models)
    return whole
