"""The weights of a round as the step from those that the sites hold already.

Server and sites hold the same reference weights to the last bit, under their SHA-256. For new weights the server codes how far they
are from the reference, and both add what was coded to it. What rounding drops is so part of the next step: error feedback
without a remainder of its own. Where nobody holds a reference, the first weights travel in bfloat16 and are it.

A question names its weights by hash (`weights_hash`), and where its arrays `weights/*` are a step, what it is a step from (`weights_base`).
"""

from __future__ import annotations

import numpy as np
from oncofed.common.blocks import Sum
from oncofed.common.compression import BFLOAT16, INT8, SCALE, SMALL, from_bfloat16, from_int8, to_bfloat16, to_int8
from oncofed.common.saved import digest

WEIGHTS = "weights/"
"""Before the names of a message's weights."""

HASH, BASE = "weights_hash", "weights_base"
"""In a question: the weights that it is about, and those that its step begins at."""

LACKS = "weights_lacked"
"""In an answer, all that it says: the hash of weights that the site cannot make from what it holds."""


def hash_of(weights: Sum) -> str:
    """SHA-256 of weights: names, types, shapes and bytes."""
    return digest(weights, "")


def code_step(held: Sum, weights: Sum, kind: str, draws: np.random.Generator) -> Sum:
    """The step from `held` to `weights`, of the same names, in int8 or bfloat16, each number one row of a chunk's scale.

    Small arrays, and what is no float32, travel as they are; what has not changed, not at all.
    """
    coded: Sum = {}
    for name, value in sorted(weights.items()):  # draws must not depend on the order
        if np.array_equal(value, held[name]):
            continue
        if value.dtype != np.float32 or value.size < SMALL:
            coded[name] = value
            continue
        step = (value - held[name]).reshape(1, -1)
        if kind == "int8":
            coded[INT8 + name], coded[SCALE + name] = to_int8(step, draws)
        else:
            coded[BFLOAT16 + name] = to_bfloat16(step, draws)
    return coded


def take_step(held: Sum, coded: Sum) -> Sum:
    """`held` after a step. One multiplication and one addition a number, each rounded as IEEE 754 says: alike on every machine."""
    after = dict(held)
    for key, value in coded.items():
        if key.startswith(SCALE):
            continue
        name = key.removeprefix(INT8).removeprefix(BFLOAT16)
        if key == name:
            after[name] = value
            continue
        step = from_int8(value, coded[SCALE + name]) if key.startswith(INT8) else from_bfloat16(value)
        after[name] = held[name] + step.reshape(held[name].shape)
    return after
