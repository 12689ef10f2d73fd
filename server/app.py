"""The Flower ServerApp: the phases of a study, from the first greeting to the results on disk."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from oncofed.common import wire
from oncofed.common.files import write_text
from oncofed.common.modalities import EMBEDDING_TROUBLE, IMAGE_TROUBLE, RNA, Beside, agree_text, parse_images
from oncofed.common.panel import NO_GENES, GenePanel
from oncofed.common.progress import progress_bar
from oncofed.common.splits import ALL_PATIENTS
from oncofed.common.study import Study
from oncofed.server.fold import FoldRun
from oncofed.server.genes import models_of, summarise
from oncofed.server.inquiry import greeting
from oncofed.server.roster import Roster

app = ServerApp()
log = logging.getLogger("oncofed.server")

DEFAULTS = Study().run_config()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Read the study from the run config (or the file that it names) and run it."""
    config = dict(context.run_config)
    file = str(config.get("study", ""))
    if file:
        own = {key: config[key] for key in ("runtime.out", "runtime.resume") if config.get(key) != DEFAULTS[key]}
        study = Study.from_toml(Path(file), own)
    else:
        study = Study.from_run_config(config)
    run_study(study, grid)


def run_study(study: Study, grid: Grid) -> dict[str, Any]:
    """Run all folds of a study; writes `results.json` and a model a fold below `runtime.out`, and returns the results."""
    out = Path(study.runtime.out)
    out.mkdir(parents=True, exist_ok=True)
    roster = Roster(grid, study.runtime.wait_sites_s, study.runtime.round_timeout_s)
    roster.gather(study.aggregation.min_sites, greeting(study))
    cancers, panel, beside = agree(study, roster)
    absent = [site for site in study.splits.held_out_sites if site not in roster.sites]
    if absent:
        raise ValueError(f"splits.held_out_sites = {absent} are not in the federation; its sites are {roster.sites}")
    log.info("%d sites, %d cancer types, %d genes (panel %s)", len(roster.hellos), len(cancers), len(panel), panel.hash)
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
    with progress_bar() as progress:
        rounds = sum(study.steps(phase).rounds for phase in study.phases)
        bar = progress.add_task("federation", total=len(folds) * rounds)

        def advance(news: str) -> None:
            log.info("%s", news)
            progress.advance(bar)

        for fold in folds:
            results["folds"].append(FoldRun(study, roster, panel, cancers, fold, out, beside).run(advance))
            progress.update(bar, completed=len(results["folds"]) * rounds)
            write_text(out / "results.json", json.dumps(results, indent=1))
    if study.analysis.attributions:
        results["genes"] = summarise(models_of(out, folds))
        write_text(out / "results.json", json.dumps(results, indent=1))
    return results


UNIT_TROUBLE = "sites deliver expression that cannot share a scale ({}); convert one group, or run two studies"


def agree(study: Study, roster: Roster) -> tuple[tuple[str, ...], GenePanel, Beside]:
    """Cancer types, gene panel and what stands beside genes, from the sites' greetings.

    Refuses sites whose units cannot share a scale, and sites of other images or another frozen model, by name.
    """
    hellos = {str(h["site"]): h for h in roster.hellos.values()}
    agree_text({site: str(h["unit_family"]) for site, h in hellos.items()}, UNIT_TROUBLE)
    found = sorted({c for h in hellos.values() for c in h["cancers"]})  # type: ignore[union-attr]
    cancers = study.cancers or tuple(map(str, found))
    absent = [c for c in cancers if c not in found]
    if absent:
        raise ValueError(f"cancers = {absent} are at no site; the sites hold {found}")
    beside = agree_beside(hellos, study.panel.min_site_share)
    if RNA not in study.modalities:
        return cancers, NO_GENES, beside
    if study.panel.file:
        return cancers, GenePanel.from_file(Path(study.panel.file)), beside
    genes = [h["genes"] for h in hellos.values() if h["genes"]]
    return cancers, GenePanel.shared(genes, study.panel.min_site_share), beside  # type: ignore[arg-type]


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
