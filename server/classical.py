"""Classical survival analysis across hospitals: Cox regression, survival curves, log-rank tests, each exactly as on pooled data."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
from flwr.serverapp import Grid
from oncofed.common import wire
from oncofed.common.blocks import Sum, under
from oncofed.common.classical.cox import CLOSE, fit_cox
from oncofed.common.classical.life_table import Cells, curves, life_tables
from oncofed.common.classical.log_rank import log_rank
from oncofed.common.classical.noisy_log_rank import simulated_p
from oncofed.common.classical.proportional_hazards import check_proportional_hazards
from oncofed.common.classical.risk_sets import leaving_shapes
from oncofed.common.classical.score_residuals import residual_terms
from oncofed.common.evaluation.bootstrap import interval
from oncofed.common.evaluation.concordance import comparable, concordance, concordance_bounds
from oncofed.common.evaluation.edges import cell_variance, risk_bins
from oncofed.common.files import write_text
from oncofed.common.metrics import ratio
from oncofed.common.plan import Plan
from oncofed.common.survival import RISK_EDGES
from oncofed.server.aggregate import TooLarge
from oncofed.server.membership import Membership
from oncofed.server.questions import Questions, SiteLost, check_greeting
from oncofed.server.report.analysis import render_analysis
from oncofed.server.roster import NotEnoughSites, Roster
from oncofed.server.secure_questions import SecureQuestions

log = logging.getLogger("oncofed.server")

BINS = 256
"""Of risk and of time in the table of test patients: a fit is evaluated once, so it may be fine."""

COARSE = 1e-4
"""In standard errors: near enough to the maximum where times are coarse."""

EVENTS_EACH = 11
"""Events behind a point of the picture of residuals, on a grid: one event's residual is a patient's covariates."""

RESULT, REPORT = "analysis.json", "analysis.html"


def run_plan(plan: Plan, grid: Grid) -> dict[str, Any]:
    """Run a plan over the sites; writes `analysis.json` and `analysis.html` below `plan.out`, and returns the result."""
    begin = time.perf_counter()
    roster = Roster(grid, plan.wait_sites_s, plan.timeout_s, wire.ANALYSE, check_greeting)
    if plan.roster:
        roster.membership = Membership.of(plan.roster)
    questions = (SecureQuestions if plan.secure_sum else Questions)(plan, roster)
    questions.begin()
    while True:
        try:
            found = cox(questions) if plan.kind == "cox" else tables(questions)
            break
        except SiteLost as lost:
            log.warning("%s; the analysis begins anew without it", lost)
    result = {
        "plan": plan.model_dump(mode="json", exclude={"out", "roster", "signature"}),
        "package": wire.package_version(),
        "sites": sorted(questions.members),
        "left_out": roster.left_out,
        "notes": notes(questions) + [f"Drowned in noise, and not shown: {name}." for name in found.get("drowned", [])],
        "questions": questions.asked,
        "seconds": time.perf_counter() - begin,
        "bytes_to_sites": roster.sent,
        "bytes_from_sites": roster.received,
        **found,
    }
    out = Path(plan.out)
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / RESULT, json.dumps(result, indent=1))
    write_text(out / REPORT, render_analysis(result))
    return result


def cells_of(questions: Questions) -> tuple[Cells, Sum]:
    """The agreed cells of time, and what of them travels with a question."""
    if questions.plan.times == "grid":
        return Cells.grid(questions.plan.starts), {}
    times = questions.times()
    return Cells.exact(times), {"times": times}


def tables(questions: Questions) -> dict[str, Any]:
    """Survival curves by group, and the log-rank test of groups."""
    plan = questions.plan
    cells, sent = cells_of(questions)
    names = questions.names(plan.compared)
    strata = questions.names(plan.stratified)
    shape = len(strata), len(names), len(cells)
    if plan.epsilon:
        table = questions.add_up("table", sent, {"table": (2, *shape)})["table"]
        total = {"events": table[1], "leaving": table.sum(0), "patients": table.sum((0, -1))}
    else:
        shapes = {"patients": shape[:2], "events": shape, "leaving": shape}
        total = questions.add_up("table", sent, shapes)
    shown = [name or "all patients" for name in names]
    found: dict[str, Any] = {"curves": [], "logrank": None, "drowned": []}
    if plan.epsilon:
        # a group's patients are the sum of two noisy counts a cell, stratum and site
        reach = 3 * np.sqrt(2 * len(cells) * len(strata) * len(questions.members) * cell_variance(plan.epsilon))
        found["drowned"] = [name for name, n in zip(shown, total["patients"].sum(0), strict=True) if n <= reach]
    if plan.kind == "km":
        known = curves(life_tables(total, cells, shown))
        found["curves"] = [c for c in known if c["name"] not in found["drowned"]]
    if len(names) > 1 and not found["drowned"]:
        found["logrank"] = log_rank(total, cells, shown, plan.rho).as_dict() | {"strata_names": strata}
        if plan.epsilon:
            rng = np.random.default_rng(0)  # of tables that nobody's patients are in
            noises = len(questions.members)
            found["logrank"]["p"] = simulated_p(
                total, cells, shown, plan.rho, epsilon=plan.epsilon, noises=noises, rng=rng
            )
    return found


def cox(questions: Questions) -> dict[str, Any]:
    """Cox regression: scale of the covariates, Newton's steps, and where the plan asks robust errors and an evaluation."""
    plan, strata = questions.plan, questions.names(questions.plan.stratified)
    names, width = plan.inputs, len(plan.inputs)
    cells, sent = cells_of(questions)
    mean, sd = questions.moments(width)
    sent |= {"mean": mean, "sd": sd}
    shapes = leaving_shapes(width, len(strata), len(cells), plan.ties)

    def ask(beta: np.ndarray) -> Sum:
        try:
            return questions.add_up("cox", sent | {"beta": beta}, shapes)
        except TooLarge:  # a step too far: told as such, so that a shorter one is tried
            empty = {name: np.zeros(shape) for name, shape in shapes.items()}
            return empty | {"beyond": np.ones(len(strata))}

    penalty = np.full(width, plan.ridge) / (1.0 if plan.standardise else np.square(sd))
    # hospitals that take intervals together count the questions, and their sums are good to fewer digits anyway
    close = COARSE if questions.merged else CLOSE
    fit = fit_cox(ask, names, ties=plan.ties, penalty_P=penalty, max_steps=plan.steps, close=close)
    if plan.robust:
        terms = under("terms/", residual_terms(fit.total, plan.ties)) | {"beta": fit.beta_P}
        outer = questions.add_up("residuals", sent | terms, {"outer": (width, width)})["outer"]
        fit = fit.with_robust(outer)
    fit = fit.on_scale(mean, sd)
    exact = plan.times == "exact"
    times = cells.starts if exact else np.minimum(cells.ends, plan.end)
    checked = None  # where sites do not tell covariates of events by time
    if not questions.merged:
        checked = check_proportional_hazards(fit, times, plan.transform, 1 if exact else EVENTS_EACH).as_dict()
    found = {"cox": fit.as_dict(times, [name or "all patients" for name in strata], checked)}
    if plan.test:
        found["evaluation"] = evaluate(questions, sent | {"beta": fit.beta_P}, times)
    return found


def evaluate(questions: Questions, sent: Sum, times: np.ndarray) -> dict[str, Any]:
    """C-index of a fit on the plan's test patients, within strata: of pairs within sites, and of all sites from one table."""
    strata = len(questions.names(questions.plan.stratified))
    names = ("patients", "events", "concordant", "comparable")
    whole, pairs, _ = questions.of_tested("pairs", sent, dict.fromkeys(names, (strata,)))
    if whole is None:
        raise ValueError(
            f"no site evaluates the fit on the patients of test = {list(questions.plan.test)}: {questions.reasons}"
        )
    by_site = {site: {k: float(p[k].sum()) for k in names} for site, p in pairs.items()}
    summed = {k: float(whole[k].sum()) for k in names}
    found: dict[str, Any] = {
        "c_index_within_sites": {"value": _share(summed), "pairs": summed["comparable"]},
        "by_site": {
            s: {"patients": row["patients"], "pairs": row["comparable"], "value": _share(row)}
            for s, row in by_site.items()
        },
    }
    fitted = set(questions.members)
    try:
        counts = questions.add_up("risks", sent, {"risk_counts": (1, len(RISK_EDGES) + 1)})["risk_counts"]
    except (SiteLost, NotEnoughSites):  # hospitals with a smallest cell
        return found
    finally:
        questions.members = fitted
    risk_edges, _ = risk_bins(counts, BINS)
    time_edges = times[np.unique(np.linspace(0, len(times) - 1, BINS - 1).astype(int))]
    asked = sent | {"risk_edges": risk_edges, "time_edges": np.unique(time_edges)}
    shape = (strata, 2, BINS, len(asked["time_edges"]) + 1)
    tables, _, answered = questions.of_tested("scores", asked, {"table": shape})
    if tables is not None:
        table = tables["table"]
        weight = np.nan_to_num(comparable(table))

        def mean(h: np.ndarray) -> np.ndarray:
            return ratio((np.nan_to_num(concordance(h)) * weight).sum(-1), weight.sum())

        rng = np.random.default_rng(0)  # of a bootstrap of counts: nothing of patients rests on it
        value, low, high = (float(v) for v in interval(mean, table, rng, draws=500))
        bounds = [float(ratio((b * weight).sum(), weight.sum())) for b in concordance_bounds(table)]
        found["c_index"] = {"value": value, "low": low, "high": high, "bounds": bounds}
        found["c_index"] |= {"sites": len(answered), "patients": float(table.sum())}
    return found


def _share(row: dict[str, float]) -> float | None:
    return row["concordant"] / row["comparable"] if row["comparable"] else None


def notes(questions: Questions) -> list[str]:
    """What a reader must know of the numbers, beside what times and noise left the hospitals."""
    out, absent = [], sorted(set(questions.roster.sites) - questions.members)
    if absent:
        out.append(f"Not of all sites: {', '.join(absent)} took no part.")
    if questions.plan.secure_sum:
        out.append(f"Sums of {len(questions.members)} sites were added under masks: the server has seen no site's own.")
    if questions.merged:
        out.append(
            f"{len(questions.merged)} sites leave out patients whom few others are like, and take intervals of time together until they hold "
            f"enough: {', '.join(sorted(questions.merged))}. Times are coarser there than the grid."
        )
    return out
