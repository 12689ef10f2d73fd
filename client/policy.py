"""What this hospital allows, whatever the study asks. The file belongs to the hospital: no message can change it."""

from __future__ import annotations

import tomllib
from pathlib import Path

from oncofed.common.errors import Refusal
from pydantic import BaseModel, ConfigDict, Field, ValidationError


class Policy(BaseModel):
    """The content of `policy.toml` in the site's folder; without the file, these defaults hold.

    A simulated site without the file is `OPEN`: its researcher sees every row anyway.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    min_patients: int = Field(10, ge=1, description="no sum over fewer patients leaves")
    min_cell: int = Field(
        11, ge=1, description="no group of fewer patients shows in an evaluation or an analysis; 1: any may (no rule)"
    )
    rounding: int = Field(1, ge=1, description="counts in tables leave as multiples of this; 1: as they are")
    exact_times: bool = Field(False, description="exact event times may leave, for analyses that ask for them")
    max_newton_steps: int = Field(
        12,
        ge=0,
        description="steps of Cox regressions about one patient, over all analyses; each tells sums of covariates, so a run of intervals "
        "holds more patients than could be solved for of all of them",
    )
    max_tables: int = Field(
        12,
        ge=1,
        description="groups, each with a table of its own, that one patient may be in, over all analyses and evaluations",
    )
    min_grid_months: float = Field(1.0, ge=0, description="no interval of an analysis is narrower")
    own_model: bool = Field(
        False, description="a model trained here alone may leave and be scored at other sites (analysis.cross_site)"
    )
    epsilon_budget: float = Field(
        8.0,
        ge=0,
        description="what everything with noise that leaves may cost a patient together: training, statistics, evaluations and analyses",
    )
    delta_budget: float = Field(
        1e-5,
        gt=0,
        lt=1,
        description="the delta at which `epsilon_budget` holds; far below one over the site's patients",
    )
    require_privacy: bool = Field(
        False, description="answer studies with privacy.unit = 'patient' and analyses with an epsilon alone"
    )
    shared_noise: bool = Field(
        False,
        description="answer studies with privacy.noise = 'shared' as well: what leaves here has a part of the noise, and the promise rests on "
        "the other hospitals' parts",
    )
    require_secure_sum: bool = Field(
        False,
        description="answer studies with privacy.secure_sum = true, and analyses with secure_sum = true, alone",
    )
    min_members: int = Field(3, ge=3, description="hospitals in a total of a secure sum that this one is part of")
    max_folds: int = Field(10, ge=2, description="finer folds single out patients: two statistics differ by one fold")
    max_local_steps: int = Field(1000, ge=1, description="longest round")
    max_rounds: int = Field(1000, ge=1, description="longest study that is answered")
    labels: tuple[str, ...] = Field(
        ("cancer_type",), description="clinical columns whose values a study may learn, and hear, as classes"
    )
    allow: tuple[str, ...] = Field(
        ("query.hello", "query.statistics", "train", "evaluate", "query.explain", "query.analyse"),
        description="kinds of message that are answered",
    )

    def least(self, numbers: int = 1) -> int:
        """Patients that a cell of a table needs which holds `numbers` sums of one quantity: so many could be solved for."""
        return 1 if self.min_cell == 1 else max(self.min_cell, numbers + 1)

    @classmethod
    def read(cls, folder: Path, *, simulated: bool = False) -> Policy:
        """Raises `Refusal` where the file is wrong: a policy that cannot be read lets nothing out."""
        file = folder / "policy.toml"
        if not file.exists():
            return OPEN if simulated else cls()
        try:
            return cls.model_validate(tomllib.loads(file.read_text()))
        except (tomllib.TOMLDecodeError, ValidationError, OSError) as error:
            raise Refusal(
                f"the site's policy.toml cannot be used ({type(error).__name__}); the site's engineer must correct it"
            ) from None


DEFAULT = Policy()
OPEN = Policy(min_cell=1, exact_times=True, own_model=True, shared_noise=True)
"""Of a simulated site that says nothing else; training and statistics keep the bound of a real one."""
