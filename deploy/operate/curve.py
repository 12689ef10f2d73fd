"""The curve of a number over the rounds of a phase, one line a fold, as an SVG element without styles: its page has them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup, escape

WIDTH, HEIGHT = 380, 190
LEFT, RIGHT, TOP, BOTTOM = 58, 8, 10, 30
POINTS = 400
"""Points of a line that are drawn: a longer one is thinned, its last point stays."""

Line = Sequence[tuple[int, float]]
"""Round and value, by round."""


def curve(name: str, lines: dict[int, Line], current: int | None) -> Markup:
    """An SVG element, or nothing where there is no point; the line of the `current` fold stands out."""
    drawn = {fold: _thinned(line) for fold, line in lines.items() if line}
    if not drawn:
        return Markup("")
    rounds = [r for line in drawn.values() for r, _ in line]
    first, last = min(rounds), max(rounds)
    ticks = _ticks([v for line in drawn.values() for _, v in line])
    low, high = ticks[0], ticks[-1]

    def x(round_: int) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * ((round_ - first) / (last - first) if last > first else 0.5)

    def y(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - (value - low) / (high - low))

    parts = [
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(t):.1f}" y2="{y(t):.1f}"/>'
        f'<text class="tick" x="{LEFT - 6}" y="{y(t) + 4:.1f}" text-anchor="end">{t:.6g}</text>'
        for t in ticks
    ]
    ends = [(first, "start"), (last, "end")] if last > first else [(first, "middle")]
    parts += [
        f'<text class="tick" x="{x(r):.1f}" y="{HEIGHT - 10}" text-anchor="{anchor}">round {r}</text>'
        for r, anchor in ends
    ]
    for fold in sorted(drawn, key=lambda f: (f == current, f)):
        kind = "line now" if fold == current else "line"
        points = " ".join(f"{x(r):.1f},{y(v):.1f}" for r, v in drawn[fold])
        parts.append(f'<polyline class="{kind}" points="{points}"><title>fold {fold}</title></polyline>')
        r, v = drawn[fold][-1]
        parts.append(f'<circle class="{kind}" cx="{x(r):.1f}" cy="{y(v):.1f}" r="3.5"/>')
    label = escape(_said(name, drawn, current))
    return Markup(f'<svg role="img" aria-label="{label}" viewBox="0 0 {WIDTH} {HEIGHT}">{"".join(parts)}</svg>')


def _said(name: str, lines: dict[int, Line], current: int | None) -> str:
    """The picture in words, for those who do not see it."""
    fold = current if current in lines else max(lines)
    (first, at_first), (last, at_last) = lines[fold][0], lines[fold][-1]
    others = f"; {len(lines) - 1} other folds" if len(lines) > 1 else ""
    return f"{name} of fold {fold}: {at_first:.4g} at round {first}, {at_last:.4g} at round {last}{others}"


def _thinned(line: Line) -> Line:
    step = -(-len(line) // POINTS)
    return [*line[:-1:step], line[-1]]


def _ticks(values: Sequence[float]) -> list[float]:
    """Three to seven round numbers that hold the values between them."""
    low, high = min(values), max(values)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        pad = max(abs(high) * 0.1, 1e-6)
        low, high = low - pad, high + pad
    rough = (high - low) / 4
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= rough * 0.999)
    return [step * k for k in range(math.floor(low / step), math.ceil(high / step) + 1)]
