"""The later exchanges of a secure sum as messages at a site."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from flwr.app import RecordDict
from oncofed.client.data.site import SiteFolder
from oncofed.client.policy import Policy
from oncofed.client.release import Answer, Door
from oncofed.client.resident import Resident
from oncofed.client.secure_sum import SecureSums, texts
from oncofed.common import wire
from oncofed.common.errors import Refusal


@dataclass(frozen=True)
class SumSession:
    """One later exchange of a secure sum at a site; the question itself was a session of its own, and passed the policy."""

    ask: wire.Config
    sums: SecureSums
    question: str

    @classmethod
    def of(
        cls, content: RecordDict, site: SiteFolder, work: Path, resident: Resident, own_device: str, policy: Policy
    ) -> SumSession:
        """Read an exchange, whose form is checked; raises `Refusal` on a question that is none."""
        ask = wire.read_config(content, "ask")
        question = str(ask.get("sum", ""))
        if not re.fullmatch("[0-9a-f]{64}", question):  # it names a folder
            raise Refusal(f"site {site.name}: {question[:40]!r} is no question's digest")
        return cls(ask, SecureSums(work, site.path, site.name, policy.min_members), question)

    def admit(self, door: Door, kind: str) -> None:
        """Nothing: the policy has admitted the question."""

    @cached_property
    def stamp(self) -> wire.Config:
        """The question, and of which study it is, as long as the sum is open."""
        stamp: wire.Config = {"sum": self.question}
        study = self.sums.study_of(self.question)
        return stamp | {"study": study} if study else stamp

    def share(self) -> Answer:
        return Answer(self.sums.share(self.question, self.ask))

    def masked(self) -> Answer:
        return Answer({}, self.sums.masked(self.question, self.ask))

    def unmask(self) -> Answer:
        # the hospital's log shows of whom the total is
        return Answer(self.sums.unmask(self.question, self.ask) | {"members": texts(self.ask, "came")})
