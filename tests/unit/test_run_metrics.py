"""Metrics of a run for Prometheus, read with Prometheus's own parser."""

from __future__ import annotations

import time
from pathlib import Path

from oncofed.deploy.operate.metrics import ONLINE_S, exposed, online
from oncofed.deploy.operate.state import Follower, RunState
from oncofed.deploy.operate.web import application
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient
from toy_journal import write_journal

TOKEN = "t" * 43


def read(text: str) -> dict[tuple[str, ...], float]:
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_the_metrics_say_what_the_state_says(tmp_path: Path) -> None:
    state = RunState.of(write_journal(tmp_path / "out"))
    told = read(exposed(state, lambda: (state.updated or 0.0) + 30).decode())
    assert told["oncofed_run_info", "0.1.0", "pan-cancer-1"] == 1
    assert [told["oncofed_run_status", s] for s in ("waiting", "running", "finished", "failed")] == [0, 1, 0, 0]
    assert (told["oncofed_rounds_done",], told["oncofed_rounds_planned",]) == (7, 10)
    assert (told["oncofed_sites",], told["oncofed_sites_online",]) == (3, 3)
    assert told["oncofed_site_answers_total", "North"] == 7
    assert told["oncofed_site_left_out_total", "Ridge"] == 1
    assert told["oncofed_site_left_out_total", "North"] == 0
    assert told["oncofed_site_bytes_from_total", "North"] == 7 * 1_500_000
    assert told["oncofed_bytes_to_sites_total",] == 7 * 6_000_000
    assert told["oncofed_bytes_from_sites_total",] == 7 * 4_500_000
    assert told["oncofed_round_seconds", "1", "training"] == 4.0
    assert told["oncofed_loss", "1", "training"] == state.rounds[-1].loss
    assert told["oncofed_validation", "1", "training"] == state.rounds[-1].validation
    assert told["oncofed_last_event_age_seconds",] == 30
    assert told["oncofed_seconds_left",] == 12


def test_a_run_that_has_not_begun_has_metrics() -> None:
    told = read(exposed(RunState()).decode())
    assert told["oncofed_run_status", "waiting"] == 1
    assert told["oncofed_rounds_done",] == 0
    assert not any(name.startswith("oncofed_loss") for name, *_ in told)


def test_hidden_losses_are_no_numbers(tmp_path: Path) -> None:
    told = read(exposed(RunState.of(write_journal(tmp_path / "out", loss=False))).decode())
    assert ("oncofed_loss", "1", "training") not in told
    assert told["oncofed_round", "1", "training"] == 2


def test_sites_go_offline_with_time_and_with_the_run(tmp_path: Path) -> None:
    state = RunState.of(write_journal(tmp_path / "out", done=2))
    assert state.updated is not None
    assert online(state, state.updated) == 3
    assert online(state, state.updated + ONLINE_S + 60) == 0
    ended = RunState.of(write_journal(tmp_path / "ended", end="finished"))
    assert online(ended, time.time()) == 0


def test_names_cannot_forge_metrics(tmp_path: Path) -> None:
    name = 'x"} 1\noncofed_rounds_done 99\n#\\'
    told = read(exposed(RunState.of(write_journal(tmp_path / "out", sites=(name,)))).decode())
    assert told["oncofed_rounds_done",] == 7
    assert told["oncofed_site_answers_total", name.replace("\n", " ")] == 7  # on one line in all that is shown


def test_prometheus_reads_with_the_token(tmp_path: Path) -> None:
    out = write_journal(tmp_path / "out")
    client = TestClient(application(out, TOKEN, Follower(out).state), base_url="http://127.0.0.1:8600")
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": f"Basic {TOKEN}"}):
        response = client.get("/metrics", headers=headers)
        assert response.status_code == 401
        assert "oncofed_" not in response.text
    response = client.get("/metrics", headers={"authorization": f"Bearer {TOKEN}"})
    assert response.headers["content-type"].startswith("text/plain; version=")
    assert read(response.text)["oncofed_rounds_done",] == 7
    assert "set-cookie" not in response.headers
