"""The report of a classical analysis: a Cox model, survival curves or a log-rank test, as one HTML file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from oncofed.server.report import curves, hazards
from oncofed.server.report.look import p_text
from oncofed.server.report.pages import page

YEARS = (1, 3, 5)
"""Years after which survival is told."""

TITLES = {"cox": "Cox regression", "km": "Survival curves", "logrank": "Log-rank test"}

TESTS = {"likelihood_ratio": "likelihood ratio", "wald": "Wald", "score": "score (log-rank)"}

SCORES = {
    "c_index": "C-index, all pairs",
    "c_index_within_sites": "C-index, pairs within sites",
    "brier": "Brier score",
    "integrated_brier": "integrated Brier score",
    "auc": "AUC",
    "calibration": "calibration",
}


def render_analysis(result: dict[str, Any]) -> str:
    """One HTML page of a finished analysis; parts that `result` lacks, or has as None, are left out."""
    cox, drawn = result.get("cox"), result.get("curves") or []
    check = (cox or {}).get("proportional_hazards")
    logrank = result.get("logrank")
    pictures: dict[str, str] = {}
    if cox and cox["names"]:
        pictures["forest"] = hazards.forest(cox)
        if cox.get("baseline"):
            pictures["baselines"] = hazards.baselines(cox["baseline"])
        if check and check.get("residuals") and any(n > 0 for n in check["residuals"]["events"]):
            pictures["residuals"] = hazards.residuals(check, cox["coef"])
    if any(c["time"] for c in drawn):
        pictures["survival"] = curves.survival_curves(drawn, (logrank or {}).get("p"))
        pictures["cumulative"] = curves.cumulative_hazards(drawn)
    plan = result["plan"]
    return page(
        "analysis.html",
        pictures,
        result=result,
        plan=plan,
        title=plan.get("name") or TITLES[plan["kind"]],
        kind=TITLES[plan["kind"]],
        privacy=privacy(plan),
        cox=cox,
        check=check,
        curves=drawn,
        logrank=logrank,
        penalty=plan.get("ridge", _penalty((cox or {}).get("penalty"))),
        tests=[(TESTS.get(name, name), test) for name, test in (cox or {}).get("tests", {}).items()],
        evaluation=list(evaluation_rows(result.get("evaluation") or {})),
        years=YEARS,
        survival_at=survival_at,
        panels=hazards.PANELS,
        bands=curves.BANDS,
        p_text=p_text,
        ratio=hazards.number,
    )


def privacy(plan: Mapping[str, Any]) -> str:
    """What left the hospitals, in a sentence or two."""
    if plan.get("times") == "exact":
        said = "Exact times: the event times of patients left the hospitals, and with them counts and sums at each. Choose times = grid where that is more than the hospitals want to tell."
    else:
        width = plan.get("grid_months")
        cells = f"intervals of {width:g} month{'' if width == 1 else 's'}" if width else "intervals"
        said = f"Time on a grid: only counts and sums over {cells} left the hospitals, no patient's time."
    epsilon = plan.get("epsilon") or 0.0
    if epsilon > 0:
        said += f" Counts carry noise for differential privacy: a patient's part in them is bounded by epsilon = {epsilon:g}."
    return said


def survival_at(curve: Mapping[str, Any], year: float) -> tuple[float | None, float | None, float | None]:
    """Survival after so many years and its interval; None where nobody was under observation any more."""
    value, low, high = (curves.value_at(curve, key, 12.0 * year) for key in ("survival", "lower", "upper"))
    return value, low, high


def evaluation_rows(found: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    """Names and numbers of whatever an evaluation holds: `{"value", "low", "high", "bound"}`, lists, and such by name."""
    for key, value in found.items():
        name = f"{before}{SCORES.get(key, key.replace('_', ' '))}"
        if isinstance(value, Mapping) and "value" not in value:
            yield from evaluation_rows(value, f"{name}, ")
        elif value is not None:
            yield name, _score(value) if isinstance(value, Mapping) else _plain(value)


def _penalty(penalty: float | Sequence[float] | None) -> float:
    """The one number of a ridge penalty, the same for each coefficient, or the largest of several."""
    return max(penalty, default=0.0) if isinstance(penalty, Sequence) else penalty or 0.0


def _score(score: Mapping[str, Any]) -> str:
    said = _plain(score["value"])
    if score.get("low") is not None and score.get("high") is not None:
        said += f" [{_plain(score['low'])}, {_plain(score['high'])}]"
    if score.get("bound") is not None:
        said += f", at most {_plain(score['bound'])} from that of exact times"
    more = {k: v for k, v in score.items() if k not in ("value", "low", "high", "bound") and v is not None}
    return said + "".join(f", {k.replace('_', ' ')} {_plain(v)}" for k, v in more.items())


def _plain(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, float):
        return f"{value:.0f}" if value.is_integer() and abs(value) >= 2 else f"{value:.3f}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(_plain(v) for v in value)
    return str(value)
