"""What a report says of bytes, and of changes that a robust rule cut or left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any


def shares(folds: Sequence[Mapping[str, Any]]) -> dict[str, float] | None:
    """Bytes of all rounds of training over those of float32 models in full: `up` from sites, `down` to them, `both`.

    None where nothing was saved, and in results of before bytes were counted so.
    """
    moved: Counter[str] = sum((Counter(f.get("training_bytes", {})) for f in folds), Counter())
    up, down = moved["plain_from_sites"], moved["plain_to_sites"]
    if not up or not down or (moved["from_sites"] == up and moved["to_sites"] == down):
        return None
    return {
        "up": moved["from_sites"] / up,
        "down": moved["to_sites"] / down,
        "both": (moved["from_sites"] + moved["to_sites"]) / (up + down),
    }


def travelled(folds: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Bytes to and from sites, fold by fold: of all questions, of rounds of training, and of each of these rounds."""
    return [
        {
            "fold": f["fold"],
            "to": f["bytes_to_sites"],
            "from": f["bytes_from_sites"],
            "training": Counter(f["training_bytes"]),  # empty in results of a run that was resumed when it was over
            "rounds": f.get("bytes_by_round", []),
        }
        for f in folds
        if "training_bytes" in f
    ]


def robust(folds: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Who was cut or left out in which block of which fold, the most rounds first, and whom Krum chose; None without a robust rule."""
    found = [(f["fold"], f["robust"]) for f in folds if f.get("robust", {}).get("rule", "none") != "none"]
    if not found:
        return None
    rows = [row | {"fold": fold} for fold, one in found for row in one["rows"]]
    rows.sort(key=lambda row: (-row["rounds"], row["site"], row["fold"], row["block"]))
    chosen: Counter[str] = sum((Counter(one["chosen"]) for _, one in found), Counter())
    return {"rows": rows, "chosen": dict(sorted(chosen.items()))}
