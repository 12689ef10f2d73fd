"""The Flower ServerApp: the phases of a study, from the first greeting to the results on disk."""

from __future__ import annotations

import difflib
import json
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from oncofed.common import wire
from oncofed.common.files import write_text
from oncofed.common.gene_names import GeneNames, ids_meet_symbols, is_plain
from oncofed.common.modalities import EMBEDDING_TROUBLE, IMAGE_TROUBLE, RNA, Beside, agree_text, parse_images
from oncofed.common.panel import NO_GENES, GenePanel
from oncofed.common.pathways import pathways_on
from oncofed.common.plan import Plan
from oncofed.common.progress import progress_bar
from oncofed.common.saved import SavedModel
from oncofed.common.sections import Panel
from oncofed.common.signed_study import signature_beside, with_signature
from oncofed.common.splits import ALL_PATIENTS
from oncofed.common.study import Study
from oncofed.server.classical import run_plan
from oncofed.server.evaluation import load_tables
from oncofed.server.fold import FoldRun
from oncofed.server.inquiry import greeting
from oncofed.server.interpret import interpret
from oncofed.server.journal import JOURNAL, Journal
from oncofed.server.membership import Membership
from oncofed.server.pooled_classes import summarise_classes
from oncofed.server.pooled_evaluation import summarise
from oncofed.server.privacy import statement
from oncofed.server.roster import Roster
from oncofed.server.run_folder import RESULTS, opened

app = ServerApp()
log = logging.getLogger("oncofed.server")

DEFAULTS = Study().run_config()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Read the study from the run config (or the file that it names) and run it; or the plan of a classical analysis."""
    config = dict(context.run_config)
    if config.get("plan"):
        run_plan(_signed(Plan.read(str(config["plan"])), str(config["plan"]), config), grid)
        return
    file = str(config.get("study", ""))
    if file:
        own = {key: config[key] for key in ("runtime.out", "runtime.resume") if config.get(key) != DEFAULTS[key]}
        study = _signed(Study.from_toml(Path(file), own), file, config)
    else:
        study = Study.from_run_config(config)
    run_study(study, grid)


def _signed(asked: Any, file: str, config: Mapping[str, Any]) -> Any:
    """A study or a plan with the signature of the run config, or of the file beside it."""
    given = str(config.get("runtime.signature", ""))
    if not given and not file.lstrip().startswith("{"):
        given = signature_beside(Path(file))
    return with_signature(asked, given) if given else asked


def run_study(study: Study, grid: Grid) -> dict[str, Any]:
    """Run all folds of a study; writes `results.json` and a model a fold below `runtime.out`, and returns the results."""
    with opened(study) as out, Journal.opened(out / JOURNAL) as journal:
        try:
            return _run_study(study, grid, out, journal)
        except BaseException as error:  # also when it is stopped
            journal.failure(error)
            raise


def _run_study(study: Study, grid: Grid, out: Path, journal: Journal) -> dict[str, Any]:
    roster = Roster(grid, study.runtime.wait_sites_s, study.runtime.round_timeout_s, journal=journal)
    if study.runtime.roster:
        roster.membership = Membership.of(study.runtime.roster)
    roster.gather(study.aggregation.min_sites, greeting(study))
    if study.splits.every_site:
        study = study.changed(splits__held_out_sites=roster.sites)
    start = SavedModel.read(Path(study.training.start)) if study.training.start else None
    cancers, panel, beside = agree(study, roster) if start is None else agree_with(start, study, roster)
    absent = [site for site in study.splits.held_out_sites if site not in roster.sites]
    if absent:
        raise ValueError(f"splits.held_out_sites = {absent} are not in the federation; its sites are {roster.sites}")
    log.info("%d sites, %d cancer types, %d genes (panel %s)", len(roster.hellos), len(cancers), len(panel), panel.hash)
    # before training: a mistake in the file must not cost it
    sets = pathways_on(panel, Path(study.analysis.pathways)) if study.analysis.pathways else {}
    folds = list(study.splits.only or range(study.splits.count)) + ([ALL_PATIENTS] if study.splits.refit else [])
    results: dict[str, Any] = {
        "study": study.model_dump(mode="json"),
        "package": wire.package_version(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "sites": roster.sites,
        "cancers": list(cancers),
        "panel": {"genes": len(panel), "hash": panel.hash},
        "beside": beside.config(),
        "folds": [],
        "left_out": roster.left_out,
    }

    def keep() -> None:
        write_text(out / RESULTS, json.dumps(results, indent=1), durable=True)

    rounds = sum(study.steps(phase).rounds for phase in study.phases)
    journal.write(
        "started",
        study=study.name,
        package=wire.package_version(),
        folds=folds,
        rounds=rounds,
        resume=study.runtime.resume,
        sites=roster.sites,
    )
    with progress_bar() as progress:
        bar = progress.add_task("federation", total=len(folds) * rounds)

        def advance(news: str) -> None:
            log.info("%s", news)
            progress.advance(bar)

        for fold in folds:
            results["folds"].append(FoldRun(study, roster, panel, cancers, fold, out, beside, start).run(advance))
            if study.privacy.on:  # after every fold: what has left has left, whatever comes of the next
                results["privacy"] = statement(study, results)
            progress.update(bar, completed=len(results["folds"]) * rounds)
            keep()
    tables = load_tables(out, results["folds"])
    if tables:
        results["evaluation"] = summarise(study, cancers, tables)
        keep()
    told = summarise_classes(results["folds"], cancers, study.seed)
    if told:
        results["class_evaluation"] = told
        keep()
    if study.analysis.attributions or study.analysis.attention:
        results |= interpret(out, folds, sets)
    results["finished"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    keep()
    journal.write("finished")
    return results


UNIT_TROUBLE = "sites deliver expression that cannot share a scale ({}); convert one group, or run two studies"


def agree(study: Study, roster: Roster) -> tuple[tuple[str, ...], GenePanel, Beside]:
    """Cancer types, gene panel and what stands beside genes, from the sites' greetings.

    Refuses sites whose units cannot share a scale, and sites of other images or another frozen model, by name.
    """
    hellos = {str(h["site"]): h for h in roster.hellos.values()}
    agree_text({site: str(h["unit_family"]) for site, h in hellos.items()}, UNIT_TROUBLE)
    found = sorted({c for h in hellos.values() for c in h["cancers"]})  # type: ignore[union-attr]
    cancers = study.groups or tuple(map(str, found))
    absent = [c for c in cancers if c not in found]
    if absent:
        key = "task.classes" if study.task.classes else "cancers"
        raise ValueError(f"{key} = {absent} are at no site; the sites hold {found}")
    beside = agree_beside(hellos, study.panel.min_site_share)
    if RNA not in study.modalities:
        return cancers, NO_GENES, beside
    held = [list(map(str, h["genes"])) for h in hellos.values() if h["genes"]]  # type: ignore[arg-type]
    return cancers, agree_panel(study.panel, held), beside


def agree_with(start: SavedModel, study: Study, roster: Roster) -> tuple[tuple[str, ...], GenePanel, Beside]:
    """Cancer types, panel and what stands beside genes of a saved model, where sites and study fit it."""
    hellos = {str(h["site"]): h for h in roster.hellos.values()}
    family = agree_text({site: str(h["unit_family"]) for site, h in hellos.items()}, UNIT_TROUBLE)
    if start.unit_family and family and start.unit_family != family:
        raise ValueError(
            f"training.start: the model was trained on expression of the unit family '{start.unit_family}', the sites deliver '{family}'; "
            "take a model of their units"
        )
    for key, mine, saved in (
        ("cancers", study.groups, start.cancers),
        ("task.kind", study.task.kind, start.study.task.kind),
        ("panel.covariates", study.panel.covariates, start.study.panel.covariates),
        ("panel.scale_by", study.scale_by_cancer, start.study.scale_by_cancer),
        ("fusion.modalities", study.modalities, start.study.modalities),
    ):
        if mine != saved and (mine or key != "cancers"):
            raise ValueError(
                f"training.start: {key} = {mine!r} in the study, {saved!r} in the saved model; take over the model's"
            )
    return start.cancers, start.panel, start.beside


SHOWN = 3
"""Genes that a message names."""


def agree_panel(asked: Panel, held: Sequence[Sequence[str]]) -> GenePanel:
    """The genes of `panel.file`, or those that enough sites hold, with the other names that the table of `panel.names` has.

    `held` are the names of genes in each site's file.
    """
    names = GeneNames.from_file(Path(asked.names)) if asked.names else None
    if asked.file:
        return _held_somewhere(asked, GenePanel.from_file(Path(asked.file), names), held)
    if names is None:
        return GenePanel.shared(held, asked.min_site_share)
    # counted as the sites will find them: by the panel's names, not by the table
    every = GenePanel.named(sorted(filter(is_plain, {names.approved(g) for genes in held for g in genes})), names)
    return every.only(GenePanel.shared(map(every.names_of, held), asked.min_site_share).genes)


def _held_somewhere(asked: Panel, panel: GenePanel, held: Sequence[Sequence[str]]) -> GenePanel:
    """The panel's genes that some site holds; those of none are refused or, with `panel.unknown = "drop"`, left out."""
    here = set().union(*map(panel.names_of, held))
    unknown = [g for g in panel.genes if g not in here]
    if not unknown:
        return panel
    near = {g: difflib.get_close_matches(g, here, 1) for g in unknown[:SHOWN]}
    shown = ", ".join(f"{g} (nearest: {found[0]})" if found else g for g, found in near.items())
    text = f"{len(unknown)} of the {len(panel)} genes of panel.file = {asked.file} are at no site: {shown}" + (
        " ..." if len(unknown) > SHOWN else ""
    )
    remedies = ["correct them"]
    if not asked.names and ids_meet_symbols(panel.genes, list(here)):
        remedies.append("let panel.names name HGNC's table of names, since only one side goes by Ensembl ids")
    if asked.unknown == "refuse" or len(unknown) == len(panel):
        if len(unknown) < len(panel):
            remedies.append("leave them out with panel.unknown = 'drop'")
        raise ValueError(f"{text}; {', or '.join(remedies)}")
    log.warning("%s; left out, as panel.unknown = 'drop' says", text)
    return panel.only(here)


def agree_beside(hellos: Mapping[str, wire.Config], min_site_share: float) -> Beside:
    """What the sites that have images, alterations or embeddings have in common."""
    alterations = [Beside.of(h).alterations for h in hellos.values() if h.get("alterations")]
    images = agree_text({site: str(h.get("images", "")) for site, h in hellos.items()}, IMAGE_TROUBLE)
    embedding = agree_text(
        {s: f"{h['embedding']} of width {h.get('embedding_width')}" for s, h in hellos.items() if h.get("embedding")},
        EMBEDDING_TROUBLE,
    )
    kind, width = parse_images(images) if images else ("", 0)
    model, _, length = embedding.partition(" of width ")
    return Beside(
        image_kind=kind,
        image_width=width,
        images=images,
        alterations=GenePanel.shared(alterations, min_site_share).genes if alterations else (),
        embedding=model,
        embedding_width=int(length or 0),
    )
