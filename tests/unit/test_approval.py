"""Approvals of code, bundles and studies: hashes that are the same everywhere, and a person behind each."""

from __future__ import annotations

import io
import json
import os
import shutil
import zipfile
from pathlib import Path

import pytest
from oncofed.client import bundle_store
from oncofed.client.approval import PARTS, Approvals, Package, code_hash
from oncofed.common import signing
from oncofed.common.errors import Refusal
from oncofed.common.plan import Plan
from oncofed.common.signed_study import is_signed, read_file, signature_beside, signed_text
from oncofed.common.study import Study
from oncofed.deploy import cli
from oncofed.deploy.bundle import build_bundle, run_options, write_bundle
from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parents[2]
BY = "Dr. Ada Lovelace"


def call(*arguments: str, typed: str = "") -> tuple[int, str]:
    done = CliRunner(env={"COLUMNS": "200"}).invoke(cli.cli, list(arguments), input=typed)
    return done.exit_code, done.output + str(done.exception or "")


@pytest.fixture
def site(tmp_path: Path) -> Path:
    folder = tmp_path / "mayo"
    folder.mkdir()
    (folder / "site.toml").write_text('name = "Mayo"\nexpression_unit = "log2"\n')
    return folder


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_bundle(tmp_path_factory.mktemp("bundle"))


def test_the_hash_of_the_code_is_that_of_its_files_wherever_they_lie(tmp_path: Path) -> None:
    here = {part: ROOT / part for part in PARTS}
    assert Package.installed().hash == code_hash(here.items())
    for part, folder in here.items():
        shutil.copytree(folder, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    there = {part: tmp_path / part for part in reversed(PARTS)}
    assert code_hash(there.items()) == code_hash(here.items())
    file = tmp_path / "client" / "app.py"
    file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))  # as git writes it on another system
    assert code_hash(there.items()) == code_hash(here.items())
    file.write_bytes(file.read_bytes() + b"\n# a remark\n")
    assert code_hash(there.items()) != code_hash(here.items())
    file.rename(file.with_name("apps.py"))
    assert code_hash(there.items()) != code_hash(here.items())


def test_the_bundle_is_the_same_for_every_study_and_holds_no_code(bundle: Path, tmp_path: Path) -> None:
    again = build_bundle(tmp_path)
    assert again.read_bytes() == bundle.read_bytes()
    read = bundle_store.read_bundle(bundle.read_bytes())
    assert read.code == ()
    assert (read.clientapp, read.serverapp) == ("oncofed.client.app:app", "oncofed.server.app:app")
    one = write_bundle(tmp_path / "one", Study(name="a", seed=7).run_config())
    two = write_bundle(tmp_path / "two", {"plan": '{"kind": "km", "where": ["a=\\"b\\""]}'})
    for name in ("pyproject.toml", "README.md"):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    assert run_options(one) == ["-c", str(one / "run.toml")]
    assert (one / "run.toml").read_text() == 'name = "a"\nseed = 7\n'
    assert run_options(write_bundle(tmp_path / "three", Study().run_config())) == []


def test_a_person_approves_what_the_command_shows(site: Path, bundle: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    sent = ("site", "approve", str(site), "--bundle", str(bundle), "--flower-home", str(home), "--by", BY)
    try:
        code, text = call(*sent, typed="n\n")
        assert code == 1
        assert Package.installed().hash in text
        assert not (site / "approvals.jsonl").exists()
        assert not home.exists()
        code, text = call(*sent, typed="y\n")
        assert code == 0
        read = bundle_store.read_bundle(bundle.read_bytes())
        for said in (read.sha256, "oncofed.client.app:app", "pyproject.toml", str(home / "bin")):
            assert said in text
        (line,) = [json.loads(x) for x in (site / "approvals.jsonl").read_text().splitlines()]
        assert (line["op"], line["by"], line["bundle"]["sha256"]) == ("approve", BY, read.sha256)
        approvals = Approvals(site, "Mayo")
        approvals.check_package(Package.installed())
        approvals.check_bundle(read.sha256)
        assert approvals.bundles() == [read]
        assert (home / "apps" / read.folder / "pyproject.toml").exists()
        assert not (home / "apps" / read.folder / ".info").exists()
        assert bundle_store.others(home, approvals.bundles()) == []
        if os.geteuid() or bundle_store.is_immutable(home / "apps"):
            with pytest.raises(PermissionError):
                (home / "apps" / "other").mkdir()
        guard = (home / "bin" / "flwr-clientapp").read_text()
        assert guard.endswith(f"guarded_clientapp({str(site)!r})\n")
        assert "refuse_program" in (home / "bin" / "flwr-agentapp").read_text()
        assert call(*sent, "--withdraw", "--yes")[0] == 0
        with pytest.raises(Refusal, match="nobody here approved the Flower bundle"):
            approvals.check_bundle(read.sha256)
        assert list((home / "apps").iterdir()) == []
    finally:
        bundle_store.unlock(home / "apps")


def test_who_approves_must_be_a_person(site: Path) -> None:
    for name in ("", "root", "a\nb c"):
        code, text = call("site", "approve", str(site), "--by", name, "--yes")
        assert code == 1
        assert "a person answers for this" in text
    assert not (site / "approvals.jsonl").exists()


def test_a_study_is_approved_by_itself(site: Path, tmp_path: Path) -> None:
    file = tmp_path / "lung.toml"
    file.write_text('name = "lung"\n[training]\nrounds = 7\n')
    code, text = call("site", "approve", str(site), "--study", str(file), "--by", BY, "--yes")
    assert code == 0
    assert "training.rounds = 7" in text
    approvals = Approvals(site, "Mayo")
    approvals.check_text(Study(name="lung").changed(training__rounds=7))
    with pytest.raises(Refusal, match="as it is asked"):
        approvals.check_text(Study(name="lung").changed(training__rounds=8))
    with pytest.raises(Refusal, match="nobody here approved oncofed"):
        approvals.check_package(Package.installed())


def fab(version: str = "1", publisher: str = "p", extra: dict[str, bytes] | None = None) -> bytes:
    text = (
        f'[project]\nname = "n"\nversion = "{version}"\n[tool.flwr.app]\npublisher = "{publisher}"\n'
        '[tool.flwr.app.components]\nserverapp = "s:app"\nclientapp = "c:app"\n'
    )
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as packed:
        for name, content in {"pyproject.toml": text.encode(), **(extra or {})}.items():
            packed.writestr(name, content)
    return out.getvalue()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (fab("1/../../x"), "would lead out of its folder"),
        (fab(publisher="../x"), "would lead out of its folder"),
        (fab(publisher=""), "would lead out of its folder"),
        (fab(extra={"../evil.py": b""}), "would lead out of its folder"),
        (fab(extra={"/etc/evil": b""}), "would lead out of its folder"),
        (fab(extra={"big.md": b"\0" * 11_000_000}), "it has more than"),
        (b"no zip", "no Flower bundle"),
    ],
)
def test_bundles_that_lead_astray_cannot_be_approved(site: Path, tmp_path: Path, content: bytes, words: str) -> None:
    file = tmp_path / "x.fab"
    file.write_bytes(content)
    code, text = call("site", "approve", str(site), "--bundle", str(file), "--by", BY, "--yes")
    assert code == 1
    assert words in text
    assert not (site / "approvals.jsonl").exists()


def test_code_in_a_bundle_is_pointed_at(site: Path, tmp_path: Path) -> None:
    file = tmp_path / "x.fab"
    file.write_bytes(fab(extra={"c.py": b"import os\n"}))
    _, text = call("site", "approve", str(site), "--bundle", str(file), "--by", BY, typed="n\n")
    assert "brings code of its own" in text


@pytest.mark.parametrize(
    "text", ['name = "lung"\nseed = 3\n[splits]\nheld_out_sites = ["all"]\n', 'kind = "km"\nepsilon = 1.0\n']
)
def test_studies_and_plans_are_signed_in_a_file_beside_them(tmp_path: Path, text: str) -> None:
    file, key = tmp_path / "asked.toml", tmp_path / "coordinator.key"
    file.write_text(text)
    private = signing.new_private()
    key.write_text(private.hex() + "\n")
    code, told = call("study", "sign", str(file), "--key", str(key))
    assert code == 0
    assert signing.public_of(private) in told
    asked = read_file(file)
    assert isinstance(asked, Plan if "kind" in text else Study)
    assert is_signed(asked, signing.public_of(private), signature_beside(file))
    assert not is_signed(asked, signing.public_of(signing.new_private()), signature_beside(file))
    assert "no key of 64 hex digits" in call("study", "sign", str(file), "--key", str(file))[1]


def test_what_is_signed_is_the_same_after_a_journey_as_json() -> None:
    study = Study().changed(
        name="lung", task__time_edges=(0, 12.5, 60), cancers=["BRCA"], training__start="/a/b/m.safetensors"
    )
    told = study.changed(training__start="m.safetensors", runtime__threads=3, runtime__out="elsewhere")
    assert signed_text(Study.from_json(told.model_dump_json())) == signed_text(study)
    assert signed_text(study.changed(seed=1)) != signed_text(study)
