"""Writes a member's start-up kit: a folder and a zip of the same files, the same bytes from the same content. No private key is in it."""

from __future__ import annotations

import io
import os
import shutil
import zipfile
from collections.abc import Mapping
from importlib.resources import files as packaged
from pathlib import Path

import jinja2
from oncofed.common import signing
from oncofed.common.consortium import ConsortiumFile
from oncofed.common.enrolment import CA_FILE, KIT_FILE, Kit, digests
from oncofed.common.files import write_secret
from oncofed.common.wire import package_version

_HERE = "oncofed.deploy.consortium"
_EPOCH = (1980, 1, 1, 0, 0, 0)


def write_kit(
    folder: Path,
    settings: ConsortiumFile,
    member: str,
    *,
    token: str,
    authority: bytes,
    private: bytes,
    new_keys: bool = False,
) -> Path:
    """`folder/MEMBER/` and `folder/MEMBER.zip`, in place of those that were there; returns the zip."""
    files = kit_files(settings, member, token=token, authority=authority, private=private, new_keys=new_keys)
    target = folder / member
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(mode=0o700, parents=True)
    for name, content in files.items():
        write_secret(target / name, content)  # kit.toml has the token
        os.chmod(target / name, _mode(name))
    zipped = folder / f"{member}.zip"
    write_secret(zipped, pack(files))
    return zipped


def kit_files(
    settings: ConsortiumFile, member: str, *, token: str, authority: bytes, private: bytes, new_keys: bool
) -> dict[str, bytes]:
    """The files of a kit by name, kit.toml signed over all others."""
    said = {
        "consortium": settings.name,
        "member": member,
        "address": settings.address,
        "port": settings.port,
        "version": package_version(),
        "new_keys": new_keys,
    }
    files = {name: _render(name, said) for name in templates()} | {CA_FILE: authority}
    kit = Kit(
        consortium=settings.name,
        member=member,
        address=settings.address,
        port=settings.port,
        coordinator=signing.public_of(private),
        token=token,
        new_keys=new_keys,
        version=package_version(),
        files=digests(files),
    )
    return dict(sorted((files | {KIT_FILE: kit.text(private).encode()}).items()))


def templates() -> list[str]:
    """Names of the files that are written from templates."""
    return sorted(f.name for f in packaged(_HERE).joinpath("templates", "site").iterdir() if f.is_file())


def pack(files: Mapping[str, bytes]) -> bytes:
    """A zip without dates and owners."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in sorted(files.items()):
            entry = zipfile.ZipInfo(name, _EPOCH)
            entry.compress_type, entry.create_system = zipfile.ZIP_DEFLATED, 3
            entry.external_attr = (0o100000 | _mode(name)) << 16
            packed.writestr(entry, content)
    return buffer.getvalue()


def _mode(name: str) -> int:
    return 0o700 if name.endswith(".sh") else 0o600


def _render(name: str, said: Mapping[str, object]) -> bytes:
    template = packaged(_HERE).joinpath("templates", "site", name).read_text(encoding="utf-8")
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True, autoescape=False)
    return environment.from_string(template).render(said).encode()
