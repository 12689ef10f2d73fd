"""Server optimisers, block by block (Reddi et al. 2021, arXiv 2003.00295, algorithm 2)."""

from __future__ import annotations

import numpy as np
from oncofed.common.blocks import Blocks, Sum
from oncofed.common.study import Aggregation


class ServerOptimizer:
    """theta_b <- theta_b + step(mean delta_b). A block without evidence keeps its weights, momentum and variance."""

    def __init__(self, settings: Aggregation, blocks: Blocks) -> None:
        self.settings, self.blocks = settings, blocks
        self.state: dict[str, Sum] = {}

    def step(self, weights: Sum, mean: Sum, evidence: np.ndarray) -> Sum:
        """New float32 weights; inputs are not changed."""
        return {name: self._step_one(name, value, mean[name], evidence) for name, value in weights.items()}

    def _step_one(self, name: str, theta: np.ndarray, delta: np.ndarray, evidence: np.ndarray) -> np.ndarray:
        s = self.settings
        if s.optimizer == "sgd":  # the mean change of a block without evidence is exactly 0
            return (theta + s.learning_rate * delta).astype(np.float32)
        used = np.broadcast_to(self.blocks.spread(evidence, name, theta.ndim) > 0, theta.shape)
        state = self.state.setdefault(name, self._fresh(theta))
        first = s.momentum * state["first"] + (delta if s.optimizer == "momentum" else (1 - s.momentum) * delta)
        state["first"] = np.where(used, first, state["first"])
        move = state["first"]
        if s.optimizer in ("adam", "yogi"):
            square = np.square(delta)
            if s.optimizer == "adam":
                second = s.second_momentum * state["second"] + (1 - s.second_momentum) * square
            else:
                second = state["second"] - (1 - s.second_momentum) * square * np.sign(state["second"] - square)
            state["second"] = np.where(used, second, state["second"])
            move = state["first"] / (np.sqrt(state["second"]) + s.adaptivity)
        return np.where(used, theta + s.learning_rate * move, theta).astype(np.float32)

    def _fresh(self, theta: np.ndarray) -> Sum:
        fresh = {"first": np.zeros(theta.shape)}
        if self.settings.optimizer in ("adam", "yogi"):
            fresh["second"] = np.full(theta.shape, self.settings.adaptivity**2)
        return fresh
