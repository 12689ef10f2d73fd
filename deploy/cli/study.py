"""The `oncofed study` commands: what a coordinator does before and after a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from oncofed.deploy.cli.operate import add_operation
from oncofed.deploy.cli.web import add_web
from rich.console import Console
from rich.markup import escape
from rich.table import Table

study_cli = typer.Typer(no_args_is_help=True, help="For a coordinator: check a study, and read what it found.")
add_operation(study_cli)
add_web(study_cli)
out = Console()


@study_cli.command("check")
def study_check(file: Annotated[Path, typer.Argument(help="study TOML file")]) -> None:
    """Validate a study file and show it with every default filled in."""
    from oncofed.common.study import Study

    out.print_json(Study.from_toml(file).model_dump_json())


@study_cli.command("sign")
def study_sign(
    file: Annotated[Path, typer.Argument(help="study TOML file, or a plan's (with a top-level kind)")],
    key: Annotated[Path, typer.Option(help="coordinator.key of the coordinator's folder")],
) -> None:
    """Sign a study or a plan: FILE.sig holds the signature, which travels with every question; a change of the text voids it."""
    from oncofed.common import signing
    from oncofed.common.files import write_text
    from oncofed.common.signed_study import SUFFIX, read_file, sign

    asked = read_file(file)
    try:
        private = bytes.fromhex(key.read_text().strip())
        public = signing.public_of(private)
    except (OSError, ValueError):
        raise ValueError(
            f"{key} is no key of 64 hex digits; name the coordinator.key of oncofed consortium init"
        ) from None
    beside = file.with_name(file.name + SUFFIX)
    write_text(beside, sign(asked, private) + "\n")
    out.print(escape(f"'{asked.name}' signed by {public}: {beside}"), soft_wrap=True, highlight=False)


@study_cli.command("bundle")
def study_bundle(
    target: Annotated[Path, typer.Option("--out", help="folder for the file")] = Path(),
) -> None:
    """Write the Flower bundle of this version of oncofed, to be sent to hospitals that approve code: no code and no study is in it."""
    import hashlib

    from oncofed.deploy.bundle import build_bundle

    file = build_bundle(target)
    out.print(escape(f"bundle:  {file}"), soft_wrap=True)
    out.print(f"SHA-256: {hashlib.sha256(file.read_bytes()).hexdigest()}", highlight=False)


@study_cli.command("start")
def study_start(
    sites: Annotated[Path, typer.Argument(help="folder of public site folders: no private patient may be in them")],
    target: Annotated[Path, typer.Option("--out", help="folder for model.safetensors and study.toml")] = Path("start"),
    features: Annotated[int, typer.Option(min=1, help="principal components that the frozen encoder gives")] = 128,
    penalty: Annotated[float, typer.Option(min=0, help="of the heads' ridge on the public patients")] = 1.0,
    epsilon: Annotated[float, typer.Option(min=0.01, help="of the private study: clip, rate and pull follow it")] = 8.0,
    delta: Annotated[float, typer.Option(min=0, max=1, help="of the private study")] = 1e-5,
    covariate: Annotated[
        list[str] | None, typer.Option(help='clinical column, may be repeated: age, "sex=female|male"')
    ] = None,
) -> None:
    """Fit a model on public patients for a private study to start from, and write that study: frozen encoder, heads alone learn."""
    from oncofed.deploy.public_start import fit_start

    with Console(stderr=True).status("fitting"):
        model, study = fit_start(
            sites,
            target,
            features=features,
            penalty=penalty,
            epsilon=epsilon,
            delta=delta,
            covariates=tuple(covariate or ()),
        )
    out.print(escape(f"model: {model}\nstudy: {study}"))


@study_cli.command("privacy")
def study_privacy(
    file: Annotated[Path, typer.Argument(help="study TOML file")],
    sites: Annotated[int, typer.Option(min=1, help="hospitals that will train")],
    patients: Annotated[int, typer.Option(min=1, help="training patients of all hospitals together")],
    parameters: Annotated[
        int | None, typer.Option(min=1, help="numbers that are trained; without it, those of the study's model")
    ] = None,
    genes: Annotated[int, typer.Option(min=3, help="of the panel, to count them")] = 1500,
) -> None:
    """Before anything runs: the noise that the promise wants, what each part of it costs, and whether it drowns the signal."""
    from oncofed.common.privacy.accounting import epsilon_of
    from oncofed.common.privacy.releases import promise_of
    from oncofed.common.study import Study
    from oncofed.server.privacy import cost_of, counted, foretold, membership

    study = Study.from_toml(file)
    if not study.privacy.on:
        raise ValueError(f"{file}: privacy.unit = 'none' promises nothing; set it to 'patient' or 'hospital'")
    if study.splits.every_site:
        study = study.changed(splits__held_out_sites=[f"site {i}" for i in range(sites)])
    promise, p = promise_of(study), study.privacy
    table = Table(title=f"Privacy of one {p.unit}: epsilon at delta {p.delta:g}", title_justify="left")
    table.add_column("what leaves")
    for column in ("noise", "times", "epsilon"):
        table.add_column(column, justify="right")
    for name, m in promise.mechanisms.items():
        noise = f"epsilon {m.noise:.3g}" if m.kind == "pure" else f"{m.noise:.4g} sensitivities"
        table.add_row(f"{name} alone", noise, str(m.count), f"{epsilon_of([m], p.delta):.3f}")
    table.add_row("together", "", "", f"{promise.epsilon:.3f}")
    out.print(table)
    out.print(f"promised: {p.epsilon:g}; sigma of a training step: {promise.deviation:.4g} clips of {p.clip:g}")
    out.print(f"membership: {membership(promise.epsilon, p.delta)['says']}\n")
    cost = cost_of(study, parameters or counted(study, genes), sites, patients)
    words = foretold(study, cost, sites, patients)
    out.print(escape(words[0].upper() + words[1:]), style="yellow" if cost.drowned else "", highlight=False)


@study_cli.command("resume")
def study_resume(
    folder: Annotated[Path, typer.Argument(help="folder of the interrupted run (runtime.out)")],
    sites: Annotated[
        Path | None,
        typer.Option(help="of a simulation: folder of site folders; without it, the one that it was started with"),
    ] = None,
    engine: Annotated[
        Literal["local", "ray", "superlink"] | None,
        typer.Option(help="of a simulation; without it, the one that it was started with"),
    ] = None,
    superlink: Annotated[
        str,
        typer.Option(help="of a real federation: a connection of Flower's configuration; without it, the default one"),
    ] = "",
) -> None:
    """Go on after a crash where the last checkpoint is: the weights become those of a run that nothing interrupted."""
    from oncofed.deploy.comparison.present import print_tables
    from oncofed.deploy.loopback import wait
    from oncofed.deploy.operate.control import submitted
    from oncofed.deploy.resume import bundle_of, configured, flwr_command, interrupted, resume_simulation
    from oncofed.deploy.started import Started

    study = interrupted(folder)
    if study is None:
        out.print(escape(f"{folder}: finished, there is nothing to resume"))
        return
    if sites is not None or Started.read(folder) is not None:
        comparison, report = resume_simulation(study, sites, engine)
        print_tables(comparison, out)
        out.print(f"report: {report}")
        return
    if engine is not None:
        raise ValueError(
            f"{folder}: --engine is of a simulation, and none was started here; name its sites with --sites"
        )
    connection, bundle = superlink or configured(), bundle_of(study)
    out.print(escape(flwr_command(bundle, connection)), soft_wrap=True, highlight=False)
    if not connection:
        out.print("Flower's configuration names no SuperLink: run this where it does, or name one with --superlink")
        return
    run = submitted(study, connection)
    out.print(f"run {run.run} on '{escape(connection)}'", soft_wrap=True)
    wait(run.run, connection)
    out.print("finished")


@study_cli.command("genes")
def study_genes(
    folder: Annotated[Path, typer.Argument(help="folder of a finished run (runtime.out)")],
    pathways: Annotated[
        Path | None, typer.Option(help="gene sets (.gmt) to score; without it, the study's analysis.pathways")
    ] = None,
) -> None:
    """Rank genes by what the model makes of them, and score pathways: .rnk files, genes/pathways.csv, how far folds agree."""
    from oncofed.deploy.present_genes import print_genes, print_pathways
    from oncofed.server.genes import write_rankings
    from oncofed.server.pathways import write_pathways

    summary, files = write_rankings(folder)
    scored = write_pathways(folder, pathways)
    print_genes(summary, out)
    if scored:
        print_pathways(scored[0], out)
        files.append(scored[1])
    out.print(escape(f"{len(files)} files in {files[0].parent}"))


@study_cli.command("network")
def study_network(
    folders: Annotated[
        list[Path], typer.Argument(help="folder of a finished run; several: runs of one study with other seeds")
    ],
) -> None:
    """Networks of genes from the attention of t_gem: hubs against permuted labels, GraphML and edge lists in FOLDER/network."""
    from oncofed.deploy.present_genes import print_networks
    from oncofed.server.network_results import write_networks

    summary, files = write_networks(folders)
    print_networks(summary, out)
    out.print(escape(f"{len(files)} files in {files[0].parent}"))


@study_cli.command("report")
def study_report(folder: Annotated[Path, typer.Argument(help="folder of a finished run (runtime.out)")]) -> None:
    """Draw the report of a run from what the coordinator has: sums, no patients. A simulation writes a fuller one itself."""
    import json

    from oncofed.common.files import write_text
    from oncofed.server.report.privacy import read_audit
    from oncofed.server.report.render import render

    file = folder / "results.json"
    if not file.exists():
        raise ValueError(f"{file}: no results of a run; name the folder that was its runtime.out")
    report = folder / "report.html"
    write_text(report, render({"results": json.loads(file.read_text())}, read_audit(folder)))
    out.print(f"report: {report}")
