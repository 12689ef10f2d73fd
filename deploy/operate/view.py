"""A run in a terminal: how far it is, who takes part, the loss, who was left out and why; drawn once or as it goes on."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import datetime

from oncofed.deploy.operate.state import RunState
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

BARS = "▁▂▃▄▅▆▇█"
WIDTH = 48
"""Rounds that the line of losses shows."""
REASONS = 5
"""Reasons that are shown."""
EVERY_S = 1.0
COLOURS = {"waiting": "yellow", "running": "cyan", "finished": "green", "failed": "red"}


def follow(state: Callable[[], RunState], console: Console) -> RunState:
    """Draw the state again and again until the run has ended; returns the last one."""
    with Live(console=console, auto_refresh=False) as live:
        while True:
            now = state()
            live.update(drawn(now, time.time()), refresh=True)
            if now.status in ("finished", "failed"):
                return now
            time.sleep(EVERY_S)


def drawn(state: RunState, now: float) -> RenderableType:
    """The state at unix time `now`."""
    parts: list[RenderableType] = [_head(state, now)]
    if state.rounds_planned:
        parts.append(_progress(state))
    losses = [r.loss for r in state.rounds if r.loss is not None and (r.fold, r.phase) == _last(state)]
    if losses:
        fold, phase = _last(state)
        parts.append(Text(f"loss, fold {fold} {phase}  {sparkline(losses[-WIDTH:])}  {losses[-1]:.4f}"))
    if state.sites:
        parts.append(_sites(state, now))
    if state.left_out:
        parts.append(Text("left out lately", style="bold"))
        parts += [Text(f"  {line}") for line in left_out(state)[-REASONS:]]
    return Group(*parts)


def left_out(state: RunState) -> list[str]:
    """A line for each time that a site was left out: when, of what, why."""
    return [
        f"{_clock(at)}  {site}  {kind}{f' of round {round_}' if round_ else ''}: {reason}"
        for at, site, kind, round_, reason in state.left_out
    ]


def sparkline(values: list[float]) -> str:
    """Numbers as bars from the lowest to the highest."""
    low, high = min(values), max(values)
    step = (high - low) / (len(BARS) - 1) or 1.0
    return "".join(BARS[round((v - low) / step)] for v in values)


def lasting(seconds: float) -> str:
    """A time span in its two largest units."""
    whole = int(max(seconds, 0.0))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def sized(count: int) -> str:
    """Bytes with a unit."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def _head(state: RunState, now: float) -> Text:
    name = state.study or "study"
    head = Text.assemble((name, "bold"), "  ", (state.status, COLOURS[state.status]))
    if state.status == "waiting":
        head.append("  the sites are greeted")
    if state.status == "running" and state.fold is not None:
        done = [r.round for r in state.rounds if (r.fold, r.phase) == (state.fold, state.phase)]
        head.append(f"  fold {state.fold}, {state.phase}, {max(done, default=0)} rounds done")
    if state.started is not None and state.updated is not None:
        head.append(f"  for {lasting((now if state.status == 'running' else state.updated) - state.started)}")
    if state.status == "running" and state.updated is not None:
        head.append(f", last event {lasting(now - state.updated)} ago")
    if state.reason:
        head.append(f"\n{state.reason}", style="red")
    return head


def _progress(state: RunState) -> RenderableType:
    row = Table.grid(padding=(0, 2))
    left = f"about {lasting(state.seconds_left)} left" if state.seconds_left is not None else ""
    moved = f"{sized(state.bytes_to_sites)} to sites, {sized(state.bytes_from_sites)} from them"
    bar = ProgressBar(total=state.rounds_planned, completed=state.rounds_done, width=30)
    row.add_row(bar, f"{state.rounds_done} of {state.rounds_planned} rounds", left, moved)
    return row


def _sites(state: RunState, now: float) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("site")
    for column in ("last seen", "last answer", "answers", "bytes", "left out"):
        table.add_column(column, justify="right")
    table.add_column("last reason", overflow="ellipsis", no_wrap=True)
    for s in state.sites:
        seen = "never" if s.last_seen is None else f"{lasting(now - s.last_seen)} ago"
        took = "" if s.seconds is None else f"{s.seconds:.1f} s"
        table.add_row(
            escape(s.name),
            seen,
            took,
            str(s.answers),
            sized(s.bytes_from),
            Text(str(s.left_out), style="red" if s.left_out else ""),
            escape(s.reason),
        )
    return table


def _last(state: RunState) -> tuple[int, str]:
    return (state.rounds[-1].fold, state.rounds[-1].phase) if state.rounds else (0, "")


def _clock(at: float) -> str:
    return datetime.fromtimestamp(at).astimezone().strftime("%H:%M:%S")
