"""The one door: every sum that leaves passes the policy, a check of its numbers, and the release log.

Suppression, noise and masks of later steps belong here and nowhere else.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from flwr.app import RecordDict
from oncofed.client.policy import Policy
from oncofed.common import wire
from oncofed.common.blocks import Sum, all_finite
from oncofed.common.errors import Refusal
from oncofed.common.study import Study


@dataclass(frozen=True)
class Answer:
    """What a handler wants to let out: a sum over `patients` patients.

    `cells` names arrays whose first axis are groups of patients, with the patients in each `[groups]`, or in each of those
    for whom a number is known `[groups, numbers]`; `numbers` is how many sums of
    one quantity a cell holds: as many patients could be solved for, so a cell needs more.
    """

    config: wire.Config
    total: Sum | None = None
    patients: int = 0
    cells: Mapping[str, np.ndarray] = field(default_factory=dict)
    numbers: int = 1


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

    def admit(self, kind: str, study: Study) -> None:
        """Refuse a request that the site's policy does not allow, before any data are touched."""
        if kind not in self.policy.allow:
            raise Refusal(
                f"site {self.site}: its policy does not answer '{kind}' (allowed: {', '.join(self.policy.allow)})"
            )
        label = study.task.label
        if label not in self.policy.labels and not self.simulated:
            raise Refusal(
                f"site {self.site}: its policy does not let values of the column '{label}' be classes (labels: "
                f"{', '.join(self.policy.labels)}); the site's engineer can add it to labels in policy.toml"
            )
        p, phases = self.policy, [study.steps(phase) for phase in study.phases]
        for what, wanted, limit in (
            ("rounds", sum(t.rounds for t in phases), p.max_rounds),
            ("folds", study.splits.count, p.max_folds),
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

    def release(self, kind: str, stamp: wire.Config, answer: Answer) -> RecordDict:
        """Pack an answer for the server, without the cells that rest on too few patients, and write what left to the log."""
        patients, config = answer.patients, stamp | answer.config
        total = self._withhold(answer)
        wanted = self.policy.min_test_patients if kind == wire.EVALUATE else self.policy.min_patients
        if total is not None and patients < wanted:
            raise Refusal(
                f"site {self.site}: {patients} patients behind '{kind}' are fewer than the {wanted} that its policy wants"
            )
        for name, value in (total or {}).items():
            if not all_finite(value):
                raise Refusal(
                    f"site {self.site}: '{kind}' has {int((~np.isfinite(value)).sum())} values that are not finite in '{name}'; "
                    "lower training.learning_rate, set training.clip_norm, or run `oncofed site check`"
                )
        content = wire.reply(self.site, config, total)
        self._write(kind, config, total or {}, patients)
        return content

    def _withhold(self, answer: Answer) -> Sum | None:
        """The sum with zeros in the cells of fewer patients than the policy, or than the numbers in a cell, allow."""
        if answer.total is None or not answer.cells:
            return answer.total
        least = max(self.policy.min_patients, answer.numbers + 1)
        total = dict(answer.total)
        for name, count in answer.cells.items():
            few = (count > 0) & (count < least)
            if few.any():
                # counts by group or, as some numbers are known of few patients of a group, by group and number
                axes = range(count.ndim, total[name].ndim) if count.ndim == 1 else range(1, total[name].ndim - 1)
                total[name] = np.where(np.expand_dims(few, tuple(axes)), 0.0, total[name])
        return total

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
            "fold": config.get("fold", -1),
            "round": config.get("round", 0),
            "patients": patients,
            "arrays": {name: list(value.shape) for name, value in total.items()},
            "bytes": sum(value.nbytes for value in total.values()),
        }
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
