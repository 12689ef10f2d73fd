"""The training schedules of FLamby's Fed-TCGA-BRCA benchmark, written anew in numpy for many seeds at once.

One linear score of 39 columns, the Cox partial likelihood of batches of 8, ties as they come; federated: 5 rounds of 100
local SGD updates a client (Ogier du Terrail et al., arXiv 2210.04620, and the benchmark's code). Shapes: S seeds, P columns,
B patients of a batch. The model's bias never moves: the likelihood does not see it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

BATCH, ROUNDS, UPDATES, EPOCHS = 8, 5, 100, 30


@dataclass(frozen=True)
class Patients:
    """Training patients of a client: columns `[N, P]`, times and events `[N]`."""

    x: np.ndarray
    time: np.ndarray
    event: np.ndarray

    def __len__(self) -> int:
        return len(self.x)


def gradient(w_SP: np.ndarray, x_SBP: np.ndarray, time_SB: np.ndarray, event_SB: np.ndarray) -> np.ndarray:
    """Of the mean negative log partial likelihood of each seed's batch `[S, P]`."""
    order = np.argsort(-time_SB, axis=1, kind="stable")
    rows = np.arange(len(order))[:, None]
    x, event = x_SBP[rows, order], event_SB[rows, order]
    score = np.einsum("sbp,sp->sb", x, w_SP)
    log_risk = np.logaddexp.accumulate(score, axis=1)
    share = np.tril(np.exp(np.minimum(score[:, None, :] - log_risk[:, :, None], 0.0)))  # [S, event, who is at risk]
    by_score = np.einsum("si,sij->sj", event, share) - event
    return np.einsum("sb,sbp->sp", by_score, x) / x.shape[1]


def batches(patients: Patients, rngs: Sequence[np.random.Generator]) -> Iterator[tuple[np.ndarray, ...]]:
    """Shuffled batches without end, each seed in its own order; the last of an epoch may be smaller."""
    while True:
        order = np.stack([rng.permutation(len(patients)) for rng in rngs])
        for start in range(0, len(patients), BATCH):
            rows = order[:, start : start + BATCH]
            yield patients.x[rows], patients.time[rows], patients.event[rows]


def first_weights(rngs: Sequence[np.random.Generator], columns: int) -> np.ndarray:
    """As `torch.nn.Linear(columns, 1)` draws them."""
    return np.stack([rng.uniform(-1, 1, columns) / np.sqrt(columns) for rng in rngs])


def federated(clients: Sequence[Patients], seeds: Sequence[int], *, rate: float, server: str = "average") -> np.ndarray:
    """Weights `[S, P]` after the benchmark's rounds; `server`: average (FedAvg) or adam (FedAdam, rate 0.1, tau 1e-8)."""
    rngs = [np.random.default_rng(seed) for seed in seeds]
    w = first_weights(rngs, clients[0].x.shape[1])
    streams = [batches(client, rngs) for client in clients]
    total = sum(len(client) for client in clients)
    m, v = np.zeros_like(w), np.zeros_like(w)
    for _ in range(ROUNDS):
        step = np.zeros_like(w)
        for client, stream in zip(clients, streams, strict=True):
            own = w.copy()
            for _ in range(UPDATES):
                own -= rate * gradient(own, *next(stream))
            step += len(client) / total * (own - w)
        if server == "adam":
            m, v = 0.9 * m + 0.1 * step, 0.999 * v + 0.001 * step**2
            step = 0.1 * m / (np.sqrt(v) + 1e-8)
        w = w + step
    return w


def pooled(patients: Patients, seeds: Sequence[int], *, rate: float = 0.1) -> np.ndarray:
    """Weights `[S, P]` after 30 epochs of Adam over all patients together."""
    rngs = [np.random.default_rng(seed) for seed in seeds]
    w, stream = first_weights(rngs, patients.x.shape[1]), batches(patients, rngs)
    m, v = np.zeros_like(w), np.zeros_like(w)
    for t in range(1, EPOCHS * -(-len(patients) // BATCH) + 1):
        g = gradient(w, *next(stream))
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        w = w - rate * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    return w
