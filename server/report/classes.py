"""A classification in the report: how well each class is told apart, how sure the model is and how sure it may be.

All of it from sums of held-out patients (common/class_metrics.py). Scores are computed in each fold and averaged, as in a
comparison: probabilities of different folds are different models'. Calibration and abstention count all folds together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from oncofed.common import class_metrics as cm
from oncofed.common.metrics import mean_known
from oncofed.server.report.look import BLUE, RED, STYLE, svg


def nouns(study: dict[str, Any]) -> tuple[str, str]:
    """What one class is called, and several: cancer types, unless the study classifies by another label."""
    other = study["task"].get("label", "cancer_type") != "cancer_type"
    return ("class", "classes") if other else ("cancer type", "cancer types")


def sums(folds: list[dict[str, Any]], name: str) -> np.ndarray:
    """A sum of `class_sums` by fold `[folds, ...]`; of no folds where the study is no classification, or is of an earlier version."""
    return np.array([f["evaluation"][name] for f in folds if name in f.get("evaluation", {})], dtype=np.float64)


def measured(folds: list[dict[str, Any]], study: dict[str, Any], classes: list[str]) -> dict[str, Any] | None:
    """The numbers of the section: `rows` by class, `whole`, and what abstention gives; None where there is nothing to say.

    What is unknown is None.
    """
    confusion, ranking, certainty = (sums(folds, name) for name in ("confusion", "ranking", "certainty"))
    if not len(certainty):
        return None
    patients, loss = sums(folds, "patients").sum(0), sums(folds, "loss").sum()
    by_class = {"recall": cm.class_recall, "precision": cm.class_precision, "f1": cm.class_f1}
    columns = {name: mean_known(measure(confusion), axis=0) for name, measure in by_class.items()}
    columns["auroc"] = mean_known(cm.class_auroc(ranking), axis=0)
    whole: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "balanced_accuracy": cm.balanced_accuracy,
        "macro_f1": cm.macro_f1,
        "mcc": cm.matthews,
        "accuracy": cm.accuracy,
    }
    scores = {name: float(mean_known(measure(confusion), axis=0)) for name, measure in whole.items()}
    scores["macro_auroc"] = float(mean_known(cm.macro_auroc(ranking), axis=0))
    together = certainty.sum(0)
    scores |= {"ece": cm.calibration_error(together), "log_loss": float(loss / max(patients.sum(), 1.0))}
    answers = cm.Answers.of(together).at(study["task"]["abstain_below"])
    return {
        "rows": [
            {"name": name, "patients": int(patients[i])} | {k: _known(float(v[i])) for k, v in columns.items()}
            for i, name in enumerate(classes)
        ],
        "whole": {name: _known(v) for name, v in scores.items()},
        "answers": {name: _known(v) for name, v in answers.items()},
        "patients": int(patients.sum()),
        "top_three": _known(cm.top_three(together)) if len(classes) > cm.FIRST else None,
    }


@STYLE
def certainty(table: np.ndarray, below: float) -> str:
    """Reliability of the likeliest class's probability, and what share of patients can be answered how well, from `[4, B]`."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    _reliability(left, table)
    _coverage(right, cm.Answers.of(table), below)
    return svg(figure)


def _reliability(axis: Axes, table: np.ndarray) -> None:
    """A point a tenth, as large as its patients are many, with the range that chance alone would give (95 %)."""
    patients, probability, right = cm.reliability(table)
    axis.plot([0, 1], [0, 1], color="#999999", linewidth=0.8, linestyle="--")
    known = patients > 0
    p, r, n = probability[known], right[known], patients[known]
    reach = 1.96 * np.sqrt(p * (1 - p) / n)
    axis.vlines(p, np.clip(p - reach, 0, 1), np.clip(p + reach, 0, 1), color="#bbbbbb", linewidth=4, alpha=0.6)
    axis.scatter(p, r, s=12 + 180 * n / n.sum(), color=BLUE, alpha=0.85, linewidths=0, zorder=3)
    for x, y, count in zip(p, r, n, strict=True):
        axis.annotate(f"{count:.0f}", (x, y), (7, -9), textcoords="offset points", fontsize=7, color="#555555")
    axis.set_xlim(0, 1.03)
    axis.set_ylim(0, 1.05)
    axis.set_xlabel("probability of the likeliest class")
    axis.set_ylabel("share who are of it")
    axis.set_title(
        f"expected calibration error {cm.calibration_error(table):.3f}\n"
        "patients by tenth of probability; bars: if it were exact",
        loc="left",
        fontsize=9,
    )


def _coverage(axis: Axes, answers: cm.Answers, below: float) -> None:
    """Accuracy among those who are answered by their share, with the study's own threshold."""
    known = ~np.isnan(answers.accuracy)
    axis.plot(answers.coverage[known], answers.accuracy[known], color=BLUE, linewidth=2, drawstyle="steps-post")
    here = answers.at(below)
    if not np.isnan(here["accuracy"]):
        x, y = here["coverage"], here["accuracy"]
        axis.plot(x, y, "o", color=RED, markersize=6)
        said = f"no answer below {here['threshold']:.3g}:\n{100 * x:.1f} % answered, {100 * y:.1f} % of them right"
        axis.text(0.03, 0.04, said, transform=axis.transAxes, fontsize=8, color=RED)
    low = float(np.nanmin(answers.accuracy, initial=1.0))
    axis.set_ylim(max(0.0, low - 0.15), 1.005)
    axis.set_xlim(0, 1.02)
    axis.set_xlabel("share of patients who are answered")
    axis.set_ylabel("accuracy among them")
    axis.set_title("the surest patients first", loc="left", fontsize=9)


def _known(value: float) -> float | None:
    return None if np.isnan(value) else value
