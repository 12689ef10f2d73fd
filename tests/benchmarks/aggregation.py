"""How fast the server adds sites' sums, and what it holds meanwhile: GB/s of client data and resident memory by replies.

Every number of replies runs in a process of its own, in which replies arrive one at a time as raw bytes, as in a deployment.

    python tests/benchmarks/aggregation.py [--megabytes 50] [--repeats 3]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
from oncofed.common.blocks import EVIDENCE, Sum
from oncofed.server.aggregate import Accumulator
from rich.console import Console
from rich.table import Table

REPLIES = (5, 20, 100)
LAYERS = 8


def resident() -> float:
    """Megabytes of this process in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6


class Peak:
    """The highest resident memory while it is open, looked at every few milliseconds: `ru_maxrss` has no beginning."""

    def __enter__(self) -> Peak:
        self.value, self._open = resident(), True
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._open = False
        self._thread.join()

    def _watch(self) -> None:
        while self._open:
            self.value = max(self.value, resident())
            time.sleep(0.003)


def one(replies: int, megabytes: float) -> dict[str, float]:
    """Add so many replies; bytes are made outside the time that counts."""
    size = int(megabytes * 1e6 / 4 / LAYERS)
    shapes = {f"layer{i}": (size,) for i in range(LAYERS)} | {EVIDENCE: (4,)}
    before = resident()
    rng = np.random.default_rng(0)
    templates = [rng.normal(0, 10, size).astype(np.float32) for _ in range(2)]
    begun = resident()
    accumulator = Accumulator(shapes)
    seconds = cpu = plain = 0.0
    floats = np.zeros(size, np.float32)
    with Peak() as peak:
        for r in range(replies):
            reply: Sum = {n: np.frombuffer(templates[r % 2].tobytes(), np.float32) for n in shapes if n != EVIDENCE}
            reply[EVIDENCE] = np.ones(4)
            begin, used = time.perf_counter(), time.process_time()
            accumulator.add(reply, f"site {r}")
            seconds, cpu = seconds + time.perf_counter() - begin, cpu + time.process_time() - used
            begin = time.thread_time()
            for name in shapes.keys() - {EVIDENCE}:
                np.add(floats, reply[name], out=floats)
            plain += time.thread_time() - begin
            del reply
    model = size * LAYERS * 4 / 1e6
    return {
        "speed": replies * model / 1e3 / seconds,
        "core": replies * model / 1e3 / cpu,
        "plain": cpu / plain,
        "models": (peak.value - begun) / model,
        "peak": peak.value - begun,
        "start": before,
        "count": accumulator.count,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=float, default=50.0, help="of a reply, in float32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(args.one, args.megabytes)))
        return
    command = [sys.executable, __file__, "--megabytes", str(args.megabytes), "--one"]
    runs: dict[int, list[dict[str, float]]] = {n: [] for n in REPLIES}
    for _ in range(args.repeats):  # turn by turn: what else the machine does meets all alike
        for n in REPLIES:
            runs[n].append(json.loads(subprocess.run([*command, str(n)], capture_output=True, check=True).stdout))
    table = Table(title=f"replies of {args.megabytes:g} MB; memory beside what the process held before")
    for column in (
        "replies",
        "GB/s",
        "best",
        "GB a core's second",
        "its time to a plain float32 +=",
        "peak MB",
        "in models",
        "peak to that of 5",
    ):
        table.add_column(column, justify="right")
    first = float(np.median([r["peak"] for r in runs[REPLIES[0]]]))
    for n, found in runs.items():
        speed, peak, core, plain = (
            float(np.median([r[key] for r in found])) for key in ("speed", "peak", "core", "plain")
        )
        best, models = max(r["speed"] for r in found), peak / args.megabytes
        row = (
            str(n),
            f"{speed:.2f}",
            f"{best:.2f}",
            f"{core:.2f}",
            f"{plain:.1f}",
            f"{peak:.0f}",
            f"{models:.2f}",
            f"{peak / first:.2f}",
        )
        table.add_row(*row)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
