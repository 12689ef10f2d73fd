"""What a site answers in a classical analysis: sums by cell of time over its own patients, one step a message.

Nothing is kept between steps; every step reads the same patients by the same rules. Shapes: P covariates, S strata,
G groups, T cells of time, R risk bins, B time bins.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from oncofed.client.analysis_session import AnalysisSession
from oncofed.client.data.outcomes import held_levels
from oncofed.client.disclosure import Runs
from oncofed.client.members import Identity
from oncofed.client.release import Answer
from oncofed.client.released import ReleasedGroups
from oncofed.common import wire
from oncofed.common.blocks import Sum
from oncofed.common.classical.life_table import table_sums
from oncofed.common.classical.risk_sets import FARTHEST, leaving_sums
from oncofed.common.classical.score_residuals import residual_sums
from oncofed.common.errors import Refusal
from oncofed.common.evaluation.table import risk_time_table
from oncofed.common.fixed_point import TooLarge
from oncofed.common.metrics import survival_sums
from oncofed.common.sum_coding import ANALYSIS_BITS, SumCoding
from oncofed.common.survival import RISK_EDGES

COUNTED = ("cox", "residuals", "pairs")
"""Steps that tell more of the same patients each time: counted before anything is computed, so that a refusal costs one too."""


def analyse(session: AnalysisSession) -> Answer:
    """The answer to a step."""
    kinds, handler = STEPS.get(session.step, ((), None))
    if handler is None or session.plan.kind not in kinds:
        raise Refusal(f"site {session.site.name}: a plan of kind {session.plan.kind} has no step {session.step!r}")
    if session.step in COUNTED and session.policy.min_cell > 1:
        memory = ReleasedGroups.of(session.work, session.site.name)
        memory.count(session.everybody[0], session.policy.max_newton_steps, session.step)
    return handler(session)


def _greeting(session: AnalysisSession) -> Answer:
    """Levels of the plan's columns that enough patients have; nobody's data."""
    told: wire.Config = {"levels": held_levels(session.site, session.plan, session.policy.least())}
    if session.plan.secure_sum:
        told["identity"] = Identity.of(session.work, session.site.name).public.hex()
    return Answer(told)


def _times(session: AnalysisSession) -> Answer:
    """Exact times alone: the distinct times of the site's events `times [*]`. No sum: they leave as they are."""
    o, plan = session.outcomes, session.plan
    if plan.times != "exact":
        raise Refusal(f"site {session.site.name}: event times leave in a plan with times = 'exact' only")
    died = o.time[(o.event == 1) & (o.time <= plan.end)]
    return Answer(session.coarse, {"times": np.unique(died)}, len(o), groups=session.everybody)


def _moments(session: AnalysisSession) -> Answer:
    """Number, sum and squares of each covariate `[P]`; a site that could not answer the steps to come says so now."""
    if session.coarsened:
        _enough_events(session)
    x = session.scaled
    total = {"n": np.full(x.shape[1], float(len(x))), "sum": x.sum(0), "squares": np.square(x).sum(0)}
    return Answer(session.coarse, total, len(x), groups=session.everybody, numbers=session.numbers)


def _enough_events(session: AnalysisSession) -> None:
    """Refuse a Cox regression that would sum the covariates of few who had the event, or of few who had not."""
    o, strata, least = session.outcomes, session.strata, session.policy.min_cell
    dead = np.bincount(o.stratum, session.event, strata)
    alive = np.bincount(o.stratum, minlength=strata) - dead
    if (((dead > 0) & (dead < least)) | ((alive > 0) & (alive < least))).any():
        raise Refusal(
            f"site {session.site.name}: fewer than {least} patients of a stratum had the event, or did not, and the sum of their "
            "covariates would tell of them (min_cell); take away strata, or leave the site out"
        )


def _cox(session: AnalysisSession) -> Answer:
    """Newton terms at the coefficients of the message (common/classical/risk_sets.py)."""
    o, strata, cells = session.outcomes, session.strata, len(session.cells)
    x, beta, ties = session.scaled, session.beta, session.plan.ties
    total = leaving_sums(x, session.cell, session.event, o.stratum, beta, strata, cells, ties)
    behind: dict[str, np.ndarray] = {}
    if session.runs is not None:
        total, behind = _without_few(session, session.runs, total)
    if session.plan.secure_sum:
        total = _within_reach(session, total)
    return Answer(
        session.coarse,
        total,
        len(o),
        cells=behind,
        numbers=session.numbers,
        groups=session.everybody,
        events=session.died,
        grid=session.grid,
    )


def _within_reach(session: AnalysisSession, total: Sum) -> Sum:
    """Newton terms; at coefficients so far out that they leave the range of a sum under masks, nothing but that they do.

    In the sum: said by name it would tell of one hospital's own.
    """
    try:
        coding = SumCoding(ANALYSIS_BITS, "fine")
        _, peaks = coding.integers(total, session.site.name)
        coding.check_reach(peaks, max(1, int(session.ask.get("sites", 1))), session.site.name)  # type: ignore[arg-type]
    except TooLarge:
        return {name: np.full_like(value, float(name == "beyond")) for name, value in total.items()}
    return total


def _without_few(session: AnalysisSession, runs: Runs, total: Sum) -> tuple[Sum, dict[str, np.ndarray]]:
    """Newton terms in which no number rests on few patients, and how many stand behind each.

    Who leaves in a run is summed over the run, and the sum given to its cells by their shares. The covariates of those who had
    the event are summed over all of a stratum's time, and stand at its first event: the score needs no more. Efron's ties would need
    them by cell. Weights exp(x beta) under which a few patients outweigh their run would make the run's sum theirs.
    """
    _enough_events(session)
    o, site, x = session.outcomes, session.site.name, session.scaled
    strata, cells, number = session.strata, len(session.cells), len(runs.low)
    eta = x @ session.beta
    worth = runs.worth(np.exp(np.clip(eta, -FARTHEST, FARTHEST)))
    # cut at the ends weights would be a step, and a step singles out whoever is near it
    if (np.abs(eta) > FARTHEST).any() or (worth < session.policy.min_cell).any():
        raise Refusal(
            f"site {site}: at these coefficients fewer than {session.policy.min_cell} patients would outweigh the others of a run of intervals "
            "(Kish's effective number), and the sum would be theirs; use a ridge penalty, or fewer covariates"
        )
    by_run = leaving_sums(
        x, runs.run, np.zeros(len(o)), np.zeros(len(o), dtype=np.int64), session.beta, 1, number, "breslow"
    )
    total = dict(total)
    behind: dict[str, np.ndarray] = {}
    size = runs.shared_by(strata, cells)
    for power in range(3):
        name = f"left/{power}"
        total[name] = runs.spread(by_run[name][0], strata, cells)
        behind[name] = size.reshape(strata, cells, *[1] * (total[name].ndim - 2))
    of_events, first = np.zeros_like(total["event_x"]), (total["events"] > 0).argmax(axis=1)
    of_events[np.arange(strata), first] = total["event_x"].sum(1)
    total["event_x"] = of_events
    return total, behind


def _residuals(session: AnalysisSession) -> Answer:
    """Outer products of score residuals, for robust standard errors."""
    if session.coarsened:
        raise Refusal(
            f"site {session.site.name}: residuals are sums of squares under terms that the coordinator chooses, which can single out a "
            f"patient; its policy wants {session.policy.min_cell} behind each sum (min_cell); set robust = false"
        )
    o, p, shape = session.outcomes, len(session.plan.inputs), (session.strata, len(session.cells))
    wide = ("hazard_x", "event_hazard_x", "mean_x")
    terms = {
        k: session.array(f"terms/{k}", *shape, *([p] if k in wide else [])) for k in ("hazard", "event_hazard", *wide)
    }
    total = residual_sums(session.scaled, session.cell, session.event, o.stratum, session.beta, terms)
    return Answer(session.coarse, total, len(o), groups=session.everybody)


def _table(session: AnalysisSession) -> Answer:
    """Patients, events and those who leave, by stratum, group and cell."""
    o, plan = session.outcomes, session.plan
    groups, strata = session.groups, session.strata
    sums = table_sums(
        session.cell, session.event, o.group, o.stratum, groups=groups, strata=strata, cells=len(session.cells)
    )
    if plan.epsilon:  # one cell a patient: events and censored side by side; all other numbers are made of them
        table = np.stack([sums["leaving"] - sums["events"], sums["events"]])
        return Answer(session.coarse, {"table": table}, len(o), counts={"table": 1}, epsilon=plan.epsilon)
    names = [frozenset(o.patient[session.alike == g].tolist()) for g in range(groups * strata)]
    return Answer(
        session.coarse,
        sums,
        len(o),
        cells=_behind(session, sums),
        numbers=session.numbers,
        groups=(*session.everybody, *names),
        events=session.died,
        grid=session.grid,
        counts=dict.fromkeys(sums, 1),
    )


def _risks(session: AnalysisSession) -> Answer:
    """How log hazards lie among the fitted patients: `risk_counts [1, len(RISK_EDGES) + 1]`."""
    _open(session, "the spread of risks")
    counts = np.bincount(np.searchsorted(RISK_EDGES, session.risk), minlength=len(RISK_EDGES) + 1)
    total = {"risk_counts": counts[None].astype(np.float64)}
    return Answer(session.coarse, total, len(session.outcomes), groups=session.everybody)


def _pairs(session: AnalysisSession) -> Answer:
    """A fit on patients who are only evaluated: patients, events, concordant and comparable pairs by stratum `[S]`."""
    if not session.plan.test:
        raise Refusal(f"site {session.site.name}: the plan names no test patients, so there is nobody to evaluate")
    o, strata = session.outcomes, session.strata
    time = np.minimum(o.time, session.plan.end)
    total = survival_sums(session.risk, time, session.event, np.zeros(len(o)), o.stratum, strata)
    del total["loss"]
    return Answer(session.coarse, total, len(o), groups=session.everybody, events=session.died, grid=session.grid)


def _scores(session: AnalysisSession) -> Answer:
    """The same patients as one table of risk and time `[S, 2, R, T]`: its cells hold single patients."""
    _open(session, "a table of risk and time")
    o, a = session.outcomes, session.arrays
    time = np.minimum(o.time, session.plan.end)
    edges = np.repeat(a["risk_edges"][:1], session.strata, axis=0)
    table = risk_time_table(session.risk, time, session.event, o.stratum, edges, a["time_edges"])
    return Answer(session.coarse, {"table": table}, len(o), groups=session.everybody)


def _open(session: AnalysisSession, what: str) -> None:
    """Refuse what holds single patients, where the site's policy lets none show."""
    if session.policy.min_cell > 1:
        raise Refusal(
            f"site {session.site.name}: {what} has cells of single patients, its policy wants {session.policy.min_cell} (min_cell)"
        )


def _behind(session: AnalysisSession, total: Sum) -> dict[str, np.ndarray]:
    """The patients behind each count of a table by cell of time: the fewest of a run in it; exact times have no rule for cells."""
    if session.runs is None:
        return {}
    o, shared = session.outcomes, session.runs.shared
    shape = total["leaving"].shape
    fewest = np.full(shape, len(o) + 1)
    np.minimum.at(fewest, (o.stratum, o.group, session.cell), shared)
    fewest = np.where(fewest > len(o), 0, fewest)
    return {name: fewest for name, value in total.items() if value.shape == shape}


COX, TABLES = ("cox",), ("km", "logrank")
STEPS: dict[str, tuple[tuple[str, ...], Callable[[AnalysisSession], Answer]]] = {
    "greeting": (COX + TABLES, _greeting),
    "times": (COX + TABLES, _times),
    "moments": (COX, _moments),
    "cox": (COX, _cox),
    "residuals": (COX, _residuals),
    "risks": (COX, _risks),
    "pairs": (COX, _pairs),
    "scores": (COX, _scores),
    "table": (TABLES, _table),
}
"""What a plan's kind may ask."""
