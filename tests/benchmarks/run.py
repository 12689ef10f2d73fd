"""Benchmarks: ratios within one run, printed as a table. `make bench`, or name one: overhead, experts, aggregation, paper, t_gem.

Nothing here is a test: machines differ and are noisy. Measured results stand in docs/results/benchmarks.md.
"""

from __future__ import annotations

import multiprocessing
import resource
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from oncofed.client import answers
from oncofed.client.app import app as client_app
from oncofed.client.batch import Batch
from oncofed.client.objectives import objective_for
from oncofed.common.blocks import EVIDENCE
from oncofed.common.models import attention, t_gem
from oncofed.common.models.build import Sizes, build_model
from oncofed.common.models.layers import AttentionExperts, ExpertLayer
from oncofed.common.study import Study
from oncofed.deploy.engine import InProcessGrid
from oncofed.deploy.sites.synth import SynthSettings, write_consortium
from oncofed.server.aggregate import Accumulator
from oncofed.server.app import run_study
from oncofed.server.strategy import EvidenceStrategy
from rich.console import Console
from rich.table import Table

console = Console()


def overhead() -> None:
    """Seconds of a round against the sum of its local training steps alone (target: at most 10 % more)."""
    table = Table(
        "sites", "parameters", "local steps", "s/round", "s in local steps", "overhead", title="in-process round"
    )
    with tempfile.TemporaryDirectory() as folder:
        for sites, patients, keys in (
            (5, 1000, {}),
            (10, 2000, {}),
            (10, 2000, {"training__local_steps": 12}),
            (10, 2000, {"model__width": 64, "model__latent": 32}),
        ):
            root = Path(folder) / f"{sites}-{len(keys)}-{list(keys)[:1]}"
            write_consortium(root, SynthSettings(sites=sites, patients=patients, genes=1500, cancers=5))
            study = Study().changed(
                training__rounds=11,
                training__evaluate_every=0,
                splits__only=[0],
                runtime__out=str(root / "out"),
                **keys,
            )
            grid = InProcessGrid(client_app, [{"partition-id": i} for i in range(sites)], {"sites": str(root)})
            marks: list[float] = []
            spent: list[float] = []
            aggregate, train = EvidenceStrategy.aggregate, answers.train

            def timed_round(self, *args, aggregate=aggregate, marks=marks):  # type: ignore[no-untyped-def]
                result = aggregate(self, *args)
                marks.append(time.perf_counter())
                return result

            def timed_train(session, train=train, spent=spent):  # type: ignore[no-untyped-def]
                answer = train(session)
                spent.append(answer.config["seconds"])
                return answer

            EvidenceStrategy.aggregate, answers.train = timed_round, timed_train  # type: ignore[method-assign]
            try:
                results = run_study(study, grid)
            finally:
                EvidenceStrategy.aggregate, answers.train = aggregate, train  # type: ignore[method-assign]
            # the first round prepares nothing any more, but warms up allocators: leave it out
            a_round = (marks[-1] - marks[0]) / (len(marks) - 1)
            local = sum(spent[sites:]) / (len(marks) - 1)
            parameters = results["folds"][0]["parameters"]
            table.add_row(
                str(sites),
                f"{parameters:,}",
                str(study.training.local_steps),
                f"{a_round:.3f}",
                f"{local:.3f}",
                f"{a_round / local - 1:+.1%}",
            )
    console.print(table)


def experts() -> None:
    """The stacked expert layers against a Python loop over `nn.Linear` experts, forward and backward."""
    table = Table(
        "layer", "batch", "loop ms", "dense ms", "routed ms", "routed/loop", title="expert layer, forward + backward"
    )
    for batch, (g, d, e, k) in ((32, (1500, 256, 8, 2)), (256, (1500, 256, 8, 2)), (256, (25_000, 1024, 15, 6))):
        x = torch.randn(batch, g)
        top, index = torch.randn(batch, e).topk(k, dim=1)
        gate = torch.zeros(batch, e).scatter(1, index, torch.softmax(top, 1))
        layer = ExpertLayer(e, g, d)
        linears = torch.nn.ModuleList(torch.nn.Linear(g, d) for _ in range(e))

        def loop(
            x: torch.Tensor = x, gate: torch.Tensor = gate, linears: torch.nn.ModuleList = linears, d: int = d
        ) -> torch.Tensor:
            out = torch.zeros(len(x), d)
            for i, linear in enumerate(linears):
                rows = torch.nonzero(gate[:, i]).squeeze(1)
                if len(rows):
                    out = out.index_add(0, rows, gate[rows, i, None] * torch.tanh(linear(x[rows])))
            return out

        calls = [loop, partial(layer.mix, x, gate, dense=True), partial(layer.mix, x, gate)]
        times = _interleaved(calls, repeats=15 if g < 10_000 else 5)
        table.add_row(
            f"experts {e} x {g} -> {d}", str(batch), *(f"{1e3 * t:.1f}" for t in times), f"{times[2] / times[0]:.2f}"
        )
        if g > 10_000:
            continue
        h = torch.randn(batch, d)
        attention = AttentionExperts(4, d)
        top, index = torch.randn(batch, 4).topk(2, dim=1)
        gate4 = torch.zeros(batch, 4).scatter(1, index, torch.softmax(top, 1))

        def attention_loop(
            h: torch.Tensor = h, gate4: torch.Tensor = gate4, attention: AttentionExperts = attention
        ) -> torch.Tensor:
            out = torch.zeros_like(h)
            for i in range(4):
                rows = torch.nonzero(gate4[:, i]).squeeze(1)
                q, key, v = (h[rows] @ w[i] for w in (attention.query, attention.key, attention.value))
                a = torch.softmax(q[:, :, None] * key[:, None, :], -1)
                out = out.index_add(0, rows, gate4[rows, i, None] * torch.einsum("bij,bj->bi", a, v))
            return out

        times = _interleaved(
            [attention_loop, partial(attention.mix, h, gate4, dense=True), partial(attention.mix, h, gate4)]
        )
        table.add_row(
            f"attention 4 x {d}", str(batch), *(f"{1e3 * t:.1f}" for t in times), f"{times[2] / times[0]:.2f}"
        )
    console.print(table)


def paper_size() -> None:
    """One training step of Gene-MOE at the paper's size: 25,000 genes, batch 256, each way in a process of its own."""
    table = Table("way", "parameters", "s/step", "peak GB", title="paper size: 15 experts top 6, width 1,024")
    context = multiprocessing.get_context("spawn")
    ways = {
        "routed": {},
        "dense": {"model__dispatch": "dense"},
        "routed, experts in bfloat16": {"model__expert_dtype": "bfloat16"},
        "routed, no attention experts": {"model__attention_experts": 0},
        "pre-training, routed": {"pretraining__rounds": 1},
    }
    for name, keys in ways.items():
        with context.Pool(1) as pool:
            parameters, seconds, peak = pool.apply(one_step, ({"model__size": "paper", **keys}, 25_000, 256))
        table.add_row(name, f"{parameters:,}", f"{seconds:.2f}", f"{peak:.1f}")
    console.print(table)


def t_gem_size() -> None:
    """One training step of T-GEM at the paper's size, its attention interpolated and from all pairs, each in its own process."""
    table = Table("attention", "genes", "batch", "s/step", "ratio", "peak GB", title="T-GEM: 3 layers, 5 heads")
    context = multiprocessing.get_context("spawn")
    keys = {"model__name": "t_gem", "task__kind": "classification"}
    for genes, batch in ((1_708, 16), (1_708, 64), (20_000, 16)):
        first = None
        for way in (
            ("interpolated", "direct, in pieces", "all pairs at once") if genes * batch < 30_000 else ("interpolated",)
        ):
            with context.Pool(1) as pool:
                _, seconds, peak = pool.apply(one_step, (keys, genes, batch, way))
            first = first or seconds
            table.add_row(way, f"{genes:,}", str(batch), f"{seconds:.3f}", f"{seconds / first:.1f}", f"{peak:.2f}")
    console.print(table)


def all_pairs(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, to_self: str) -> torch.Tensor:
    """As the paper's code has it: the whole G x G score of every head and layer is kept for the backward pass."""
    own = torch.eye(q.shape[-1], dtype=torch.bool)
    score = (q[..., :, None] * k[..., None, :]).masked_fill(own, -torch.inf)
    return (torch.softmax(score, dim=-1) @ v[..., None]).squeeze(-1)


def one_step(keys: dict[str, object], genes: int, batch: int, way: str = "") -> tuple[int, float, float]:
    """Parameters, median seconds of a step, and peak memory in GB (of the device where there is one)."""
    study = Study().changed(**keys)
    if way == "direct, in pieces":
        attention._near = lambda q, k: torch.zeros(q.shape[:-1], dtype=torch.bool)
    elif way == "all pairs at once":
        t_gem.scalar_token_attention = all_pairs
    phase = study.phases[0]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build_model(study, Sizes(genes, tuple("ABCDEFGHI"), 20), phase=phase).to(device)
    x = torch.randn(batch, genes, device=device)
    long = torch.arange(batch, device=device)
    data = Batch(
        x, x[:, :0], long % 9, x[:, 0].abs() + 1, (long % 2).float(), torch.ones(batch, 20, device=device), long % 20
    )
    objective = objective_for(study, phase)
    generator = torch.Generator(device=device).manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    times = []
    for _ in range(4):
        begin = time.perf_counter()
        _, loss = objective.run(model, data, generator)
        optimizer.zero_grad(set_to_none=False)
        loss.backward()
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    cuda = device.type == "cuda"
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return sum(p.numel() for p in model.parameters()), float(np.median(times[1:])), peak / 1e9


def aggregation() -> None:
    """Speed and peak memory of the accumulator: memory must not grow with the number of replies."""
    table = Table("replies", "model MB", "seconds", "GB/s", "peak MB beside the reply", title="streaming aggregation")
    size = 4_000_000
    reply = {"w": np.random.default_rng(0).normal(size=size).astype(np.float32), EVIDENCE: np.ones(1)}
    for replies in (5, 20, 100):
        tracemalloc.start()
        accumulator = Accumulator({"w": (size,), EVIDENCE: (1,)})
        begin = time.perf_counter()
        for _ in range(replies):
            accumulator.add(reply)
        seconds = time.perf_counter() - begin
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        moved = replies * reply["w"].nbytes
        table.add_row(
            str(replies),
            f"{reply['w'].nbytes / 1e6:.0f}",
            f"{seconds:.2f}",
            f"{moved / seconds / 1e9:.2f}",
            f"{peak / 1e6:.0f}",
        )
    console.print(table)


def _interleaved(calls: list[Callable[[], torch.Tensor]], repeats: int = 15) -> list[float]:
    """Median seconds of each call with its backward pass, taken in turns so that noise meets all alike."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats):
        for mine, call in zip(times, calls, strict=True):
            begin = time.perf_counter()
            call().sum().backward()
            mine.append(time.perf_counter() - begin)
    return [float(np.median(t[2:])) for t in times]


BENCHMARKS = {
    "overhead": overhead,
    "experts": experts,
    "aggregation": aggregation,
    "paper": paper_size,
    "t_gem": t_gem_size,
}

if __name__ == "__main__":
    for name in sys.argv[1:] or BENCHMARKS:
        BENCHMARKS[name]()
