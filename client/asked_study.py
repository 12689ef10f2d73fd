"""The study that a question is about, and whether the question has a place in it."""

from __future__ import annotations

from oncofed.common import wire
from oncofed.common.errors import Refusal
from oncofed.common.splits import ALL_PATIENTS
from oncofed.common.study import TRAIN, Study

MOST_CANCERS = 500
"""Cancer types or classes of a study: with more, noise alone would tell of its own scale."""


def asked_study(ask: wire.Config, site: str) -> Study:
    """The study in a question whose form is checked; raises `Refusal` where it is not valid here, or has no such fold, phase or round."""
    try:
        study = Study.from_json(str(ask["study_json"]))
    except RecursionError:
        raise Refusal(f"site {site}: the study in the message is not valid here: it is nested too deep") from None
    except (ValueError, KeyError, TypeError) as error:
        raise Refusal(f"site {site}: the study in the message is not valid here: {error}") from None
    fold, round_, phase = ask.get("fold", 0), ask.get("round", 0), ask.get("phase", TRAIN)
    known = (0 <= fold < study.splits.count) or (fold == ALL_PATIENTS and study.splits.refit)  # type: ignore[operator]
    if (
        not known
        or phase not in study.phases
        or not isinstance(round_, int)
        or not 0 <= round_ <= study.steps(str(phase)).rounds
    ):
        raise Refusal(
            f"site {site}: fold {fold!r}, phase {phase!r}, round {round_!r} is not part of the study in the message"
        )
    if len(ask.get("cancers", ())) > MOST_CANCERS:  # type: ignore[arg-type]
        raise Refusal(f"site {site}: {len(ask['cancers'])} cancer types are more than {MOST_CANCERS}")  # type: ignore[arg-type]
    return study
