"""policy.toml: every key is documented, a template holds the defaults, and what is wrong is named."""

from __future__ import annotations

import tomllib
from datetime import UTC, datetime
from pathlib import Path

import pytest
from oncofed.client.hours import Hours
from oncofed.client.policy import DEFAULT, Policy
from oncofed.client.policy_text import template, toml_value
from oncofed.common.errors import Refusal
from oncofed.deploy import cli
from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parents[2]


def call(*arguments: str) -> tuple[int, str]:
    done = CliRunner(env={"COLUMNS": "200"}).invoke(cli.cli, ["site", *arguments])
    return done.exit_code, done.output + str(done.exception or "")


def test_the_guide_lists_every_key_in_order_with_its_default_and_words() -> None:
    rows = (ROOT / "docs" / "site.md").read_text().split("## The policy")[1].split("\n## ")[0].splitlines()
    told = [row for row in rows if row.startswith("| `")]
    assert [row.split("`")[1] for row in told] == list(Policy.model_fields)
    for row, (_, about) in zip(told, Policy.model_fields.items(), strict=True):
        assert row.endswith(f"| `{toml_value(about.default)}` | {about.description} |"), row


def test_the_template_is_a_policy_that_changes_nothing_until_a_line_is_freed(tmp_path: Path) -> None:
    text = template()
    assert tomllib.loads(text) == {}
    freed = "\n".join(line.removeprefix("# ") for line in text.splitlines() if " = " in line and line.startswith("# "))
    (tmp_path / "policy.toml").write_text(
        "\n".join(line for line in freed.splitlines() if line.split(" = ")[0] in Policy.model_fields)
    )
    assert Policy.read(tmp_path) == DEFAULT


def test_the_command_writes_shows_and_judges(tmp_path: Path) -> None:
    code, text = call("policy", str(tmp_path))
    assert code == 0
    assert "not there, the defaults hold" in text
    assert call("policy", str(tmp_path), "--write")[0] == 0
    assert tomllib.loads((tmp_path / "policy.toml").read_text()) == {}
    assert "stays as it is" in call("policy", str(tmp_path), "--write")[1]
    (tmp_path / "policy.toml").write_text("min_cell = 20\n")
    code, text = call("policy", str(tmp_path))
    assert code == 0
    for key in Policy.model_fields:
        assert key in text


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("min_cells = 3", "min_cells: unknown key; did you mean min_cell?"),
        ("min_cell = 0", "min_cell = 0: "),
        ('models = ["gpt"]', "models.0 = 'gpt': "),
        ('coordinators = ["xyz"]', "'xyz' is no key or hash of 64 hex digits"),
        ('hours = ["Mon-Fri 9-17"]', "wanted days and times such as"),
        ('hours = ["Mon-Fry 09:00-17:00"]', "'Mon-Fry' names no days"),
        ('hours = ["Mon 09:00-25:00"]', "25:00 is no time of the day"),
        ('hours = ["Mon 09:00-09:00"]', "begins when it ends"),
        ('time_zone = "Berlin"', "time_zone = 'Berlin' is none"),
        ("max_epsilon = nan", "max_epsilon = nan"),
        ("max_epsilon = 0", "max_epsilon = 0"),
        ("[", "not valid TOML"),
    ],
)
def test_what_is_wrong_is_named_to_the_hospital_and_not_to_the_coordinator(
    tmp_path: Path, line: str, words: str
) -> None:
    (tmp_path / "policy.toml").write_text(line + "\n")
    code, text = call("policy", str(tmp_path))
    assert code == 1
    assert words in text
    with pytest.raises(Refusal, match=r"^the site's policy\.toml cannot be used \(\w+\); the site's engineer"):
        Policy.read(tmp_path)


@pytest.mark.parametrize(
    ("texts", "zone", "now", "opens"),
    [
        ((), "UTC", "2026-11-29T12:00", None),
        (("Mon-Sun 00:00-24:00",), "UTC", "2026-11-29T23:59", None),
        (("Mon 08:00-18:00",), "UTC", "2026-11-30T18:00", "2026-12-07T08:00+00:00"),
        (("Mon 08:00-18:00",), "UTC", "2026-11-30T07:59", "2026-11-30T08:00+00:00"),
        (("Sat-Mon 22:00-02:00",), "UTC", "2026-12-01T01:59", None),  # Monday's, on Tuesday
        (("Sat-Mon 22:00-02:00",), "UTC", "2026-12-01T02:00", "2026-12-05T22:00+00:00"),
        (("Sun 20:00-24:00", "Mon 06:00-07:00"), "America/New_York", "2026-11-30T05:30", "2026-11-30T06:00-05:00"),
        (("Sun 03:00-04:00",), "Europe/Berlin", "2026-03-29T01:00", None),  # the night when clocks go forward
        (("Sun 03:00-04:00",), "Europe/Berlin", "2026-10-25T02:30", None),  # and back
    ],
)
def test_opening_hours(texts: tuple[str, ...], zone: str, now: str, opens: str | None) -> None:
    found = Hours(texts, zone).opens(datetime.fromisoformat(now).replace(tzinfo=UTC))
    assert (found.isoformat(timespec="minutes") if found else None) == opens
