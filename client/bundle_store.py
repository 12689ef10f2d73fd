"""Flower bundles at a hospital: what is in one, and the locked folder of a node that holds approved ones alone.

A SuperNode takes the bundle of a run from the coordinator, unpacks it below `$FLWR_HOME/apps` and runs what it names, so two
things stand in the way of others than those approved: the folder is locked, and the node's programs are guards. The lock alone
does not hold: Flower 1.41 takes version and publisher of a bundle for parts of a path and checks neither. The guard compares the
bundle's SHA-256 before anything is unpacked, and runs the installed oncofed whatever the bundle names.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import shutil
import subprocess
import tomllib
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from oncofed.common.files import write_program

APPS, BIN = "apps", "bin"
LARGEST = 10 * 1024 * 1024
"""Bytes of a bundle, packed or not: Flower's own bound."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
GUARDED, REFUSED = (
    "flwr-clientapp",
    ("flwr-agentapp", "flwr-serverapp", "flwr-simulation", "flwr-model", "flwr-connector"),
)
"""The program of Flower's that a node needs, and those that it would start for a coordinator who asks for them."""


@dataclass(frozen=True)
class Bundle:
    """A bundle by its names, its SHA-256, what it runs, and its files (`path size`)."""

    name: str
    sha256: str
    clientapp: str
    serverapp: str
    files: tuple[str, ...]

    @property
    def folder(self) -> str:
        """Where Flower unpacks it, below `apps`."""
        return f"{self.name}.{self.sha256[:8]}"

    @property
    def code(self) -> tuple[str, ...]:
        """Its files that hold programs; oncofed's own has none."""
        return tuple(file for file in self.files if file.split()[0].endswith((".py", ".pyc", ".so")))


def read_bundle(content: bytes) -> Bundle:
    """Raises `ValueError` on what is no bundle, or one whose names or files would lead out of its folder."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as packed:
            about = [info for info in packed.infolist() if not info.is_dir()]
            if len(content) > LARGEST or sum(info.file_size for info in about) > LARGEST:
                raise ValueError(f"it has more than {LARGEST} bytes")
            config = tomllib.loads(packed.read("pyproject.toml").decode())
        app, project = config["tool"]["flwr"]["app"], config["project"]
        names = [str(app["publisher"]), str(project["name"]), str(project["version"])]
        components = app["components"]
        client, server = str(components["clientapp"]), str(components["serverapp"])
    except (zipfile.BadZipFile, KeyError, TypeError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"no Flower bundle ({type(error).__name__}: {error})") from None
    odd = [name for name in names if not _NAME.fullmatch(name) or ".." in name]
    odd += [
        i.filename for i in about if i.filename.startswith("/") or ".." in Path(i.filename).parts or "\\" in i.filename
    ]
    if odd:
        raise ValueError(f"a Flower bundle whose {odd[0][:60]!r} would lead out of its folder; do not approve it")
    files = tuple(f"{i.filename} {i.file_size}" for i in about if not i.filename.startswith(".info/"))
    return Bundle(".".join(names), hashlib.sha256(content).hexdigest(), client, server, files)


def flower_home() -> Path:
    """Where Flower keeps a node's bundles."""
    return Path(os.environ.get("FLWR_HOME", "") or Path.home() / ".flwr")


def install(content: bytes, home: Path) -> Path:
    """Unpack a bundle as Flower would, and lock the folder of bundles again; returns where it lies."""
    bundle, apps = read_bundle(content), home / APPS
    target = apps / bundle.folder
    with unlocked(apps):
        shutil.rmtree(target, ignore_errors=True)
        with zipfile.ZipFile(io.BytesIO(content)) as packed:
            for info in packed.infolist():
                if not info.is_dir() and not info.filename.startswith(".info/"):
                    file = target / info.filename
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_bytes(packed.read(info))
    return target


def remove(bundle: Bundle, home: Path) -> None:
    """Take a bundle away whose approval was withdrawn."""
    with unlocked(home / APPS):
        shutil.rmtree(home / APPS / bundle.folder, ignore_errors=True)


@contextlib.contextmanager
def unlocked(apps: Path) -> Iterator[None]:
    """Let the folder be changed for a moment."""
    apps.mkdir(parents=True, exist_ok=True)
    unlock(apps)
    try:
        yield
    finally:
        _set_writable(apps, on=False)
        _chattr("chattr", "-R", "+i", str(apps))


def unlock(apps: Path) -> None:
    """Let the folder be changed from here on."""
    _chattr("chattr", "-R", "-i", str(apps))
    _set_writable(apps, on=True)


def is_immutable(apps: Path) -> bool:
    """Whether not even root may write there: of a folder without the flag, permissions alone keep others out."""
    found = _chattr("lsattr", "-d", str(apps))
    return found is not None and "i" in found.split()[0]


def others(home: Path, approved: list[Bundle]) -> list[str]:
    """What lies in the folder of bundles beside those approved."""
    apps = home / APPS
    return sorted({p.name for p in apps.iterdir()} - {b.folder for b in approved}) if apps.is_dir() else []


def write_guard(home: Path, site: Path) -> Path:
    """The programs that a guarded node finds first in its PATH; returns their folder."""
    folder = home / BIN
    for name in (GUARDED, *REFUSED):
        call = f"guarded_clientapp({str(site.resolve())!r})" if name == GUARDED else f"refuse_program({name!r})"
        write_program(folder / name, "oncofed.deploy.engine", call)
    return folder


def _set_writable(apps: Path, *, on: bool) -> None:
    for path in (apps, *apps.rglob("*")):
        with contextlib.suppress(OSError):
            path.chmod((0o755 if on else 0o555) if path.is_dir() else (0o644 if on else 0o444))


def _chattr(*command: str) -> str | None:
    """Its answer; None where the flag cannot be had: not root, another file system, no such program."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return None if done.returncode else done.stdout
