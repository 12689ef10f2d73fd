"""The one door: every sum that leaves passes the policy, a check of its numbers, and the release log.

Suppression, rounding, noise and the step into a sum under masks belong here and nowhere else.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from flwr.app import RecordDict
from oncofed.client.policy import Policy
from oncofed.client.privacy.answers import KeptAnswers
from oncofed.client.privacy.ledger import Ledger
from oncofed.client.released import ReleasedGroups
from oncofed.common import wire
from oncofed.common.blocks import Sum, all_finite
from oncofed.common.errors import Refusal
from oncofed.common.plan import Plan
from oncofed.common.privacy.accounting import Mechanism
from oncofed.common.study import Study

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
    """What one site's messages go through. `log` is an append-only file of JSON lines at the site.

    A line holds the SHA-256 of what left, to be held against what the server received. `simulated` sites go without: there
    is nobody to prove it to, and it costs as much as a training step. Their researcher sees every column anyway.
    """

    site: str
    policy: Policy
    log: Path
    simulated: bool = False
    ledger_file: Path | None = None
    reserved: list[Release] = field(default_factory=list)
    masks: list[Callable[[Sum], wire.Config]] = field(default_factory=list)
    """Where the study sums under masks: what keeps a sum at the site and says what leaves in its stead."""

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
        if self.simulated:
            return
        kept = self.answers.again(release.id, release.question)
        if kept is not None:
            config, arrays = kept
            self._write(f"{release.purpose} again", config, arrays, 0)
            raise Answered(self._pack(config, arrays))
        self.ledger.reserve(release.id, release.study, release.purpose, release.mechanisms, cap=release.cap)
        self.reserved.append(release)

    def admit_plan(self, kind: str, plan: Plan) -> None:
        """Refuse an analysis that the site's policy does not allow, before any data are touched."""
        self._admit(kind, *plan.columns)
        p = self.policy
        if p.require_secure_sum and not plan.secure_sum:
            raise Refusal(
                f"site {self.site}: the analysis lets the server see every hospital's own sums, its policy does not (require_secure_sum); set "
                "secure_sum = true"
            )
        if p.require_privacy and not plan.epsilon:
            raise Refusal(
                f"site {self.site}: the analysis has no epsilon, its policy answers none without (require_privacy); set epsilon"
            )
        if plan.times == "grid" and plan.grid_months < p.min_grid_months:
            raise Refusal(
                f"site {self.site}: grid_months = {plan.grid_months:g} is finer than the {p.min_grid_months:g} that its policy wants "
                "(min_grid_months)"
            )
        if plan.times == "grid" and p.min_cell > 1 and not plan.epsilon:
            if plan.end % plan.grid_months > 1e-9 and plan.grid_months - plan.end % plan.grid_months > 1e-9:
                raise Refusal(
                    f"site {self.site}: horizon_months = {plan.end:g} is no multiple of grid_months = {plan.grid_months:g}, and the last "
                    "interval would be finer"
                )
            if plan.kind == "cox" and plan.ties != "breslow":
                raise Refusal(
                    f"site {self.site}: Efron's ties need sums over the few events of an interval, its policy wants {p.min_cell} patients "
                    "behind each (min_cell); set ties = 'breslow'"
                )
        if plan.times == "exact" and not self.policy.exact_times:
            raise Refusal(
                f"site {self.site}: times = 'exact' lets event times leave, its policy does not (exact_times); use times = 'grid'"
            )

    def admit(self, kind: str, study: Study) -> None:
        """Refuse a request that the site's policy does not allow, before any data are touched."""
        self._admit(kind, study.task.label)
        if self.policy.require_privacy and not study.privacy.of_patients:
            raise Refusal(
                f"site {self.site}: the study promises privacy.unit = '{study.privacy.unit}', its policy answers 'patient' alone "
                "(require_privacy); set privacy.unit = 'patient'"
            )
        if self.policy.require_secure_sum and not study.privacy.secure_sum:
            raise Refusal(
                f"site {self.site}: the study lets the server see every hospital's own sums, its policy does not (require_secure_sum); set "
                "privacy.secure_sum = true"
            )
        if study.privacy.sharing is not None and not self.policy.shared_noise:
            raise Refusal(
                f"site {self.site}: the study has hospitals share their noise, its policy wants all of it added here (shared_noise); set "
                "privacy.noise = 'own', or have the site's engineer allow it"
            )
        p, phases, alone = self.policy, [study.steps(phase) for phase in study.phases], study.analysis.cross_site
        if alone and not p.own_model:
            raise Refusal(
                f"site {self.site}: analysis.cross_site sends a model trained here alone to all sites, its policy does not let it "
                "(own_model)"
            )
        rounds = sum(t.rounds for t in phases) * (1 + ("local" in alone))
        rounds += study.analysis.personal_rounds * ("personalised" in alone)
        for what, wanted, limit in (
            ("rounds", rounds, p.max_rounds),
            ("folds", 1 if study.splits.held_out_sites else study.splits.folds, p.max_folds),
            ("local steps", max(t.local_steps for t in phases), p.max_local_steps),
        ):
            if wanted > limit:
                raise Refusal(f"site {self.site}: the study wants {wanted} {what}, the site's policy allows {limit}")
        for t in phases:
            seen = t.batch_size * t.local_steps
            if t.batch_size and seen < p.min_patients:
                raise Refusal(
                    f"site {self.site}: a round of {t.local_steps} steps with {t.batch_size} patients rests on {seen} "
                    f"patients, the site's policy wants {p.min_patients}; raise batch_size"
                )

    def _admit(self, kind: str, *columns: str) -> None:
        if kind not in self.policy.allow:
            raise Refusal(
                f"site {self.site}: its policy does not answer '{kind}' (allowed: {', '.join(self.policy.allow)})"
            )
        for column in columns if not self.simulated else ():
            if column not in self.policy.labels:
                raise Refusal(
                    f"site {self.site}: its policy does not let values of the column '{column}' be classes (labels: "
                    f"{', '.join(self.policy.labels)}); the site's engineer can add it to labels in policy.toml"
                )

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
        for release in self.reserved:
            self.answers.keep(release.id, release.question, config, total or {})
            self.ledger.settle(release.id)
        self._write(kind, config, total or {}, patients)
        return content

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
        p = self.policy
        least = p.least(answer.numbers) if kind in TABLES else max(p.min_patients, answer.numbers + 1)
        total = dict(answer.total)
        for name, count in answer.cells.items():
            few = (count > 0) & (count < least)
            if few.any():
                if few.ndim == 1:
                    few = np.expand_dims(few, tuple(range(1, total[name].ndim)))
                total[name] = np.where(few, 0.0, total[name])
        for name in answer.counts if p.rounding > 1 else ():
            total[name] = np.rint(total[name] / p.rounding) * p.rounding
        return total

    def _noisy(self, kind: str, config: wire.Config, answer: Answer) -> Sum:
        """Counts with noise, its cost booked first; each table gets an equal share of epsilon."""
        from oncofed.client.noise import geometric

        total = answer.total or {}
        if set(answer.counts) != set(total):
            raise Refusal(
                f"site {self.site}: '{kind}' with noise may hold tables of counts alone, not {sorted(set(total) - set(answer.counts))}"
            )
        if not self.simulated and not self.reserved:
            purpose = " ".join(str(config[k]) for k in ("study", "analysis", "plan", "step") if config.get(k))
            study = str(config.get("study") or config.get("analysis") or "")
            self.ledger.charge(study, f"{kind} {purpose}", [Mechanism("pure", answer.epsilon)])
        share = answer.epsilon / len(total)
        return {name: geometric(value, share, answer.counts[name]) for name, value in total.items()}

    def refuse(self, kind: str, reason: str) -> RecordDict:
        """Pack a refusal; its text leaves too, so it stands in the log."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("a") as file:
            file.write(json.dumps({"time": _now(), "kind": kind, "refusal": reason}) + "\n")
        return wire.refusal(self.site, reason)

    def _write(self, kind: str, config: wire.Config, total: Sum, patients: int) -> None:
        line: dict[str, object] = {
            "time": _now(),
            "kind": kind,
            "study": config.get("study", ""),
            **{k: config[k] for k in ("analysis", "plan", "step", "members") if k in config},
            "fold": config.get("fold", -1),
            "round": config.get("round", 0),
            "patients": patients,
            "arrays": {name: list(value.shape) for name, value in total.items()},
            "bytes": sum(value.nbytes for value in total.values()),
        }
        if self.masks and total:
            line["under_masks"] = True  # the sum stays here until its masked words leave, with a line of their own
        if not self.simulated:
            line["sha256"] = _digest(total)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("a") as file:
            file.write(json.dumps(line) + "\n")


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _digest(total: Sum) -> str:
    digest = hashlib.sha256()
    for name in sorted(total):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(total[name]).data if total[name].size else b"")
    return digest.hexdigest()
