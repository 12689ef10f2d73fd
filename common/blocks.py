"""Blocks of a model, the evidence behind them, and the sums that sites send.

A block is a piece of the parameters with its own meaning: one expert, one cancer's baseline hazard, the shared trunk.
A parameter belongs to one block, or, when it is stacked (`[E, in, out]`), each index of its first axis to a block of its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

Sum = dict[str, np.ndarray]
"""Named arrays that can be added across sites: the only thing that leaves a hospital."""

EVIDENCE = "evidence"
"""The name under which a training sum carries its evidence vector, one entry a block in the order of `Blocks.names`."""

LOSS = "told/loss"
"""The name under which a training sum under masks carries `[loss * patients, patients]`: no site tells its own."""


@dataclass(frozen=True)
class Blocks:
    """Which block owns each parameter, or each row of a stacked parameter.

    `owners` maps a parameter's name to a block's name, or to a tuple with one block's name for each index of its first axis.
    """

    owners: Mapping[str, str | tuple[str, ...]]
    names: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        seen: dict[str, None] = {}
        for owner in self.owners.values():
            seen.update(dict.fromkeys((owner,) if isinstance(owner, str) else owner))
        object.__setattr__(self, "names", tuple(seen))

    def vector(self, evidence: Mapping[str, float]) -> np.ndarray:
        """Evidence in the order of `names`, float64 `[blocks]`; raises on a block without evidence or below zero."""
        missing = [name for name in self.names if name not in evidence]
        if missing:
            raise ValueError(
                f"evidence is missing for blocks {missing[:5]}; every block of the model needs a value (0 if unused)"
            )
        values = np.array([evidence[name] for name in self.names], dtype=np.float64)
        if not np.isfinite(values).all() or (values < 0).any():
            raise ValueError(
                f"evidence must be finite and >= 0, got {dict(zip(self.names, values.tolist(), strict=True))}"
            )
        return values

    def rows(self, values: np.ndarray, parameter: str) -> np.ndarray:
        """The per-block `values` of one parameter's rows `[rows]`; a parameter that is one block is one row."""
        owner = self.owners[parameter]
        position = {name: i for i, name in enumerate(self.names)}
        return values[[position[name] for name in ((owner,) if isinstance(owner, str) else owner)]]

    def spread(self, values: np.ndarray, parameter: str, ndim: int) -> np.ndarray:
        """The per-block `values` of one parameter, shaped to broadcast against it: `[]` or `[rows, 1, ...]`."""
        owner = self.owners[parameter]
        if isinstance(owner, str):
            return np.asarray(values[self.names.index(owner)])
        position = {name: i for i, name in enumerate(self.names)}
        rows = values[[position[name] for name in owner]]
        return rows.reshape(-1, *([1] * (ndim - 1)))


def under(prefix: str, arrays: Mapping[str, np.ndarray]) -> Sum:
    """The arrays with `prefix` before their names: how several kinds travel in one message or lie in one file."""
    return {prefix + name: value for name, value in arrays.items()}


def part(prefix: str, arrays: Mapping[str, np.ndarray]) -> Sum:
    """The inverse of `under`: the arrays whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}


def digests(arrays: Mapping[str, np.ndarray]) -> dict[str, str]:
    """The SHA-256 of each array by name: type, shape and bytes, since the same bytes of another type are other numbers."""
    out = {}
    for name, value in sorted(arrays.items()):
        of = hashlib.sha256(f"{value.dtype.str} {value.shape} ".encode())
        of.update(value.tobytes())
        out[name] = of.hexdigest()
    return out


def all_finite(value: np.ndarray) -> bool:
    """Whether an array holds no NaN and no infinity: one pass and no copy where all is well."""
    flat = value.reshape(-1)
    # The squares may overflow though all is finite: only then look closer.
    return bool(np.isfinite(np.vdot(flat, flat))) or bool(np.isfinite(flat).all())


def weigh(delta: Mapping[str, np.ndarray], evidence: np.ndarray, blocks: Blocks) -> Sum:
    """A site's training sum `{evidence: n_b, name: n_b * delta_b}` in float32 (evidence float64).

    Both parts are linear in the site, so they can be added, masked or noised (architecture.md, idea 2).
    """
    total: Sum = {EVIDENCE: np.asarray(evidence, dtype=np.float64)}
    for name, value in delta.items():
        total[name] = value * blocks.spread(evidence, name, value.ndim).astype(np.float32)
    return total
