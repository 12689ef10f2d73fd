"""The `oncofed server` commands: a coordinator runs the consortium's server, and sees who is there."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

server_cli = typer.Typer(
    no_args_is_help=True, help="For a coordinator: run the consortium's server, see who is connected."
)
out = Console()

Where = Annotated[Path, typer.Argument(help="the coordinator's folder, as oncofed consortium init made it")]
State = Annotated[Path | None, typer.Option(help="where database, logs and status are kept; without it, FOLDER/state")]
ToStdout = Annotated[bool, typer.Option("--log-to-stdout", help="log to standard output and not to files")]
Health = Annotated[
    str, typer.Option(help="tell health by gRPC at HOST:PORT, for probes; loopback alone unless the network is private")
]


@server_cli.command("start")
def server_start(
    folder: Where,
    state: State = None,
    only: Annotated[
        str, typer.Option(help="comma-separated: link, exec, edge; for containers of their own. Without it, all")
    ] = "",
    no_edge: Annotated[
        bool, typer.Option("--no-edge", help="a proxy of your own forwards /v1/fleet/ instead of nginx")
    ] = False,
    bind: Annotated[str, typer.Option(help="address that hospitals reach; without it, every one of this machine")] = "",
    link_host: Annotated[
        str, typer.Option(help="address that the SuperLink listens on; hospitals must not reach it")
    ] = "127.0.0.1",
    link_at: Annotated[str, typer.Option(help="where exec and edge find the SuperLink")] = "127.0.0.1",
    log_to_stdout: ToStdout = False,
    health: Health = "",
) -> None:
    """Run nginx, SuperLink and SuperExec until SIGTERM; a process that ends is started again, and the roster says who may dial in."""
    from oncofed.deploy.services.coordinator import EDGE, PARTS, Server
    from oncofed.deploy.services.health import HealthServer

    parts = [p.strip() for p in only.split(",") if p.strip()] or list(PARTS)
    unknown = [p for p in parts if p not in PARTS]
    if unknown:
        raise ValueError(f"--only {only}: {unknown[0]!r} is no part of the server; the parts are {', '.join(PARTS)}")
    if no_edge:
        parts = [p for p in parts if p != EDGE]
    server = Server.open(folder, state, bind, link_host, link_at)
    supervisor = server.supervisor(parts, None if log_to_stdout else server.state / "logs")
    settings = server.settings
    out.print(
        escape(f"{settings.name}: {', '.join(parts)}; hospitals dial {settings.address}:{settings.port}"),
        soft_wrap=True,
    )
    out.print(escape(f"to start studies here: export FLWR_HOME={server.flower_home}"), soft_wrap=True)
    with HealthServer(health, supervisor.health) if health else contextlib.nullcontext():
        supervisor.run()


@server_cli.command("status")
def server_status(folder: Where, state: State = None) -> None:
    """Show processes, members with their nodes, and how long certificates last. Exit code 1 when something is down."""
    from oncofed.common.certificates import days_left
    from oncofed.deploy.services.coordinator import Server
    from oncofed.deploy.services.running import members_seen, running

    server = Server.open(folder, state)
    found = running(server.state / "run")
    print_processes([(r.name, r.process, r.services) for r in found])
    table = Table(title="members", title_justify="left")
    for column in ("member", "membership", "node", "last seen"):
        table.add_column(column)
    styles = {"online": "green", "offline": "yellow", "key revoked for good": "red"}
    for m in members_seen(server):
        style = styles.get(m.node, "default")
        table.add_row(escape(m.name), m.status, f"[{style}]{m.node}[/]", m.last_seen)
    out.print(table)
    for name in ("server.crt", "ca.crt"):
        days = days_left((server.folder / name).read_bytes(), name)
        style = "red" if days < 0 else "yellow" if days < 30 else "default"
        out.print(f"[{style}]{name} lasts {days:.0f} days[/]" if days >= 0 else f"[red]{name} has ended[/]")
    raise typer.Exit(0 if found and all(r.ready for r in found) else 1)


@server_cli.command("stop")
def server_stop(folder: Where, state: State = None) -> None:
    """End the server's processes; nodes dial in again when it is back."""
    from oncofed.deploy.services.coordinator import Server
    from oncofed.deploy.services.running import stop

    files = sorted((Server.open(folder, state).state / "run").glob("*.json"))
    stopped = [f.stem for f in files if stop(f)]
    out.print(f"stopped: {', '.join(stopped)}" if stopped else "it was not running")


@server_cli.command("unit")
def server_unit(
    folder: Where,
    user: Annotated[str, typer.Option(help="who owns the folder and runs the server; not root")] = "oncofed",
) -> None:
    """Print a systemd unit for this folder, to be written to /etc/systemd/system/oncofed-server.service."""
    from oncofed.deploy.services.coordinator import Server
    from oncofed.deploy.services.edge import rendered

    server = Server.open(folder)
    if not server.state.exists():  # the unit may write there and nowhere else, so it must be there before
        server.state.mkdir(mode=0o700)
        owner = server.folder.stat()
        os.chown(server.state, owner.st_uid, owner.st_gid)
    program = Path(sys.executable).parent / "oncofed"
    privileged = server.settings.port < 1024
    text = rendered("oncofed-server.service", folder=server.folder, program=program, user=user, privileged=privileged)
    typer.echo(text, nl=False)


def print_processes(supervisors: list[tuple[str, int | None, dict[str, dict[str, object]]]]) -> None:
    """One table of supervised processes."""
    table = Table(title="processes", title_justify="left")
    for column in ("process", "state", "ready", "since", "starts", "last end"):
        table.add_column(column)
    for _, process, services in supervisors:
        for service, told in services.items():
            style = "green" if told["ready"] else "yellow" if process is not None else "red"
            row = (str(told["state"]), "yes" if told["ready"] else "no", str(told["since"]), str(told["starts"]))
            table.add_row(service, f"[{style}]{row[0]}[/]", *row[1:], escape(str(told["last_exit"])))
    out.print(table if table.rows else "no process was started here yet")
