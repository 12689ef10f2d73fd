"""What a site answers in a classical analysis: sums by cell of time over its own patients, one step a message.

Nothing is kept between steps; every step reads the same patients by the same rules. Shapes: P covariates, S strata,
G groups, T cells of time, R risk bins, B time bins.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from flwr.app import RecordDict
from oncofed.client.data.outcomes import Outcomes, held_levels
from oncofed.client.data.site import SiteFolder
from oncofed.client.disclosure import Runs, spread_cells
from oncofed.client.policy import Policy
from oncofed.client.release import Answer, Door
from oncofed.client.resident import Resident
from oncofed.common import wire
from oncofed.common.blocks import Sum, part
from oncofed.common.classical.life_table import Cells, table_sums
from oncofed.common.classical.risk_sets import FARTHEST, exact_cells, grid_cells, leaving_sums
from oncofed.common.classical.score_residuals import residual_sums
from oncofed.common.errors import Refusal
from oncofed.common.evaluation.table import risk_time_table
from oncofed.common.metrics import survival_sums
from oncofed.common.plan import Plan
from oncofed.common.survival import RISK_EDGES

EFFECTIVE = 0.5
"""Of the smallest cell: so many patients a run's weights must be worth, (sum w)^2 / sum w^2 (Kish 1965), or a few outweigh the rest."""


@dataclass(frozen=True)
class AnalysisSession:
    """A validated request of a classical analysis at a site."""

    ask: wire.Config
    arrays: Sum
    plan: Plan
    site: SiteFolder
    policy: Policy

    @classmethod
    def of(
        cls, content: RecordDict, site: SiteFolder, work: Path, resident: Resident, own_device: str, policy: Policy
    ) -> AnalysisSession:
        """Read a request; raises `Refusal` on another protocol or a plan that is not valid here."""
        ask = wire.read_config(content, "ask")
        wire.check_protocol(ask, "the server")
        try:
            plan = Plan.from_json(str(ask["plan_json"]))
        except (ValueError, KeyError) as error:
            raise Refusal(f"site {site.name}: the plan in the message is not valid here: {error}") from None
        return cls(ask, wire.read_arrays(content), plan, site, policy)

    def admit(self, door: Door, kind: str) -> None:
        """Refuse what the site's policy does not allow."""
        door.admit_plan(kind, self.plan)

    @property
    def step(self) -> str:
        return str(self.ask.get("step", ""))

    @property
    def stamp(self) -> wire.Config:
        """What every answer repeats, so that the server can refuse an answer to another question."""
        return {"analysis": self.plan.name, "step": self.step, "round": int(self.ask.get("round", 0))}  # type: ignore[arg-type]

    # -- patients ------------------------------------------------------------------------------------------------------

    @property
    def levels(self) -> dict[str, list[str]]:
        """The agreed levels by column, from lines `column<TAB>level`."""
        out: dict[str, list[str]] = {}
        for line in self.ask.get("levels", []):  # type: ignore[union-attr]
            column, _, level = str(line).partition("\t")
            out.setdefault(column, []).append(level)
        return out

    @property
    def numbers(self) -> int:
        """Sums of one quantity that all steps of the analysis have in a cell: so many patients could be solved for."""
        return 3 * self.plan.steps if self.plan.kind == "cox" else 2

    @cached_property
    def outcomes(self) -> Outcomes:
        least = 1 if self.plan.epsilon else self.policy.least(self.numbers)  # with noise no group is too small
        return Outcomes.read(self.site, self.plan, self.levels, least, test=self.step in ("pairs", "scores"))

    @cached_property
    def cells(self) -> Cells:
        """The agreed cells of time."""
        return Cells.exact(self.arrays["times"]) if self.plan.times == "exact" else Cells.grid(self.plan.starts)

    @cached_property
    def event(self) -> np.ndarray:
        """Events `[N]` before follow-up ends."""
        return np.where(self.outcomes.time > self.plan.end, 0.0, self.outcomes.event)

    @cached_property
    def runs(self) -> Runs | None:
        """Cells of time taken together where they hold few patients; None where no rule asks for it."""
        o = self.outcomes
        if not self.coarsened:
            return None
        cell = grid_cells(o.time, self.cells.starts)
        alike = o.stratum * self.count("group") + o.group
        return spread_cells(cell, self.event, alike, o.patient, self.policy.least(self.numbers))

    @property
    def coarsened(self) -> bool:
        """Whether cells of time must not hold few patients: not with noise, nor with exact times, which the site has allowed."""
        return self.plan.times == "grid" and not self.plan.epsilon and self.policy.min_cell > 1

    @cached_property
    def cell(self) -> np.ndarray:
        """The last cell of time `[N]` in which each patient is at risk."""
        o = self.outcomes
        if self.plan.times == "exact":
            return exact_cells(np.minimum(o.time, self.plan.end), self.event, self.cells.starts)
        return grid_cells(o.time, self.cells.starts) if self.runs is None else self.runs.cell

    @property
    def coarse(self) -> wire.Config:
        """What the coordinator is told of disclosure control here."""
        return {"left_out": self.outcomes.left_out, "merged": self.coarsened}

    def count(self, name: str) -> int:
        """How many combinations of levels `group` or `strata` has."""
        columns = [g.column for g in self.plan.groupings]
        mine = columns[: 1 if self.plan.group else 0] if name == "group" else columns[1 if self.plan.group else 0 :]
        return int(np.prod([len(self.levels.get(c, [])) for c in mine], dtype=np.int64))

    @property
    def scaled(self) -> np.ndarray:
        """Covariates on the federation's scale `[N, P]`."""
        return (self.outcomes.x_NP - self.arrays["mean"]) / self.arrays["sd"]

    @property
    def risk(self) -> np.ndarray:
        """Log hazards `[N]` by the coefficients of the message."""
        return self.scaled @ self.arrays["beta"]

    @property
    def everybody(self) -> tuple[frozenset[str], ...]:
        return (frozenset(self.outcomes.patient.tolist()),)


def analyse(session: AnalysisSession) -> Answer:
    """The answer to a step."""
    if session.step not in STEPS:
        raise Refusal(f"site {session.site.name}: an analysis has no step {session.step!r}")
    return STEPS[session.step](session)


def _greeting(session: AnalysisSession) -> Answer:
    """Levels of the plan's columns that enough patients have; nobody's data."""
    return Answer({"levels": held_levels(session.site, session.plan, session.policy.least())})


def _times(session: AnalysisSession) -> Answer:
    """Exact times alone: the distinct times of the site's events `times [*]`. No sum: they leave as they are."""
    o, plan = session.outcomes, session.plan
    if plan.times != "exact":
        raise Refusal(f"site {session.site.name}: event times leave in a plan with times = 'exact' only")
    died = o.time[(o.event == 1) & (o.time <= plan.end)]
    return Answer(session.coarse, {"times": np.unique(died)}, len(o), groups=session.everybody)


def _moments(session: AnalysisSession) -> Answer:
    """Number, sum and squares of each covariate `[P]`."""
    x = session.scaled
    total = {"n": np.full(x.shape[1], float(len(x))), "sum": x.sum(0), "squares": np.square(x).sum(0)}
    return Answer(session.coarse, total, len(x), groups=session.everybody, numbers=session.numbers)


def _cox(session: AnalysisSession) -> Answer:
    """Newton terms at the coefficients of the message (common/classical/risk_sets.py)."""
    o, strata, cells = session.outcomes, session.count("strata"), len(session.cells)
    x, beta, ties = session.scaled, session.arrays["beta"], session.plan.ties
    total = leaving_sums(x, session.cell, session.event, o.stratum, beta, strata, cells, ties)
    behind: dict[str, np.ndarray] = {}
    if session.runs is not None:
        total, behind = _without_few(session, session.runs, total)
    return Answer(session.coarse, total, len(o), behind, session.numbers, session.everybody, counted=True)


def _without_few(session: AnalysisSession, runs: Runs, total: Sum) -> tuple[Sum, dict[str, np.ndarray]]:
    """Newton terms in which no number rests on few patients, and how many stand behind each.

    Who leaves in a run is summed over the run, and the sum given in equal parts to its cells. The covariates of those who had
    the event are summed over all of a stratum's time, and stand at its first event: the score needs no more. Efron's ties would need
    them by cell. Weights exp(x beta) under which a few patients outweigh their run would make the run's sum theirs.
    """
    o, site, x = session.outcomes, session.site.name, session.scaled
    if session.plan.ties != "breslow":
        raise Refusal(
            f"site {site}: Efron's ties need sums over the few events of an interval, its policy wants {session.policy.min_cell} patients "
            "behind each (min_cell); set ties = 'breslow'"
        )
    strata, cells, number = session.count("strata"), len(session.cells), len(runs.low)
    weight = np.exp(np.clip(x @ session.arrays["beta"], -FARTHEST, FARTHEST))
    worth = np.bincount(runs.run, weight, number) ** 2 / np.bincount(runs.run, weight**2, number)
    if (worth < EFFECTIVE * session.policy.min_cell).any():
        raise Refusal(
            f"site {site}: at these coefficients a few patients would outweigh the others of a run of intervals, and the sum would be "
            "theirs; use a ridge penalty, or fewer covariates"
        )
    by_run = leaving_sums(
        x, runs.run, np.zeros(len(o)), np.zeros(len(o), dtype=np.int64), session.arrays["beta"], 1, number, "breslow"
    )
    total = dict(total)
    behind: dict[str, np.ndarray] = {}
    size = runs.even(np.bincount(runs.run, minlength=number) * (runs.high + 1.0 - runs.low), strata, cells)
    for power in range(3):
        name = f"left/{power}"
        total[name] = runs.even(by_run[name][0], strata, cells)
        behind[name] = size.reshape(strata, cells, *[1] * (total[name].ndim - 2))
    of_events, first = np.zeros_like(total["event_x"]), (total["events"] > 0).argmax(axis=1)
    of_events[np.arange(strata), first] = total["event_x"].sum(1)
    total["event_x"] = of_events
    dead = np.bincount(o.stratum, session.event, strata)
    alive = np.bincount(o.stratum, minlength=strata) - dead
    few = ((dead > 0) & (dead < session.policy.min_cell)) | ((alive > 0) & (alive < session.policy.min_cell))
    if few.any():
        raise Refusal(
            f"site {site}: fewer than {session.policy.min_cell} patients of a stratum had the event, or did not, and the sum of their "
            "covariates would tell of them (min_cell); take away strata, or leave the site out"
        )
    return total, behind


def _residuals(session: AnalysisSession) -> Answer:
    """Outer products of score residuals, for robust standard errors."""
    o, terms = session.outcomes, part("terms/", session.arrays)
    total = residual_sums(session.scaled, session.cell, session.event, o.stratum, session.arrays["beta"], terms)
    return Answer(session.coarse, total, len(o), groups=session.everybody, numbers=session.numbers, counted=True)


def _table(session: AnalysisSession) -> Answer:
    """Patients, events and those who leave, by stratum, group and cell."""
    o, plan = session.outcomes, session.plan
    groups, strata = session.count("group"), session.count("strata")
    sums = table_sums(
        session.cell, session.event, o.group, o.stratum, groups=groups, strata=strata, cells=len(session.cells)
    )
    if plan.epsilon:  # one cell a patient: events and censored side by side; all other numbers are made of them
        table = np.stack([sums["leaving"] - sums["events"], sums["events"]])
        return Answer(session.coarse, {"table": table}, len(o), counts={"table": 1}, epsilon=plan.epsilon)
    names = [
        frozenset(o.patient[(o.group == g) & (o.stratum == s)].tolist()) for g in range(groups) for s in range(strata)
    ]
    return Answer(
        session.coarse,
        sums,
        len(o),
        _behind(session, sums),
        2,
        (*session.everybody, *names),
        dict.fromkeys(sums, 1),
    )


def _risks(session: AnalysisSession) -> Answer:
    """How log hazards lie among the fitted patients: `risk_counts [1, len(RISK_EDGES) + 1]`."""
    counts = np.bincount(np.searchsorted(RISK_EDGES, session.risk), minlength=len(RISK_EDGES) + 1)
    total = {"risk_counts": counts[None].astype(np.float64)}
    return Answer(session.coarse, total, len(session.outcomes), groups=session.everybody)


def _pairs(session: AnalysisSession) -> Answer:
    """A fit on patients who are only evaluated: concordant and comparable pairs within the site `[1]`."""
    o = session.outcomes
    zero = np.zeros(len(o), dtype=np.int64)
    pairs = survival_sums(session.risk, o.time, o.event, np.zeros(len(o)), zero, 1)
    total = {k: pairs[k] for k in ("patients", "events", "concordant", "comparable")}
    return Answer(session.coarse, total, len(o), groups=session.everybody)


def _scores(session: AnalysisSession) -> Answer:
    """The same patients as one table of risk and time `[1, 2, R, T]`: its cells hold single patients."""
    o, a, least = session.outcomes, session.arrays, session.policy.min_cell
    if least > 1:
        raise Refusal(
            f"site {session.site.name}: a table of risk and time has cells of single patients, its policy wants {least} (min_cell)"
        )
    zero = np.zeros(len(o), dtype=np.int64)
    table = risk_time_table(session.risk, o.time, o.event, zero, a["risk_edges"], a["time_edges"])
    return Answer(session.coarse, {"table": table}, len(o), groups=session.everybody)


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


STEPS: dict[str, Callable[[AnalysisSession], Answer]] = {
    "greeting": _greeting,
    "times": _times,
    "moments": _moments,
    "cox": _cox,
    "residuals": _residuals,
    "table": _table,
    "risks": _risks,
    "pairs": _pairs,
    "scores": _scores,
}
