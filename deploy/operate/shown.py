"""The parts of the web page that change while a run goes on: rendered once for the page and for its script."""

from __future__ import annotations

from datetime import UTC, datetime

from jinja2 import Environment
from markupsafe import Markup
from oncofed.deploy.operate.curve import Line, curve
from oncofed.deploy.operate.state import RunState
from oncofed.deploy.operate.view import lasting, sized

PARTS = ("headline", "summary", "curves", "sites", "rounds", "left_out")
ROUNDS = 20
"""Rounds that the table shows."""


def shown(env: Environment, state: RunState, now: float, *, report: bool, folder: str) -> dict[str, str]:
    """HTML by part, escaped: names and reasons are words of others."""
    running = state.status == "running"
    about = {
        "state": state,
        "done": _done_here(state),
        "lasted": _lasted(state, now),
        "quiet": lasting(now - state.updated) if running and state.updated is not None else "",
        "left": lasting(state.seconds_left) if state.seconds_left is not None else "",
        "to_sites": sized(state.bytes_to_sites),
        "from_sites": sized(state.bytes_from_sites),
        "curves": [(name, picture) for name, picture in _curves(state) if picture],
        "latest": state.rounds[: -ROUNDS - 1 : -1],
        "reasons": state.left_out[::-1],
        "report": report,
        "folder": folder,
        "ago": lambda at: f"{lasting(now - at)} ago",
        "sized": sized,
        "lasting": lasting,
        "clock": _clock,
        "stamp": lambda at: datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
    }
    return {part: Markup(env.get_template(f"parts/{part}.html").render(about)) for part in PARTS}


def _done_here(state: RunState) -> int:
    """Rounds that are done of the fold and phase at work."""
    return max((r.round for r in state.rounds if (r.fold, r.phase) == (state.fold, state.phase)), default=0)


def _lasted(state: RunState, now: float) -> str:
    if state.started is None or state.updated is None:
        return ""
    return lasting((now if state.status == "running" else state.updated) - state.started)


def _curves(state: RunState) -> list[tuple[str, Markup]]:
    """Loss and validation of the phase of the last round, a line a fold."""
    if not state.rounds:
        return []
    last = state.rounds[-1]
    losses: dict[int, Line] = {}
    validations: dict[int, Line] = {}
    for r in sorted((r for r in state.rounds if r.phase == last.phase), key=lambda r: (r.fold, r.round)):
        if r.loss is not None:
            losses[r.fold] = [*losses.get(r.fold, ()), (r.round, r.loss)]
        if r.validation is not None:
            validations[r.fold] = [*validations.get(r.fold, ()), (r.round, r.validation)]
    return [
        (f"Loss of {last.phase}", curve("Loss", losses, last.fold)),
        (f"Validation in {last.phase}", curve("Validation", validations, last.fold)),
    ]


def _clock(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%d %b %H:%M:%S")
