"""What this hospital allows, whatever the study asks. The file belongs to the hospital: no message can change it."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, Literal

from oncofed.client.hours import Hours, check
from oncofed.common.errors import Refusal
from oncofed.common.signing import is_public
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

FILE = "policy.toml"
ANY = "*"
"""In a list: any."""
PINNED = "pinned"
"""Among coordinators: whoever's key the site pinned when it enrolled, and the key that this one hands over to."""

UNBOUND = float("inf")
Model = Literal["gene_moe", "path_gptomic", "t_gem"]
Task = Literal["survival", "classification"]
Kind = Literal["cox", "km", "logrank"]
Modality = Literal["rna", "pathology", "alterations"]


class Policy(BaseModel):
    """The content of `policy.toml` in the site's folder; without the file, these defaults hold.

    A simulated site without the file is `OPEN`: its researcher sees every row anyway. Keys stand here in the order of the guide.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    # -- who may ask, and what ------------------------------------------------------------------------------------------
    allow: tuple[str, ...] = Field(
        ("query.hello", "query.statistics", "train", "evaluate", "query.explain", "query.analyse"),
        description="kinds of message that are answered",
    )
    coordinators: tuple[str, ...] = Field(
        (),
        description="public keys (hex) that studies and analyses must be signed with, one of them; 'pinned' stands for the coordinator of the "
        "enrolment; none: they need no signature",
    )
    studies: tuple[str, ...] = Field((ANY,), description="names of studies and analyses that are answered; '*': any")
    approved_studies: bool = Field(
        False,
        description="answer only studies and analyses whose very text a person approved (oncofed site approve --study)",
    )
    tasks: tuple[Task, ...] = Field(("survival", "classification"), description="what studies may learn")
    models: tuple[Model, ...] = Field(
        ("gene_moe", "path_gptomic", "t_gem"), description="models that studies may train"
    )
    analyses: tuple[Kind, ...] = Field(("cox", "km", "logrank"), description="kinds of classical analysis")
    modalities: tuple[Modality, ...] = Field(
        ("rna", "pathology", "alterations"), description="kinds of data that studies may see"
    )
    columns: tuple[str, ...] = Field(
        (ANY,),
        description="clinical columns beside cancer type and outcome that studies and analyses may use, as covariates, labels, groups or "
        "filters; '*': any",
    )
    labels: tuple[str, ...] = Field(
        ("cancer_type",),
        description="clinical columns whose values a study may learn, and hear, as classes, or an analysis as groups; of another column than "
        "the cancer type only values of min_patients patients are told, or those that the study names",
    )
    hours: tuple[str, ...] = Field(
        (), description="when requests are answered, such as 'Mon-Fri 18:00-06:00', 'Sat,Sun 00:00-24:00'; none: always"
    )
    time_zone: str = Field("UTC", description="of hours, such as 'Europe/Berlin'")

    # -- which code runs ------------------------------------------------------------------------------------------------
    versions: tuple[str, ...] = Field((ANY,), description="versions of oncofed that may answer; '*': any")
    code: tuple[str, ...] = Field(
        (), description="hashes of the installed oncofed that may answer (oncofed site code); none: any"
    )
    approved_code: bool = Field(
        False,
        description="answer only with an oncofed and a Flower bundle whose hashes a person approved (oncofed site approve)",
    )

    # -- how many patients ----------------------------------------------------------------------------------------------
    min_patients: int = Field(
        10,
        ge=1,
        description="no training or statistics sum over fewer patients leaves; of a round count the patients seen in its steps; a modality that "
        "fewer training patients have is left out of the hospital's training",
    )
    min_cell: int = Field(
        11,
        ge=1,
        description="no group of fewer patients shows in an evaluation or an analysis: such patients are left out, with as many others that "
        "those left out are never few; intervals of time are taken together until they hold as many; two tables about patients who differ by "
        "fewer are not both answered; 1: no rule",
    )
    rounding: int = Field(1, ge=1, description="counts in tables leave as multiples of this; 1: as they are")
    exact_times: bool = Field(
        False,
        description="exact event times may leave, for analyses that ask for them; with them and the sums at each, single patients can be told "
        "apart",
    )
    max_newton_steps: int = Field(
        12,
        ge=0,
        description="steps of Cox regressions about one patient, over all analyses (about two of them); a run of intervals holds more patients "
        "than could be solved for of what they tell; released/each/ in the working folder has the counts, and who removes it begins anew",
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

    # -- privacy --------------------------------------------------------------------------------------------------------
    require_privacy: bool = Field(
        False, description="answer studies with privacy.unit = 'patient' and analyses with an epsilon alone"
    )
    max_epsilon: float = Field(
        UNBOUND,
        gt=0,
        description="most that one study or analysis with noise may cost a patient; inf: no bound of its own",
    )
    max_delta: float = Field(1.0, gt=0, le=1, description="largest delta of such a study")
    epsilon_budget: float = Field(
        8.0,
        ge=0,
        description="what everything with noise that leaves may cost a patient together: training, statistics, evaluations and analyses; the "
        "site's ledger.jsonl says what is spent, and oncofed site budget shows it",
    )
    delta_budget: float = Field(
        1e-5,
        gt=0,
        lt=1,
        description="the delta at which `epsilon_budget` holds; far below one over the site's patients",
    )
    shared_noise: bool = Field(
        False,
        description="answer studies with privacy.noise = 'shared' as well: what leaves here has a part of the noise, and the promise rests on "
        "the other hospitals' parts",
    )
    require_secure_sum: bool = Field(
        False,
        description="answer studies with privacy.secure_sum = true, and analyses with secure_sum = true, alone: the coordinator then never sees "
        "this hospital's own sums",
    )
    min_members: int = Field(3, ge=3, description="hospitals in a total of a secure sum that this one is part of")

    # -- how much -------------------------------------------------------------------------------------------------------
    max_rounds: int = Field(1000, ge=1, description="longest study that is answered")
    max_folds: int = Field(10, ge=2, description="finer folds single out patients: two statistics differ by one fold")
    max_local_steps: int = Field(1000, ge=1, description="longest round")
    max_incoming_mb: float = Field(4096.0, gt=0, description="largest message that is read, in millions of bytes")
    max_outgoing_mb: float = Field(UNBOUND, gt=0, description="largest answer that leaves; inf: no bound")
    max_study_mb: float = Field(
        UNBOUND, gt=0, description="all that leaves for one study or analysis, by the release log; inf: no bound"
    )

    min_free_mb: float = Field(
        1000.0,
        ge=0,
        description="no message is answered while less is free on the disk of the working folder, in millions of bytes: messages leave files there",
    )

    @field_validator("coordinators", "code")
    @classmethod
    def _hex(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        values = tuple(value.strip() if value.strip() == PINNED else value.strip().lower() for value in values)
        wrong = [value for value in values if value != PINNED and not is_public(value)]
        if wrong:
            raise ValueError(f"{wrong[0][:20]!r} is no key or hash of 64 hex digits")
        return values

    @model_validator(mode="after")
    def _open(self) -> Policy:
        check(self.hours, self.time_zone)
        return self

    def least(self, numbers: int = 1) -> int:
        """Patients that a cell of a table needs which holds `numbers` sums of one quantity: so many could be solved for."""
        return 1 if self.min_cell == 1 else max(self.min_cell, numbers + 1)

    @property
    def opening(self) -> Hours:
        """When requests are answered."""
        return Hours(self.hours, self.time_zone)

    @classmethod
    def read(cls, folder: Path, *, simulated: bool = False) -> Policy:
        """Raises `Refusal` where the file is wrong: a policy that cannot be read lets nothing out."""
        if not (folder / FILE).exists():
            return OPEN if simulated else cls()
        try:
            return cls.parse(folder)
        except (ValueError, OSError) as error:
            cause = error.__cause__ or error
            raise Refusal(
                f"the site's policy.toml cannot be used ({type(cause).__name__}); the site's engineer must correct it"
            ) from None

    @classmethod
    def parse(cls, folder: Path) -> Policy:
        """The file's content; raises `ValueError` with every problem in it, for the hospital's own eyes."""
        file = folder / FILE
        try:
            return cls.model_validate(tomllib.loads(file.read_text()))
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"{file}: not valid TOML: {error}") from error
        except ValidationError as error:
            raise ValueError(f"{file}:\n" + "\n".join(map(_explain, error.errors()))) from error


def _explain(error: Any) -> str:
    key = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        import difflib

        near = difflib.get_close_matches(key, Policy.model_fields, 1, 0.0)
        return f"  {key}: unknown key; did you mean {near[0]}?"
    about = Policy.model_fields[str(error["loc"][0])].description if error["loc"] else ""
    told = error["msg"].removeprefix("Value error, ")
    return (
        f"  {key or 'policy'} = {error['input']!r}: {told}" + (f" ({about})" if about else "") if key else f"  {told}"
    )


DEFAULT = Policy()
OPEN = Policy(min_cell=1, exact_times=True, own_model=True, shared_noise=True)
"""Of a simulated site that says nothing else; training and statistics keep the bound of a real one."""
