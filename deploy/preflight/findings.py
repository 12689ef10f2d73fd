"""One thing that was looked at before a node starts, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Check:
    """`fail`: the node would not work; `warn`: it would, but somebody should know. Never names a patient."""

    name: str
    level: Literal["ok", "warn", "fail"]
    seen: str
    remedy: str = ""


def ok(name: str, seen: str) -> Check:
    return Check(name, "ok", seen)


def warn(name: str, seen: str, remedy: str) -> Check:
    return Check(name, "warn", seen, remedy)


def fail(name: str, seen: str, remedy: str) -> Check:
    return Check(name, "fail", seen, remedy)
