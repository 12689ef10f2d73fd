"""The `oncofed site` commands: what a hospital's data engineer does with its own data and node."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

site_cli = typer.Typer(no_args_is_help=True, help="For a hospital: check the data, see what was spent, score patients.")
out = Console()
err = Console(stderr=True)


@site_cli.command("check")
def site_check(
    folder: Annotated[Path, typer.Argument(help="site folder with site.toml and tables")],
    panel: Annotated[
        Path | None, typer.Option(help="gene panel, one gene a line or .gmt, to measure the overlap with")
    ] = None,
    names: Annotated[
        Path | None, typer.Option(help="HGNC's table of gene names, hgnc_complete_set.txt: panel.names of the study")
    ] = None,
) -> None:
    """Report what a site holds and every problem in one pass; exit code 1 when there is an error. Prints no patient."""
    from oncofed.client.data.check import check_site
    from oncofed.common.gene_names import GeneNames
    from oncofed.common.panel import GenePanel

    if names and panel is None:
        raise ValueError("--names says under which names the genes of a panel are looked for; name one with --panel")
    with err.status("reading"):
        table = GeneNames.from_file(names) if names else None
        report = check_site(folder, GenePanel.from_file(panel, table) if panel else None)
    facts = Table(title=f"Site {report.site}", show_header=False, title_justify="left")
    for key, value in report.facts.items():
        facts.add_row(key, value)
    out.print(facts)
    if report.findings:
        for f in sorted(report.findings, key=lambda f: f.level):
            style = "red" if f.level == "error" else "yellow"
            where = escape(": ".join(part for part in (f.file, f.column) if part))
            out.print(
                f"[{style}]{f.level}[/] {where}: {f.count} {escape(f.problem)}\n        [dim]{escape(f.remedy)}[/]"
            )
    out.print("[green]ready[/]" if report.ok else "[red]not ready: mend the errors above[/]")
    raise typer.Exit(0 if report.ok else 1)


@site_cli.command("budget")
def site_budget(
    folder: Annotated[Path, typer.Argument(help="site folder with site.toml and policy.toml")],
    work_dir: Annotated[Path | None, typer.Option(help="where ledger.jsonl is; without it, FOLDER/.oncofed")] = None,
) -> None:
    """Show what noisy releases have cost the site's patients, study by study, and what is left. Exit code 1 when nobody can know."""
    from oncofed.client.data.site import SiteFolder
    from oncofed.client.policy import Policy
    from oncofed.client.privacy.ledger import Ledger, ledger_of

    name, policy = SiteFolder.open(folder).name, Policy.read(folder)
    file = work_dir / "ledger.jsonl" if work_dir else ledger_of(folder, folder / ".oncofed")
    ledger = Ledger(file, name, policy.epsilon_budget, policy.delta_budget)
    ledger.verify()
    table = Table(title=f"Site {escape(name)}", title_justify="left")
    table.add_column("study")
    for column in ("releases", "unsettled", "epsilon", "first", "last"):
        table.add_column(column, justify="right")
    for s in ledger.studies():
        numbers = (str(s.releases), str(s.unsettled), f"{s.epsilon:.3f}", s.first[:10], s.last[:10])
        table.add_row(escape(s.study), *numbers)
    out.print(table)
    spent, budget = ledger.spent(), policy.epsilon_budget
    out.print(f"spent: epsilon {spent:.3f} at delta {policy.delta_budget:g}, all studies together")
    out.print(f"budget: {budget:g} (epsilon_budget in policy.toml), left: {max(budget - spent, 0.0):.3f}")
    out.print(f"[green]verified[/]: {escape(str(file))}" if file.exists() else f"no ledger yet: {escape(str(file))}")


@site_cli.command("predict")
def site_predict(
    model: Annotated[Path, typer.Argument(help="model.safetensors or model-fold-K.safetensors of a study")],
    folder: Annotated[Path, typer.Argument(help="site folder; its clinical table needs no outcome")],
    target: Annotated[Path, typer.Option("--out", help="CSV file for the patients' rows")],
    picture: Annotated[
        Path | None, typer.Option(help="survival curves of one cancer type and what drives its risks, .svg or .png")
    ] = None,
    cancer: Annotated[str, typer.Option(help="of the picture; without it, the one with the most patients")] = "",
    attention: Annotated[
        Path | None,
        typer.Option(help="folder for one GeoJSON file a slide: which tiles the model looks at, for QuPath"),
    ] = None,
    patient: Annotated[
        list[str] | None, typer.Option(help="of --attention, may be repeated; without it, the 20 of highest percentile")
    ] = None,
    microns_per_pixel: Annotated[
        float, typer.Option(min=0, help="of the scanner, where slide files hold coords in micrometres (STAMP)")
    ] = 0.0,
    pathways: Annotated[
        Path | None,
        typer.Option(help="gene sets (.gmt): beside --out, what pathways and single genes say for each patient"),
    ] = None,
) -> None:
    """Score a hospital's own patients with a saved model, offline. Rows go to the files; only counts are printed."""
    from oncofed.client.attention import Drawn, choose_patients, write_attention
    from oncofed.client.curves import choose_cancer, draw_curves
    from oncofed.client.pathways import choose_sets, write_pathways
    from oncofed.client.predict import predict

    if patient and attention is None:
        raise ValueError("--patient chooses whose slides are drawn; name a folder for them with --attention")
    with err.status("reading"):
        prediction = predict(model, folder)
    shown = choose_cancer(prediction, cancer, picture) if picture else ""
    rows = choose_patients(prediction, patient or []) if attention else None
    sets = choose_sets(prediction, pathways) if pathways else {}
    prediction.write(target)
    if picture:
        draw_curves(prediction, shown, picture)
    looked = Drawn()
    if attention and rows is not None:
        with err.status("looking at slides"):
            looked = write_attention(prediction, rows, attention, microns_per_pixel)
    counts = Table(box=None, padding=(0, 2, 0, 0))
    counts.add_column("cancer type" if prediction.survival else "answer")
    counts.add_column("patients", justify="right")
    for name, n in prediction.count_by_cancer.items():
        counts.add_row(escape(name), str(n))
    out.print(counts)
    for note in (*prediction.notes, *looked.notes):
        out.print(f"[yellow]note[/] {escape(note)}")
    drawn = f", {shown} drawn: {picture}" if picture else ""
    out.print(escape(f"{len(prediction.cohort)} patients: {target}{drawn}"))
    if pathways:
        with err.status("attributing"):
            beside = write_pathways(prediction, sets, target)
        out.print(escape(f"{len(sets)} pathways of {len(prediction.cohort)} patients: {beside}"))
    if attention:
        out.print(escape(f"{looked.slides} slides of {looked.patients} patients: {attention}"))


@site_cli.command("enrol")
def site_enrol(
    kit: Annotated[Path, typer.Argument(help="start-up kit of the coordinator, a zip or a folder")],
    folder: Annotated[Path, typer.Option("--site", help="site folder")],
    work_dir: Annotated[Path | None, typer.Option(help="where keys are kept; without it, SITE/.oncofed")] = None,
    fingerprint: Annotated[str, typer.Option(help="as the coordinator reads it out: another one is refused")] = "",
) -> None:
    """Join a consortium: make the hospital's keys here, trust this coordinator, and write the public keys for it."""
    from oncofed.client.enrol import enrol

    done = enrol(kit, folder, work_dir, fingerprint)
    out.print(escape(f"{done.kit.member} trusts the coordinator of {done.kit.consortium}"))
    for note in done.notes:
        out.print(f"[yellow]note[/] {escape(note)}", soft_wrap=True)
    out.print(f"fingerprint of the consortium: [bold]{done.consortium_fingerprint}[/]")
    out.print(f"fingerprint of your keys:      [bold]{done.enrolment.fingerprint}[/]")
    out.print("compare both with the coordinator by telephone, at a number that does not come with the kit")
    out.print(escape(f"send to the coordinator: {done.file}"), soft_wrap=True)


@site_cli.command("roster")
def site_roster(
    file: Annotated[Path, typer.Argument(help="roster.json, as the coordinator sent it")],
    folder: Annotated[Path, typer.Option("--site", help="site folder")],
) -> None:
    """Take in who is a member of the consortium; an older roster, or one that the coordinator did not sign, is refused."""
    from oncofed.client.consortium import accept_roster

    roster, before = accept_roster(folder, file)
    table = Table(title=escape(f"{roster.consortium}, roster {roster.serial} of {roster.issued}"), title_justify="left")
    for column in ("member", "status", "before"):
        table.add_column(column)
    for name in sorted(roster.members.keys() | (before.members.keys() if before else set())):
        now, then = roster.members.get(name), before.members.get(name) if before else None
        changed = now and then and (now.identity, now.node_key) != (then.identity, then.node_key)
        was = "" if then is None or then == now else then.status
        table.add_row(escape(name), now.status if now else "gone", "other keys" if changed else was)
    out.print(table)


WorkDir = Annotated[Path | None, typer.Option(help="the work folder of the enrolment; without it, FOLDER/.oncofed")]


@site_cli.command("start")
def site_start(
    folder: Annotated[Path, typer.Argument(help="site folder that has enrolled")],
    work_dir: WorkDir = None,
    device: Annotated[str, typer.Option(help="cpu or cuda:0, whatever a study says")] = "",
    log_to_stdout: Annotated[
        bool, typer.Option("--log-to-stdout", help="log to standard output and not to WORK/logs")
    ] = False,
    health: Annotated[str, typer.Option(help="tell health by gRPC at HOST:PORT, for probes")] = "",
) -> None:
    """Run the hospital's node until SIGTERM. It dials out; nothing outside can connect to it."""
    from oncofed.deploy.services.health import HealthServer
    from oncofed.deploy.services.node import Readiness, SiteNode

    node = SiteNode.open(folder, work_dir, device)
    supervisor = node.supervisor(None if log_to_stdout else node.work / "logs")
    out.print(
        escape(f"{node.kit.member} dials {node.dials}; logs: {'here' if log_to_stdout else node.work / 'logs'}"),
        soft_wrap=True,
    )
    with HealthServer(health, Readiness(node, supervisor).health) if health else contextlib.nullcontext():
        supervisor.run()


@site_cli.command("stop")
def site_stop(
    folder: Annotated[Path, typer.Argument(help="site folder")],
    work_dir: WorkDir = None,
) -> None:
    """End the hospital's node; a run goes on without it, and it takes part again once it is started."""
    from oncofed.deploy.services.node import SiteNode
    from oncofed.deploy.services.running import stop

    out.print("stopped" if stop(SiteNode.open(folder, work_dir).status_file) else "it was not running")


@site_cli.command("status")
def site_status(
    folder: Annotated[Path, typer.Argument(help="site folder")],
    work_dir: WorkDir = None,
) -> None:
    """Show whether the node runs and is connected. Exit code 1 when not."""
    from oncofed.deploy.cli.server import print_processes
    from oncofed.deploy.services.node import SiteNode
    from oncofed.deploy.services.running import Running

    told = Running.read(SiteNode.open(folder, work_dir).status_file)
    print_processes([(told.name, told.process, told.services)])
    if told.process:
        out.print("to end it: oncofed site stop")
    raise typer.Exit(0 if told.ready else 1)


@site_cli.command("preflight")
def site_preflight(
    folder: Annotated[Path, typer.Argument(help="site folder that has enrolled")],
    work_dir: WorkDir = None,
    data: Annotated[bool, typer.Option(help="read the patients' tables, as site check does")] = True,
) -> None:
    """Before the node starts: network, certificates, clock, keys, disk, GPU, data. Exit code 1 when something must be mended."""
    from oncofed.deploy.preflight.run import preflight

    with err.status("checking"):
        report = preflight(folder, work_dir, data=data)
    table = Table(title=escape(report.title), title_justify="left")
    for column in ("check", "", "seen"):
        table.add_column(column)
    styles = {"ok": "green", "warn": "yellow", "fail": "red"}
    for c in report.checks:
        remedy = f"\n[dim]{escape(c.remedy)}[/]" if c.remedy else ""
        table.add_row(c.name, f"[{styles[c.level]}]{c.level}[/]", f"{escape(c.seen)}{remedy}")
    out.print(table)
    if report.firewall:
        out.print(f"\n[bold]For the firewall team:[/]\n{escape(report.firewall)}", soft_wrap=True)
    out.print("[green]ready to start[/]" if report.ok else "[red]not ready: mend what fails above[/]")
    raise typer.Exit(0 if report.ok else 1)
