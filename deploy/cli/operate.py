"""The `oncofed study` commands with which a coordinator runs a study: run, watch, status, stop, logs."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

if TYPE_CHECKING:  # the command's help need not load Flower
    from oncofed.deploy.operate.control import FlowerRun

out = Console()
Folder = Annotated[Path, typer.Argument(help="folder of the run (runtime.out)")]


def add_operation(study_cli: typer.Typer) -> None:
    """Give the commands to `oncofed study`."""
    for name, command in (
        ("run", study_run),
        ("watch", study_watch),
        ("status", study_status),
        ("stop", study_stop),
        ("logs", study_logs),
    ):
        study_cli.command(name)(command)


def study_run(
    file: Annotated[Path, typer.Argument(help="study TOML file")],
    target: Annotated[Path, typer.Option("--out", help="folder for results, models and journal (runtime.out)")],
    superlink: Annotated[
        str, typer.Option(help="a connection of Flower's configuration; without it, the default one")
    ] = "",
    follow: Annotated[
        bool, typer.Option("--follow", help="watch until the end; exit code 1 when it is no good one")
    ] = False,
) -> None:
    """Run a study on a real federation: submit it to the SuperLink, and keep the run's id in the folder."""
    from oncofed.common.signed_study import signature_beside
    from oncofed.common.study import Study
    from oncofed.deploy.operate.control import among_members, at_home, submitted

    connection = connection_of(superlink)
    study = at_home(among_members(Study.from_toml(file), connection), target)
    signature = study.runtime.signature or signature_beside(file)
    study = study.changed(runtime__signature=signature)
    run = submitted(study, connection)
    out.print(f"run {run.run} on '{escape(run.connection)}'", soft_wrap=True, highlight=False)
    if not follow:
        out.print(escape(f"watch it with `oncofed study watch {target}`"), soft_wrap=True, highlight=False)
    elif not followed(target, run):
        raise typer.Exit(1)


def study_watch(
    folder: Folder,
    once: Annotated[bool, typer.Option("--once", help="draw the state of this moment and end")] = False,
) -> None:
    """Watch a run, a simulation too: progress, sites, loss, who was left out and why. Ends with the run; Ctrl-C leaves it alone."""
    from oncofed.deploy.operate.control import Watch
    from oncofed.deploy.operate.view import drawn, follow

    watch = Watch(folder)
    if once:
        out.print(drawn(watch.state(), time.time()))
        return
    try:
        state = follow(watch.state, out)
    except KeyboardInterrupt:
        return
    if state.status == "failed":
        raise typer.Exit(1)


def study_status(folder: Folder) -> None:
    """Say how a run is: what Flower says of it, its journal, and who was left out lately."""
    from oncofed.deploy.operate.control import FlowerRun, Watch, asked
    from oncofed.deploy.operate.view import drawn

    run, watch = FlowerRun.read(folder), Watch(folder)
    if run is not None:
        out.print(escape(f"run {run.run} on '{run.connection}': {asked(run)}"), soft_wrap=True, highlight=False)
    out.print(drawn(watch.state(), time.time()))


def study_stop(folder: Folder) -> None:
    """Stop a run of a real federation; what its last checkpoint holds stays."""
    from oncofed.deploy.operate.control import stopped

    run = submitted_in(folder)
    state = stopped(run)
    out.print(escape(f"run {run.run} on '{run.connection}': {state}"), soft_wrap=True, highlight=False)
    if not state.ended:
        raise RuntimeError(f"run {run.run} has not ended yet; ask again with `oncofed study status {folder}`")
    if not state.good:
        out.print(
            escape(f"go on from the last checkpoint with `oncofed study resume {folder} --superlink {run.connection}`"),
            soft_wrap=True,
            highlight=False,
        )


def study_logs(
    folder: Folder,
    follow: Annotated[bool, typer.Option("--follow", help="go on until the run ends")] = False,
) -> None:
    """Show the log of the run's server as Flower keeps it, and who was left out and why."""
    from oncofed.deploy.operate.control import Watch, shown_log
    from oncofed.deploy.operate.view import left_out

    run = submitted_in(folder)
    shown_log(run, follow=follow)
    for line in left_out(Watch(folder).state()):
        out.print(escape(f"left out: {line}"), soft_wrap=True, highlight=False)


def connection_of(superlink: str) -> str:
    """The connection that is named, or the default one of Flower's configuration; raises where there is none."""
    from oncofed.deploy.resume import configured

    connection = superlink or configured()
    if not connection:
        raise ValueError(
            "Flower's configuration names no SuperLink; add it to the file config.toml of Flower's home, or name one with --superlink"
        )
    return connection


def submitted_in(folder: Path) -> FlowerRun:
    """The run that was submitted for a folder; raises where none was."""
    from oncofed.deploy.operate.control import FlowerRun

    run = FlowerRun.read(folder)
    if run is None:
        raise ValueError(
            f"{folder}: no run of a real federation was submitted for this folder; start one with `oncofed study run`"
        )
    return run


def followed(folder: Path, run: FlowerRun) -> bool:
    """Watch a run until Flower says that it has ended; returns whether the end is a good one."""
    from oncofed.deploy.operate.control import Watch, ended
    from oncofed.deploy.operate.view import follow

    try:
        state = follow(Watch(folder).state, out)
        flower = ended(run)
    except KeyboardInterrupt:
        out.print(escape(f"the run goes on; stop it with `oncofed study stop {folder}`"), soft_wrap=True)
        return True
    out.print(escape(f"run {run.run}: {flower}"), soft_wrap=True, highlight=False)
    return flower.good and state.status == "finished"
