"""The `oncofed consortium` commands: a coordinator makes keys and start-up kits, and says who is a member."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

consortium_cli = typer.Typer(
    no_args_is_help=True, help="For a coordinator: keys, start-up kits, who is a member with which keys."
)
rotate_cli = typer.Typer(no_args_is_help=True, help="Change the keys of a member, the server or the coordinator.")
consortium_cli.add_typer(rotate_cli, name="rotate")
out = Console()

Where = Annotated[Path, typer.Argument(help="the coordinator's folder, as init made it")]
Name = Annotated[str, typer.Argument(help="the member, as in its site.toml")]
SOON_DAYS = 30


@consortium_cli.command("init")
def consortium_init(
    settings: Annotated[Path, typer.Argument(help="consortium.toml: name, address, members (docs/consortium.md)")],
    target: Annotated[Path, typer.Option("--out", help="the coordinator's folder; must not be there yet")],
) -> None:
    """Make the consortium's keys and certificates, its first roster, and a start-up kit for each member."""
    from oncofed.deploy.consortium.folder import KITS, init

    folder = init(settings, target)
    members = folder.roster.members
    out.print(
        escape(f"{folder.settings.name}: {len(members)} members invited, kits in {target / KITS}"), soft_wrap=True
    )
    out.print(f"fingerprint to read out to each hospital: [bold]{folder.fingerprint}[/]")


@consortium_cli.command("list")
def consortium_list(folder: Where) -> None:
    """Show who is a member, with the fingerprint of its keys, and how long certificates last."""
    from oncofed.deploy.consortium.folder import Folder
    from oncofed.deploy.consortium.members import certificates, list_members

    here = Folder.open(folder)
    roster = here.roster
    table = Table(title=escape(f"{roster.consortium}, roster {roster.serial} of {roster.issued}"), title_justify="left")
    for column in ("member", "status", "since", "fingerprint of its keys", "kit until"):
        table.add_column(column, no_wrap=column.startswith("fingerprint"))
    styles = {"active": "green", "revoked": "red", "invited": "yellow"}
    for m in list_members(here):
        table.add_row(
            escape(m.name), f"[{styles[m.status]}]{m.status}[/]", m.since[:10], m.fingerprint, m.invited_until[:10]
        )
    out.print(table)
    out.print(f"fingerprint of the consortium: [bold]{here.fingerprint}[/]")
    for name, days in certificates(here).items():
        if days < 0:
            remedy = "oncofed consortium rotate server" if name.startswith("server") else "make a new consortium"
            out.print(f"[red]{name} has ended[/]: no hospital connects; {remedy}")
        else:
            out.print(f"[{'yellow' if days < SOON_DAYS else 'default'}]{name} lasts {days:.0f} days[/]")


@consortium_cli.command("add")
def consortium_add(folder: Where, name: Name) -> None:
    """Invite a new member: a line in the roster and a start-up kit."""
    from oncofed.deploy.consortium.folder import Folder
    from oncofed.deploy.consortium.members import add

    out.print(escape(f"{name} is invited, its kit: {add(Folder.open(folder), name)}"), soft_wrap=True)


@consortium_cli.command("admit")
def consortium_admit(
    folder: Where,
    file: Annotated[Path, typer.Argument(help="enrolment-NAME.json, as the hospital sent it")],
    fingerprint: Annotated[str, typer.Option(help="as the hospital reads it out: another one is refused")] = "",
) -> None:
    """Take the public keys of a hospital into the roster."""
    from oncofed.deploy.consortium.folder import Folder
    from oncofed.deploy.consortium.members import admit

    here = Folder.open(folder)
    enrolment, changed = admit(here, file, fingerprint)
    what = "is a member" if changed else "was a member with these keys already: nothing changed"
    out.print(escape(f"{enrolment.name} {what}; its oncofed: {enrolment.version}"), soft_wrap=True)
    out.print(f"fingerprint of its keys: [bold]{enrolment.fingerprint}[/]")
    if not fingerprint:
        out.print(
            escape(
                f"have it read out by telephone; if it differs: oncofed consortium revoke {folder} '{enrolment.name}'"
            ),
            soft_wrap=True,
        )
    _send(here.path)


@consortium_cli.command("revoke")
def consortium_revoke(folder: Where, name: Name) -> None:
    """End a membership: no kit, no node and no secure sum of this hospital any more."""
    from oncofed.deploy.consortium.folder import Folder
    from oncofed.deploy.consortium.members import revoke

    changed = revoke(Folder.open(folder), name)
    out.print(escape(f"{name} is revoked" if changed else f"{name} was revoked already"))
    _send(folder)


@rotate_cli.command("member")
def rotate_member_command(folder: Where, name: Name) -> None:
    """Make a new start-up kit, whose enrolment brings new keys; the old ones stay until it is admitted."""
    from oncofed.deploy.consortium.folder import Folder
    from oncofed.deploy.consortium.members import rotate_member

    out.print(escape(f"the new kit of {name}: {rotate_member(Folder.open(folder), name)}"), soft_wrap=True)


@rotate_cli.command("server")
def rotate_server_command(folder: Where) -> None:
    """Renew the server's certificate, for the address in the folder's consortium.toml; hospitals change nothing."""
    from oncofed.deploy.consortium.folder import SERVER, Folder
    from oncofed.deploy.consortium.members import certificates, rotate_server

    here = Folder.open(folder)
    rotate_server(here)
    days = certificates(here)[SERVER]
    out.print(f"{SERVER} lasts {days:.0f} days; restart the server (oncofed server start)")


@rotate_cli.command("coordinator")
def rotate_coordinator_command(folder: Where) -> None:
    """Change the key that signs rosters and studies; the old one vouches for it, and hospitals follow with the new roster."""
    from oncofed.deploy.consortium.folder import Folder
    from oncofed.deploy.consortium.members import rotate_coordinator

    here = Folder.open(folder)
    rotate_coordinator(here)
    out.print(f"fingerprint of the consortium from now on: [bold]{here.fingerprint}[/]")
    waiting = here.invitations.open()
    if waiting:
        names = ", ".join(sorted(waiting))
        out.print(
            escape(
                f"kits that nobody used yet show the old one ({names}): oncofed consortium rotate member makes new ones"
            ),
            soft_wrap=True,
        )
    _send(folder)


def _send(folder: Path) -> None:
    from oncofed.deploy.consortium.folder import ROSTER

    out.print(
        escape(
            f"send {folder / ROSTER} to all members, who take it in with: oncofed site roster {ROSTER} --site SITE_DIR"
        ),
        soft_wrap=True,
    )
