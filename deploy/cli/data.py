"""The `oncofed data` commands: site folders from pooled tables, from public TCGA files, from a benchmark, or from nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from oncofed.client.data.site import Unit
from rich.console import Console
from rich.markup import escape
from rich.table import Table

data_cli = typer.Typer(no_args_is_help=True, help="For a researcher: make site folders.")
out = Console()
err = Console(stderr=True)


@data_cli.command("split")
def data_split(
    source: Annotated[
        Path, typer.Argument(help="folder with clinical.csv and <COHORT>.* tables, in expression/ or beside it")
    ],
    target: Annotated[Path, typer.Option("--out", help="folder for the site folders")],
    by: Annotated[str, typer.Option(help="clinical column that names the institution")] = "institution",
    min_patients: Annotated[int, typer.Option(help="institutions with fewer patients are merged or dropped")] = 40,
    rest: Annotated[Literal["merge", "drop"], typer.Option(help="merge | drop the small institutions")] = "merge",
    unit: Annotated[
        Unit | None, typer.Option(help="counts | tpm | log2 | zscore; without it, recognised where there is no doubt")
    ] = None,
    time_unit: Annotated[
        Literal["days", "months", "years"] | None,
        typer.Option(help="days | months | years, where the column's name does not say it"),
    ] = None,
) -> None:
    """Turn pooled tables into one site folder per institution."""
    from oncofed.deploy.sites.split import split_pooled

    with err.status("splitting"):
        folders, used = split_pooled(
            source, target, by=by, min_patients=min_patients, rest=rest, unit=unit, time_unit=time_unit
        )
    out.print(
        f"{len(folders)} sites in {target}, expression unit {used} ({'as given' if unit else 'recognised from the values'})"
    )


@data_cli.command("xena")
def data_xena(
    source: Annotated[Path, typer.Argument(help="folder with TCGA-<PROJECT>.* files of UCSC Xena's GDC hub")],
    target: Annotated[Path, typer.Option("--out", help="folder for the site folders")],
    expression: Annotated[
        str | None,
        typer.Option(help="counts | tpm | fpkm | fpkm-uq, or a file's kind such as star_tpm, where there are several"),
    ] = None,
    codes: Annotated[
        Path | None,
        typer.Option(
            help="the GDC's code table, tissueSourceSite.tsv, which names institutions; without it, looked for in the folder"
        ),
    ] = None,
    by: Annotated[
        Literal["institution", "code"] | None,
        typer.Option(
            help="institution | code: a site for each institution, or for each tissue source site code; without it, institution "
            "where something names them"
        ),
    ] = None,
    min_patients: Annotated[int, typer.Option(help="institutions with fewer patients are merged or dropped")] = 40,
    rest: Annotated[Literal["merge", "drop"], typer.Option(help="merge | drop the small institutions")] = "merge",
) -> None:
    """Turn TCGA as UCSC Xena hands it out into one site folder per institution or code: primary tumours, one a patient."""
    from oncofed.deploy.sites.xena.sites import write_xena_sites

    done = write_xena_sites(
        source, target, expression=expression, codes=codes, by=by, min_patients=min_patients, rest=rest
    )
    left_out = Table(box=None, padding=(0, 2, 0, 0))
    left_out.add_column("left out")
    left_out.add_column("samples", justify="right")
    for kind, n in sorted(done.left_out.items()):
        left_out.add_row(escape(kind), str(n))
    if done.left_out:
        out.print(left_out)
    for note in done.notes:
        out.print(f"[yellow]note[/] {escape(note)}")
    out.print(
        escape(
            f"{len(done.folders)} sites in {target}: {done.patients} patients of {done.cancers} cancer types, of each the first "
            f"primary sample in the order of barcodes; {done.kind} as {done.unit}"
        )
    )


@data_cli.command("flamby")
def data_flamby(
    source: Annotated[
        Path, typer.Argument(help="folder with brca.csv and train_test_split.csv of FLamby's Fed-TCGA-BRCA")
    ],
    target: Annotated[Path, typer.Option("--out", help="folder for the site folders")],
) -> None:
    """Turn FLamby's Fed-TCGA-BRCA into its six clients, with the published split and a plan of its Cox regression."""
    from oncofed.deploy.sites.flamby import PLAN, write_flamby_sites

    folders, covariates = write_flamby_sites(source, target)
    out.print(
        escape(
            f"{len(folders)} sites in {target}, {len(covariates)} covariates, split=train|test as published; "
            f"its Cox regression: oncofed analyse run {target} {target / PLAN}"
        )
    )


@data_cli.command("synth")
def data_synth(
    target: Annotated[Path, typer.Option("--out", help="folder for the site folders")],
    sites: Annotated[int, typer.Option(min=1)] = 6,
    patients: Annotated[int, typer.Option(min=20)] = 900,
    genes: Annotated[int, typer.Option(min=10)] = 240,
    cancers: Annotated[int, typer.Option(min=1)] = 4,
    own_level: Annotated[
        float, typer.Option(help="log2 units by which a cancer's own program stands above the other cancers")
    ] = 0.0,
    seed: int = 0,
) -> None:
    """Write a synthetic pan-cancer consortium with known truth."""
    from oncofed.deploy.sites.synth import SynthSettings, write_consortium

    with err.status("writing"):
        folders = write_consortium(
            target,
            SynthSettings(sites=sites, patients=patients, genes=genes, cancers=cancers, own_level=own_level, seed=seed),
        )
    out.print(f"{len(folders)} sites in {target}; the truth behind them in {target / 'truth.json'}")
