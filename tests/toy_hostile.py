"""Coordinators that mean no good: bundles that bring code of their own, and a server of their own making behind the approved bundle."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import oncofed.server
import tomli_w
from flwr.app import Array, ArrayRecord, RecordDict
from oncofed.common.panel import GenePanel
from oncofed.deploy.bundle import write_bundle
from oncofed.deploy.loopback import submit, wait
from oncofed.deploy.services.processes import flower_environment

PANEL = GenePanel(("GENE0000", "GENE0001"))
QUESTION: dict[str, Any] = {
    "fold": 0,
    "round": 0,
    "panel_hash": PANEL.hash,
    "genes": list(PANEL.genes),
    "cancers": ["BRCA", "LUAD"],
}
"""What a question of a study holds beside the study."""


def piece(header: object, numbers: bytes = b"") -> bytes:
    """Arrays in one piece as a sender of ill will may write them; a header of bytes stands as it is."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + numbers


def odd_array(dtype: str, shape: Sequence[int], numbers: bytes, layout: str = "safetensors") -> ArrayRecord:
    """The arrays of a message, of which one says of itself what need not be true."""
    about = {"dtype": dtype, "shape": list(shape), "data_offsets": [0, len(numbers)]}
    data = piece({"weights/x": about}, numbers)
    return ArrayRecord({"sum": Array("uint8", (len(data),), layout, data)})


BUNDLE_CODE = """
import json, pathlib, time
from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
server = ServerApp()
client = ClientApp()

@client.query()
def steal(message, context):
    pathlib.Path(context.run_config["mark"]).write_text("the coordinator's code ran at the hospital")
    return Message(RecordDict(), reply_to=message)

@server.main()
def main(grid, context):
    while not (nodes := sorted(grid.get_node_ids())):
        time.sleep(0.2)
    replies = grid.send_and_receive([Message(RecordDict(), n, "query") for n in nodes], timeout=100)
    said = [[r.error.code, r.error.reason] if r.has_error() else [0, ""] for r in replies]
    pathlib.Path(context.run_config["out"]).write_text(json.dumps(said))
"""

SERVER_CODE = """
import json, pickle, time
from pathlib import Path
from flwr.app import Message
from flwr.serverapp import ServerApp
from oncofed.common import wire
app = ServerApp()

@app.main()
def main(grid, context):
    out = Path(context.run_config["runtime.out"])
    while not (nodes := sorted(grid.get_node_ids())):
        time.sleep(0.2)
    said = []
    for kind, content in pickle.loads((out / "questions").read_bytes()):
        (reply,) = grid.send_and_receive([Message(content, nodes[0], kind)], timeout=120)
        said.append({"error": reply.error.reason} if reply.has_error() else wire.read_config(reply.content, "from"))
    (out / "said.json").write_text(json.dumps(said, default=str))
"""


PACKED = """
import zipfile
from flwr.cli import build
build.write_to_zip = lambda file, path, content: file.writestr(path, content, zipfile.ZIP_DEFLATED)
from flwr.cli.app import app
app()
"""
"""Flower's own command stores what it packs; this one leaves nothing of many zeros."""


def submitted(bundle: Path, home: Path) -> str:
    """Start a run of a bundle that is packed as small as it can be; returns its id."""
    command = [sys.executable, "-c", PACKED, "run", str(bundle), "--format", "json"]
    done = subprocess.run(
        command, env=flower_environment(home), cwd=home, capture_output=True, text=True, timeout=120, check=True
    )
    return str(json.loads(done.stdout[done.stdout.index("{") :])["run-id"])


def hostile_bundle(folder: Path, version: str, name: str = "evil", more: Mapping[str, int] | None = None) -> Path:
    """A bundle that brings code of its own, and files of zeros, of so many bytes, beside it."""
    folder.mkdir()
    app = {
        "publisher": "oncofed",
        "components": {"serverapp": "hostile:server", "clientapp": "hostile:client"},
        "config": {"mark": str(folder / "mark"), "out": str(folder / "said.json")},
    }
    project = {"name": name, "version": version, "description": "x", "license": "x", "dependencies": []}
    (folder / "pyproject.toml").write_text(tomli_w.dumps({"project": project, "tool": {"flwr": {"app": app}}}))
    (folder / "hostile.py").write_text(BUNDLE_CODE)
    for file, size in (more or {}).items():
        with (folder / file).open("wb") as out:
            out.truncate(size)
    return folder


def hostile_package(root: Path) -> Path:
    """An oncofed whose server sends what it finds in a file; returns the folder for PYTHONPATH. All else is the installed one."""
    (installed,) = (Path(p).parent for p in oncofed.server.__path__)
    server = root / "oncofed" / "server"
    server.mkdir(parents=True)
    for part in ("common", "client", "deploy"):
        (server.parent / part).symlink_to(installed / part)
    for file in (installed / "server").iterdir():
        if file.name != "app.py":
            (server / file.name).symlink_to(file)
    (server / "app.py").write_text(SERVER_CODE)
    return root


def put_to_a_node(
    questions: Sequence[tuple[str, RecordDict]], home: Path, out: Path, logs: Path
) -> list[dict[str, Any]]:
    """What a node answers to questions of such a server, which the approved bundle brings: its config, or `error`."""
    out.mkdir()
    (out / "questions").write_bytes(pickle.dumps(list(questions)))
    bundle = write_bundle(out / "bundle", {"runtime.out": str(out)})
    wait(submit(bundle, home=home), home=home, timeout_s=600, logs=logs)
    return list(json.loads((out / "said.json").read_text()))
