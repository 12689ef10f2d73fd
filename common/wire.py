"""What a message holds: names, packing, versions.

A request carries `ask` (versions, study, phase, round, panel hash) and, where needed, arrays; a reply carries `from`
(who answers, to what) and one sum, or a refusal. All arrays of a message travel in one piece (common/packing.py).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from oncofed.common.blocks import Sum
from oncofed.common.errors import Refusal
from oncofed.common.packing import numbers_begin, pack, unpack

PROTOCOL = 6
"""Raised whenever the meaning of a message changes; sites and server must agree."""

HELLO, STATISTICS, TRAIN, EVALUATE = "query.hello", "query.statistics", "train", "evaluate"
EXPLAIN, ANALYSE = "query.explain", "query.analyse"
SHARES, MASKED, UNMASK = "query.shares", "query.masked", "query.unmask"
"""The later exchanges of a question whose answers are summed under masks (docs/secure_sum.md)."""

NETWORK_GENES = "network/genes"
"""The genes of each class's network `[C, K]` in a request to explain: with them a site is asked for their network alone."""

Config = dict[str, bool | int | float | str | list[str] | list[float]]

_PIECE, _LAYOUT = "sum", "safetensors"


@functools.cache
def package_version() -> str:
    """The installed version of oncofed."""
    try:
        return version("oncofed")
    except PackageNotFoundError:
        return "not installed"


def pack_arrays(arrays: Mapping[str, np.ndarray]) -> ArrayRecord:
    """Named arrays as a Flower record of one piece; one copy of the bytes."""
    data = pack(arrays)
    return ArrayRecord({_PIECE: Array("uint8", (len(data),), _LAYOUT, data)})


def unpack_arrays(record: ArrayRecord) -> Sum:
    """Named, read-only arrays over the message's own bytes."""
    if list(record) != [_PIECE] or record[_PIECE].stype != _LAYOUT:
        raise Refusal(
            f"the message's arrays are packed as {', '.join(sorted({a.stype[:40] for a in record.values()})) or 'nothing'}, wanted are one piece of "
            f"{_LAYOUT}; install the same oncofed version on both sides"
        )
    return unpack(record[_PIECE].data)


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


def sizes(content: RecordDict) -> tuple[int, int]:
    """Bytes of the numbers in a message's arrays, and of the arrays' names and shapes."""
    pieces = [array.data for record in content.array_records.values() for array in record.values()]
    headers = sum(map(numbers_begin, pieces))
    return sum(map(len, pieces)) - headers, headers


def check_protocol(config: Config, other: str) -> None:
    """Refuse a peer of another protocol by name."""
    seen = config.get("protocol")
    if seen != PROTOCOL:
        raise Refusal(
            f"{other} speaks oncofed protocol {seen} (package {config.get('package', 'unknown')}), this side speaks {PROTOCOL} "
            f"(package {package_version()}); install the same oncofed version on both sides"
        )
