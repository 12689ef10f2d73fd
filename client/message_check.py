"""The form of an incoming message: sizes and types, before anything in it is believed or any data are opened."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import RecordDict
from oncofed.common import wire
from oncofed.common.errors import Refusal
from oncofed.common.study import TRAIN

MB = 1e6
LONGEST_LIST = 500_000
"""Names in a list; a panel with all other names of its genes has some ten thousand lines."""
LONGEST_TEXT = 20_000_000
"""Characters of a text: that of a study has some thousands, the names of all alterations some hundred thousand."""
MOST_TIMES = 1000
"""Starts of intervals of time: a site makes as many columns of them as they are, for every cancer type."""
SHOWN = 40


def check_size(content: RecordDict, site: str, most_mb: float) -> int:
    """The bytes of a message; raises `Refusal` above the policy's bound."""
    size = sum(wire.sizes(content))
    size += sum(_size(value) for record in content.config_records.values() for value in record.values())
    size += sum(_size(value) for record in content.metric_records.values() for value in record.values())
    if size > most_mb * MB:
        raise Refusal(
            f"site {site}: the message has {size / MB:.1f} MB, its policy reads {most_mb:g} (max_incoming_mb in policy.toml); send less, or "
            "ask its engineer"
        )
    return size


def check_question(kind: str, ask: wire.Config, site: str) -> None:
    """Refuse a question of no kind, or one that lacks a key, has one of another type, or a number that is none."""
    if kind not in NEEDED:
        raise Refusal(f"site {site} does not know '{kind[:SHOWN]}'; ask with the same oncofed version")

    def refuse(key: str, wanted: str) -> None:
        seen = f"{ask[key]!r}"[:SHOWN] if key in ask else "nothing"
        raise Refusal(
            f"site {site}: the message's {key} is {seen}, '{kind}' wants {wanted}; ask with the same oncofed version"
        )

    for key, value in ask.items():
        if isinstance(value, bytes) or (isinstance(value, list) and any(isinstance(v, bytes) for v in value)):
            refuse(key, "no bytes")
        if isinstance(value, list) and len(value) > LONGEST_LIST:
            raise Refusal(f"site {site}: the message's {key} has {len(value)} entries, more than {LONGEST_LIST}")
        if any(len(v) > LONGEST_TEXT for v in (value if isinstance(value, list) else [value]) if isinstance(v, str)):
            raise Refusal(f"site {site}: the message's {key} has a text of more than {LONGEST_TEXT} characters")
        if any(isinstance(v, float) and not math.isfinite(v) for v in (value if isinstance(value, list) else [value])):
            refuse(key, "finite numbers")
    for key in ("grid", "edges"):
        times = ask.get(key)
        if isinstance(times, list) and len(times) > MOST_TIMES:
            raise Refusal(f"site {site}: the message's {key} has {len(times)} times, more than {MOST_TIMES}")
    for key in NEEDED.get(kind, ()):
        if key not in ask:
            refuse(key, TYPES[key][1])
    for key, (fits, wanted) in TYPES.items():
        if key in ask and not fits(ask[key]):
            refuse(key, wanted)


def check_arrays(arrays: Mapping[str, np.ndarray], site: str) -> None:
    """Refuse arrays with numbers that are none: they would cost patients' privacy and give nothing."""
    for name, value in arrays.items():
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            raise Refusal(f"site {site}: the message's array '{name[:SHOWN]}' has numbers that are not finite")


def check_place(kind: str, phase: str, round_: int, site: str) -> None:
    """Refuse a round or a phase where a question has none: the same sum asked in many places could be had of many sets of hospitals."""
    if kind != wire.TRAIN and (phase != TRAIN or (kind != wire.EVALUATE and round_ != 0)):
        raise Refusal(
            f"site {site}: '{kind}' of phase {phase!r}, round {round_}; it is asked once a fold, of phase '{TRAIN}' and round 0"
        )


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) for v in value)


def _numbers(value: Any) -> bool:
    return isinstance(value, list) and all(map(_number, value))


_WHOLE, _TEXT, _FLAG = (_whole, "a whole number"), (_text, "text"), (_flag, "true or false")
_NUMBER, _TEXTS, _NUMBERS = (_number, "a number"), (_texts, "a list of text"), (_numbers, "a list of numbers")

TYPES: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("fold", "round", "bits"), _WHOLE),
    **dict.fromkeys(("study_json", "plan_json", "signature", "phase", "panel_hash", "step", "sum"), _TEXT),
    **dict.fromkeys(("powers", "validation", "final", "table"), _FLAG),
    "noise_scale": _NUMBER,
    **dict.fromkeys(("cancers", "genes", "levels"), _TEXTS),
    **dict.fromkeys(("grid", "edges"), _NUMBERS),
}
"""Keys of questions whose type is fixed; others are read where they are used."""

_FOLD = ("study_json", "fold", "panel_hash", "cancers")
NEEDED: dict[str, tuple[str, ...]] = {
    wire.HELLO: ("study_json",),
    wire.STATISTICS: _FOLD,
    wire.TRAIN: (*_FOLD, "round", "grid"),
    wire.EVALUATE: (*_FOLD, "grid"),
    wire.EXPLAIN: (*_FOLD, "grid"),
    wire.ANALYSE: ("plan_json", "step"),
    **dict.fromkeys((wire.SHARES, wire.MASKED, wire.UNMASK), ("sum",)),
}
"""Keys without which a question is none."""


def _size(value: Any) -> int:
    if isinstance(value, str | bytes):
        return len(value)
    return sum(map(_size, value)) if isinstance(value, list | tuple) else 8


def check_room(work: Path, site: str, least_mb: float) -> None:
    """Refuse any message where little is free on the disk of the working folder: messages leave files there, a coordinator's many messages many."""
    there = next(folder for folder in (work.absolute(), *work.absolute().parents) if folder.exists())
    free = shutil.disk_usage(there).free / MB
    if free < least_mb:
        raise Refusal(
            f"site {site}: {free:.0f} MB are free on the disk of its working folder, its policy keeps {least_mb:g} (min_free_mb in policy.toml); "
            "its engineer must make room"
        )
