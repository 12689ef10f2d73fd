"""Curves of the web page."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from oncofed.deploy.operate.curve import HEIGHT, POINTS, WIDTH, curve


def points(svg: str) -> list[list[tuple[float, float]]]:
    root = ElementTree.fromstring(svg)
    return [[tuple(map(float, p.split(","))) for p in e.attrib["points"].split()] for e in root.iter("polyline")]  # type: ignore[misc]


def test_no_points_no_picture() -> None:
    assert curve("Loss", {}, None) == ""
    assert curve("Loss", {0: []}, 0) == ""


def test_the_current_fold_is_drawn_last_and_stands_out() -> None:
    svg = curve("Loss", {0: [(1, 2.0), (2, 1.0)], 1: [(1, 2.0), (2, 1.5)], 2: [(1, 3.0)]}, 0)
    assert re.findall(r'<polyline class="([^"]*)"[^>]*><title>([^<]*)', svg) == [
        ("line", "fold 1"),
        ("line", "fold 2"),
        ("line now", "fold 0"),
    ]


def test_less_loss_is_lower() -> None:
    (line,) = points(curve("Loss", {0: [(1, 2.0), (2, 1.0), (4, 0.5)]}, 0))
    (x1, y1), (x2, y2), (x4, y4) = line
    assert x1 < x2 < x4
    assert y1 < y2 < y4, "the axis of a picture points down"
    assert x4 - x2 == pytest.approx(2 * (x2 - x1), abs=0.2)


def test_a_long_line_is_thinned_and_keeps_its_ends() -> None:
    line = [(r, 1.0 / r) for r in range(1, 5001)]
    (drawn,) = points(curve("Loss", {0: line}, 0))
    assert POINTS / 2 < len(drawn) <= POINTS + 1
    assert "5000" in curve("Loss", {0: line}, 0)


def test_the_name_is_escaped() -> None:
    assert "<b>" not in curve('<b>"', {0: [(1, 1.0)]}, 0)


@given(
    st.lists(st.floats(allow_nan=False, allow_infinity=False, min_value=-1e12, max_value=1e12), min_size=1, max_size=8)
)
def test_any_numbers_stay_within_the_picture(values: list[float]) -> None:
    svg = curve("Loss", {0: list(enumerate(values, 1))}, 0)
    for x, y in points(svg)[0]:
        assert 0 <= x <= WIDTH
        assert 0 <= y <= HEIGHT
    assert 2 <= svg.count('class="grid"') <= 8
