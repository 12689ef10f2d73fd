"""The `oncofed analyse` commands: classical survival analysis over hospitals, each on its own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape

analyse_cli = typer.Typer(
    no_args_is_help=True,
    help="Classical survival analysis across sites, exactly as on pooled data: Cox regression, curves, log-rank tests.",
)
out = Console()

Sites = Annotated[Path, typer.Argument(help="folder of site folders; a site needs its clinical table alone")]
Times = Annotated[
    Literal["grid", "exact"],
    typer.Option(help="grid: counts by interval leave; exact: event times leave, and with them nearly rows"),
]
Strata = Annotated[list[str] | None, typer.Option(help="site, cancer_type, a column, or 'column=a|b'; may be repeated")]
Where = Annotated[list[str] | None, typer.Option(help="whose patients: 'column=a|b'; may be repeated, all must hold")]
Step = Annotated[float, typer.Option(help="width of an interval of the grid, months")]
Horizon = Annotated[
    float, typer.Option(min=0, help="follow-up ends here, months; 0: at 120 on a grid, never with exact")
]
Target = Annotated[Path, typer.Option("--out", help="folder for analysis.json and analysis.html")]
Engine = Annotated[
    Literal["local", "ray", "superlink"],
    typer.Option(help="local (in this process) | ray | superlink (real processes)"),
]
Masks = Annotated[
    bool, typer.Option("--secure-sum", help="the server sees totals over all sites alone, added under masks")
]
MinSites = Annotated[int, typer.Option(min=1, help="fewer good answers stop the analysis")]
GROUP = "the grouping that is compared: site, cancer_type, a column, or 'column=a|b'"


@analyse_cli.command("cox")
def analyse_cox(
    sites: Sites,
    covariate: Annotated[
        list[str],
        typer.Option(
            help="'age' is a number, 'sex=female|male' has levels, the first is the reference; may be repeated"
        ),
    ],
    strata: Strata = None,
    where: Where = None,
    test: Annotated[
        list[str] | None, typer.Option(help="patients who are not fitted, but evaluated: 'split=test'; may be repeated")
    ] = None,
    ties: Annotated[Literal["efron", "breslow"], typer.Option(help="how events at one time are taken")] = "efron",
    ridge: Annotated[float, typer.Option(min=0, help="penalty: loglik / patients - ridge / 2 * sum of squares")] = 0.0,
    standardise: Annotated[bool, typer.Option(help="the penalty is on standardised covariates")] = True,
    robust: Annotated[bool, typer.Option(help="sandwich standard errors as well")] = False,
    times: Times = "grid",
    grid_months: Step = 3.0,
    horizon_months: Horizon = 0.0,
    steps: Annotated[int, typer.Option(min=1, max=50, help="Newton steps at most")] = 10,
    secure_sum: Masks = False,
    min_sites: MinSites = 2,
    target: Target = Path("analysis"),
    engine: Engine = "local",
) -> None:
    """Cox regression: hazard ratios, tests, baseline hazards, check of proportional hazards."""
    _run("cox", locals())


@analyse_cli.command("km")
def analyse_km(
    sites: Sites,
    group: Annotated[str, typer.Option(help=GROUP)] = "",
    strata: Strata = None,
    where: Where = None,
    times: Times = "grid",
    grid_months: Step = 3.0,
    horizon_months: Horizon = 0.0,
    epsilon: Annotated[float, typer.Option(min=0, help="differential privacy: what it costs a patient; 0: none")] = 0.0,
    secure_sum: Masks = False,
    min_sites: MinSites = 2,
    target: Target = Path("analysis"),
    engine: Engine = "local",
) -> None:
    """Kaplan-Meier and Nelson-Aalen curves with intervals and numbers at risk; of groups, a log-rank test."""
    _run("km", locals())


@analyse_cli.command("logrank")
def analyse_logrank(
    sites: Sites,
    group: Annotated[str, typer.Option(help=GROUP)],
    strata: Strata = None,
    where: Where = None,
    rho: Annotated[float, typer.Option(min=0, help="weights S(t)^rho; 0: log-rank, 1: Peto and Peto")] = 0.0,
    times: Times = "grid",
    grid_months: Step = 3.0,
    horizon_months: Horizon = 0.0,
    epsilon: Annotated[float, typer.Option(min=0, help="differential privacy: what it costs a patient; 0: none")] = 0.0,
    secure_sum: Masks = False,
    min_sites: MinSites = 2,
    target: Target = Path("analysis"),
    engine: Engine = "local",
) -> None:
    """The log-rank test of two or more groups, stratified where asked."""
    _run("logrank", locals())


@analyse_cli.command("run")
def analyse_run(
    sites: Sites,
    plan: Annotated[Path, typer.Argument(help="TOML file of a plan: the keys of the other commands, and kind")],
    target: Target = Path("analysis"),
    engine: Engine = "local",
) -> None:
    """Run the analysis that a plan file describes; the same file runs in a real federation (`flwr run`, key plan)."""
    from oncofed.common.plan import Plan

    _analyse(sites, engine, Plan.read(str(plan)).model_copy(update={"out": str(target)}))


def _run(kind: str, given: dict[str, Any]) -> None:
    """The analysis that a command's options describe: they are the plan's keys, lists in the singular."""
    from oncofed.common.plan import Plan

    sites, engine, target = (given.pop(name) for name in ("sites", "engine", "target"))
    keys = {"covariates" if k == "covariate" else k: v for k, v in given.items() if v is not None}
    _analyse(sites, engine, Plan.from_config(keys | {"kind": kind, "out": str(target)}))


def _analyse(sites: Path, engine: Literal["local", "ray", "superlink"], plan: Any) -> None:
    from oncofed.deploy.analyse import analyse
    from oncofed.deploy.present_analysis import print_analysis
    from oncofed.server.classical import REPORT

    print_analysis(analyse(plan, sites, engine), out)
    out.print(escape(f"report: {Path(plan.out) / REPORT}"))
