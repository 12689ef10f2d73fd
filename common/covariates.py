"""Clinical covariates as a study names them: `age` is a number, `sex=female|male` has levels, the first is the reference."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

OUTCOME = ("patient", "cancer_type", "time", "event")
"""Columns that are not covariates: they name the patient or tell the answer."""


@dataclass(frozen=True)
class Covariate:
    """One clinical column; without levels it is a number."""

    column: str
    levels: tuple[str, ...] = ()

    @property
    def inputs(self) -> tuple[str, ...]:
        """The model's inputs: the number itself, or one 0/1 input a level after the first."""
        return tuple(f"{self.column}={level}" for level in self.levels[1:]) if self.levels else (self.column,)

    @classmethod
    def parse(cls, text: str) -> Covariate:
        """Raises `ValueError` on an outcome column, or on levels that are empty, repeated or alone."""
        column, sign, rest = (part.strip() for part in text.partition("="))
        levels = tuple(level.strip() for level in rest.split("|")) if sign else ()
        if not column or column in OUTCOME:
            raise ValueError(
                f"panel.covariates: {text!r} names no covariate; use a clinical column other than {OUTCOME}"
            )
        if sign and (len(levels) < 2 or "" in levels or len({level.lower() for level in levels}) < len(levels)):
            raise ValueError(f"panel.covariates: {text!r} needs two or more different levels, as in 'sex=female|male'")
        return cls(column, levels)


def parse_covariates(texts: Iterable[str]) -> tuple[Covariate, ...]:
    """All covariates of a study; a column may stand there once."""
    out = tuple(Covariate.parse(text) for text in texts)
    columns = [c.column for c in out]
    if len(set(columns)) < len(columns):
        raise ValueError(f"panel.covariates names a column twice: {columns}")
    return out


def input_names(texts: Iterable[str]) -> tuple[str, ...]:
    """Names of the model's covariate inputs, in order."""
    return tuple(name for c in parse_covariates(texts) for name in c.inputs)
