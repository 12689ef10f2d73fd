"""What a private step of Gene-MOE costs beside a plain one, and beside Opacus' default hooks mode: seconds and peak memory.

Each way runs in a process of its own, one thread, turn by turn; figures are medians and ratios within one run.

    python tests/benchmarks/private_step.py [--genes 1500] [--batch 128] [--size small]
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from oncofed.client.batch import Batch
from oncofed.client.privacy.dp_sgd import PatientGradients, cover
from oncofed.client.privacy.train import losses_by_patient
from oncofed.client.train import optimizer_for
from oncofed.common.models.build import Sizes, build_model
from oncofed.common.models.layers import AttentionExperts, ExpertLayer
from oncofed.common.noise import SecureNoise
from oncofed.common.study import TRAIN, Study
from rich.console import Console
from rich.table import Table

WAYS = ("start", "plain", "private", "hooks")
CANCERS = tuple(f"C{i}" for i in range(9))
INTERVALS = 5


def batch_of(patients: int, genes: int) -> Batch:
    rng = np.random.default_rng(0)
    return Batch(
        x_BG=torch.tensor(rng.normal(size=(patients, genes)), dtype=torch.float32),
        v_BV=torch.zeros(patients, 0),
        cancer_B=torch.arange(patients) % len(CANCERS),
        time_B=torch.tensor(rng.exponential(30, patients) + 1, dtype=torch.float32),
        event_B=torch.tensor(rng.integers(0, 2, patients), dtype=torch.float32),
        exposure_BK=torch.tensor(rng.random((patients, INTERVALS)) * 10, dtype=torch.float32),
        interval_B=torch.tensor(rng.integers(0, INTERVALS, patients)),
        width_BK=torch.full((patients, INTERVALS), 12.0),
    )


def step_of(way: str, args: argparse.Namespace) -> Callable[[], None]:
    """One optimiser step of a way."""
    study = Study().changed(model__size=args.size, task__time_edges=(0, 12, 24, 36, 60))
    model = build_model(study, Sizes(args.genes, CANCERS, INTERVALS)).train()
    batch, clip = batch_of(args.batch, args.genes), 1.0
    load = {group: np.full(n, 1.0 / n) for group, n in model.mixtures().items()}
    losses_of = losses_by_patient(model, study, load)  # type: ignore[arg-type]
    optimizer, noise = optimizer_for(model, study, TRAIN, 1), SecureNoise()
    if way == "start":
        return lambda: None
    if way == "plain":

        def plain() -> None:
            optimizer.zero_grad()
            losses_of(batch).mean().backward()
            optimizer.step()

        return plain
    if way == "private":

        def private() -> None:
            with PatientGradients.opened(model, clip) as gradients:
                total = cover(gradients.clipped_sum([lambda: losses_of(batch)]), clip=clip, deviation=2.0, noise=noise)
                for p, value in zip(gradients.parameters, total, strict=True):
                    p.grad = value / args.batch
                optimizer.step()
                model.zero_grad(set_to_none=True)

        return private
    from oncofed.client.privacy import samplers  # noqa: F401 - Opacus' hooks use the grad samplers
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer

    for name, p in model.named_parameters():  # Opacus counts the parameters of a layer within a layer twice
        p.requires_grad_("gate.norm" not in name)
    wrapped = GradSampleModule(model, loss_reduction="sum")
    for layer in model.modules():  # and takes the pairs of patient and expert for the batch
        if isinstance(layer, ExpertLayer | AttentionExperts):
            layer.register_forward_pre_hook(lambda m, seen: setattr(m, "max_batch_len", len(seen[0])))
    wrapped.enable_hooks()
    private_optimizer = DPOptimizer(
        optimizer_for(model, study, TRAIN, 1),
        noise_multiplier=2.0,
        max_grad_norm=clip,
        expected_batch_size=args.batch,
        loss_reduction="sum",
    )

    def hooks() -> None:
        private_optimizer.zero_grad()
        losses_of(batch).sum().backward()
        private_optimizer.step()

    return hooks


def measure(way: str, args: argparse.Namespace) -> None:
    """Run in its own process: JSON of the seconds of each step and of the peak memory in MB."""
    torch.set_num_threads(1)
    step = step_of(way, args)
    step()
    seconds = []
    for _ in range(args.repeats):
        begin = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - begin)
    print(json.dumps({"seconds": seconds, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--genes", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--size", default="small")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--way", default="")
    args = parser.parse_args()
    if args.way:
        measure(args.way, args)
        return
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    peak: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(args.rounds):
        for way in WAYS:  # turn by turn: whatever else the machine does meets all of them
            run = subprocess.run(
                [sys.executable, __file__, *sys.argv[1:], "--way", way], capture_output=True, text=True
            )
            if run.returncode:
                print(way, run.stderr[-800:])
                continue
            told = json.loads(run.stdout.splitlines()[-1])
            seconds[way] += told["seconds"]
            peak[way].append(told["peak"])
    table = Table(
        "way",
        "ms a step",
        "of plain",
        "MB above start",
        "of plain",
        title=f"Gene-MOE {args.size}, {args.genes} genes, batch {args.batch}",
    )
    base, idle = statistics.median(seconds["plain"]), statistics.median(peak["start"])
    memory = statistics.median(peak["plain"]) - idle
    for way in WAYS[1:]:
        if seconds[way]:
            s, m = statistics.median(seconds[way]), statistics.median(peak[way]) - idle
            table.add_row(way, f"{1e3 * s:.1f}", f"{s / base:.2f}", f"{m:.0f}", f"{m / memory:.2f}")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
