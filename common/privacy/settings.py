"""The table of a study file that says what may become known of one patient, or of one hospital."""

from __future__ import annotations

from typing import Any, Literal

from oncofed.common.privacy.sharing import Sharing
from oncofed.common.section import Section
from pydantic import Field, model_validator

ACCOUNTANTS = {
    "gdp": "it is an approximation by the central limit theorem and reports less than is spent (5.92 for 7.88)",
    "rdp": "it is valid and wastes noise (9.13 for 7.88)",
    "prv": "it is valid, and slow where many mechanisms come together",
}


class Privacy(Section):
    """Differential privacy of all that leaves a hospital in a study; `unit` none: there is none."""

    unit: Literal["none", "patient", "hospital"] = Field(
        "none",
        description="whose presence must not show: a patient's, at every site by noise of its own, or a whole hospital's, "
        "by noise of the server",
    )
    epsilon: float = Field(
        8.0,
        gt=0,
        description="of everything that leaves in the study together: statistics, evidence, training, evaluation",
    )
    delta: float = Field(1e-5, gt=0, lt=1, description="far below 1 / patients of a site")
    clip: float = Field(
        1.0, ge=1e-3, le=1e3, description="norm that a patient's gradient, or a hospital's change, is cut to"
    )
    sample_rate: float = Field(
        1.0,
        gt=0,
        le=1,
        description="each patient is in a step with this probability; 1: all are. Takes the place of batch_size",
    )
    statistics: Literal["public", "noised"] = Field(
        "public",
        description="first baselines (and, without task.time_edges, the time grid): public ones, or from sums with noise",
    )
    statistics_share: float = Field(0.1, gt=0, lt=0.5, description="of the budget that those sums may have")
    evidence: Literal["public", "noised"] = Field(
        "public",
        description="public: a site stands behind all blocks with its patients, rounded to tens; noised: counts of patients by expert, "
        "cancer type and modality with noise, those below the policy's min_patients withheld",
    )
    evidence_share: float = Field(0.05, gt=0, lt=0.5, description="of the budget that those counts may have")
    evidence_every: int = Field(10, ge=1, description="rounds between two counts; they are used until the next")
    chunk: int = Field(256, ge=1, description="patients of a step that are computed at once: memory, not privacy")
    secure_sum: bool = Field(
        False, description="the server sees sums over all hospitals alone, added under masks, and no hospital's own"
    )
    secure_threshold: int = Field(
        0, ge=0, description="hospitals that must be there at every step of such a sum; 0: floor(2n/3) + 1 of n"
    )
    noise: Literal["own", "shared"] = Field(
        "own",
        description="of a patient's promise: every site adds all of it, or each its share, and only their total has all; shared wants "
        "secure_sum, and rests on the other sites",
    )
    sharing_sites: int = Field(
        0, ge=0, description="sites that share the noise: the consortium's size; 0: nobody shares it"
    )
    silent_sites: int = Field(
        0,
        ge=0,
        description="of those that share the noise, how many may be missing in a total; with more a site refuses it",
    )
    colluding_sites: int = Field(
        1,
        ge=1,
        description="of those that share the noise, how many may tell the server, or each other, what they added",
    )
    accountant: Literal["pld"] = Field("pld", description="privacy loss distributions, the tightest valid account")

    @model_validator(mode="before")
    @classmethod
    def _refused(cls, data: Any) -> Any:
        """Keys that other tools have and that would break the promise get their reason."""
        if not isinstance(data, dict):
            return data
        for key in ("noise_seed", "seed", "deterministic"):
            if key in data:
                raise ValueError(
                    f"privacy.{key}: noise that can be drawn again protects nobody; leave it out, noise comes from the operating system"
                )
        named = data.get("accountant", "pld")
        if named in ACCOUNTANTS:
            raise ValueError(f"privacy.accountant = {named!r}: {ACCOUNTANTS[named]}; leave it out, or use 'pld'")
        return data

    @property
    def on(self) -> bool:
        """Whether there is any promise."""
        return self.unit != "none"

    @property
    def sharing(self) -> Sharing | None:
        """Who shares the noise; None where each site adds all of it."""
        return Sharing(self.sharing_sites, self.silent_sites, self.colluding_sites) if self.noise == "shared" else None

    @property
    def of_patients(self) -> bool:
        return self.unit == "patient"
