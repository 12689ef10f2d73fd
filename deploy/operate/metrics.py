"""The state of a run as Prometheus metrics."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import get_args

from oncofed.deploy.operate.state import RunState, Status
from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

ONLINE_S, ONLINE_ROUNDS = 900.0, 3
"""A site is online while its last answer is no older than this, or than so many of the latest rounds took."""


def online(state: RunState, now: float) -> int:
    """Sites of a running study that were heard of lately."""
    recent = [r.seconds for r in state.rounds[-10:]]
    patience = max(ONLINE_S, ONLINE_ROUNDS * median(recent) if recent else 0.0)
    heard = [s for s in state.sites if s.last_seen is not None and now - s.last_seen <= patience]
    return len(heard) if state.status == "running" else 0


def exposed(state: RunState, clock: Callable[[], float] = time.time) -> bytes:
    """The metrics in Prometheus's text format."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_State(state, clock()))
    return generate_latest(registry)


class _State(Collector):
    """One state as metric families; counters begin again with another run."""

    def __init__(self, state: RunState, now: float) -> None:
        self.state, self.now = state, now

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        state = self.state
        yield _labelled(
            "oncofed_run_info",
            "Study and package of the run.",
            ("study", "package"),
            [((state.study, state.package), 1.0)],
        )
        yield _labelled(
            "oncofed_run_status",
            "1 for the status that the run has.",
            ("status",),
            [((s,), float(s == state.status)) for s in get_args(Status)],
        )
        yield _gauge("oncofed_rounds_done", "Rounds that are done, of all folds and phases.", state.rounds_done)
        yield _gauge("oncofed_rounds_planned", "Rounds of all folds and phases.", state.rounds_planned)
        yield _gauge("oncofed_sites", "Sites that take part or took part.", len(state.sites))
        yield _gauge("oncofed_sites_online", "Sites that were heard of lately.", online(state, self.now))
        if state.updated is not None:
            yield _gauge("oncofed_last_event_age_seconds", "Since the last event.", max(self.now - state.updated, 0.0))
        if state.seconds_left is not None:
            yield _gauge("oncofed_seconds_left", "Until the end, as recent rounds went.", state.seconds_left)
        yield CounterMetricFamily("oncofed_bytes_to_sites", "Bytes sent to sites.", value=state.bytes_to_sites)
        yield CounterMetricFamily(
            "oncofed_bytes_from_sites", "Bytes received from sites.", value=state.bytes_from_sites
        )
        yield from self._sites()
        yield from self._last_round()

    def _sites(self) -> Iterator[Metric]:
        sites = self.state.sites
        for name, about, values in (
            ("oncofed_site_answers", "Answers of a site.", [(s.name, s.answers) for s in sites]),
            ("oncofed_site_left_out", "Times that a site was left out.", [(s.name, s.left_out) for s in sites]),
            ("oncofed_site_bytes_from", "Bytes received from a site.", [(s.name, s.bytes_from) for s in sites]),
        ):
            counter = CounterMetricFamily(name, about, labels=("site",))
            for site, count in values:
                counter.add_metric((site,), count)
            yield counter
        yield _labelled(
            "oncofed_site_last_seen_timestamp_seconds",
            "When a site last answered, unix time.",
            ("site",),
            [((s.name,), s.last_seen) for s in sites if s.last_seen is not None],
        )
        yield _labelled(
            "oncofed_site_answer_seconds",
            "How long a site's last answer took.",
            ("site",),
            [((s.name,), s.seconds) for s in sites if s.seconds is not None],
        )

    def _last_round(self) -> Iterator[Metric]:
        if not self.state.rounds:
            return
        last = self.state.rounds[-1]
        where = (str(last.fold), last.phase)
        for name, about, value in (
            ("oncofed_round", "The last round that is done.", last.round),
            ("oncofed_round_seconds", "How long the last round took.", last.seconds),
            ("oncofed_round_sites", "Sites that took part in the last round.", last.sites),
            ("oncofed_loss", "Training loss of the last round.", last.loss),
            ("oncofed_validation", "Validation of the last round.", last.validation),
        ):
            if value is not None:
                yield _labelled(name, about, ("fold", "phase"), [(where, float(value))])


def _gauge(name: str, about: str, value: float) -> Metric:
    return GaugeMetricFamily(name, about, value=value)


def _labelled(name: str, about: str, labels: tuple[str, ...], values: list[tuple[tuple[str, ...], float]]) -> Metric:
    family = GaugeMetricFamily(name, about, labels=labels)
    for of, value in values:
        family.add_metric(of, value)
    return family
