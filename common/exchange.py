"""The tables of a study file that say how the sites' changes travel, and how the server puts them together."""

from __future__ import annotations

from typing import Literal

from oncofed.common.section import Section
from pydantic import Field, model_validator

ALL_AT_ONCE = ("median", "trimmed_mean", "krum")
"""Robust rules that need the changes of all sites at once: the server's memory is sites x model."""

LEAST_SITES = 3
"""Sites without which those rules have no majority to go by."""


class Transport(Section):
    """What a round of training costs in bytes: how changes and weights are written. Sums of other phases travel as they are."""

    upload: Literal["float32", "bfloat16", "int8"] = Field(
        "float32",
        description="of a site's change, rounded stochastically; what is dropped stays at the site and is added to its next change",
    )
    download: Literal["float32", "bfloat16", "int8"] = Field(
        "float32",
        description="of the weights that a question is about: but for float32 a site keeps them, and gets the step from those it holds",
    )
    only_evidence: bool = Field(
        True, description="blocks that nobody at a site stands behind, whose change counts for nothing, are not sent"
    )


class Aggregation(Section):
    """The server's rule: theta_b += eta * sum_i n_ib delta_ib / (sum_i n_ib + tau), block by block."""

    rule: Literal["evidence", "fedavg"] = Field("evidence", description="fedavg: all blocks by a site's patients")
    optimizer: Literal["sgd", "momentum", "adam", "yogi"] = Field("sgd", description="of the server, by block")
    learning_rate: float = Field(1.0, gt=0, description="eta; adam and yogi want about 0.01")
    momentum: float = Field(0.9, ge=0, lt=1, description="of momentum, adam (beta 1) and yogi (beta 1)")
    second_momentum: float = Field(0.99, ge=0, lt=1, description="beta 2 of adam and yogi")
    adaptivity: float = Field(1e-3, gt=0, description="tau of FedAdam and FedYogi (Reddi et al. 2021)")
    pull: float = Field(
        0.0, ge=0, lt=1, description="share of the way back to the weights that training began with, after every round"
    )
    average_last: int = Field(0, ge=0, description="the model is the mean of so many last rounds; 0: the last one")
    tau: float = Field(0.0, ge=0, description="prior evidence that slows blocks with few patients")
    min_sites: int = Field(2, ge=1, description="a round with fewer good replies stops the study")
    robust: Literal["none", "norm", "median", "trimmed_mean", "krum"] = Field(
        "none",
        description="against bad members, block by block: norm: a site's change is cut to a bound; median, trimmed_mean: of each number; krum: the "
        "one change nearest to the others. All need to see single answers: not with secure sums",
    )
    norm_bound: float = Field(
        0.0,
        ge=0,
        description="of robust = norm: longest change of a block; 0: twice the middle one of the round before",
    )
    trim: float = Field(
        0.1,
        ge=0,
        lt=0.5,
        description="share of the sites who may be bad: so many, rounded up, are trimmed at either end, or are what krum reckons with",
    )

    @model_validator(mode="after")
    def _enough(self) -> Aggregation:
        if self.robust in ALL_AT_ONCE and self.min_sites < LEAST_SITES:
            raise ValueError(
                f"aggregation.robust = {self.robust!r} cannot tell which of two sites is the odd one; set aggregation.min_sites to "
                f"{LEAST_SITES} or more, it is {self.min_sites}"
            )
        return self
