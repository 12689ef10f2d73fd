"""A site's change under hospital-level differential privacy: one vector of all its blocks, cut to one norm."""

from __future__ import annotations

import math

import numpy as np
from oncofed.common.blocks import EVIDENCE, Blocks, Sum, weigh
from oncofed.common.errors import Refusal


def clipped_change(total: Sum, blocks: Blocks, clip: float, site: str) -> Sum:
    """A training sum as the site's change of norm `clip` at most, with evidence 1 for every block.

    All blocks are cut together: one by one they would be sqrt(blocks) times as long. What stands behind a block, which would
    tell of the site, is replaced by 1; `total` must weigh all blocks alike (aggregation.rule fedavg). A zero change stays
    zero. Raises `Refusal` where it is not finite.
    """
    patients = float(total[EVIDENCE].max(initial=0.0))
    if not (total[EVIDENCE] == patients).all() or not patients:
        raise ValueError("a hospital's change must weigh all blocks alike")
    delta = {name: value / np.float32(patients) for name, value in total.items() if name in blocks.owners}
    norm = math.sqrt(sum(float(np.vdot(v.astype(np.float64), v.astype(np.float64))) for v in delta.values()))
    if not math.isfinite(norm):
        raise Refusal(f"site {site}: its change is not finite; lower training.learning_rate or set training.clip_norm")
    factor = np.float32(1.0 if norm <= clip else clip * (1.0 - 1e-6) / norm)
    return weigh({n: v * factor for n, v in delta.items()}, np.ones(len(blocks.names)), blocks)
