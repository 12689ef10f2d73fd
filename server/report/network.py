"""The report's drawings of attention networks, one a class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import networkx as nx
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from oncofed.server.report.look import BLUE, RED, STYLE, svg

MOST = 12
"""Classes that are drawn; the files hold all."""

LAYERS = (BLUE, "#d98a29", "#6b8e23", "#7a5195")
"""Colours of edges by layer, from the first; later layers share the last."""


def sections(results: Mapping[str, Any]) -> dict[str, str]:
    """The picture of the networks, where the results hold some."""
    classes = results.get("network", {}).get("classes", {})
    with_edges = {name: c for name, c in classes.items() if c["drawn"]}
    return {"networks": drawings(dict(list(with_edges.items())[:MOST]))} if with_edges else {}


@STYLE
def drawings(classes: Mapping[str, Mapping[str, Any]]) -> str:
    """A panel a class: hubs with their names, red where p < 0.05, size by degree; arrows from key to query, coloured by layer."""
    columns = min(3, len(classes))
    rows = -(-len(classes) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.9 * rows + 0.3), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, (name, c) in zip(axes, classes.items(), strict=False):
        _draw(axis, c)
        axis.set_title(f"{name}: {c['edges']:.0f} edges, {c['genes']} genes", loc="left", fontsize=9)
    for axis in axes:
        axis.set_axis_off()
    layers = max(edge[2] for c in classes.values() for edge in c["drawn"])
    handles = [Line2D([], [], color=_colour(n), label=f"layer {n}") for n in range(1, layers + 1)]
    figure.legend(handles=handles, loc="outside lower left", ncols=len(handles), frameon=False, fontsize=8)
    return svg(figure)


def _draw(axis: Axes, c: Mapping[str, Any]) -> None:
    graph = nx.DiGraph()
    for source, target, layer, weight in sorted(c["drawn"], key=lambda edge: edge[3]):
        graph.add_edge(source, target, layer=layer, weight=weight)  # of several layers the strongest is drawn
    hubs = {h["gene"]: h for h in c["hubs"] if h["gene"] in graph}
    place = _layout(graph)
    largest = max(h["degree"] for h in hubs.values())
    size = {n: 30 + 170 * hubs[n]["degree"] / largest if n in hubs else 8 for n in graph}
    strongest = max(d["weight"] for *_, d in graph.edges(data=True))
    nx.draw_networkx_edges(
        graph,
        place,
        ax=axis,
        node_size=[size[n] for n in graph],
        edge_color=[_colour(d["layer"]) for *_, d in graph.edges(data=True)],
        width=[0.5 + 1.3 * d["weight"] / strongest for *_, d in graph.edges(data=True)],
        alpha=0.5,
        arrowsize=6,
        connectionstyle="arc3,rad=0.08",
    )
    colour = [_node_colour(hubs.get(n)) for n in graph]
    nx.draw_networkx_nodes(graph, place, ax=axis, node_size=[size[n] for n in graph], node_color=colour, linewidths=0)
    for gene in hubs:
        x, y = place[gene]
        away = 3 + size[gene] ** 0.5 / 2
        axis.annotate(
            gene,
            (x, y),
            (0, away),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=7,
            bbox={"facecolor": "white", "alpha": 0.65, "edgecolor": "none", "pad": 0.3},
        )
    spread = np.array(list(place.values()))
    low, high = spread.min(0), spread.max(0)
    room = 0.08 * (high - low) + 1e-3
    axis.set_xlim(low[0] - room[0], high[0] + room[0])
    axis.set_ylim(low[1] - room[1], high[1] + 1.5 * room[1])  # names stand above


def _layout(graph: nx.DiGraph) -> dict[str, np.ndarray]:
    """Places whose distances follow the steps between genes, the same for the same graph."""
    plain = nx.Graph(graph.edges())
    centre = ("centre",)  # no gene is a tuple; it holds parts together that no edge joins
    for part in list(nx.connected_components(plain)):
        plain.add_edge(centre, max(part, key=plain.degree))
    places: dict[str, np.ndarray] = nx.kamada_kawai_layout(plain)
    return {gene: places[gene] for gene in graph}


def _colour(layer: int) -> str:
    return LAYERS[min(layer, len(LAYERS)) - 1]


def _node_colour(hub: Mapping[str, Any] | None) -> str:
    if hub is None:
        return "#bbbbbb"
    return RED if hub["p"] is not None and hub["p"] < 0.05 else BLUE
