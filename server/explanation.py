"""What the server asks of a fold's finished model: calibration, genes, attention, and what is left without the best genes.

Shapes: C cancer types or classes, G genes, L layers, H heads, K genes of a network.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
from oncofed.common import wire
from oncofed.common.ablation import ORDER, SHARES, genes_of
from oncofed.common.blocks import Sum, under
from oncofed.common.study import Study
from oncofed.common.survival import RISK_EDGES, baseline_on_grid, initial_log_baseline
from oncofed.server.aggregate import STATISTICS_BITS
from oncofed.server.inquiry import Inquiry, Shapes
from oncofed.server.roster import NotEnoughSites
from oncofed.server.statistics import Frame
from oncofed.server.strategy import EvidenceStrategy

log = logging.getLogger("oncofed.server")

NETWORK_BITS = 40
"""Resolution 1e-12 of sums of attributions of pairs of genes, of which there are many that hold little each."""


PUBLIC_RISKS = (np.abs(np.append(RISK_EDGES, np.inf)) <= 2.0).astype(np.float64)
"""How risks are taken to lie where nobody's patients may say it: evenly, from -2 to 2."""


def public_explanation(study: Study, frame: Frame, weights: Sum) -> Sum:
    """What a model says of itself: the log baselines `[C, K]` that its weights hold, of which no patient is asked."""
    baseline = weights.get("head.log_baseline")
    return {} if baseline is None else {"log_baseline": baseline_on_grid(study.task.loss, baseline, frame.grid)}


@dataclass(frozen=True)
class Explanation:
    """A finished model of one fold and the sites that are asked about it."""

    inquiry: Inquiry
    frame: Frame
    strategy: EvidenceStrategy

    def gather(self) -> Sum:
        """Sums over training patients: the spread of risks, the baselines that fit them, attributions of genes and attention."""
        total = self._ask("calibration and attributions", self._shapes())
        if "risk_counts" in total:
            events, exposure = total.pop("events"), total.pop("weighted_exposure")
            total["log_baseline"] = initial_log_baseline(events, exposure)
        strength = total.pop("network/strength", None)
        if strength is not None:
            total.pop("network/patients")
            total |= self._network(strength)
        return total

    def ablate(self, explanation: Sum) -> dict[str, Any] | None:
        """Held-out patients of each class who are still recognised without the genes that speak most for it; None without."""
        if not self.inquiry.study.analysis.ablation or "attribution/sum" not in explanation:
            return None
        mean = explanation["attribution/sum"]
        largest = genes_of(SHARES[-1], mean.shape[1])
        order = np.argsort(-mean, axis=1, kind="stable")[:, :largest]
        order[explanation["attribution/patients"] == 0] = -1
        c, s = len(mean), 1 + len(SHARES)
        shapes = {"ablation/hits": (c, s), "ablation/random": (c, s), "ablation/patients": (c,)}
        try:
            total = self.inquiry.add_up(wire.EVALUATE, self.frame.config, self._arrays | {ORDER: order}, shapes)
        except NotEnoughSites as error:
            log.warning("fold %d: no ablation of genes: %s", self.inquiry.fold, error)
            return None
        return {"shares": list(SHARES)} | {k.removeprefix("ablation/"): v.tolist() for k, v in total.items()}

    @property
    def _arrays(self) -> Sum:
        return self.frame.arrays | under("weights/", self.strategy.weights)

    def _ask(self, what: str, shapes: Shapes, more: Sum | None = None, bits: int = STATISTICS_BITS) -> Sum:
        """The sites' sums; nothing where too few answer: what explains a model must not cost the model."""
        if not shapes:
            return {}
        try:
            return self.inquiry.add_up(wire.EXPLAIN, self.frame.config, self._arrays | (more or {}), shapes, bits=bits)
        except NotEnoughSites as error:
            log.warning("fold %d: the model is saved without %s: %s", self.inquiry.fold, what, error)
            return {}

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        c, genes, study = len(self.inquiry.cancers), len(self.inquiry.panel), self.inquiry.study
        shapes: dict[str, tuple[int, ...]] = {}
        if study.task.kind == "survival":
            shapes |= {"risk_counts": (c, len(RISK_EDGES) + 1)}
            shapes |= dict.fromkeys(("events", "weighted_exposure"), (c, len(self.frame.grid)))
        if study.analysis.attributions:
            shapes |= {f"attribution/{k}": (c, genes) for k in ("sum", "size", "product", "squares")}
            shapes |= {"attribution/patients": (c,)}
            experts = self.strategy.mixtures.get("expert")
            shapes |= {"gate/product": (experts, genes), "gate/squares": (genes,)} if experts else {}
        if study.analysis.attention:
            shapes |= {"attention/entropy": (c, study.model.layers, study.model.heads), "attention/patients": (c,)}
        if study.analysis.network_genes:
            shapes |= {"network/strength": (c, 2, genes), "network/patients": (c,)}
        return shapes

    def _network(self, strength_C2G: np.ndarray) -> Sum:
        """Attention between the strongest genes of each class, beside the same with permuted labels."""
        a, layers = self.inquiry.study.analysis, self.inquiry.study.model.layers
        genes = strongest(strength_C2G, a.network_genes)
        c, k = genes.shape
        shapes: dict[str, tuple[int, ...]] = {"network/edges": (c, layers, k, k), "network/patients": (c,)}
        shapes |= {f"network/{n}": (c, layers) for n in ("error", "change")} | {
            f"network/{n}": (c,) for n in ("covered", "total")
        }
        for d in range(a.network_draws):
            shapes |= {f"network/null-{d}": (c, layers, k, k), f"network/null-patients-{d}": (c,)}
        total = self._ask("networks", shapes, {wire.NETWORK_GENES: genes}, NETWORK_BITS)
        if not total:
            return {}
        for name in ("null", "null-patients"):
            parts = [total.pop(f"network/{name}-{d}") for d in range(a.network_draws)]
            total[f"network/{name.replace('-', '_')}"] = np.stack(parts)
        return total | {wire.NETWORK_GENES: genes}


def strongest(strength_C2G: np.ndarray, count: int) -> np.ndarray:
    """Genes of each class `[C, K]` in the panel's order: by turns the strongest query and the strongest key."""
    count = min(count, strength_C2G.shape[2])
    chosen = []
    for as_query, as_key in np.abs(strength_C2G):
        turns = np.stack([np.argsort(-as_query, kind="stable"), np.argsort(-as_key, kind="stable")], axis=1).ravel()
        chosen.append(np.sort(list(dict.fromkeys(turns.tolist()))[:count]))
    return np.array(chosen, dtype=np.int64)
