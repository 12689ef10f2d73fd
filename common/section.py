"""What all tables of a study file share: strictness, and lists as text."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A table of the study file: unknown keys are refused, values cannot change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


def split_text(data: Any, *keys: str) -> Any:
    """Comma-separated text, or one number, as a list: so Flower's flat run config and the command line write lists.

    Text that holds a comma itself, as names of hospitals do, stands in double quotes.
    """
    if not isinstance(data, dict):
        return data
    lists: dict[str, Any] = {}
    for key in keys:
        value = data.get(key)
        if isinstance(value, str):
            parts = next(csv.reader([value], skipinitialspace=True), [])
            lists[key] = [part.strip() for part in parts if part.strip()]
        elif isinstance(value, int | float) and not isinstance(value, bool):
            lists[key] = [value]
    return data | lists


def join_text(values: Iterable[Any]) -> str:
    """The inverse of `split_text`."""
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow(values)
    return line.getvalue()
