"""Reads a start-up kit, a folder or a zip, as something that anybody may have sent: plain small files, and nothing beyond them."""

from __future__ import annotations

import re
import stat
import zipfile
import zlib
from pathlib import Path

MOST_FILES = 40
LARGEST = 1 << 20
"""Bytes of one file."""
MOST_BYTES = 4 << 20
"""Bytes of all of them."""
WIDEST_RATIO = 200
"""Unpacked over packed: text packs well, bombs better."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_AGAIN = "take the kit as the coordinator sent it, or ask for it again"


def read_files(kit: Path) -> dict[str, bytes]:
    """The files of a kit by name, all in its one folder; raises `ValueError` where it holds anything else."""
    if kit.is_dir():
        files = _of_folder(kit)
    elif kit.exists():
        files = _of_zip(kit)
    else:
        raise ValueError(f"{kit} is not there; name the start-up kit that the coordinator sent, a zip or a folder")
    for name, content in files.items():
        if b"PRIVATE KEY" in content:
            raise ValueError(
                f"{kit}: {name} holds a private key, and a kit never does: those are made here; do not use it, and tell the coordinator"
            )
    return files


def _of_folder(kit: Path) -> dict[str, bytes]:
    entries = sorted(kit.iterdir())
    _check_count(kit, len(entries))
    for entry in entries:
        if entry.is_symlink() or not entry.is_file():
            raise ValueError(f"{kit}: {entry.name!r} is a link or a folder, and a kit has plain files alone; {_AGAIN}")
        _check_name(kit, entry.name)
        _check_size(kit, entry.name, entry.stat().st_size)
    files = {entry.name: entry.read_bytes() for entry in entries}
    _check_total(kit, sum(map(len, files.values())))
    return files


def _of_zip(kit: Path) -> dict[str, bytes]:
    try:
        with zipfile.ZipFile(kit) as packed:
            entries = [e for e in packed.infolist() if not e.is_dir()]
            _check_count(kit, len(packed.infolist()))
            _check_total(kit, sum(e.file_size for e in entries))
            files: dict[str, bytes] = {}
            for entry in entries:
                name = _plain_name(kit, entry)
                if name in files:
                    raise ValueError(f"{kit}: {name!r} is in it twice; {_AGAIN}")
                files[name] = _unpacked(kit, packed, entry)
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, UnicodeDecodeError) as error:
        raise ValueError(f"{kit} is no zip that can be read ({type(error).__name__}: {error}); {_AGAIN}") from None
    return files


def _plain_name(kit: Path, entry: zipfile.ZipInfo) -> str:
    """An entry's name below the kit's one folder."""
    mode = entry.external_attr >> 16
    if mode and not stat.S_ISREG(mode) and stat.S_IFMT(mode):
        raise ValueError(f"{kit}: {entry.filename!r} is a link or a device, and a kit has plain files alone; {_AGAIN}")
    if entry.flag_bits & 1:
        raise ValueError(f"{kit}: {entry.filename!r} is encrypted; {_AGAIN}")
    _check_name(kit, entry.filename)
    return entry.filename


def _unpacked(kit: Path, packed: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    """One file's content; what an entry says of its own size is not believed."""
    _check_size(kit, entry.filename, entry.file_size)
    with packed.open(entry) as file:
        content = file.read(LARGEST + 1)
    _check_size(kit, entry.filename, len(content))
    if len(content) > WIDEST_RATIO * max(entry.compress_size, 1):
        raise ValueError(
            f"{kit}: {entry.filename!r} unpacks to {len(content)} bytes of {entry.compress_size}, as zip bombs do; {_AGAIN}"
        )
    return content


def _check_name(kit: Path, name: str) -> None:
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"{kit}: the file name {name[:100]!r} leads elsewhere or is none of a kit's, which all lie in one folder; {_AGAIN}"
        )


def _check_count(kit: Path, count: int) -> None:
    if count > MOST_FILES:
        raise ValueError(f"{kit} holds {count} files, a kit has at most {MOST_FILES}; {_AGAIN}")


def _check_size(kit: Path, name: str, size: int) -> None:
    if size > LARGEST:
        raise ValueError(f"{kit}: {name} has more than {LARGEST} bytes; {_AGAIN}")


def _check_total(kit: Path, size: int) -> None:
    if size > MOST_BYTES:
        raise ValueError(f"{kit} unpacks to {size} bytes, a kit has at most {MOST_BYTES}; {_AGAIN}")
