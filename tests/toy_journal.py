"""A journal as a run writes it, for tests of what reads it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from oncofed.server.journal import JOURNAL, Journal

SITES = ("Gulf Coast", "North", "Ridge")


def write_journal(
    out: Path,
    *,
    study: str = "pan-cancer-1",
    sites: Sequence[str] = SITES,
    folds: int = 2,
    rounds: int = 5,
    done: int = 7,
    left_out: Sequence[tuple[str, str]] = (("Ridge", "no answer within 60 s"),),
    loss: bool = True,
    end: str = "",
) -> Path:
    """A run that has done some rounds of training, fold after fold; `end` is "finished" or why it failed."""
    out.mkdir(parents=True, exist_ok=True)
    with Journal.opened(out / JOURNAL) as journal:
        journal.write(
            "started",
            study=study,
            package="0.1.0",
            folds=list(range(folds)),
            rounds=rounds,
            resume=False,
            sites=list(sites),
        )
        for k in range(done):
            where = {"fold": k // rounds, "phase": "training", "round": k % rounds + 1}
            size = len(sites)
            journal.write("question", kind="train", sites=size, bytes=2_000_000 * size, **where)
            for i, site in enumerate(sites):
                journal.write("answer", site=site, kind="train", seconds=1.5 + i, bytes=1_500_000, **where)
            journal.write(
                "round",
                seconds=4.0,
                sites=list(sites),
                bytes_to_sites=2_000_000 * size,
                bytes_from_sites=1_500_000 * size,
                loss=1.2 / (1 + where["round"]) + 0.1 * where["fold"] if loss else None,
                validation=0.6 + 0.01 * where["round"] if loss else None,
                **where,
            )
            if where["round"] == rounds:
                journal.write("fold", fold=where["fold"], seconds=20.0, test=0.65)
        for site, reason in left_out:
            journal.write("left_out", site=site, kind="train", round=2, reason=reason)
        if end == "finished":
            journal.write("finished")
        elif end:
            journal.write("failed", reason=end)
    return out
