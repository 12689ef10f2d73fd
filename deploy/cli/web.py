"""The `oncofed study` commands that show a run elsewhere than in the terminal: a web page, an experiment tracker."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

out = Console()
Folder = Annotated[Path, typer.Argument(help="folder of the run (runtime.out)")]


def add_web(study_cli: typer.Typer) -> None:
    """Give the commands to `oncofed study`."""
    study_cli.command("serve")(study_serve)
    study_cli.command("track")(study_track)


def study_serve(
    folder: Folder,
    host: Annotated[str, typer.Option(help="address to listen on; other than loopback only with TLS")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8600,
    name: Annotated[
        list[str] | None, typer.Option(help="name under which the page may be asked, of a proxy say; may be repeated")
    ] = None,
    certificate: Annotated[Path | None, typer.Option(help="TLS certificate (PEM)")] = None,
    key: Annotated[Path | None, typer.Option(help="its private key (PEM)")] = None,
) -> None:
    """Show a run on a web page, for reading only, behind a token; also /metrics for Prometheus. Ctrl-C ends the page alone."""
    from oncofed.deploy.operate.access import token_of
    from oncofed.deploy.operate.web import checked, served

    if (certificate is None) != (key is None):
        raise ValueError("--certificate and --key belong together: give both, or neither")
    tls = (certificate, key) if certificate and key else None
    names = tuple(name or ())
    checked(folder, host, names, tls)
    shown = f"[{host}]" if ":" in host else host
    out.print(f"{'https' if tls else 'http'}://{shown}:{port}/", highlight=False, soft_wrap=True)
    out.print(escape(f"token: {token_of(folder)}"), highlight=False, soft_wrap=True)
    served(folder, host, port, names, tls)


def study_track(
    folder: Folder,
    to: Annotated[str, typer.Option("--to", help="tensorboard:DIR or mlflow:URI")],
    follow: Annotated[bool, typer.Option("--follow", help="go on until the run ends")] = False,
) -> None:
    """Put a run's rounds into TensorBoard or MLflow: each once, however often it is called. Ctrl-C leaves the run alone."""
    from contextlib import closing

    from oncofed.deploy.operate.control import Watch
    from oncofed.deploy.operate.tracking import tracked, tracker_of

    watch = Watch(folder)
    watch.state()
    with closing(tracker_of(to)) as tracker:
        try:
            added = tracked(watch.state, tracker, follow=follow)
        except KeyboardInterrupt:
            return
    out.print(f"{added} rounds added", highlight=False)
