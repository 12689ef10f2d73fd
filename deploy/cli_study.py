"""The `oncofed study` commands: what a coordinator does before and after a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

study_cli = typer.Typer(no_args_is_help=True, help="For a coordinator: check a study, and read what it found.")
out = Console()


@study_cli.command("check")
def study_check(file: Annotated[Path, typer.Argument(help="study TOML file")]) -> None:
    """Validate a study file and show it with every default filled in."""
    from oncofed.common.study import Study

    out.print_json(Study.from_toml(file).model_dump_json())


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
    from oncofed.server.report.render import render

    file = folder / "results.json"
    if not file.exists():
        raise ValueError(f"{file}: no results of a run; name the folder that was its runtime.out")
    report = folder / "report.html"
    write_text(report, render({"results": json.loads(file.read_text())}))
    out.print(f"report: {report}")
