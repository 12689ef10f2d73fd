"""Engines: run one ServerApp against many sites in-process, on Ray, or as real processes on loopback.

The one module that touches Flower's private parts; `check_version` guards them.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sqlite3
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import flwr
from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid, ServerApp
from oncofed.common.errors import Refusal
from oncofed.deploy.bundle import write_bundle

TESTED_FLOWER = "1.41"

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""No telemetry, no update check, no installation at run time, in every process that we start."""

Value = bool | int | float | str


def check_version() -> None:
    """Refuse a Flower whose private parts were not tested here."""
    if not flwr.__version__.startswith(TESTED_FLOWER + "."):
        raise RuntimeError(
            f"flwr {flwr.__version__} is installed, oncofed works with {TESTED_FLOWER}.*; pip install 'flwr=={TESTED_FLOWER}.0'"
        )


class InProcessGrid(Grid):
    """Flower's Grid over sites in this process: no serialisation, no threads, so a breakpoint in a site just stops.

    A message is handled when its reply is pulled, one at a time: the server holds one reply, whatever the number of
    sites. `fault(message)` may return `lost` (never arrives), `lost-reply` or `error`, to test what a server does then.
    `through_wire` sends everything through Flower's own serialisation, as a deployment does.
    """

    all_present = True

    def __init__(
        self,
        client_app: ClientApp,
        node_configs: list[dict[str, Value]],
        run_config: dict[str, Value] | None = None,
        *,
        fault: Callable[[Message], str | None] | None = None,
        through_wire: bool = False,
        order: Callable[[list[str]], list[str]] = list,
    ) -> None:
        check_version()
        from flwr.supercore.run import Run
        from flwr.supercore.task_identity import TaskIdentity

        # Message(content, node, type) asks this private holder for its run; inside a process there is one run.
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
        self.client_app, self.fault, self.through_wire, self.order = client_app, fault, through_wire, order
        self._contexts = {
            1000 + i: Context(
                run_id=1, node_id=1000 + i, node_config=dict(c), state=RecordDict(), run_config=dict(run_config or {})
            )
            for i, c in enumerate(node_configs)
        }
        self._pending: dict[str, Message] = {}
        self._run = Run.create_empty(run_id=1)

    def set_run(self, run: object) -> None:
        self._run = run  # type: ignore[assignment]

    @property
    def run(self):  # type: ignore[no-untyped-def]
        return self._run

    def create_message(self, content, message_type, dst_node_id, group_id, ttl=None) -> Message:  # type: ignore[no-untyped-def]
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        return list(self._contexts)

    def get_nodes(self) -> Iterable[NodeInfo]:
        return [NodeInfo(node_id=n) for n in self._contexts]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            identifier = str(uuid4())
            message.metadata.__dict__["_message_id"] = identifier
            self._pending[identifier] = message
            ids.append(identifier)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The reply to one of the waiting messages; a lost one stays open, as it would on a network."""
        for identifier in self.order([i for i in message_ids if i in self._pending]):
            reply = self._handle(self._pending.pop(identifier))
            if reply is not None:
                return [reply]
        return []

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        waiting, replies = set(self.push_messages(messages)), []
        while new := list(self.pull_messages(sorted(waiting))):
            replies += new
            waiting -= {m.metadata.reply_to_message_id for m in new}
        return replies

    def _handle(self, message: Message) -> Message | None:
        fault = self.fault(message) if self.fault else None
        if fault == "lost":
            return None
        if self.through_wire:
            message = _through_wire(message)
        try:
            if fault == "error":
                raise RuntimeError("injected fault")
            reply = self.client_app(message, self._contexts[message.metadata.dst_node_id])
        except Exception as error:  # what flwr's SuperNode does with an exception of the ClientApp
            reply = Message(
                Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, f"{type(error)}:<'{error}'>"), reply_to=message
            )
        if fault == "lost-reply":
            return None
        reply.metadata.__dict__["_message_id"] = str(uuid4())
        return _through_wire(reply) if self.through_wire else reply


def _through_wire(message: Message) -> Message:
    """Serialise and deserialise as the deployment runtime does."""
    from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
    from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

    identifier = message.metadata.message_id
    contents = {key: value.deflate() for key, value in get_all_nested_objects(message).items()}
    out = inflate_object_from_contents(message.object_id, contents)
    assert isinstance(out, Message)
    out.metadata.__dict__["_message_id"] = identifier
    out.metadata.delivered_at = ""
    return out


def run_in_process(
    server_app: ServerApp, client_app: ClientApp, node_configs: list[dict[str, Value]], run_config: dict[str, Value]
) -> None:
    """Run a ServerApp over in-process sites; its exceptions are raised here."""
    grid = InProcessGrid(client_app, node_configs, run_config)
    server_app(grid, Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=dict(run_config)))


def run_on_ray(
    server_attr: str, client_attr: str, sites: int, run_config: dict[str, Value], *, cpus: int = 1, gpus: float = 0.0
) -> None:
    """Run on Flower's simulation runtime (Ray). `flwr run` does the same from a command line."""
    check_version()
    os.environ.update(QUIET)
    from flwr.simulation.run_simulation import _run_simulation
    from flwr.supercore.constant import NOOP_FEDERATION_ID
    from flwr.supercore.run import Run
    from flwr.supercore.task_identity import TaskIdentity
    from flwr.supercore.telemetry import EventType

    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    run = replace(
        Run.create_empty(run_id=1), override_config=run_config, federation_id=NOOP_FEDERATION_ID, primary_task_id=1
    )
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=dict(run_config))
    with tempfile.TemporaryDirectory() as folder:
        write_bundle(Path(folder), run_config)
        _run_simulation(
            num_supernodes=sites,
            exit_event=EventType.PYTHON_API_RUN_SIMULATION_LEAVE,
            server_app_attr=server_attr,
            client_app_attr=client_attr,
            server_app_context=context,
            app_dir=str(folder),
            run=run,
            is_app=True,
            backend_config={
                "client_resources": {"num_cpus": cpus, "num_gpus": gpus},
                "init_args": {"include_dashboard": False},
            },
        )


@dataclass(frozen=True)
class Node:
    """A node as the SuperLink knows it. `key` is PEM; `status` is Flower's: registered, online, offline or unregistered."""

    identifier: int
    key: bytes
    status: str
    online_until: float
    """Seconds since 1970 that the last heartbeat reaches to; 0 where there was none."""
    activated: str


def nodes_of(database: Path) -> list[Node]:
    """All nodes that a SuperLink's database has, none before it was made; `flwr supernode list` tells neither keys nor names."""
    check_version()
    if not database.exists():
        return []
    with contextlib.closing(sqlite3.connect(f"{database.resolve().as_uri()}?mode=ro", uri=True, timeout=10)) as link:
        if not link.execute("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'node'").fetchall():
            return []
        rows = link.execute("SELECT node_id, public_key, status, online_until, last_activated_at FROM node").fetchall()
    return [
        Node(n % 2**64, bytes(key or b""), status, float(until or 0), at or "") for n, key, status, until, at in rows
    ]


def guarded_clientapp(site: str) -> None:
    """Flower's `flwr-clientapp` at a hospital that approves bundles: it runs the installed oncofed, whatever a bundle names, and that only for
    a bundle whose SHA-256 stands among the approvals in the site's folder. No bundle is unpacked."""
    check_version()
    from flwr.supernode.cli import flwr_clientapp
    from flwr.supernode.runtime import run_clientapp as runtime

    # oncofed is imported once the process has reported to its SuperNode, which gives up on one that is slow to begin
    def check(fab_file: bytes, *_: object, **__: object) -> Path:
        from oncofed.client.approval import RUNNING, Approvals

        bundle, name = hashlib.sha256(fab_file).hexdigest(), Path(site).name
        try:
            Approvals(Path(site), name).check_bundle(bundle)
        except OSError as error:  # whose text names paths
            raise Refusal(f"site {name}: its approvals cannot be read ({type(error).__name__})") from None
        os.environ[RUNNING] = bundle
        return Path(site)

    def load(*_: object) -> ClientApp:
        from oncofed.client.app import app

        return app

    def no_dependencies(*_: object, **__: object) -> None:
        raise Refusal("this node installs nothing at run time")

    runtime.install_from_fab = check  # type: ignore[assignment]
    runtime.get_project_dir = lambda *_: Path(site)
    runtime.install_app_dependencies = no_dependencies  # type: ignore[assignment]
    runtime.get_load_client_app_fn = lambda *_, **__: load
    flwr_clientapp()


def run_superexec(begin: Callable[[list[str]], bool]) -> None:
    """Flower's `flower-superexec`; `begin` is offered every command first, and where it does not begin it, it is started as Flower would."""
    check_version()
    from flwr.supercore.cli import flower_superexec
    from flwr.supercore.superexec.executor import subprocess_executor

    def start(command: list[str], **how: Any) -> None:
        if not begin(command):
            subprocess.Popen(command, **how)

    subprocess_executor.subprocess = SimpleNamespace(DEVNULL=subprocess.DEVNULL, Popen=start)  # type: ignore[assignment]
    flower_superexec()


def refuse_program(name: str) -> None:
    """In place of a program of Flower's that a coordinator could have a node start."""
    raise SystemExit(f"{name}: this node runs the ClientApp of oncofed and nothing else (oncofed site approve)")
