"""The tables of a study that say what is asked of the trained model."""

from __future__ import annotations

from typing import Any, Literal

from oncofed.common.section import Section, split_text
from pydantic import Field, model_validator


class Analysis(Section):
    """What is asked of the trained model beside its score, all of it sums over patients."""

    experts: bool = Field(True, description="what each expert is worth: held-out patients without it")
    attributions: bool = Field(
        False, description="which genes drive each cancer's score and each expert (integrated gradients)"
    )
    patients: int = Field(200, ge=10, description="at most so many training patients of a site are attributed")
    steps: int = Field(16, ge=2, description="of the path from the mean patient to the patient")
    ablation: bool = Field(
        False, description="recall of held-out patients without the genes that rank highest among training patients"
    )
    attention: bool = Field(False, description="how focused each attention head of t_gem is, by class")
    network_genes: int = Field(
        0, ge=0, le=1000, description="genes in the attention network of each class of t_gem; 0: no network"
    )
    network_draws: int = Field(
        4, ge=1, le=100, description="networks of permuted labels that each class's is held against"
    )
    pathways: str = Field("", description="gene sets (.gmt) whose mean attribution is shown; beside attributions")
    cross_site: tuple[Literal["local", "personalised"], ...] = Field(
        (),
        description="models of each site alone that are evaluated at every site, beside the federated one; local: trained "
        "there alone, personalised: the federated one trained on there; empty: no matrix",
    )
    personal_rounds: int = Field(3, ge=1, description="more rounds at a site alone that make a model personalised")

    @model_validator(mode="before")
    @classmethod
    def _text(cls, data: Any) -> Any:
        return split_text(data, "cross_site")


class Evaluation(Section):
    """What is measured of held-out patients in survival, from one table of risk and time that the sites' sums make."""

    tables: bool = Field(
        True,
        description="ask for it: pooled C-index, AUC, Brier score, calibration and curves of risk groups, without rows",
    )
    risk_bins: int = Field(
        64, ge=2, le=256, description="of each cancer type's training risks, equally filled; an even number"
    )
    time_bins: int = Field(32, ge=4, le=256, description="of follow-up, by training events")
    horizons: tuple[float, ...] = Field((12.0, 36.0, 60.0), description="months of AUC, Brier score and calibration")
    epsilon: float = Field(
        0.0, ge=0, description="differential privacy of the evaluation of a fold: noise on its counts; 0: none"
    )

    @model_validator(mode="before")
    @classmethod
    def _text(cls, data: Any) -> Any:
        return split_text(data, "horizons")

    @model_validator(mode="after")
    def _usable(self) -> Evaluation:
        if self.risk_bins % 2:
            raise ValueError(f"evaluation.risk_bins = {self.risk_bins} must be even: risk groups meet in the middle")
        if list(self.horizons) != sorted(set(self.horizons)) or any(h <= 0 for h in self.horizons):
            raise ValueError(f"evaluation.horizons = {self.horizons} must be months above 0 that increase")
        if len(self.horizons) > self.time_bins - 2:
            raise ValueError(f"{len(self.horizons)} horizons need more than evaluation.time_bins = {self.time_bins}")
        return self
