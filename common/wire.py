"""What a message holds: names, packing, versions.

A request carries `ask` (versions, study, phase, round, panel hash) and, where needed, arrays; a reply carries `from`
(who answers, to what) and one sum, or a refusal. Arrays travel as raw little-endian bytes, so that unpacking copies nothing.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from oncofed.common.blocks import Sum
from oncofed.common.errors import Refusal

PROTOCOL = 5
"""Raised whenever the meaning of a message changes; sites and server must agree."""

HELLO, STATISTICS, TRAIN, EVALUATE = "query.hello", "query.statistics", "train", "evaluate"
EXPLAIN, ANALYSE = "query.explain", "query.analyse"
SHARES, MASKED, UNMASK = "query.shares", "query.masked", "query.unmask"
"""The later exchanges of a question whose answers are summed under masks (docs/secure_sum.md)."""

NETWORK_GENES = "network/genes"
"""The genes of each class's network `[C, K]` in a request to explain: with them a site is asked for their network alone."""

Config = dict[str, bool | int | float | str | list[str] | list[float]]

_RAW = "raw.little-endian"
MOST_AXES = 16
"""Of an array; no sum has more than five."""


@functools.cache
def package_version() -> str:
    """The installed version of oncofed."""
    try:
        return version("oncofed")
    except PackageNotFoundError:
        return "not installed"


def pack_arrays(arrays: Mapping[str, np.ndarray]) -> ArrayRecord:
    """Named arrays as a Flower record; one copy of the bytes."""
    return ArrayRecord({name: _pack(value) for name, value in arrays.items()})


def unpack_arrays(record: ArrayRecord) -> Sum:
    """Named, read-only arrays over the message's own bytes."""
    return {name: _unpack(name, array) for name, array in record.items()}


def request(config: Config, arrays: Mapping[str, np.ndarray] | None = None) -> RecordDict:
    """The content of a message from the server; the protocol and package version are added here and nowhere else."""
    stamp: Config = {"protocol": PROTOCOL, "package": package_version()}
    content = RecordDict({"ask": ConfigRecord({**config, **stamp})})
    if arrays is not None:
        content["arrays"] = pack_arrays(arrays)
    return content


def reply(site: str, config: Config, arrays: Mapping[str, np.ndarray] | None = None) -> RecordDict:
    """The content of a site's answer."""
    content = RecordDict(
        {"from": ConfigRecord({"site": site, "protocol": PROTOCOL, "package": package_version(), **config})}
    )
    if arrays is not None:
        content["arrays"] = pack_arrays(arrays)
    return content


def refusal(site: str, reason: str) -> RecordDict:
    """The content of an answer that says why there is no answer."""
    return RecordDict(
        {"from": ConfigRecord({"site": site, "protocol": PROTOCOL, "package": package_version(), "refusal": reason})}
    )


def read_config(content: RecordDict, key: str) -> Config:
    """The `ask` or `from` part as a plain dict."""
    if key not in content.config_records:
        raise Refusal(
            f"the message has no part '{key}'; the other party runs something else than oncofed protocol {PROTOCOL}"
        )
    return dict(content.config_records[key])  # type: ignore[arg-type]


def read_arrays(content: RecordDict) -> Sum:
    """The arrays of a message; empty without any."""
    return unpack_arrays(content.array_records["arrays"]) if "arrays" in content.array_records else {}


def check_protocol(config: Config, other: str) -> None:
    """Refuse a peer of another protocol by name."""
    seen = config.get("protocol")
    if seen != PROTOCOL:
        raise Refusal(
            f"{other} speaks oncofed protocol {seen} (package {config.get('package', 'unknown')}), this side speaks {PROTOCOL} "
            f"(package {package_version()}); install the same oncofed version on both sides"
        )


def _pack(value: np.ndarray) -> Array:
    little = np.ascontiguousarray(value).astype(value.dtype.newbyteorder("<"), copy=False)
    return Array(str(value.dtype), tuple(int(n) for n in value.shape), _RAW, little.tobytes())


def _unpack(name: str, array: Array) -> np.ndarray:
    if array.stype != _RAW:
        raise Refusal(
            f"array '{name}' is packed as {array.stype!r}, expected {_RAW!r}; install the same oncofed version on both sides"
        )
    try:
        kind = np.dtype(array.dtype)
    except (TypeError, ValueError):
        raise Refusal(
            f"array '{name}' has dtype {array.dtype[:40]!r}, which is none; only plain numbers travel"
        ) from None
    if kind.kind not in "fiub":
        raise Refusal(f"array '{name}' has dtype {array.dtype}; only plain numbers travel")
    wanted = math.prod(array.shape) * kind.itemsize  # of whole numbers without bounds: no product wraps around
    if any(n < 0 for n in array.shape) or len(array.data) != wanted or len(array.shape) > MOST_AXES:
        raise Refusal(
            f"array '{name}' holds {len(array.data)} bytes, its shape {tuple(array.shape)[:MOST_AXES]} of {kind} wants {wanted}"
        )
    return np.frombuffer(array.data, dtype=kind.newbyteorder("<")).reshape(array.shape)
