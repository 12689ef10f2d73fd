"""How the report's pictures look, and how they become text."""

from __future__ import annotations

import hashlib
import io
import re

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from oncofed.common.modalities import MODALITIES

BLUE, RED = "#0b6e99", "#b03a5b"

COLOURS = {
    "federated": BLUE,
    "fedavg": "#d98a29",
    "pooled": "#3f3f46",
    "local": RED,
    "ridge": "#6b8e23",
    "ridge-own": "#2e8b6f",
    "ridge-powers": "#a3b18a",
    "cox": "#c9a227",
    "logistic": "#7a5195",
    "linear": "#b07aa1",
    "rna": "#5aa9e6",
    "pathology": "#d46aa6",
    "alterations": "#8a6fb0",
    "late": "#9a9aa3",
    "concat": "#7f5539",
    "modulated": BLUE,
    "unmodulated": "#e07a5f",
}
"""One colour a method or modality, the same in every picture; a method that sees one modality has its colour."""

MIXTURES = {"expert": "first-layer experts", "attention": "attention experts", "shared": "shared"}
"""Names of the mixtures for people."""

WHOLE = ("shared", *MODALITIES)
"""What can be taken out beside routed experts: all patients pass it, or all who have the modality."""

STYLE = matplotlib.rc_context(
    {
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.25,
        "svg.fonttype": "none",
        "svg.hashsalt": "oncofed",
    }
)
"""Our look as a decorator: it holds while a picture is drawn and leaves the user's matplotlib alone."""


def svg(figure: Figure, tight: bool = True) -> str:
    """A figure as an SVG element, the same for the same numbers."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight" if tight else None, metadata={"Date": None})
    return _stable_ids(re.sub(r"^.*?(?=<svg)|<metadata>.*?</metadata>", "", buffer.getvalue(), flags=re.DOTALL))


def p_text(p: float | None, name: bool = False) -> str:
    """A p value for people, never 0.000; with `name`, as in `p = 0.031`."""
    if p is None or not np.isfinite(p):
        return "p unknown" if name else "–"
    if p < 1e-4:
        return "p < 0.0001" if name else "< 0.0001"
    said = f"{p:.4f}" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"
    return f"p = {said}" if name else said


def label(text: str, longest: int = 200) -> str:
    """A name as matplotlib writes it: a dollar is a dollar, and what is too long lacks its middle, as names differ at their ends."""
    half = longest // 2
    short = text if len(text) <= longest else f"{text[: longest - half - 1]}…{text[-half:]}"
    return short.replace("$", r"\$")


def _stable_ids(text: str) -> str:
    """Identifiers counted within a picture, after a digest of it: matplotlib makes some of them from memory addresses."""
    pattern = r"\b[a-zA-Z]+[0-9a-f]{10}\b"
    own = dict.fromkeys(re.findall(f'id="({pattern})"', text))
    known = "|".join(own)
    if not known:
        return text
    digest = hashlib.sha256(re.sub(known, "", text).encode()).hexdigest()[:8]
    names = {old: f"{old[:-10]}{digest}-{n}" for n, old in enumerate(own)}
    return re.sub(known, lambda match: names[match.group()], text)
