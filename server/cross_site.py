"""Every model at every site: the federated one, and each site's own, scored by the held-out patients of all sites.

A site's own model is `local` (trained there alone, by the study's own phases, from the federation's first weights, scale of
genes and time grid) or `personalised` (the federated one, trained on there alone, as if training began anew). Its weights travel
to all other sites, which those of a site in a federation do not. Nothing here changes the fold: no checkpoint is written, and who
does not answer leaves a gap with the reason.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from oncofed.common import wire
from oncofed.common.blocks import Sum, under
from oncofed.common.metrics import ratio
from oncofed.server.aggregate import STATISTICS_BITS, Accumulator
from oncofed.server.inquiry import Inquiry
from oncofed.server.roster import NotEnoughSites
from oncofed.server.rounds import Rounds

log = logging.getLogger("oncofed.server")

FEDERATED, LOCAL, PERSONALISED = KINDS = ("federated", "local", "personalised")

ENOUGH = 10
"""A score of fewer pairs of patients (in a classification, patients) tells nothing."""

Scores = Mapping[str, Mapping[str, float]]
"""By site: what `summed` makes of its evaluation."""


@dataclass
class CrossSite:
    """One fold's matrix, after its training; `train_alone` trains a model by an inquiry that asks one site."""

    federated: Rounds
    train_alone: Callable[[Inquiry], Rounds]

    def run(self) -> dict[str, Any]:
        """Sums `[models][sites]` over cancer types, None where a site did not answer; `gaps` says why."""
        inquiry, begin = self.federated.inquiry, time.perf_counter()
        roster, wanted = inquiry.roster, inquiry.study.analysis.cross_site
        moved, sites = roster.sent + roster.received, roster.sites
        alone = [(kind, site) for kind in KINDS if kind in wanted for site in sites if site != inquiry.site_held_out]
        models: list[dict[str, Any]] = []
        scores: list[Scores] = []
        gaps: list[dict[str, Any]] = []
        for kind, site in [(FEDERATED, ""), *alone]:
            log.info("fold %d: %s model%s at every site", inquiry.fold, kind, f" of {site}" if site else "")
            before, told, by_site = len(roster.left_out), "", {}
            try:
                model = self._model(kind, replace(inquiry, alone=site))
                by_site = {name: value for name, value in self._score(model).items() if name in sites}
            except NotEnoughSites as error:
                told = str(error)
            # these reasons stand here: the federation's own rounds are not concerned
            reasons = {str(x["site"]): str(x["reason"]) for x in roster.left_out[before:]}
            roster.left_out[before:] = [x for x in roster.left_out[before:] if x["kind"] == wire.HELLO]
            if told:
                gaps.append({"model": len(models), "site": None, "reason": reasons.get(site, told)})
            else:
                gaps += [
                    {"model": len(models), "site": name, "reason": reasons.get(name, "the site is no longer there")}
                    for name in sites
                    if name not in by_site and inquiry.site_held_out in ("", name)
                ]
            models.append({"kind": kind, "site": site or None})
            scores.append(by_site)
        keys = ("concordant", "comparable") if inquiry.study.task.kind == "survival" else ("hits",)
        return {
            "sites": sites,
            "models": models,
            "sums": {
                key: [[row[s][key] if s in row else None for s in sites] for row in scores]
                for key in (*keys, "patients", "loss")
            },
            "gaps": gaps,
            "seconds": time.perf_counter() - begin,
            "bytes": roster.sent + roster.received - moved,
        }

    def _model(self, kind: str, inquiry: Inquiry) -> Rounds:
        if kind == FEDERATED:
            return self.federated
        if kind == LOCAL:
            return self.train_alone(inquiry)
        before = self.federated.strategy
        strategy = replace(before, settings=inquiry.aggregation, weights=dict(before.weights))
        strategy.load, strategy.branches = dict(before.load), before.branches
        own = Rounds(inquiry, self.federated.phase, self.federated.frame, strategy, None)
        own.run(lambda _: None, inquiry.study.analysis.personal_rounds)
        return own

    def _score(self, model: Rounds) -> dict[str, dict[str, float]]:
        """What each site's held-out patients say of a model. Not `final`: the sites' files of predictions are the fold's."""
        inquiry, roster = model.inquiry, model.inquiry.roster
        arrays = model.frame.arrays | under("weights/", model.strategy.weights)
        round_, found = model.kept, {}
        for answer in inquiry.ask(wire.EVALUATE, model.frame.config, arrays, round_=round_):
            try:
                Accumulator(model.shapes(), STATISTICS_BITS).check(answer.arrays, answer.site)
            except ValueError as error:
                roster.leave_out(answer.site, wire.EVALUATE, round_, str(error))
                continue
            found[answer.site] = summed(answer.arrays)
        return found


def summed(evaluation: Sum) -> dict[str, float]:
    """A site's evaluation over its cancer types, which keeps pairs within them: pairs or hits, patients, loss."""
    if "confusion" in evaluation:
        out = {"hits": np.trace(evaluation["confusion"])}
    else:
        out = {key: evaluation[key].sum() for key in ("concordant", "comparable")}
    return {k: float(v) for k, v in (out | {key: evaluation[key].sum() for key in ("patients", "loss")}).items()}


def matrix(folds: Iterable[Mapping[str, Any]]) -> dict[str, Any] | None:
    """All folds' sums as one table; None where no fold has any. What is unknown is None.

    `score` `[models][sites]`: C-index over pairs of patients of one site, cancer type and fold (in a classification the
    accuracy), with its `pairs` (patients). `own`, `others`, `all` of each of `models`, and of all models of a kind in `kinds`, pool
    the pairs of sites that trained the model, of those that did not, and of both. In `kinds`, `own` is over the `own_sites` whose
    patients the models of all kinds have scored, and `better` is the `[sites, of]` at which the federated model scores higher than
    the site's own.
    """
    folds = [fold for fold in folds if "cross_site" in fold]
    parts = [fold["cross_site"] for fold in folds]
    if not parts:
        return None
    sites = sorted({site for part in parts for site in part["sites"]})
    found = {(m["kind"], m["site"]) for part in parts for m in part["models"]}
    models = sorted(found, key=lambda m: (KINDS.index(m[0]), m[1] or ""))
    hits, of = ("concordant", "comparable") if "comparable" in parts[0]["sums"] else ("hits", "patients")
    sums = np.zeros((2, 2, len(models), len(sites)))  # hits and pairs; at sites that trained the model, and at others
    for fold, part in zip(folds, parts, strict=True):
        for m, about in enumerate(part["models"]):
            row = models.index((about["kind"], about["site"]))
            for s, site in enumerate(part["sites"]):
                other = site != about["site"] if about["site"] else site not in fold["site_evidence"]
                for i, key in enumerate((hits, of)):
                    sums[i, int(other), row, sites.index(site)] += part["sums"][key][m][s] or 0.0
    score, pairs = ratio(*sums.sum(1)), sums[1].sum(0)
    kinds = [[i for i, m in enumerate(models) if m[0] == kind] for kind in KINDS]
    own_K = np.array([sums[1, 0, rows].sum(0) > 0 for rows in kinds])  # kinds, sites
    common = own_K[own_K.any(1)].all(0) if own_K.any() else np.zeros(len(sites), dtype=bool)
    return {
        "sites": sites,
        "models": [{"kind": k, "site": s} | _pooled(sums[:, :, i]) for i, (k, s) in enumerate(models)],
        "score": [[_known(v) for v in row] for row in score],
        "pairs": pairs.tolist(),
        "kinds": {
            kind: _pooled(sums[:, :, rows].sum(2))
            | {"own": _known(ratio(*sums[:, 0, rows][:, :, common].sum((1, 2)))), "better": _better(sums, rows)}
            for kind, rows in zip(KINDS, kinds, strict=True)
            if rows
        },
        "own_sites": int(common.sum()),
        "measure": "c_index" if hits == "concordant" else "accuracy",
        "gaps": [gap | {"fold": fold["fold"]} for fold in folds for gap in _named(fold)],
    }


def _pooled(sums: np.ndarray) -> dict[str, float | None]:
    """Scores of hits and pairs `[2, own or others, sites]`."""
    own, others = (_known(ratio(*sums[:, i].sum(1))) for i in (0, 1))
    return {"own": own, "others": others, "all": _known(ratio(*sums.sum((1, 2))))}


def _better(sums: np.ndarray, rows: list[int]) -> tuple[int, int] | None:
    """At how many sites the federated model, the first row, scores higher than the site's own, of those with enough pairs."""
    own = sums[:, 0, rows].sum(1)
    enough = (own[1] >= ENOUGH) & (sums[1, 0, 0] >= ENOUGH)
    if rows == [0] or not enough.any():
        return None
    return int((ratio(*sums[:, 0, 0]) > ratio(*own))[enough].sum()), int(enough.sum())


def _named(fold: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The gaps of a fold with their models' names."""
    part = fold["cross_site"]
    return [gap | {"model": part["models"][gap["model"]]} for gap in part["gaps"]]


def _known(value: np.ndarray | float) -> float | None:
    return None if np.isnan(value) else float(value)
