"""What this hospital allows, whatever the study asks. The file belongs to the hospital: no message can change it."""

from __future__ import annotations

import tomllib
from pathlib import Path

from oncofed.common.errors import Refusal
from pydantic import BaseModel, ConfigDict, Field, ValidationError


class Policy(BaseModel):
    """The content of `policy.toml` in the site's folder; without the file, these defaults hold."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    min_patients: int = Field(10, ge=1, description="no sum over fewer patients leaves")
    min_test_patients: int = Field(1, ge=1, description="no evaluation over fewer patients leaves")
    max_folds: int = Field(10, ge=2, description="finer folds single out patients: two statistics differ by one fold")
    max_local_steps: int = Field(1000, ge=1, description="longest round")
    max_rounds: int = Field(1000, ge=1, description="longest study that is answered")
    labels: tuple[str, ...] = Field(
        ("cancer_type",), description="clinical columns whose values a study may learn, and hear, as classes"
    )
    allow: tuple[str, ...] = Field(
        ("query.hello", "query.statistics", "train", "evaluate", "query.explain"),
        description="kinds of message that are answered",
    )

    @classmethod
    def read(cls, folder: Path) -> Policy:
        """Raises `Refusal` where the file is wrong: a policy that cannot be read lets nothing out."""
        file = folder / "policy.toml"
        if not file.exists():
            return cls()
        try:
            return cls.model_validate(tomllib.loads(file.read_text()))
        except (tomllib.TOMLDecodeError, ValidationError, OSError) as error:
            raise Refusal(
                f"the site's policy.toml cannot be used ({type(error).__name__}); the site's engineer must correct it"
            ) from None
