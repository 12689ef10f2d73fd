"""The `oncofed` command."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from oncofed.deploy.cli.analyse import analyse_cli
from oncofed.deploy.cli.consortium import consortium_cli
from oncofed.deploy.cli.data import data_cli
from oncofed.deploy.cli.policy import site_cli
from oncofed.deploy.cli.server import server_cli
from oncofed.deploy.cli.study import study_cli
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

cli = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    help="Federated multi-site training for cancer.",
)
cli.add_typer(site_cli, name="site")
cli.add_typer(data_cli, name="data")
cli.add_typer(study_cli, name="study")
cli.add_typer(analyse_cli, name="analyse")
cli.add_typer(consortium_cli, name="consortium")
cli.add_typer(server_cli, name="server")

out = Console()
err = Console(stderr=True)


@cli.command("simulate")
def simulate_command(
    sites: Annotated[Path, typer.Argument(help="folder of site folders")],
    study: Annotated[Path | None, typer.Option(help="study TOML file; without it, the defaults")] = None,
    compare: Annotated[
        str,
        typer.Option(
            help="comma-separated: pooled,local,ridge,cox,fedavg; in classification logistic for ridge, and linear; with privacy "
            "unprotected; of several modalities "
            "also rna,pathology,late,concat,unmodulated"
        ),
    ] = "",
    target: Annotated[Path, typer.Option("--out", help="folder for results, models and report")] = Path("out"),
    engine: Annotated[
        Literal["local", "ray", "superlink"],
        typer.Option(help="local (in this process) | ray | superlink (real processes on loopback)"),
    ] = "local",
    set_: Annotated[
        list[str] | None, typer.Option("--set", "-s", help="override a key of the study: -s training.rounds=10")
    ] = None,
    resume: Annotated[bool, typer.Option(help="continue from the checkpoints in --out")] = False,
) -> None:
    """Run a federation over site folders on this machine, compare it, and write a report."""
    from oncofed.common.study import Study
    from oncofed.deploy.comparison.present import print_tables
    from oncofed.deploy.resume import run_and_report

    overrides = _overrides(set_ or []) | {"runtime.out": str(target), "runtime.resume": resume}
    chosen = Study.from_toml(study, overrides) if study else Study.from_run_config(overrides)
    comparison, report = run_and_report(chosen, sites, tuple(m for m in compare.split(",") if m), engine)
    print_tables(comparison, out)
    out.print(f"report: {report}")


@cli.command("ablate")
def ablate_command(
    sites: Annotated[Path, typer.Argument(help="folder of site folders")],
    study: Annotated[Path | None, typer.Option(help="study TOML file; without it, the defaults")] = None,
    target: Annotated[Path, typer.Option("--out", help="folder for results and table")] = Path("ablations"),
    only: Annotated[str, typer.Option(help="comma-separated names of ablations; without it, all that apply")] = "",
    set_: Annotated[
        list[str] | None, typer.Option("--set", "-s", help="override a key of the study: -s training.rounds=10")
    ] = None,
) -> None:
    """Run a study without each of its parts in turn, and fill a table of what each part is worth."""
    from oncofed.common.study import Study
    from oncofed.deploy.comparison.ablate import ablate
    from oncofed.deploy.comparison.present_ablations import print_ablations, write_ablations

    overrides = _overrides(set_ or []) | {"runtime.out": str(target)}
    chosen = Study.from_toml(study, overrides) if study else Study.from_run_config(overrides)
    result = ablate(chosen, sites, tuple(n.strip() for n in only.split(",") if n.strip()))
    print_ablations(result, out)
    out.print(f"table: {write_ablations(result, target)}")


@cli.command("robustness")
def robustness_command(
    sites: Annotated[Path, typer.Argument(help="folder of site folders")],
    study: Annotated[Path | None, typer.Option(help="study TOML file; without it, the defaults")] = None,
    target: Annotated[Path, typer.Option("--out", help="folder for results, models and picture")] = Path("robustness"),
    shares: Annotated[str, typer.Option(help="shares of the test patients who lose pathology")] = "0,0.25,0.5,0.75,1",
    train_hospitals: Annotated[
        float, typer.Option(min=0, max=1, help="share of the hospitals that then train without pathology; 0: none")
    ] = 0.5,
    set_: Annotated[
        list[str] | None, typer.Option("--set", "-s", help="override a key of the study: -s training.rounds=10")
    ] = None,
    resume: Annotated[bool, typer.Option(help="continue from the checkpoints in --out")] = False,
) -> None:
    """Take pathology away from test patients, and from hospitals in training: a fusion model beside late fusion."""
    from oncofed.common.study import Study
    from oncofed.deploy.comparison.present_robustness import print_robustness, write_robustness
    from oncofed.deploy.comparison.robustness import robustness

    overrides = _overrides(set_ or []) | {"runtime.out": str(target), "runtime.resume": resume}
    chosen = Study.from_toml(study, overrides) if study else Study.from_run_config(overrides)
    try:
        wanted = tuple(float(part) for part in shares.split(",") if part.strip())
    except ValueError:
        raise ValueError(f"--shares {shares}: write numbers from 0 to 1 with commas between, such as 0,0.5,1") from None
    result = robustness(chosen, sites, wanted, train_hospitals)
    print_robustness(result, out)
    out.print(f"picture: {write_robustness(result, target)}")


@cli.command("audit")
def audit_command(
    sites: Annotated[Path, typer.Argument(help="folder of site folders")],
    study: Annotated[Path | None, typer.Option(help="study TOML file; without it, the defaults")] = None,
    target: Annotated[Path, typer.Option("--out", help="folder for audit.json and the picture")] = Path("audit"),
    checks: Annotated[
        str, typer.Option(help="comma-separated: sensitivity, canary, membership, inversion")
    ] = "sensitivity,canary,membership,inversion",
    models: Annotated[int, typer.Option(min=8, help="shadow models, with privacy and without")] = 32,
    site: Annotated[str, typer.Option(help="attack this site's training; without it, all patients as one site")] = "",
    seed: Annotated[int, typer.Option(help="of halves, canaries and choices; noise has none")] = 0,
    set_: Annotated[
        list[str] | None, typer.Option("--set", "-s", help="override a key of the study: -s privacy.epsilon=3")
    ] = None,
) -> None:
    """Attack a study's private training with its own code. Exit code 1 when more shows than is claimed."""
    from oncofed.common.study import Study
    from oncofed.deploy.audit.audit import audit
    from oncofed.deploy.audit.present import print_audit, write_audit

    overrides = _overrides(set_ or [])
    chosen = Study.from_toml(study, overrides) if study else Study.from_run_config(overrides)
    wanted = tuple(part.strip() for part in checks.split(",") if part.strip())
    result = audit(chosen, sites, wanted, models=models, seed=seed, site=site)
    print_audit(result, out)
    out.print(f"picture: {write_audit(result, target)}")
    raise typer.Exit(0 if result["gate"]["passed"] else 1)


@cli.command("demo")
def demo_command(
    target: Annotated[Path, typer.Option("--out", help="folder for sites, results and report")] = Path("demo"),
) -> None:
    """Run the main job on a synthetic consortium: federation, comparison, report."""
    from oncofed.deploy.comparison.present import print_tables, write_comparison
    from oncofed.deploy.demo import run_demo

    out.print("A synthetic consortium of 6 hospitals and 900 patients; the truth behind it is known.")
    comparison = run_demo(target)
    report = write_comparison(comparison, target)
    print_tables(comparison, out)
    out.print(f"report: {report}")


@cli.command("smooth")
def smooth_command(
    checkpoint: Annotated[
        Path, typer.Argument(help="folder of an scGPT checkpoint: args.json, vocab.json, best_model.pt")
    ],
    cells: Annotated[Path | None, typer.Option(help="single cells: .h5ad with raw counts in X")] = None,
    label: Annotated[str, typer.Option(help="column of the cells' obs with the cell type")] = "cell_type",
    symbols: Annotated[
        str, typer.Option(help="column of the cells' var with gene symbols; without it, its names")
    ] = "",
    sites: Annotated[
        Path | None,
        typer.Option(help="instead of cells: bulk RNA of a site folder, or a folder of them, outside the study"),
    ] = None,
    panel: Annotated[Path | None, typer.Option(help="the study's gene panel, one gene a line")] = None,
    target: Annotated[Path | None, typer.Option("--out", help="file; without it, into the checkpoint's folder")] = None,
    steps: Annotated[int, typer.Option(min=1)] = 2000,
    batch: Annotated[int, typer.Option(min=1, help="mixtures a step")] = 32,
    mixed: Annotated[int, typer.Option(min=2, help="samples in a mixture; 2 is the paper's")] = 2,
    concentration: Annotated[float, typer.Option(help="of the Dirichlet shares; 1 is the paper's")] = 1.0,
    seed: int = 0,
    device: Annotated[str, typer.Option(help="auto | cpu | cuda | mps")] = "auto",
) -> None:
    """Train stage 1 of Path-GPTOmic: a small network after scGPT that makes mixtures of cells land between their types."""
    from oncofed.deploy.smooth import smooth

    done = smooth(
        checkpoint,
        cells=cells,
        label=label,
        symbols=symbols,
        sites=sites,
        panel=panel,
        steps=steps,
        batch=batch,
        mixed=mixed,
        concentration=concentration,
        seed=seed,
        device=device,
        target=target,
    )
    out.print(f"{done.samples} samples of {len(done.classes)} labels, {done.genes} genes that scGPT knows")
    out.print(
        f"held-out mixtures: {done.error:.1%} of a mixture given to the wrong labels, {done.baseline:.1%} by the mean label"
    )
    if done.error > 0.9 * done.baseline:
        out.print(
            "[yellow]note[/] it has hardly learned: more --steps, more samples, or labels that expression can tell"
        )
    out.print(escape(f"smoothing: {done.file}"))


@cli.command("health")
def health_command(
    address: Annotated[
        str, typer.Argument(help="HOST:PORT that --health of a server or a site names")
    ] = "127.0.0.1:8081",
    service: Annotated[
        str, typer.Option(help="ready, or one process: node, link, exec, edge; without it, all run")
    ] = "",
) -> None:
    """Ask a running server or site how it is, by the gRPC health protocol. Exit code 0: serving; 1: not."""
    from oncofed.deploy.services.health import check

    told = check(address, service)
    out.print(escape(told))
    raise typer.Exit(0 if told == "SERVING" else 1)


def _overrides(pairs: list[str]) -> dict[str, Any]:
    """`key=value` with TOML values; bare words are text."""
    import tomllib

    result: dict[str, Any] = {}
    for pair in pairs:
        key, sign, value = pair.partition("=")
        if not sign:
            raise ValueError(f"--set {pair}: write key=value")
        try:
            result[key.strip()] = tomllib.loads(f"v = {value}")["v"]
        except tomllib.TOMLDecodeError:
            result[key.strip()] = value.strip()
    return result


def main() -> None:
    """Run the command; a user's mistake is one message, without a traceback."""
    handler = RichHandler(console=err, show_path=False, show_time=False)
    logging.basicConfig(level=logging.WARNING, handlers=[handler], format="%(message)s")
    logging.getLogger("oncofed").setLevel(os.environ.get("ONCOFED_LOG", "WARNING").upper())
    try:
        cli()
    except (ValueError, RuntimeError, OSError) as error:
        if os.environ.get("ONCOFED_DEBUG"):
            raise
        err.print(f"[red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise SystemExit(1) from None
