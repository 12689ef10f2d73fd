"""The questions of a classical analysis to the sites: who takes part, which levels and times they share, and sums of a step.

All steps of an analysis rest on the same sites: where one is lost on the way, `SiteLost` says that it has to begin anew.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import fsum

import numpy as np
from oncofed.common import wire
from oncofed.common.blocks import Sum
from oncofed.common.errors import Refusal
from oncofed.common.plan import SITE, Grouping, Plan
from oncofed.common.sum_coding import ANALYSIS_BITS
from oncofed.server.aggregate import Accumulator, TooLarge
from oncofed.server.inquiry import Shapes
from oncofed.server.roster import Answer, NotEnoughSites, Roster


class SiteLost(RuntimeError):
    """A site that answered earlier steps did not answer this one."""


@dataclass
class Questions:
    """One analysis and the sites that are asked. `members` are fixed by the first sum; `notes` say what sites did to small cells."""

    plan: Plan
    roster: Roster
    levels: dict[str, list[str]] = field(default_factory=dict)
    members: set[str] = field(default_factory=set)
    merged: set[str] = field(default_factory=set)
    asked: int = 0

    def begin(self) -> None:
        """Greet the sites and agree on the levels of every grouping."""
        self.roster.gather(self.plan.min_sites, self.hello)
        for grouping in self.plan.groupings:
            self.levels[grouping.column] = self._levels(grouping)

    @property
    def hello(self) -> wire.Config:
        return {**self.signed, "step": "greeting"}

    @property
    def signed(self) -> wire.Config:
        """The plan as a site needs it, and the signature over it."""
        return {"plan_json": self.plan_json, "signature": self.plan.signature}

    @property
    def plan_json(self) -> str:
        return self.plan.model_dump_json(exclude={"out", "roster", "signature"})

    def _levels(self, grouping: Grouping) -> list[str]:
        if grouping.levels:
            return list(grouping.levels)
        if grouping.column == SITE:
            return self.roster.sites
        found: dict[str, str] = {}
        for hello in self.roster.hellos.values():
            for line in hello["levels"]:  # type: ignore[union-attr]
                column, _, level = str(line).partition("\t")
                if column == grouping.column:
                    found.setdefault(level.lower(), level)
        if not found:
            raise ValueError(
                f"'{grouping.column}' has no level that a site may tell; name them: '{grouping.column}=a|b'"
            )
        return [found[key] for key in sorted(found)]

    def names(self, groupings: tuple[Grouping, ...]) -> list[str]:
        """Names of all combinations of levels, in the order of their numbers; one empty name without groupings."""
        out = [""]
        for grouping in groupings:
            out = [
                f"{before}, {level}" if before else level for before in out for level in self.levels[grouping.column]
            ]
        return out

    def ask(self, step: str, arrays: Sum | None = None, *, everybody: bool = False) -> list[Answer]:
        """Good answers to a step, ordered by site, of the members of earlier steps or, with `everybody`, of all sites."""
        self.asked += 1
        return self.answers(step, arrays, set() if everybody else self.members, {})

    def answers(self, step: str, arrays: Sum | None, some: set[str], more: wire.Config) -> list[Answer]:
        """Good answers of some sites, or of all where none are named, to the question that `asked` counts."""
        lines = [f"{column}\t{level}" for column, levels in self.levels.items() for level in levels]
        config: wire.Config = {**self.signed, "step": step, "levels": lines, "round": self.asked}
        concerns = (lambda site: site in some) if some else (lambda site: True)
        answers = []
        for answer in self.roster.ask(wire.ANALYSE, config | more, arrays, round_=self.asked, concerns=concerns):
            stamp = {"analysis": self.plan.name, "step": step, "round": self.asked}
            wrong = {k: answer.config.get(k) for k, v in stamp.items() if answer.config.get(k) != v}
            if wrong:
                self.roster.leave_out(answer.site, wire.ANALYSE, self.asked, f"answers {wrong} to {stamp}")
                continue
            answers.append(answer)
            if answer.config.get("merged"):
                self.merged.add(answer.site)
        return sorted(answers, key=lambda a: a.site)

    @property
    def reasons(self) -> str:
        """Why sites were left out: the last three reasons that differ."""
        return "; ".join(list(dict.fromkeys(str(x["reason"]) for x in self.roster.left_out))[-3:])

    def fix(self, sites: set[str], step: str) -> None:
        """Remember who answered, or raise: too few, or fewer than before."""
        if len(sites) < self.plan.min_sites:
            raise NotEnoughSites(
                f"'{step}': {len(sites)} good answers, wanted {self.plan.min_sites} (min_sites). {self.reasons}"
            )
        lost = self.members - sites
        self.members = sites
        if lost:
            raise SiteLost(f"'{step}': no answer from {sorted(lost)}")

    def add_up(self, step: str, arrays: Sum | None, shapes: Shapes) -> Sum:
        """The sum of all members' answers; a bad one is left out by name, and with it `SiteLost` is raised.

        Raises `TooLarge` where a sum of a member leaves the range: no fault of the site's, but of what it was asked.
        """
        accumulator, sites = Accumulator(shapes, ANALYSIS_BITS, fine=True), set()
        for answer in self.ask(step, arrays):
            try:
                accumulator.add(answer.arrays, answer.site)
                sites.add(answer.site)
            except TooLarge:
                if answer.site in self.members:
                    raise
                self.roster.leave_out(answer.site, wire.ANALYSE, self.asked, "its sums are too large")
            except ValueError as error:
                self.roster.leave_out(answer.site, wire.ANALYSE, self.asked, str(error))
        self.fix(sites, step)
        return accumulator.total()

    def by_site(self, step: str, arrays: Sum | None, shapes: Shapes) -> dict[str, Sum]:
        """Each site's own answer, of those whose arrays have the shapes; also of sites that the fit left out."""
        good = {}
        for answer in self.ask(step, arrays, everybody=True):
            try:
                Accumulator(shapes).peaks(answer.arrays, answer.site)
                good[answer.site] = answer.arrays
            except ValueError as error:
                self.roster.leave_out(answer.site, wire.ANALYSE, self.asked, str(error))
        return good

    def times(self) -> np.ndarray:
        """Exact times alone: the distinct event times of all sites, rising."""
        answers = self.ask("times")
        good = [a for a in answers if set(a.arrays) == {"times"} and np.isfinite(a.arrays["times"]).all()]
        self.fix({a.site for a in good}, "times")
        times = np.unique(np.concatenate([np.zeros(0), *(a.arrays["times"] for a in good)]))
        if not len(times):
            raise ValueError("no event at any site; an analysis of survival needs some")
        return times

    def moments(self, covariates: int) -> tuple[np.ndarray, np.ndarray]:
        """Mean and deviation `[P]` of covariates over all patients.

        Asked twice: the first answers, in whatever units, are added exactly as floats, and give a scale on which the fixed
        point of the second is exact.
        """
        shapes = dict.fromkeys(("n", "sum", "squares"), (covariates,))
        scale = {"mean": np.zeros(covariates), "sd": np.ones(covariates)}
        for total in (self.in_any_unit("moments", scale, shapes), None):
            total = total or self.add_up("moments", scale, shapes)
            n, mean = total["n"], total["sum"] / total["n"]
            sd = np.sqrt(np.maximum(total["squares"] / n - np.square(mean), 0.0))
            scale = {"mean": scale["mean"] + scale["sd"] * mean, "sd": scale["sd"] * np.where(sd > 0, sd, 1.0)}
        return scale["mean"], scale["sd"]

    def in_any_unit(self, step: str, arrays: Sum, shapes: Shapes) -> Sum:
        """The sum of rows `[P]` of whatever size, rounded once."""
        each = self.by_site(step, arrays, shapes)
        self.fix(set(each), step)
        return {
            k: np.array([fsum(a[k][p] for a in each.values()) for p in range(*shape)]) for k, shape in shapes.items()
        }

    def of_tested(self, step: str, arrays: Sum, shapes: Shapes) -> tuple[Sum | None, dict[str, Sum], list[str]]:
        """The sum over the plan's test patients, also at sites that the fit left out, each site's own, and whose they are; None where nobody answers."""
        each = self.by_site(step, arrays, shapes)
        total = {k: np.sum([one[k] for one in each.values()], axis=0) for k in shapes} if each else None
        return total, each, sorted(each)


def check_greeting(config: wire.Config) -> None:
    """Refuse a greeting without levels."""
    levels = config.get("levels")
    if not isinstance(levels, list) or not all(isinstance(v, str) for v in levels):
        raise Refusal("the greeting's levels must be a list of lines")
    if not isinstance(config.get("identity", ""), str):
        raise Refusal("the greeting's identity must be text")
