"""What a secure sum costs a hospital and the server for a million numbers: processor seconds and bytes, by step, for 5 and for 20 sites.

One thread; all sites in one process, turn by turn, with their files on disk as in a deployment. Medians over repetitions; with
`--lost` so many sites are lost after the second exchange, whose masks the server makes anew.

    python tests/benchmarks/secure_sum.py [--sites 5 20] [--numbers 1000000] [--repeat 3] [--lost 0]
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from oncofed.client.members import Identity
from oncofed.client.secure_sum import SecureSums
from oncofed.common import wire
from oncofed.common.blocks import Sum
from oncofed.server.aggregate import UPDATE_BITS, Accumulator
from oncofed.server.roster import Answer, Roster
from oncofed.server.secure_sum import SecureSum
from rich.console import Console
from rich.table import Table

STEPS = (wire.TRAIN, wire.SHARES, wire.MASKED, wire.UNMASK)


class Sites:
    """Sites below a folder; `seconds` and `bytes` of each step are of all of them together, `sent` what the server sends them."""

    def __init__(self, root: Path, count: int, numbers: int, lost: int) -> None:
        self.names = [f"site-{i:02d}" for i in range(count)]
        self.root, self.lost = root, set(self.names[:lost])
        self.seconds, self.bytes, self.sent = (dict.fromkeys(STEPS, 0.0) for _ in range(3))
        rng = np.random.default_rng(0)
        self.sums: dict[str, Sum] = {n: {"weights": rng.normal(size=numbers).astype(np.float32)} for n in self.names}

    def of(self, name: str) -> SecureSums:
        return SecureSums(self.root / name, self.root / name, name)

    def begin(self, question: str) -> Iterator[Answer]:
        for name in self.names:
            begin = time.process_time()
            config = self.of(name).begin(question, question, "study", self.sums[name], UPDATE_BITS, 0)
            yield self._counted(wire.TRAIN, begin, Answer(name, config, {}, 0))

    def exchange(self, kind: str, config: wire.Config, each: Mapping[str, wire.Config]) -> Iterator[Answer]:
        for name in each:
            if kind != wire.SHARES and name in self.lost:
                continue
            ask = {**config, **each[name]}
            self.sent[kind] += size_of(ask)
            site, begin = self.of(name), time.process_time()
            if kind == wire.MASKED:
                answer = Answer(name, {}, site.masked(str(ask["sum"]), ask), 0)
            else:
                told = (site.share if kind == wire.SHARES else site.unmask)(str(ask["sum"]), ask)
                answer = Answer(name, told, {}, 0)
            yield self._counted(kind, begin, answer)

    def _counted(self, kind: str, begin: float, answer: Answer) -> Answer:
        self.seconds[kind] += time.process_time() - begin
        self.bytes[kind] += size_of(answer.config) + sum(v.nbytes for v in answer.arrays.values())
        return answer


def size_of(config: wire.Config) -> int:
    """Bytes of the text in a message."""
    return sum(len(str(v)) for value in config.values() for v in (value if isinstance(value, list) else [value]))


def measure(count: int, numbers: int, repeat: int, lost: int) -> dict[str, list[float]]:
    rows: dict[str, list[float]] = {}
    for i in range(repeat):
        with tempfile.TemporaryDirectory() as folder:
            sites = Sites(Path(folder), count, numbers, lost)
            roster = Roster(None, 1, 1)  # type: ignore[arg-type]
            identities = {n: Identity.of(sites.root / n, n).public.hex() for n in sites.names}
            roster.hellos = {k: {"site": n, "identity": identities[n]} for k, n in enumerate(sites.names)}
            shapes = {"weights": (numbers,)}
            sum_ = SecureSum(roster, sites.exchange, wire.TRAIN, 1, shapes, UPDATE_BITS, 3)
            begin = time.process_time()
            got = sum_.gather(sites.begin(hashlib.sha256(str(i).encode()).hexdigest()))
            whole = time.process_time() - begin
            begin = time.process_time()
            plain = Accumulator(shapes, UPDATE_BITS)
            for answer in got.answers:
                plain.add(sites.sums[answer.site], answer.site)
            clear = time.process_time() - begin
            assert plain.total()["weights"].tobytes() == got.total["weights"].tobytes()
        for kind in STEPS:
            rows.setdefault(f"site, seconds, {kind}", []).append(sites.seconds[kind] / count)
            rows.setdefault(f"site, bytes out, {kind}", []).append(sites.bytes[kind] / count)
        rows.setdefault("site, seconds, all", []).append(sum(sites.seconds.values()) / count)
        rows.setdefault("site, bytes out, all", []).append(sum(sites.bytes.values()) / count)
        rows.setdefault("site, bytes in beside the question", []).append(sum(sites.sent.values()) / count)
        rows.setdefault("server, seconds", []).append(whole - sum(sites.seconds.values()))
        rows.setdefault("server, seconds, clear sums", []).append(clear)
        rows.setdefault("site, bytes out, clear sums", []).append(float(numbers * 4))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sites", type=int, nargs="+", default=[5, 20])
    parser.add_argument("--numbers", type=int, default=1_000_000)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--lost", type=int, default=0)
    args = parser.parse_args()
    table = Table(title=f"A secure sum of {args.numbers:,} numbers, {args.lost} sites lost after sharing")
    table.add_column("what")
    measured = {count: measure(count, args.numbers, args.repeat, args.lost) for count in args.sites}
    for count in args.sites:
        table.add_column(f"{count} sites", justify="right")
    for name in next(iter(measured.values())):
        values = [statistics.median(measured[count][name]) for count in args.sites]
        table.add_row(name, *(f"{v:,.0f}" if "bytes" in name else f"{v:.4f}" for v in values))
    Console().print(table)


if __name__ == "__main__":
    main()
