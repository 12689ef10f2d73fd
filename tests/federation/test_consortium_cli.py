"""A coordinator's and a hospital's path through the command line, and the guide that shows it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from oncofed.common.consortium import ConsortiumFile
from oncofed.deploy import cli
from toy_consortium import NAMES, Toy, write_settings
from typer.testing import CliRunner

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "consortium.md"
runner = CliRunner()


def call(*arguments: object) -> str:
    result = runner.invoke(cli.cli, [str(a) for a in arguments])
    if result.exception:
        raise result.exception
    return result.output


def fingerprints(text: str) -> list[str]:
    return re.findall(r"(?:[0-9a-f]{4} ){5}[0-9a-f]{4}", text)


@pytest.fixture
def toy(tmp_path: Path) -> Toy:
    write_settings(tmp_path / "consortium.toml")
    toy = Toy(tmp_path)
    for name in NAMES:
        toy.site(name)
    return toy


def test_from_nothing_to_members(toy: Toy) -> None:
    """Both ends print the same fingerprints, and each can hold the other's against its own."""
    where, site = toy.root / "coordinator", toy.site("Aachen")
    made = call("consortium", "init", toy.root / "consortium.toml", "--out", where)
    assert "Rare Sarcoma: 3 members invited" in made
    (consortium,) = fingerprints(made)
    enrolled = call("site", "enrol", toy.kit("Aachen"), "--site", site, "--fingerprint", consortium)
    assert fingerprints(enrolled)[0] == consortium
    own, sent = fingerprints(enrolled)[1], site / "consortium" / "enrolment-Aachen.json"
    assert str(sent) in enrolled
    admitted = call("consortium", "admit", where, sent, "--fingerprint", own)
    assert "Aachen is a member" in admitted
    assert fingerprints(admitted) == [own]
    assert "nothing changed" in call("consortium", "admit", where, sent)
    listed = call("consortium", "list", where)
    assert {own, consortium} == set(fingerprints(listed))
    assert re.search(r"Aachen .* active", listed)
    assert re.search(r"Cork-2 .* invited", listed)
    assert re.search(r"server.crt lasts 39[67] days", listed)
    told = call("site", "roster", where / "roster.json", "--site", site)
    assert "roster 2" in told
    assert re.search(r"Aachen .* active", told)


def test_members_come_go_and_change(toy: Toy) -> None:
    where, site = toy.root / "coordinator", toy.site("Aachen")
    call("consortium", "init", toy.root / "consortium.toml", "--out", where)
    call("site", "enrol", toy.kit("Aachen"), "--site", site, "--work-dir", toy.root / "work")
    call("consortium", "admit", where, site / "consortium" / "enrolment-Aachen.json")
    call("site", "roster", where / "roster.json", "--site", site)
    assert str(where / "kits" / "Delft.zip") in call("consortium", "add", where, "Delft")
    assert "the new kit of Aachen" in call("consortium", "rotate", "member", where, "Aachen")
    call("site", "enrol", toy.kit("Aachen"), "--site", site, "--work-dir", toy.root / "work")
    call("consortium", "admit", where, site / "consortium" / "enrolment-Aachen.json")
    told = call("site", "roster", where / "roster.json", "--site", site)
    assert re.search(r"Aachen .* active .* other keys", told)
    assert "server.crt lasts" in call("consortium", "rotate", "server", where)
    before = fingerprints(call("consortium", "list", where))[-1]
    rotated = call("consortium", "rotate", "coordinator", where)
    assert fingerprints(rotated)[0] != before
    assert "kits that nobody used yet show the old one (Cork-2, Delft, St. Bergen)" in rotated
    assert "Aachen is revoked" in call("consortium", "revoke", where, "Aachen")
    assert "was revoked already" in call("consortium", "revoke", where, "Aachen")
    told = call("site", "roster", where / "roster.json", "--site", site)
    assert re.search(r"Aachen .* revoked .* active", told)


def test_mistakes_are_told_without_a_traceback(toy: Toy) -> None:
    """Names and paths as they are, markup or not."""
    where = toy.root / "coordinator"
    call("consortium", "init", toy.root / "consortium.toml", "--out", where)
    for arguments, message in (
        (("consortium", "init", toy.root / "consortium.toml", "--out", where), "is there already and stays as it is"),
        (("consortium", "list", toy.root), "is no coordinator's folder"),
        (("consortium", "add", where, "../x"), "cannot be a file's"),
        (("consortium", "revoke", where, "[red]"), "'[red]' is not in the roster"),
        (("site", "roster", where / "roster.json", "--site", toy.site("Aachen")), "pins no coordinator"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", "from oncofed.deploy.cli import main; main()", *map(str, arguments)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 1, arguments
        assert message in done.stderr.replace("\n", ""), done.stderr
        assert "Traceback" not in done.stderr


def test_the_guide_lists_every_setting() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\S*) ?\| (.*) \|$", GUIDE.read_text(), re.MULTILINE)
    for (key, default, about), (name, field) in zip(rows, ConsortiumFile.model_fields.items(), strict=False):
        assert (key, about) == (name, field.description)
        assert default == ("" if field.is_required() else str(field.default))
    assert len(rows) == len(ConsortiumFile.model_fields)


def test_the_guides_commands_run(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them, in their order, as they stand there."""
    text = GUIDE.read_text()
    monkeypatch.chdir(toy.root)
    settings = re.search(r"<<'END'\n(.*?)    END", text, re.DOTALL)
    assert settings
    Path("consortium.toml").write_text(re.sub("^    ", "", settings[1], flags=re.MULTILINE))
    commands = re.findall(r"oncofed ((?:consortium|site) [^`\n]*)", text)
    assert len(commands) == 10
    for command in commands:
        site = toy.site("Aachen")
        given = command.strip().replace("SITE_DIR", str(site))
        for file, at in (
            ("Aachen.zip", toy.root / "coordinator" / "kits" / "Aachen.zip"),
            ("enrolment-Aachen.json", site / "consortium" / "enrolment-Aachen.json"),
            (" roster.json", toy.root / "coordinator" / "roster.json"),
        ):
            given = re.sub(rf"(?<=\s){file.strip()}(?=\s|$)", str(at), given)
        call(*given.split(" "))
