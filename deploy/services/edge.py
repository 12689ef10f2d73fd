"""The edge: an nginx that hospitals reach, in front of a SuperLink whose own port they must not."""

from __future__ import annotations

import os
import shutil
import socket
from importlib.resources import files as packaged
from pathlib import Path

import jinja2
from oncofed.common.files import write_text

PLACES = ("/usr/sbin/nginx", "/usr/local/sbin/nginx", "/opt/homebrew/bin/nginx")
"""Where nginx is when PATH does not lead to it: system folders are often missing from a service's PATH."""


def find_nginx() -> str:
    """The program; raises `ValueError` that names the package."""
    found = shutil.which("nginx") or next((p for p in PLACES if os.access(p, os.X_OK)), None)
    if found is None:
        raise ValueError(
            "nginx is not installed, and hospitals must reach the SuperLink through it alone; install the package nginx-light (Debian, "
            "Ubuntu) or nginx (others), or start with --no-edge and let a proxy of your own forward /v1/fleet/ as docs/deployment.md says"
        )
    return found


def rendered(template: str, **said: object) -> str:
    """A template of the coordinator's side with these words filled in."""
    text = packaged("oncofed.deploy.consortium").joinpath("templates", "server", template).read_text(encoding="utf-8")
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True, autoescape=False)
    return environment.from_string(text).render(said)


def write_edge(
    run: Path, *, certificate: Path, key: Path, authority: Path, port: int, superlink: str, bind: str = ""
) -> Path:
    """nginx.conf in the folder `run`, which nginx uses for what it keeps; `bind` is an address, every one without it."""
    run.mkdir(parents=True, exist_ok=True)
    text = rendered(
        "nginx.conf",
        run=_plain(run),
        listens=[f"{_bracketed(bind)}:{port}"] if bind else _everywhere(port),
        certificate=_plain(certificate),
        key=_plain(key),
        authority=_plain(authority),
        superlink=superlink,
    )
    write_text(run / "nginx.conf", text)
    return run / "nginx.conf"


def edge_command(nginx: str, configuration: Path) -> list[str]:
    """Run it in the foreground; what it says before it has read its configuration goes to the same place."""
    return [nginx, "-e", "stderr", "-p", str(configuration.parent), "-c", str(configuration)]


def _plain(path: Path) -> str:
    """A path as nginx reads it between quotation marks; raises `ValueError` on characters that would mean something to it."""
    text = str(path.absolute())
    if set(text) & set("\"'\\${}\n"):
        raise ValueError(f"{text}: nginx cannot be told of this folder; choose one without \" ' \\ $ {{ }}")
    return text


def _bracketed(address: str) -> str:
    return f"[{address}]" if ":" in address else address


def _everywhere(port: int) -> list[str]:
    """All addresses, those of IPv6 where the machine has any."""
    listens = [str(port)]
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
        listens.append(f"[::]:{port}")
    except OSError:
        pass
    return listens
