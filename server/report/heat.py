"""The report's heat maps, each a function from numbers to an SVG."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from oncofed.server.analysis import Worth
from oncofed.server.report.look import MIXTURES, STYLE, WHOLE, svg

WRITTEN = 20
"""Tables with more columns than this show colours only: numbers would not be legible. A table of counts has smaller cells then."""

LONGEST = 22
"""Letters of a class's name beside a picture."""


@STYLE
def shares(tables: dict[str, np.ndarray], rows: list[str]) -> str:
    """How each row (a cancer type, a hospital) spreads over experts: one panel a mixture, rows sum to 1; empty ones are blank."""
    parts = {}
    for name, table in tables.items():
        total = table.sum(1, keepdims=True)
        parts[name] = np.divide(table, total, out=np.full(table.shape, np.nan), where=total > 0)
    fair = 1 / min(part.shape[1] for part in parts.values())
    top = min(
        1.0, max(2 * fair, *(float(np.nanmax(part, initial=0.0)) for part in parts.values()))
    )  # an even spread looks pale
    figure, axes = _panels([part.shape[1] for part in parts.values()], len(rows))
    for axis, (name, part) in zip(axes, parts.items(), strict=True):
        image = _heat(axis, part, "Blues", (0.0, top), lambda v: f"{v:.2f}".lstrip("0") if v >= 0.005 else "")
        _label(axis, name, [str(e) for e in range(part.shape[1])], rows if axis is axes[0] else [])
    figure.colorbar(image, ax=axes, shrink=0.8, label="share of gate mass", aspect=max(12, len(rows)))
    return svg(figure)


@STYLE
def worth(w: Worth, cancers: list[str]) -> str:
    """Change of the held-out loss per patient when an expert or a modality is taken out: red where it is missed, blue where it did harm.

    The colours' range is that of the routed experts; the shared one, and whole modalities, may lie beyond it.
    """
    groups: dict[str, list[int]] = {}
    for i, name in enumerate(w.names):
        groups.setdefault(name.partition("/")[0], []).append(i)
    known = w.loss[np.isfinite(w.loss)]
    routed = np.concatenate([w.loss[i] for g, i in groups.items() if g not in WHOLE] or [known])
    limit = max(float(np.nanmax(np.abs(routed), initial=0.0)), 1e-3)
    figure, axes = _panels([len(i) for i in groups.values()], len(cancers), cell=0.55)
    for axis, (group, rows) in zip(axes, groups.items(), strict=True):
        image = _heat(axis, w.loss[rows].T, "RdBu_r", (-limit, limit), _signed)
        names = ["all"] if len(rows) == 1 else [str(e) for e in range(len(rows))]
        _label(axis, group, names, cancers if axis is axes[0] else [])
    beyond = "both" if known.size and np.abs(known).max() > limit else "neither"
    figure.colorbar(
        image, ax=axes, shrink=0.8, label="change of loss per patient", aspect=max(12, len(cancers)), extend=beyond
    )
    return svg(figure)


@STYLE
def confusion(counts: np.ndarray, names: list[str], one: str = "cancer type") -> str:
    """Patients by true class (rows, with how many they are) and predicted class (columns); colours are shares of the row.

    Small shares have colours of their own: they are what the picture is looked at for.
    """
    size = 0.9 + (0.42 if len(names) <= WRITTEN else 0.3) * len(names)
    figure = Figure(figsize=(size + 1.4, size), layout="constrained")
    axis = figure.subplots()
    patients = counts.sum(1, keepdims=True)
    share = np.divide(counts, patients, out=np.full(counts.shape, np.nan), where=patients > 0)
    image = axis.imshow(share, cmap="Blues", norm=PowerNorm(0.5, 0.0, 1.0), aspect="auto")
    for i, j in np.argwhere(counts > 0):
        colour = "white" if share[i, j] > 0.45 else "#333333"
        axis.text(j, i, f"{counts[i, j]:.0f}", ha="center", va="center", fontsize=7, color=colour)
    short = [name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…" for name in names]
    axis.set_xticks(range(len(names)), short, rotation=90)
    axis.set_yticks(range(len(names)), [f"{name} ({n:.0f})" for name, n in zip(short, patients[:, 0], strict=True)])
    axis.set_xticks(np.arange(1, len(names)) - 0.5, minor=True)
    axis.set_yticks(np.arange(1, len(names)) - 0.5, minor=True)
    axis.grid(False)
    axis.grid(which="minor", color="#999999", alpha=0.18, linewidth=0.5)
    axis.tick_params(which="minor", length=0)
    axis.set_xlabel(f"predicted {one}")
    axis.set_ylabel(f"true {one} (patients)")
    bar = figure.colorbar(image, ax=axis, shrink=0.8, label="share of the row", aspect=25)
    bar.set_ticks([0.0, 0.05, 0.2, 0.5, 1.0], labels=["0", "5 %", "20 %", "50 %", "all"])
    return svg(figure)


def _panels(columns: list[int], rows: int, cell: float = 0.46) -> tuple[Figure, list[Axes]]:
    """Panels side by side whose cells are about equally wide."""
    width, height = 2.6 + cell * sum(columns) + 0.4 * len(columns), 0.9 + 0.3 * rows
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(1, len(columns), squeeze=False, width_ratios=columns)[0])


def _heat(
    axis: Axes, table: np.ndarray, colours: str, limits: tuple[float, float], text: Callable[[float], str]
) -> AxesImage:
    """A table in colours, with its numbers where there is room; unknown cells stay blank."""
    low, high = limits
    image = axis.imshow(table, cmap=colours, vmin=low, vmax=high, aspect="auto")
    for i, j in np.ndindex(*table.shape) if table.shape[1] <= WRITTEN else ():
        if np.isfinite(table[i, j]):
            red, green, blue, _ = image.cmap(image.norm(table[i, j]))
            dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.5
            colour = "white" if dark else "#333333"
            axis.text(j, i, text(float(table[i, j])), ha="center", va="center", fontsize=7, color=colour)
    axis.grid(False)
    return image


def _label(axis: Axes, group: str, columns: list[str], rows: list[str]) -> None:
    axis.set_xticks(range(len(columns)), columns)
    axis.set_yticks(range(len(rows)), rows) if rows else axis.set_yticks([])
    axis.set_title(MIXTURES.get(group, group), loc="left", fontsize=9)


def _signed(value: float) -> str:
    """`+.013`; what rounds to nothing is 0."""
    return "0" if abs(value) < 0.0005 else f"{value:+.3f}".replace("0.", ".", 1)
