"""The one door: every sum that leaves passes the policy, a check of its numbers, and the release log.

Suppression, rounding, noise and the step into a sum under masks belong here and nowhere else.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from flwr.app import RecordDict
from oncofed.client.policy import Policy
from oncofed.client.privacy.answers import KeptAnswers
from oncofed.client.privacy.ledger import Ledger
from oncofed.client.release_log import LONGEST, Protection, ReleaseLog, size_of_words
from oncofed.client.released import ReleasedGroups
from oncofed.common import wire
from oncofed.common.blocks import Sum, all_finite
from oncofed.common.broadcast import LACKS
from oncofed.common.errors import Refusal, one_line
from oncofed.common.privacy.accounting import Mechanism

log = logging.getLogger("oncofed.client")

TABLES = (wire.EVALUATE, wire.ANALYSE)
"""Kinds of message that show groups of patients: `min_cell` of the policy holds for them, `min_patients` for the others."""


@dataclass(frozen=True)
class Answer:
    """What a handler wants to let out: a sum over `patients` patients.

    `cells` names arrays and the patients behind their numbers: `[groups]` along the first axis, or an array that
    broadcasts against the whole; `numbers` is how many sums of one quantity a cell holds: as many patients could be solved
    for, so a cell needs more. `groups` names the patients behind a table, group by group, for the site's memory. `counts`
    names tables of counts and how much one patient can change each (L1); with an `epsilon` above zero nothing else may leave.
    `noised` says that the handler has covered the sum already. `events` are those of them who had the event, group by group, and
    `grid` how fine their times are told. `code` writes the sum as it travels, after all checks.
    """

    config: wire.Config
    total: Sum | None = None
    patients: int = 0
    cells: Mapping[str, np.ndarray] = field(default_factory=dict)
    numbers: int = 1
    groups: tuple[frozenset[str], ...] = ()
    events: tuple[frozenset[str], ...] = ()
    grid: str = ""
    counts: Mapping[str, int] = field(default_factory=dict)
    epsilon: float = 0.0
    noised: bool = False
    code: Callable[[Sum], Sum] | None = None


@dataclass(frozen=True)
class Release:
    """Noise that an answer will hold: booked under `id` before data are touched; `question` tells one request from another.

    `cap` is the study's own promise, (epsilon, delta), for all releases of `study` together.
    """

    id: str
    question: str
    study: str
    purpose: str
    mechanisms: tuple[Mechanism, ...]
    cap: tuple[float, float] | None = None


class Answered(Exception):
    """The very question was answered before: `content` is that answer, which costs nothing again."""

    def __init__(self, content: RecordDict) -> None:
        super().__init__()
        self.content = content


@dataclass(frozen=True)
class Door:
    """What one site's messages go through. `log` is the file of the release log (client/release_log.py).

    A line holds the SHA-256 of what left, to be held against what the server received. `simulated` sites go without: there
    is nobody to prove it to, and it costs as much as a training step.
    """

    site: str
    policy: Policy
    log: Path
    simulated: bool = False
    ledger_file: Path | None = None
    reserved: list[Release] = field(default_factory=list)
    expected: list[Release] = field(default_factory=list)
    masks: list[Callable[[Sum], wire.Config]] = field(default_factory=list)
    """Where the study sums under masks: what keeps a sum at the site and says what leaves in its stead."""

    @property
    def releases(self) -> ReleaseLog:
        """The record of every message that left."""
        return ReleaseLog(self.log, self.site, self.simulated)

    @property
    def ledger(self) -> Ledger:
        """What noisy releases have cost here."""
        return Ledger(
            self.ledger_file or self.log.parent / "ledger.jsonl",
            self.site,
            self.policy.epsilon_budget,
            self.policy.delta_budget,
        )

    @property
    def answers(self) -> KeptAnswers:
        """Releases that were let out, kept for a server that asks again."""
        return KeptAnswers(self.log.parent / "answers")

    def reserve(self, release: Release) -> None:
        """Book a release before data are touched; raises `Refusal` over the hospital's budget or the study's own promise.

        Raises `Answered` where the very question was answered before. Simulated sites have neither ledger nor memory: their
        researcher sees every row.
        """
        if not self.simulated:
            self._repeat(release)
            self._book(release)

    def expect(self, release: Release) -> None:
        """The same of a release that is booked when its answer is there and gets its noise: a refusal until then costs nothing."""
        if not self.simulated:
            self._repeat(release)
            self.expected.append(release)

    def _repeat(self, release: Release) -> None:
        """Raise `Answered` where this was answered before."""
        kept = self.answers.again(release.id, release.question)
        if kept is not None:
            config, arrays = kept
            self.reserved.append(release)
            content = self._pack(config, arrays)
            self._write(f"{release.purpose} again", config, arrays, 0, content)
            raise Answered(content)

    def _book(self, release: Release) -> None:
        self.ledger.reserve(release.id, release.study, release.purpose, release.mechanisms, cap=release.cap)
        self.reserved.append(release)

    def release(self, kind: str, stamp: wire.Config, answer: Answer) -> RecordDict:
        """Pack an answer for the server, without the cells that rest on too few patients, and write what left to the log."""
        patients, config = answer.patients, stamp | answer.config
        # noise covers one patient as well as many, and a mask all of them, who were counted when the question was answered
        wanted = (
            0
            if answer.epsilon or answer.noised or kind == wire.MASKED
            else self.policy.min_cell
            if kind in TABLES
            else self.policy.min_patients
        )
        total = self._noisy(kind, config, answer) if answer.epsilon else self._withhold(kind, answer)
        if total is not None and patients < wanted:
            raise Refusal(
                f"site {self.site}: fewer patients are behind '{kind}' than the {wanted} that its policy wants"
            )
        for name, value in (total or {}).items():
            if not all_finite(value):
                raise Refusal(
                    f"site {self.site}: '{kind}' has {int((~np.isfinite(value)).sum())} values that are not finite in '{name}'; "
                    "lower training.learning_rate, set training.clip_norm, or run `oncofed site check`"
                )
        if answer.groups and not answer.epsilon and self.policy.min_cell > 1:
            self._remember(kind, answer)
        if total is not None and answer.code is not None and not self.masks:
            total = answer.code(total)
        content = self._pack(config, total)
        self._check_size(config, content)
        for release in self.reserved:
            self.answers.keep(release.id, release.question, config, total or {})
            self.ledger.settle(release.id)
        self._write(kind, config, total or {}, patients, content, answer)
        return content

    def _check_size(self, config: wire.Config, content: RecordDict) -> None:
        """Refuse an answer that is larger than the policy lets out, at once or for one study."""
        p, size = self.policy, sum(_sizes(content))
        if size > p.max_outgoing_mb * 1e6:
            raise Refusal(
                f"site {self.site}: the answer has {size / 1e6:.1f} MB, its policy lets {p.max_outgoing_mb:g} out at once (max_outgoing_mb)"
            )
        if p.max_study_mb == float("inf"):
            return
        name = str(config.get("study") or config.get("analysis") or "")
        before = self.releases.sent(name)
        if before + size > p.max_study_mb * 1e6:
            raise Refusal(
                f"site {self.site}: with this answer {(before + size) / 1e6:.1f} MB would have left for '{name}', its policy lets "
                f"{p.max_study_mb:g} out for one study (max_study_mb)"
            )

    def _pack(self, config: wire.Config, total: Sum | None) -> RecordDict:
        """An answer for the server: the sum, or, where the study sums under masks, the keys to do it with."""
        if self.masks and total:
            return wire.reply(self.site, config | self.masks[0](total))
        return wire.reply(self.site, config, total)

    def _remember(self, kind: str, answer: Answer) -> None:
        """Refuse what together with an earlier table would single patients out, and remember this one."""
        memory = ReleasedGroups.of(self.log.parent, self.site)
        memory.check(answer.groups, self.policy.min_cell, kind, most=self.policy.max_tables)
        memory.check(answer.events, self.policy.min_cell, kind, "patients with the event")
        if answer.grid:
            memory.same_grid(answer.groups[0], answer.grid, kind)

    def _withhold(self, kind: str, answer: Answer) -> Sum | None:
        """The sum with zeros in the cells of fewer patients than the policy, or than the numbers in a cell, allow; counts rounded."""
        if answer.total is None:
            return None
        p, total = self.policy, dict(answer.total)
        for name, count in answer.cells.items():
            few = self._few(kind, answer, count)
            if few.any():
                if few.ndim == 1:
                    few = np.expand_dims(few, tuple(range(1, total[name].ndim)))
                total[name] = np.where(few, 0.0, total[name])
        for name in answer.counts if p.rounding > 1 else ():
            total[name] = np.rint(total[name] / p.rounding) * p.rounding
        return total

    def _few(self, kind: str, answer: Answer, count: np.ndarray) -> np.ndarray:
        """Which cells rest on too few patients."""
        p = self.policy
        least = p.least(answer.numbers) if kind in TABLES else max(p.min_patients, answer.numbers + 1)
        return (count > 0) & (count < least)

    def _withheld(self, kind: str, answer: Answer) -> dict[str, int]:
        """How many cells of each array left as zeros."""
        cells = {name: int(self._few(kind, answer, count).sum()) for name, count in answer.cells.items()}
        return {name: count for name, count in cells.items() if count}

    def _noisy(self, kind: str, config: wire.Config, answer: Answer) -> Sum:
        """Counts with noise, its cost booked first; each table gets an equal share of epsilon."""
        from oncofed.client.noise import geometric

        total = answer.total or {}
        if set(answer.counts) != set(total):
            raise Refusal(
                f"site {self.site}: '{kind}' with noise may hold tables of counts alone, not {sorted(set(total) - set(answer.counts))}"
            )
        for release in self.expected:
            self._book(release)
        if not self.simulated and not self.reserved:
            raise RuntimeError(f"'{kind}' has noise that nobody booked")
        share = answer.epsilon / len(total)
        return {name: geometric(value, share, answer.counts[name]) for name, value in total.items()}

    def lacks(self, kind: str, wanted: str) -> RecordDict:
        """Pack an answer that says which weights the site does not hold, and nothing else."""
        self.releases.lacked(kind, wanted)
        return wire.reply(self.site, {LACKS: wanted})

    def refuse(self, kind: str, reason: str, study: str = "") -> RecordDict:
        """Pack a refusal; its text leaves too, so it stands in the log, or where it cannot stand there, does not leave."""
        return refusal(self.releases, kind, reason, study)

    def _write(
        self,
        kind: str,
        config: wire.Config,
        total: Sum,
        patients: int,
        content: RecordDict,
        answer: Answer | None = None,
    ) -> None:
        noise = tuple(m.to_json() for release in self.reserved for m in release.mechanisms)
        withheld = self._withheld(kind, answer) if answer is not None and not answer.epsilon else {}
        rounded = self.policy.rounding if answer is not None and answer.counts and not answer.epsilon else 1
        epsilon = answer.epsilon if answer is not None else 0.0
        protection = Protection(withheld, rounded, epsilon, noise, bool(self.masks and total))
        self.releases.released(kind, config, total, patients, protection, _sizes(content)[1])


def refusal(releases: ReleaseLog, kind: str, reason: str, study: str = "") -> RecordDict:
    """Write a refusal into the log and pack it; where the log cannot be written, another text leaves, which says so and no more."""
    reason = one_line(reason, LONGEST)  # it may quote the message
    try:
        releases.refused(kind, reason, study)
    except (OSError, Refusal) as error:
        log.error("%s: the release log cannot be written: %s", releases.site, error)
        reason = (
            f"site {releases.site}: its release log cannot be written or is not as it was written, so nothing leaves; its engineer finds the "
            "reason in the node's own log, and with oncofed site log"
        )
    return wire.refusal(releases.site, reason)


def _sizes(content: RecordDict) -> tuple[int, int]:
    """Bytes of a message's numbers, and of its words."""
    numbers, headers = wire.sizes(content)
    return numbers, headers + sum(size_of_words(record) for record in content.config_records.values())
