"""Named arrays as one piece of bytes, in the layout of safetensors.

Flower moves every array of a record as messages of its own, each a request to SuperNode and to SuperLink and a line in their
databases: a model in sixty pieces costs a round sixty times what it costs in one. The layout is a length (8 bytes, little-endian),
a header in JSON (`{name: {dtype, shape, data_offsets}}`), and the numbers, little-endian and without gaps. The safetensors package
reads it; ours copies nothing, where it would copy all.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
from oncofed.common.errors import Refusal

KINDS = {
    "BOOL": np.dtype("?"),
    **{f"{letter.upper()}{8 * size}": np.dtype(f"<{letter}{size}") for letter in "iu" for size in (1, 2, 4, 8)},
    **{f"F{8 * size}": np.dtype(f"<f{size}") for size in (2, 4, 8)},
}
"""What travels: plain numbers."""
MOST_AXES = 16
"""Of an array; no sum has more than five."""
LONGEST_HEADER = 100_000_000
"""Bytes, as in safetensors."""

_LENGTH = 8
_NAMES = {kind: name for name, kind in KINDS.items()}


def pack(arrays: Mapping[str, np.ndarray]) -> bytes:
    """One copy of the numbers. Raises `TypeError` on what is no plain number."""
    about: dict[str, Any] = dict.fromkeys(arrays)  # the header keeps their order
    at, pieces = 0, []
    # the widest first: then each begins where a number of its kind may begin
    for name in sorted(arrays, key=lambda n: -arrays[n].dtype.itemsize):
        value = arrays[name]
        kind = value.dtype.newbyteorder("<")
        if kind not in _NAMES:
            raise TypeError(f"array '{name}' has dtype {value.dtype}; only plain numbers travel")
        begin, at = at, at + value.nbytes
        about[name] = {"dtype": _NAMES[kind], "shape": list(value.shape), "data_offsets": [begin, at]}
        pieces.append(np.ascontiguousarray(value).astype(kind, copy=False).reshape(-1).view(np.uint8).data)
    header = json.dumps(about, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return b"".join([len(header).to_bytes(_LENGTH, "little"), header, *pieces])


def numbers_begin(data: bytes) -> int:
    """Where the header ends: what comes before are names and shapes."""
    return min(len(data), _LENGTH + int.from_bytes(data[:_LENGTH], "little"))


def unpack(data: bytes) -> dict[str, np.ndarray]:
    """Read-only arrays over these bytes, in the order in which they were packed; raises `Refusal` where they hold something else."""
    length = int.from_bytes(data[:_LENGTH], "little")
    if len(data) < _LENGTH or length > min(len(data) - _LENGTH, LONGEST_HEADER):
        raise Refusal(f"the message's arrays have {len(data)} bytes, which end within their header")
    try:
        about = json.loads(data[_LENGTH : _LENGTH + length], object_pairs_hook=_once)
    except (ValueError, RecursionError):
        raise Refusal("the header of the message's arrays is no JSON") from None
    if not isinstance(about, dict):
        raise Refusal("the header of the message's arrays names none")
    begin, out, spans = _LENGTH + length, {}, []
    for name, one in about.items():
        kind, shape, (at, end) = _form(name, one)
        if end > len(data) - begin:
            raise Refusal(f"array '{name[:40]}' ends at byte {end}, the message has {len(data) - begin}")
        spans.append((at, end))
        out[name] = np.frombuffer(data, kind, math.prod(shape), begin + at).reshape(shape)
    spans.sort()
    if any(a[1] != b[0] for a, b in pairwise([(0, 0), *spans, (len(data) - begin, 0)])):
        raise Refusal("the message's arrays overlap, or leave bytes between them that nobody reads")
    return out


def _form(name: str, one: Any) -> tuple[np.dtype, list[int], tuple[int, int]]:
    """Kind, shape and place of an array."""
    if not isinstance(one, dict) or set(one) != {"dtype", "shape", "data_offsets"}:
        raise Refusal(f"array '{name[:40]}' comes without dtype, shape and place")
    kind, shape, place = KINDS.get(str(one["dtype"])), one["shape"], one["data_offsets"]
    if kind is None:
        raise Refusal(
            f"array '{name[:40]}' has dtype {str(one['dtype'])[:40]!r}, which is none; only plain numbers travel"
        )
    if not _counts(shape) or len(shape) > MOST_AXES or not _counts(place) or len(place) != 2:
        raise Refusal(f"array '{name[:40]}' has the shape {str(shape)[:40]} at {str(place)[:40]}, which is none")
    at, end = place
    wanted = math.prod(shape) * kind.itemsize  # of whole numbers without bounds: no product wraps around
    if end - at != wanted:
        raise Refusal(f"array '{name[:40]}' holds {end - at} bytes, its shape {tuple(shape)} of {kind} wants {wanted}")
    return kind, shape, (at, end)


def _counts(found: Any) -> bool:
    return isinstance(found, list) and all(type(n) is int and n >= 0 for n in found)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("a name stands twice")
    return out
