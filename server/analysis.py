"""What a trained model does, read from sums alone: who uses which expert, what each is worth, which genes drive the score.

Experts of different folds are different experts, so everything about experts stays within a fold; genes are the same in
all folds. Shapes: C cancer types, E experts, R rounds, S sites, F folds, G genes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from oncofed.common.blocks import Sum
from scipy.stats import random_table, spearmanr

DRAWS = 1000
"""Label-permuted tables that an observed one is held against."""

DEAD = 0.01
"""An expert with a smaller share than this serves nobody."""

LAST_ROUNDS = 5
"""Rounds at the end of training over which the load is averaged."""

TOP = 50
"""Genes whose overlap between folds is measured."""


# -- experts -------------------------------------------------------------------------------------------------------------


def normalised_mutual_information(counts: np.ndarray) -> np.ndarray:
    """Mutual information of rows and columns over the mean of their entropies: `[..., C, E]` counts -> `[...]`.

    0 where nothing depends on anything, also where all patients share one row or one column.
    """
    p = counts / counts.sum((-2, -1), keepdims=True)
    row, column = p.sum(-1), p.sum(-2)
    joint = _entropy(p.reshape(*p.shape[:-2], -1))
    mean = (_entropy(row) + _entropy(column)) / 2
    information = np.maximum(2 * mean - joint, 0.0)
    return np.divide(information, mean, out=np.zeros_like(mean), where=information > 1e-12)


def _entropy(p: np.ndarray) -> np.ndarray:
    return -(p * np.log(np.where(p > 0, p, 1.0))).sum(-1)


def specialisation(first_CE: np.ndarray, *, seed: int, draws: int = DRAWS) -> dict[str, float] | None:
    """How far the first expert of a patient follows from the cancer type, held against permuted labels.

    The null keeps both margins and draws tables exactly as permuting the labels would. Returns `value`, `null_mean`,
    `null_95` (quantile) and `p` (one-sided, at least 1 / (draws + 1)); None with fewer than two cancer types or experts.
    """
    table = np.rint(first_CE).astype(np.int64)
    if min(table.shape) < 2:
        return None
    table = table[table.sum(1) > 0]
    if len(table) < 2:
        return None
    value = float(normalised_mutual_information(table))
    columns = table.sum(0)
    null = random_table(table.sum(1), columns[columns > 0]).rvs(draws, random_state=np.random.default_rng(seed))
    scores = normalised_mutual_information(null)
    return {
        "value": value,
        "null_mean": float(scores.mean()),
        "null_95": float(np.quantile(scores, 0.95)),
        "p": float((1 + (scores >= value - 1e-12).sum()) / (draws + 1)),
    }


def specialisation_by_fold(folds: Sequence[Mapping[str, Any]], group: str, *, seed: int) -> dict[str, Any] | None:
    """`specialisation` of each fold that was evaluated, and over folds its `value`, `sd`, `null_mean` and `significant` folds."""
    rows: list[dict[str, Any]] = []
    for fold in folds:
        table = fold.get("evaluation", {}).get(f"first/{group}")
        row = None if table is None else specialisation(np.array(table), seed=seed + len(rows))
        if row is not None:
            rows.append({"fold": fold["fold"], **row})
    if not rows:
        return None
    values = [row["value"] for row in rows]
    return {
        "folds": rows,
        "value": float(np.mean(values)),
        "sd": float(np.std(values, ddof=1)) if len(values) > 1 else None,
        "null_mean": float(np.mean([row["null_mean"] for row in rows])),
        "significant": sum(row["p"] < 0.05 for row in rows),
    }


def balance(mass_E: np.ndarray) -> dict[str, Any]:
    """How evenly experts are used: `share` of each, `variation` (sd over mean) of the shares, number of `dead` ones."""
    share = _shares(np.asarray(mass_E, dtype=np.float64))
    return {
        "share": share.tolist(),
        "variation": float(share.std() / share.mean()) if share.any() else 0.0,
        "dead": int((share < DEAD).sum()),
    }


def balance_of_fold(fold: Mapping[str, Any], group: str) -> dict[str, dict[str, Any]]:
    """`balance` over the last rounds of `training` and, where there are some, over `held_out` patients."""
    out = {"training": balance(evidence_by_round(fold, group)[-LAST_ROUNDS:].sum(0))}
    if f"routing/{group}" in fold.get("evaluation", {}):
        out["held_out"] = balance(np.array(fold["evaluation"][f"routing/{group}"]).sum(0))
    return out


def evidence_by_round(fold: Mapping[str, Any], group: str) -> np.ndarray:
    """Gate mass of training patients `[R, E]` by round."""
    names = _members(fold["blocks"], group)
    return np.array([[point["evidence"][name] for name in names] for point in fold["curve"]])


def load_by_round(fold: Mapping[str, Any], group: str) -> np.ndarray:
    """Share `[R, E]` of each expert in a round's gate mass."""
    return _shares(evidence_by_round(fold, group))


def load_by_site(fold: Mapping[str, Any], group: str) -> tuple[list[str], np.ndarray]:
    """Sites, and `[S, E]` the share of each expert in a site's own gate mass over all rounds."""
    columns = [fold["blocks"].index(name) for name in _members(fold["blocks"], group)]
    sites = sorted(fold["site_evidence"])
    return sites, _shares(np.array([np.array(fold["site_evidence"][site])[columns] for site in sites]))


def mixtures(fold: Mapping[str, Any]) -> list[str]:
    """The mixtures of experts of a fold's model."""
    groups = (name.rpartition("/")[0] for name in fold["blocks"])
    return list(dict.fromkeys(g for g in groups if g and g.partition("/")[0] not in ("cancer", "class")))


def _members(blocks: Sequence[str], group: str) -> list[str]:
    return [name for name in blocks if name.rpartition("/")[0] == group]


def _shares(mass: np.ndarray) -> np.ndarray:
    total = mass.sum(-1, keepdims=True)
    return np.divide(mass, total, out=np.zeros_like(mass), where=total > 0)


@dataclass(frozen=True)
class Worth:
    """What happens to held-out patients when one expert is taken out, `[E, C]`; NaN where a cancer type has no patient.

    `loss`: change per patient, positive where the expert helped. `score`: change of the C-index within sites or, in
    classification, of the share of patients recognised; negative where the expert helped.
    """

    names: tuple[str, ...]
    loss: np.ndarray
    score: np.ndarray


def worth(evaluation: Mapping[str, Any]) -> Worth | None:
    """Of every expert that was taken out in a fold's evaluation, the shared one included; None where none was."""
    groups = [key.split("/")[1] for key in evaluation if key.startswith("without/") and key.endswith("/loss")]
    if not groups:
        return None
    base = {k: np.array(v, dtype=np.float64) for k, v in evaluation.items()}
    key = "confusion" if "confusion" in base else "concordant"
    hits = np.diag(base[key]) if key == "confusion" else base[key]
    out_of = base["patients"] if key == "confusion" else base["comparable"]
    names: list[str] = []
    loss, score = [], []
    for group in groups:
        without = base[f"without/{group}/loss"]
        names += [f"{group}/{e}" for e in range(len(without))] if len(without) > 1 else [group]
        loss.append(_ratio(without - base["loss"], base["patients"]))
        score.append(_ratio(base[f"without/{group}/{key}"] - hits, out_of))
    return Worth(tuple(names), np.concatenate(loss), np.concatenate(score))


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    b = np.broadcast_to(b, a.shape)
    return np.divide(a, b, out=np.full(a.shape, np.nan), where=b > 0)


# -- genes ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GeneEffects:
    """Of each gene, by cancer type `[C, G]`; rows without patients are NaN.

    `effect`: the slope, change of the score (in survival the log hazard) per standard deviation of the gene on the model's
    scale; or the class mean, of the signed attribution over the patients of a class. `importance`: mean size of the
    gene's attribution over patients.
    """

    effect: np.ndarray
    importance: np.ndarray


def cancer_effects(explanation: Sum, *, means: bool = False) -> GeneEffects:
    """Slopes (class means with `means`) and importance from a model's summed attributions; a withheld cancer type is NaN."""
    patients = explanation["attribution/patients"][:, None]
    each = np.maximum(patients, 1.0)
    if means:
        effect = explanation["attribution/sum"] / each
    else:
        effect = _slope(explanation["attribution/product"], explanation["attribution/squares"])
    seen = patients > 0
    return GeneEffects(np.where(seen, effect, np.nan), np.where(seen, explanation["attribution/size"] / each, np.nan))


def expert_slopes(explanation: Sum) -> np.ndarray | None:
    """Slope `[E, G]` of each expert's gate logit on genes, over all cancer types; None where the model has no experts."""
    if "gate/product" not in explanation:
        return None
    return _slope(explanation["gate/product"], explanation["gate/squares"][None])


def _slope(product: np.ndarray, squares: np.ndarray) -> np.ndarray:
    """A gene that never varies has no slope: 0."""
    squares = np.broadcast_to(squares, product.shape)
    return np.divide(product, squares, out=np.zeros(product.shape), where=squares > 0)


@dataclass(frozen=True)
class GeneRanking:
    """Genes of one cancer type over the folds that saw it: arrays `[G]`.

    `effect` is the mean slope or class mean, `sd` its deviation over folds, `agreement` the share of folds that have its
    sign. With one fold `sd` is NaN and the stabilities are None.
    """

    folds: int
    effect: np.ndarray
    sd: np.ndarray
    agreement: np.ndarray
    importance: np.ndarray
    means: bool
    spearman: float | None
    overlap: float | None

    @property
    def score(self) -> np.ndarray:
        """What a ranked list is sorted by: the class mean; of slopes the mean importance with the slope's sign."""
        return self.effect if self.means else np.sign(self.effect) * self.importance

    def top(self, count: int) -> np.ndarray:
        """Indices of the genes that speak most for the class; of slopes those of most importance, whatever their sign."""
        return np.argsort(-(self.effect if self.means else self.importance), kind="stable")[:count]


def rank_genes(effect_FG: np.ndarray, importance_FG: np.ndarray, *, means: bool = False) -> GeneRanking | None:
    """Over folds; folds in which the cancer type was withheld (NaN) do not count, and None where all are."""
    seen = ~np.isnan(effect_FG).any(1)
    effect, importance = effect_FG[seen], importance_FG[seen]
    if not len(effect):
        return None
    mean = effect.mean(0)
    one = len(effect) == 1
    return GeneRanking(
        folds=len(effect),
        effect=mean,
        sd=np.full(len(mean), np.nan) if one else effect.std(0, ddof=1),
        agreement=(np.sign(effect) == np.sign(mean)).mean(0),
        importance=importance.mean(0),
        means=means,
        spearman=None if one else _mean_spearman(effect),
        overlap=None if one else mean_overlap(effect if means else importance, TOP),
    )


def _mean_spearman(effect_FG: np.ndarray) -> float | None:
    """Mean over pairs of folds; pairs with a fold in which all effects are equal have none."""
    varying = [row for row in effect_FG if np.ptp(row) > 0]
    pairs = [float(spearmanr(a, b).statistic) for a, b in combinations(varying, 2)]
    return float(np.mean(pairs)) if pairs else None


def mean_overlap(value_FG: np.ndarray, count: int) -> float:
    """Mean share of the `count` highest genes that two folds have in common; by chance it is count / G."""
    count = min(count, value_FG.shape[1])
    tops = [set(np.argsort(-row, kind="stable")[:count].tolist()) for row in value_FG]
    return float(np.mean([len(a & b) / count for a, b in combinations(tops, 2)]))
