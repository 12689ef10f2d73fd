"""A question of one fold to the sites: stamped, so that an answer to another question is left out, and added up."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from oncofed.common import wire
from oncofed.common.blocks import Sum, part
from oncofed.common.broadcast import LACKS, WEIGHTS
from oncofed.common.exchange import Aggregation
from oncofed.common.modalities import NO_BESIDE, Beside
from oncofed.common.panel import GenePanel
from oncofed.common.privacy.releases import promise_of
from oncofed.common.privacy.sharing import sharing_of
from oncofed.common.signed_study import OWN
from oncofed.common.splits import ALL_PATIENTS
from oncofed.common.study import TRAIN, Study
from oncofed.server.aggregate import STATISTICS_BITS, Accumulator
from oncofed.server.broadcast import Broadcast
from oncofed.server.roster import Answer, NotEnoughSites, Roster
from oncofed.server.secure_sum import SecureSum, SecureTotal, Shapes

log = logging.getLogger("oncofed.server")


@dataclass(frozen=True)
class Inquiry:
    """Who is asked, about which fold of which study. `alone` is the one site that trains; empty: all do.

    `broadcast` knows how weights travel to the sites that hold others already.
    """

    study: Study
    roster: Roster
    panel: GenePanel
    cancers: tuple[str, ...]
    fold: int
    broadcast: Broadcast
    beside: Beside = NO_BESIDE
    alone: str = ""

    def ask(
        self, kind: str, config: wire.Config, arrays: Sum | None, *, phase: str = TRAIN, round_: int = 0
    ) -> Iterator[Answer]:
        """Ask the sites that the question concerns; an answer to another study, fold, round or panel is left out."""
        stamp: wire.Config = {"fold": self.fold, "phase": phase, "round": round_, "panel_hash": self.panel.hash}
        hello = greeting(self.study)
        if self.study.privacy.on:
            config = config | {"noise_scale": promise_of(self.study).scale}
        text: wire.Config = hello | {"cancers": list(self.cancers)} | self.beside.config()
        self.roster.greet_newcomers(hello)
        tests = kind == wire.EVALUATE and not config.get("validation")
        concerns = self._held_out if tests else self._training
        if tests and self.site_held_out:  # the statistics bring the panel to others, but this site hears none
            config = config | {"genes": self.panel.lines}
        for answer in self._answers(kind, {**stamp, **text, **config}, arrays, round_, concerns):
            wrong = {k: answer.config.get(k) for k, v in stamp.items() if answer.config.get(k) != v}
            if wrong:
                self.roster.leave_out(
                    answer.site, kind, round_, f"answers {wrong}, asked { {k: stamp[k] for k in wrong} }"
                )
                continue
            yield answer
            del answer  # or it would be held while the next one is fetched

    def _answers(
        self, kind: str, config: wire.Config, arrays: Sum | None, round_: int, concerns: Callable[[str], bool]
    ) -> Iterator[Answer]:
        """Answers to one question; where it is about weights that travel as steps, who lacks what they begin at is asked again in full."""
        if not self.broadcast.on or not arrays or not part(WEIGHTS, arrays):
            yield from self.roster.ask(kind, config, arrays, round_=round_, concerns=concerns)
            return
        holds, lacking = self.roster.holds, set[str]()
        for again in (False, True):
            written = self.broadcast.contents(config, arrays, {s: holds.get(s, "") for s in self.roster.sites})
            about = self.broadcast.hash
            answers = self.roster.ask(
                kind, config, arrays, round_=round_, concerns=concerns, written=written, again=again
            )
            del written
            for answer in answers:
                if LACKS not in answer.config:
                    holds[answer.site] = about
                    yield answer
                elif not again and holds.pop(answer.site, None) is not None:
                    lacking.add(answer.site)
                else:
                    self.roster.leave_out(answer.site, kind, round_, "lacks weights that it was sent in full")
                del answer  # or it would be held while the next one is fetched
            if not lacking:
                return
            log.info("round %d: %s lack the weights of before and get them in full", round_, ", ".join(sorted(lacking)))
            concerns = frozenset(lacking).__contains__

    def add_up(
        self,
        kind: str,
        config: wire.Config,
        arrays: Sum | None,
        shapes: Shapes,
        *,
        round_: int = 0,
        bits: int = STATISTICS_BITS,
    ) -> Sum:
        """The sum over the sites' answers; a bad one is left out by name, too few raise `NotEnoughSites`."""
        if self.study.privacy.secure_sum and shapes:
            return self.add_under_masks(kind, config, arrays, shapes, round_=round_, bits=bits).total
        accumulator = Accumulator(shapes, bits)
        for answer in self.ask(kind, config, arrays, round_=round_):
            try:
                accumulator.add(answer.arrays, answer.site)
            except ValueError as error:
                self.roster.leave_out(answer.site, kind, round_, str(error))
        one = self.site_held_out and kind == wire.EVALUATE and not config.get("validation")
        least = 1 if one else self.aggregation.min_sites
        if accumulator.count < least:
            raise NotEnoughSites(f"'{kind}': {accumulator.count} good answers, wanted {least} (aggregation.min_sites)")
        return accumulator.total()

    def add_under_masks(
        self,
        kind: str,
        config: wire.Config,
        arrays: Sum | None,
        shapes: Shapes,
        *,
        phase: str = TRAIN,
        round_: int = 0,
        bits: int = STATISTICS_BITS,
        check: Callable[[Answer], None] = lambda answer: None,
    ) -> SecureTotal:
        """The sum over the sites, of which the server sees nothing but the total; too few at any step raise `NotEnoughSites`."""

        def exchange(kind: str, config: wire.Config, each: Mapping[str, wire.Config]) -> Iterator[Answer]:
            self.roster.greet_newcomers(greeting(self.study))  # a site that was started again has a new node
            return self.roster.ask(kind, config, None, round_=round_, concerns=each.__contains__, each=each)

        privacy, least = self.study.privacy, self.aggregation.min_sites
        sharing = sharing_of(self.study, kind)
        least = max(least, sharing.least if sharing else 0)  # sites refuse smaller totals
        sum_ = SecureSum(self.roster, exchange, kind, round_, shapes, bits, least, privacy.secure_threshold, check)
        return sum_.gather(self.ask(kind, config | {"bits": bits}, arrays, phase=phase, round_=round_))

    @property
    def aggregation(self) -> Aggregation:
        """The study's rule; of a site alone one answer is enough, and there is none to hold it against."""
        rule = self.study.aggregation
        return rule.model_copy(update={"min_sites": 1, "robust": "none"}) if self.alone else rule

    @property
    def site_held_out(self) -> str:
        """The site that this fold holds out; empty where folds are of patients."""
        sites = self.study.splits.held_out_sites
        return sites[self.fold] if sites and self.fold != ALL_PATIENTS else ""

    def _training(self, site: str) -> bool:
        return site != self.site_held_out and self.alone in ("", site)

    def _held_out(self, site: str) -> bool:
        return self.site_held_out in ("", site)


def greeting(study: Study) -> wire.Config:
    """The study as a site needs it, without the coordinator's own paths, and the signature over it."""
    own = OWN | {"runtime": {"out", "keep_checkpoints", "roster", "signature"}}
    told = study.model_dump(mode="json", exclude=own)
    told["training"]["start"] = Path(study.training.start).name
    return {"study_json": json.dumps(told), "signature": study.runtime.signature}
