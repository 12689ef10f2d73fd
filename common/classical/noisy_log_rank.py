"""The p-value of a log-rank test whose counts hold noise: the chi-square distribution knows nothing of the noise.

We draw tables in which all groups share the pooled hazards, add noise as the sites did, and count how often the statistic is
as large. Shapes: S strata, G groups, T cells of time, B draws.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from oncofed.common.classical.life_table import Cells, at_risk
from oncofed.common.classical.log_rank import log_rank

DRAWS = 400


def simulated_p(
    sums: Mapping[str, np.ndarray],
    cells: Cells,
    names: Sequence[str],
    rho: float,
    *,
    epsilon: float,
    noises: int,
    rng: np.random.Generator,
    draws: int = DRAWS,
) -> float | None:
    """Share of tables without a difference between groups whose statistic is at least the one seen, at least 1 / (draws + 1).

    `sums` as of `life_table.table_sums`, their counts of events and of censored holding `noises` two-sided geometric
    noises of `epsilon` each. None where the test has none.
    """
    seen = log_rank(dict(sums), cells, names, rho)
    if not seen.df:
        return None
    events, leaving = sums["events"], sums["leaving"]
    size = np.maximum(np.rint(sums["patients"]), 0).astype(np.int64)  # [S, G]
    pooled_events = np.maximum(events.sum(1), 0.0)
    pooled_leaving = np.maximum(leaving.sum(1), pooled_events)
    risk = np.maximum(at_risk(pooled_leaving), 1.0)
    die, leave = np.clip(pooled_events / risk, 0, 1), np.clip((pooled_leaving - pooled_events) / risk, 0, 1)
    stay = np.clip(leave / np.maximum(1.0 - die, 1e-9), 0, 1)  # of those who do not die in the cell
    stay[:, -1] = 1.0  # whoever is left leaves in the last cell
    left = np.broadcast_to(size, (draws, *size.shape)).copy()
    drawn = np.zeros((2, draws, *events.shape))  # censored, events
    for t in range(events.shape[-1]):
        drawn[1, ..., t] = dead = rng.binomial(left, die[:, None, t])
        drawn[0, ..., t] = gone = rng.binomial(left - dead, stay[:, None, t])
        left = left - dead - gone
    for _ in range(noises):
        p = -np.expm1(-epsilon)
        drawn += rng.geometric(p, drawn.shape) - rng.geometric(p, drawn.shape)
    larger = 0
    for b in range(draws):
        table = {"events": drawn[1, b], "leaving": drawn[:, b].sum(0), "patients": sums["patients"]}
        larger += log_rank(table, cells, names, rho).chi2 >= seen.chi2
    return (1 + larger) / (draws + 1)
