"""The `oncofed site` commands about what a hospital allows, approves, and has let out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from oncofed.deploy.cli.site import out, site_cli
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

Folder = Annotated[Path, typer.Argument(help="site folder with site.toml and policy.toml")]


@site_cli.command("policy")
def site_policy(
    folder: Folder,
    write: Annotated[
        bool, typer.Option(help="write a policy.toml with every key commented out, where none is")
    ] = False,
) -> None:
    """Validate policy.toml and show every key with its value, its default and its meaning. Exit code 1 where it is wrong."""
    from oncofed.client.policy import DEFAULT, FILE, Policy
    from oncofed.client.policy_text import template, toml_value
    from oncofed.common.files import write_text

    file = folder / FILE
    if write:
        if file.exists():
            raise ValueError(f"{file} is there and stays as it is; without --write it is checked and shown")
        write_text(file, template())
        out.print(escape(f"written: {file}; every key stands at its default until you take the # away"))
    policy = Policy.parse(folder) if file.exists() else DEFAULT
    table = Table(
        title=escape(f"{file}" if file.exists() else f"{file}: not there, the defaults hold"), title_justify="left"
    )
    for column in ("key", "value", "default", "meaning"):
        table.add_column(column, overflow="fold")
    for key, about in Policy.model_fields.items():
        value, default = toml_value(getattr(policy, key)), toml_value(about.default)
        style = "bold" if value != default else ""
        table.add_row(key, escape(value), escape(default), escape(str(about.description)), style=style)
    out.print(table)


@site_cli.command("code")
def site_code() -> None:
    """The installed oncofed: its version, and the hash of its code, as policy.toml (`versions`, `code`) and approvals name it."""
    from oncofed.client.approval import Package

    package = Package.installed()
    out.print(f"version {package.version}\ncode    {package.hash}", highlight=False)


@site_cli.command("approve")
def site_approve(
    folder: Folder,
    by: Annotated[str, typer.Option(help="full name of the person who answers for it")],
    bundle: Annotated[Path | None, typer.Option(help="Flower bundle (.fab) that the coordinator sent")] = None,
    study: Annotated[Path | None, typer.Option(help="study or plan (TOML) that the coordinator sent")] = None,
    flower_home: Annotated[
        Path | None, typer.Option(help="FLWR_HOME of the node; without it, that of the environment")
    ] = None,
    withdraw: Annotated[bool, typer.Option(help="take the approval back")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="do not ask")] = False,
) -> None:
    """Approve the installed oncofed, and a bundle with it; or, with --study alone, the text of a study. Shows what it is before it asks."""
    from oncofed.client import bundle_store
    from oncofed.client.approval import Approvals, Package, Text, Thing
    from oncofed.client.data.site import SiteFolder
    from oncofed.common.signed_study import read_file, signed_text

    approvals = Approvals(folder, SiteFolder.open(folder).name)
    things: list[Thing] = []
    shown = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    content = b""
    if bundle is not None or study is None:
        package = Package.installed()
        things.append(package)
        shown.add_row("package", f"oncofed {package.version}, code {package.hash}")
    if bundle is not None:
        try:
            content = bundle.read_bytes()
            read = bundle_store.read_bundle(content)
        except (OSError, ValueError) as error:
            raise ValueError(f"{bundle}: {error}") from None
        things.append(read)
        shown.add_row("bundle", escape(f"{read.name}, SHA-256 {read.sha256}"))
        shown.add_row("it names", escape(f"{read.clientapp} at hospitals, {read.serverapp} at the coordinator"))
        shown.add_row("it holds", escape(", ".join(read.files)))
        if read.code or not read.clientapp.startswith("oncofed."):
            shown.add_row(
                "[red]caution[/]", "[red]it brings code of its own or names another package than oncofed: look at it[/]"
            )
    if study is not None:
        asked = read_file(study)
        text = Text.of(asked)
        things.append(text)
        shown.add_row(text.kind, escape(f"'{text.name}', SHA-256 {text.digest}"))
        for key, value in _changed(signed_text(asked), signed_text(type(asked)())):
            shown.add_row("", escape(f"{key} = {value}"))
    out.print(shown)
    verb = "withdraws the approval of" if withdraw else "approves"
    if not yes and not typer.confirm(f"{by} {verb} this for the hospital of {folder}?"):
        raise typer.Exit(1)
    approvals.write(things, by, "withdraw" if withdraw else "approve")
    home = flower_home or bundle_store.flower_home()
    if bundle is not None and withdraw:
        bundle_store.remove(bundle_store.read_bundle(content), home)
    elif bundle is not None:
        place = bundle_store.install(content, home)
        guard = bundle_store.write_guard(home, folder)
        locked = bundle_store.is_immutable(place.parent)
        out.print(
            escape(
                f"installed: {place}, {'immutable' if locked else 'read-only; run as root on a file system with chattr for more'}"
            )
        )
        out.print(escape(f"guard: start the node with PATH={guard}:$PATH and FLWR_HOME={home}"), soft_wrap=True)
    out.print(
        escape(f"{'withdrawn' if withdraw else 'approved'} by {by}: {folder / 'approvals.jsonl'}"), soft_wrap=True
    )


@site_cli.command("log")
def site_log(
    folder: Folder,
    verify: Annotated[bool, typer.Option(help="say only whether it is as it was written")] = False,
    study: Annotated[str, typer.Option(help="of this study or analysis alone")] = "",
    last: Annotated[int, typer.Option(min=0, help="so many of its last lines; 0: all")] = 20,
    json_: Annotated[bool, typer.Option("--json", help="one JSON object a line")] = False,
    work_dir: Annotated[Path | None, typer.Option(help="where the log is; without it, FOLDER/.oncofed")] = None,
) -> None:
    """Show what left the hospital, refusals too, and verify that no line was changed or removed. Exit code 1 where one was."""
    import json

    from oncofed.client.data.site import SiteFolder
    from oncofed.client.release_log import FILE, ReleaseLog, about

    log = ReleaseLog((work_dir or folder / ".oncofed") / FILE, SiteFolder.open(folder).name)
    lines = log.read()
    chosen = list(about(lines, study)) if study else lines
    chosen = chosen[-last:] if last else chosen
    if json_ and not verify:
        for line in chosen:
            typer.echo(json.dumps(line))
        return
    if not verify:
        out.print(escape(_ROW.format("time (UTC)", "kind", "study", "fold/round", "patients", "bytes")), style="bold")
        for line in chosen:
            row, what = _row(line)
            out.print(escape(row), highlight=False, soft_wrap=True)
            if what:
                style = "yellow" if "refusal" in line else "dim"
                out.print(Padding(Text(what, style), (0, 0, 0, 4)))
    sent = sum(int(line.get("bytes", 0)) + int(line.get("words", 0)) for line in lines)
    out.print(f"{len(lines)} lines, {sent / 1e6:.2f} MB left", highlight=False)
    out.print(
        f"[green]verified[/]: {escape(str(log.file))}" if lines else f"no log yet: {escape(str(log.file))}",
        soft_wrap=True,
    )


_ROW = "{:<20} {:<11} {:<16} {:>10} {:>8} {:>9}"
_NAMED = 3
"""Arrays that a line names; --json tells all."""


def _row(line: dict[str, Any]) -> tuple[str, str]:
    """A line of the log for a terminal of 80 columns, and what stands below it."""
    if "refusal" in line:
        what = f"refused: {line['refusal']}"
    elif line.get("kind") == "log" or "op" in line:
        what = ", ".join(f"{k} {v}" for k, v in line.items() if k not in ("time", "kind"))
    else:
        arrays = [f"{name} {'x'.join(map(str, shape))}" for name, shape in line.get("arrays", {}).items()]
        more = [f"{len(arrays) - _NAMED} more"] if len(arrays) > _NAMED else []
        protection = [_protection(k, v) for k, v in line.get("protection", {}).items()]
        what = "; ".join(filter(None, (", ".join(arrays[:_NAMED] + more), *protection)))
    fold, size = line.get("fold", -1), int(line.get("bytes", 0)) + int(line.get("words", 0))
    place = "" if fold in (-1, None) else f"{fold}/{line.get('round', 0)}"
    row = _ROW.format(
        str(line.get("time", "")).replace("T", " ").removesuffix("Z"),
        str(line.get("kind", line.get("op", ""))).removeprefix("query."),
        str(line.get("study") or line.get("analysis") or ""),
        place,
        str(line.get("patients", "") or ""),
        str(size or ""),
    )
    return row.rstrip(), what


def _protection(kind: str, how: Any) -> str:
    if kind == "noise":
        return ", ".join(f"{n['count']} x {n['kind']} noise {n['noise']:.3g}" for n in how)
    return kind if how is True else f"{kind} {how}"


def _changed(text: dict[str, Any], default: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Keys of a study that do not stand at their default."""
    rows: list[tuple[str, Any]] = []
    for key, value in text.items():
        if isinstance(value, dict):
            rows += _changed(value, default.get(key, {}), f"{prefix}{key}.")
        elif value != default.get(key):
            rows.append((prefix + key, value))
    return rows
