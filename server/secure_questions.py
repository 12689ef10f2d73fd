"""The questions of a classical analysis whose sums are added under masks: the server sees totals, and no site's own numbers.

All totals are of the same sites: of two that differ by one, the difference would be that one's. So an analysis does not begin anew
without a site that is lost on the way; it asks once more, and then ends.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from oncofed.common import wire
from oncofed.common.blocks import Sum
from oncofed.common.sum_coding import ANALYSIS_BITS, Form
from oncofed.server.inquiry import Shapes
from oncofed.server.questions import Questions
from oncofed.server.roster import Answer, NotEnoughSites
from oncofed.server.secure_sum import SecureSum, SecureTotal

FLEETING = ("no answer within", "Flower error")
"""How reasons begin that may be gone when the question is asked once more."""


@dataclass
class SecureQuestions(Questions):
    """Questions under masks. `places` counts those of each step, `tested` are the sites of test patients, fixed by their first sum."""

    places: Counter[str] = field(default_factory=Counter)
    tested: set[str] = field(default_factory=set)

    def add_up(self, step: str, arrays: Sum | None, shapes: Shapes) -> Sum:
        return self._for_good(step, arrays, shapes, "fine")

    def in_any_unit(self, step: str, arrays: Sum, shapes: Shapes) -> Sum:
        return self._for_good(step, arrays, shapes, "exact")

    def of_tested(self, step: str, arrays: Sum, shapes: Shapes) -> tuple[Sum | None, dict[str, Sum], list[str]]:
        try:
            summed = self._summed(step, arrays, shapes, "fine", self.tested)
        except NotEnoughSites:
            return None, {}, []
        self.tested = {answer.site for answer in summed.answers}
        return summed.total, {}, sorted(self.tested)

    def _for_good(self, step: str, arrays: Sum | None, shapes: Shapes, form: Form) -> Sum:
        summed = self._summed(step, arrays, shapes, form, self.members)
        self.fix({answer.site for answer in summed.answers}, step)
        return summed.total

    def _summed(self, step: str, arrays: Sum | None, shapes: Shapes, form: Form, members: set[str]) -> SecureTotal:
        """The total over `members`, or, where there are none yet, over all who answer; raises `NotEnoughSites`."""
        self.asked += 1
        self.places[step] += 1
        before = len(self.roster.left_out)
        try:
            return self._once(step, arrays, shapes, form, members)
        except NotEnoughSites as error:
            if not members:
                raise
            reasons = {str(x["site"]): str(x["reason"]) for x in self.roster.left_out[before:]}
            if self.plan.epsilon or not all(r.startswith(FLEETING) for r in reasons.values()):
                raise NotEnoughSites(_ended(step, members, reasons)) from error
        try:
            return self._once(step, arrays, shapes, form, members)
        except NotEnoughSites as error:
            raise NotEnoughSites(_ended(step, members, reasons)) from error

    def _once(self, step: str, arrays: Sum | None, shapes: Shapes, form: Form, members: set[str]) -> SecureTotal:
        plan, roster, round_ = self.plan, self.roster, self.asked
        roster.greet_newcomers(self.hello)

        def exchange(kind: str, config: wire.Config, each: Mapping[str, wire.Config]) -> Iterator[Answer]:
            roster.greet_newcomers(self.hello)  # a site that was started again has a new node
            return roster.ask(kind, config, None, round_=round_, concerns=each.__contains__, each=each)

        # the very question of an earlier attempt, or it would be another one in its place
        more: wire.Config = {"place": self.places[step], "sites": len(members) or len(roster.hellos)}
        least = len(members) or plan.min_sites
        sum_ = SecureSum(
            roster, exchange, wire.ANALYSE, round_, shapes, ANALYSIS_BITS, least, plan.secure_threshold, form=form
        )
        return sum_.gather(self.answers(step, arrays, members, more))


def _ended(step: str, members: set[str], reasons: Mapping[str, str]) -> str:
    lost = "; ".join(f"{site}: {reason}" for site, reason in reasons.items() if site in members)
    return (
        f"'{step}': not all {len(members)} hospitals of this analysis have answered, and a total of the others would tell of those who have not. "
        f"{lost}. Run the same plan when they are back, or, where they refuse, another plan under another name"
    )
