"""What noisy releases have cost this hospital's patients: written down before data are touched, and never above the budget.

Costs are added up (basic composition), which is valid for every mechanism here; a finer accountant may take this place.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

from oncofed.common.errors import Refusal


@dataclass(frozen=True)
class Ledger:
    """An append-only file of JSON lines at the site; it outlives messages and processes."""

    file: Path
    site: str
    budget: float

    @property
    def spent(self) -> float:
        """Epsilon of all releases so far."""
        if not self.file.exists():
            return 0.0
        try:
            return sum(float(json.loads(line)["epsilon"]) for line in self.file.read_text().splitlines())
        except (ValueError, KeyError, TypeError):
            raise Refusal(
                f"site {self.site}: its ledger {self.file.name} cannot be read, so nobody knows what is spent; the site's engineer must mend it"
            ) from None

    def charge(self, purpose: str, epsilon: float) -> None:
        """Book a release before it happens; raises `Refusal` where the budget does not hold it, and books nothing."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # two messages at once must not both take the last of it
            spent = self.spent
            if spent + epsilon > self.budget + 1e-9:
                raise Refusal(
                    f"site {self.site}: '{purpose}' would cost epsilon {epsilon:g}, {spent:g} of the budget of {self.budget:g} is "
                    "spent (epsilon_budget in policy.toml); ask for a smaller epsilon"
                )
            line = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "purpose": purpose, "epsilon": epsilon}
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
