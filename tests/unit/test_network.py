"""Networks from attention: edges, hubs against permuted labels, agreement between models, files."""

from __future__ import annotations

import csv
from pathlib import Path

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oncofed.common.panel import GenePanel
from oncofed.server import genes, network, network_results
from oncofed.server.network import DEGREES, Network, agreement, edge_rows, graph, hubs, network_of, pooled_edges
from toy_explanations import CHOSEN, CLASSES, DRAWS, LAYERS, PANEL, explanation, noise, own_genes, write_run

K, L = 30, 2


def sums(edges: np.ndarray, null: np.ndarray, patients: float = 10.0, chosen: np.ndarray | None = None) -> dict:
    """The explanation of one class: edges `[L, K, K]` beside null `[D, L, K, K]`."""
    k = edges.shape[1]
    return {
        "network/genes": np.arange(k)[None] if chosen is None else chosen[None],
        "network/edges": edges[None] * patients,
        "network/patients": np.array([patients]),
        "network/null": null[:, None] * 7.0,
        "network/null_patients": np.full((len(null), 1), 7.0),
    }


def alike(rng: np.random.Generator, draws: int, panel: int = 1000) -> Network:
    """A network that is a draw of its own null; in each some genes are read, or read others, more than most."""

    def one(*shape: int) -> np.ndarray:
        *many, _, k, _ = shape
        queries, keys = rng.normal(size=(*many, 1, k, 1)), rng.normal(size=(*many, 1, 1, k))
        return noise(rng, *shape) * np.exp(0.7 * (queries + keys))

    found = network_of(sums(one(L, K, K), one(draws, L, K, K)), 0, panel)
    assert found is not None
    return found


def test_planted_hub_is_found() -> None:
    """Its p is the smallest that the draws allow, and other genes are not said to be hubs."""
    rng = np.random.default_rng(0)
    models = [explanation(rng) for _ in range(4)]
    for c in range(len(CLASSES)):
        networks = [n for e in models if (n := network_of(e, c, len(PANEL))) is not None]
        found = hubs(networks)
        assert found[0].gene == own_genes(c)[0]
        assert found[0].p["degree"] == found[0].p["out_degree"] == pytest.approx(1 / (1 + 4 * DRAWS))
        assert found[0].stability == 1.0
        assert found[0].degree["out_degree"] > 10 * found[0].degree["in_degree"]  # it is read, it does not read
        assert sum(h.p["degree"] < 0.05 for h in found) <= 3
        assert agreement(networks)["jaccard"] > 3 * agreement(networks)["by_chance"]


def test_permuted_labels_have_no_hubs_beyond_chance() -> None:
    """Over simulated networks that are like their nulls, the smallest p of all genes is below 0.05 about once in twenty."""
    smallest = []
    for seed in range(200):
        found = hubs([alike(np.random.default_rng(seed), draws=39)])
        smallest.append(min((h.p["degree"] for h in found), default=1.0))
    below = [np.mean(np.array(smallest) <= level) for level in (0.05, 0.2, 0.5)]
    assert 0.0 < below[0] <= 0.09
    assert 0.05 < below[1] <= 0.25
    assert 0.2 < below[2] <= 0.55  # ties of whole numbers make p cautious


def test_folds_that_are_like_their_nulls_agree_as_these_do() -> None:
    rng = np.random.default_rng(3)
    told = agreement([alike(rng, draws=10) for _ in range(6)])
    assert told["jaccard"] == pytest.approx(told["by_chance"], abs=0.08)


def test_one_outlier_does_not_hide_the_other_edges() -> None:
    rng = np.random.default_rng(0)
    own, null = noise(rng, L, K, K), noise(rng, 5, L, K, K)
    own[:, :, 4] += 15
    before = network_of(sums(own, null), 0, 1000)
    own[0, 2, 3] = 2000.0
    after = network_of(sums(own, null), 0, 1000)
    assert before is not None
    assert after is not None
    assert hubs([after])[0].gene == hubs([before])[0].gene == 4


def test_edges_are_positive_above_the_null_and_few() -> None:
    rng = np.random.default_rng(0)
    own, null = noise(rng, L, K, K), noise(rng, 6, L, K, K)
    own[:, :, 2] += 9
    for panel, most in ((1000, 2000), (100, 20), (30, 1)):
        found = network_of(sums(own, null), 0, panel)
        assert found is not None
        assert 0 < found.edges <= most
        assert ((found.weight > 0) <= (own > 0)).all()
        assert not found.weight[:, np.eye(K, dtype=bool)].any()
        assert found.weight.max() == 1.0
    pairs = ~np.eye(K, dtype=bool)
    scaled = np.stack([n[:, pairs] / np.abs(n[:, pairs]).mean(1, keepdims=True) for n in null])
    wide = network_of(sums(own, null), 0, 10_000)
    assert wide is not None
    assert wide.threshold == pytest.approx(np.quantile(scaled, network.QUANTILE))
    mine = own[:, pairs] / np.abs(own[:, pairs]).mean(1, keepdims=True)
    assert wide.edges == (mine > wide.threshold).sum()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), factor=st.floats(1e-6, 1e6))
def test_sizes_do_not_count(seed: int, factor: float) -> None:
    """Patients, and how steep the log-probability is, scale a layer's attributions: the network stays."""
    rng = np.random.default_rng(seed)
    own, null = noise(rng, L, K, K), noise(rng, 3, L, K, K)
    a = network_of(sums(own, null), 0, 500)
    b = network_of(sums(own * np.array([factor, 1.0])[:, None, None], null * factor, patients=3.0), 0, 500)
    assert a is not None
    assert b is not None
    np.testing.assert_allclose(a.weight, b.weight, rtol=1e-9)
    np.testing.assert_array_equal(a.largest, b.largest)


def test_withheld_classes_and_draws() -> None:
    rng = np.random.default_rng(0)
    own, null = noise(rng, L, K, K), noise(rng, 4, L, K, K)
    told = sums(own, null)
    told["network/null_patients"][1] = 0.0
    told["network/null"][1] = 0.0
    found = network_of(told, 0, 1000)
    assert found is not None
    assert len(found.largest) == len(found.null_top) == 3
    told["network/null_patients"][:] = 0.0
    without = network_of(told, 0, 100)
    assert without is not None
    assert without.edges == 20  # the share of all pairs alone
    assert {h.p["degree"] for h in hubs([without])} == {None}
    assert agreement([without, without]) == {"jaccard": 1.0, "by_chance": None}
    told["network/patients"][:] = 0.0
    assert network_of(told, 0, 1000) is None
    assert network_of(sums(np.zeros((L, K, K)), null), 0, 1000) is None
    negative = network_of(sums(-np.abs(own), null), 0, 1000)  # nothing speaks for the class
    assert negative is not None
    assert negative.edges == 0
    assert hubs([negative]) == []


def test_degrees_are_networkx() -> None:
    rng = np.random.default_rng(1)
    networks = [alike(rng, draws=2, panel=200) for _ in range(3)]
    names = [f"G{i}" for i in range(K)]
    found = {names[h.gene]: h for h in hubs(networks)}
    for kind in DEGREES:
        counts: dict[str, float] = {}
        for n in networks:
            single = nx.MultiDiGraph((names[s], names[t]) for (s, t, _), _ in edge_rows(n))
            for gene, degree in getattr(single, kind)():
                counts[gene] = counts.get(gene, 0.0) + degree / 3
        assert {g: h.degree[kind] for g, h in found.items()} == pytest.approx(counts)


def test_edges_run_from_key_to_query_and_are_pooled_over_models() -> None:
    chosen = np.array([5, 7, 9])
    own = np.zeros((2, 3, 3))
    own[1, 0, 2] = 4.0  # in the second layer gene 5 (query) reads gene 9 (key)
    own[0, 1, 0] = 2.0
    null = np.full((1, 2, 3, 3), 1e-9)
    a = network_of(sums(own, null, chosen=chosen), 0, 1000)
    own[0, 1, 0] = 0.0
    b = network_of(sums(own, null, chosen=chosen), 0, 1000)
    assert a is not None
    assert b is not None
    assert dict(edge_rows(b)) == {(9, 5, 2): 1.0}
    pooled = pooled_edges([a, b])
    assert pooled[(9, 5, 2)] == (1.0, 2)
    assert pooled[(5, 7, 1)] == (0.5, 1)


def test_graphml_comes_back_as_it_was(tmp_path: Path) -> None:
    out = write_run(tmp_path / "out")
    _, files = network_results.write_networks([out])
    networks = network.networks_of([genes.read_models(out)])
    whole = graph(networks["LUAD"], hubs(networks["LUAD"]), PANEL.genes)
    read = nx.read_graphml(out / "network" / "LUAD.graphml", force_multigraph=True)
    assert read.is_directed()
    assert dict(read.nodes(data=True)) == dict(whole.nodes(data=True))

    def edges(g: nx.MultiDiGraph) -> list[tuple]:
        return sorted((s, t, d["layer"], d["models"], d["weight"]) for s, t, d in g.edges(data=True))

    assert edges(read) == edges(whole)
    assert read.number_of_edges() == len({key for *_, key in read.edges(keys=True)})
    with (out / "network" / "LUAD.tsv").open() as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert list(rows[0]) == ["source", "target", "layer", "weight", "fold", "run"]
    assert len(rows) == sum(n.edges for n in networks["LUAD"])
    assert {row["fold"] for row in rows} == {"0", "1", "2"}
    with (out / "network" / "hubs.csv").open() as file:
        table = [row for row in csv.DictReader(file) if row["class"] == "LUAD"]
    assert table[0]["gene"] == PANEL.genes[own_genes(3)[0]]
    assert float(table[0]["degree"]) == pytest.approx(whole.degree(table[0]["gene"], weight="models") / 3, rel=1e-5)
    assert len(files) == 2 * len(CLASSES) + 2


def test_runs_of_other_panels_or_classes_are_refused(tmp_path: Path) -> None:
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b", seed=1)
    runs = [genes.read_models(folder) for folder in (a, b)]
    assert len(network.networks_of(runs)["BRCA"]) == 6
    other = [type(m)(**{**vars(m), "cancers": m.cancers[::-1]}) for m in runs[1]]
    with pytest.raises(ValueError, match="run 2, fold 0: its classes differ"):
        network.networks_of([runs[0], other])
    other = [type(m)(**{**vars(m), "panel": GenePanel(m.panel.genes[::-1])}) for m in runs[1]]
    with pytest.raises(ValueError, match="run 2, fold 0: its gene panel differ"):
        network.networks_of([runs[0], other])


def test_a_run_is_not_held_against_itself(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a")
    with pytest.raises(ValueError, match="differs in its seed alone"):
        network_results.write_networks([a, a])


def test_summary_says_how_far_a_network_can_be_trusted(tmp_path: Path) -> None:
    models = genes.read_models(write_run(tmp_path / "out", withheld=(0,)))
    told = network_results.summarise([models])
    assert told["withheld"] == ["BRCA"]
    assert told["layers"] == LAYERS
    c = told["classes"]["THCA"]
    assert (c["models"], c["genes"], c["null_networks"]) == (3, CHOSEN, 3 * DRAWS)
    assert c["covered"] == pytest.approx(0.3)
    assert c["error"] == pytest.approx([0.01] * LAYERS)
    assert c["significant"] >= 1
    shown = {h["gene"] for h in c["hubs"]}
    assert all({source, target} & shown for source, target, _, _ in c["drawn"])
