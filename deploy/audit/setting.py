"""What an audit attacks: a study's training patients, its model at the first round and its promise, as the product has them.

Sites are greeted and asked for their statistics through the federation's own messages, so the frame, the panel and the first
weights are the study's. Only a researcher who holds every site's folder can go on: the patients are then put in one place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from oncofed.client.app import app as client_app
from oncofed.client.batch import CHUNK, Batch
from oncofed.client.data.cohort import Cohort
from oncofed.client.data.site import SiteFolder, list_sites
from oncofed.client.device import choose_device
from oncofed.client.greeting import known_patients
from oncofed.client.privacy.evidence import Held, public_evidence
from oncofed.client.privacy.train import train_privately
from oncofed.client.scale import lens_of
from oncofed.common.blocks import Sum, under
from oncofed.common.covariates import input_names
from oncofed.common.modalities import MODALITIES, PATHOLOGY
from oncofed.common.models.autoencoder import GeneAutoencoder
from oncofed.common.models.build import Predictor, Sizes, begin_from, build_model, get_weights
from oncofed.common.models.gene_moe import Encoder, GeneMOE
from oncofed.common.models.output import ModelOutput
from oncofed.common.privacy.accounting import epsilon_of
from oncofed.common.privacy.releases import TRAINING, Promise, promise_of
from oncofed.common.privacy.sharing import UNSHARED
from oncofed.common.saved import SavedModel
from oncofed.common.scaling import Scaling
from oncofed.common.study import TRAIN, Study
from oncofed.common.tables import scale_prefix, table_widths
from oncofed.common.wire import TRAIN as TRAIN_MESSAGE
from oncofed.deploy.comparison.reference import Pool
from oncofed.deploy.engine import InProcessGrid
from oncofed.deploy.simulate import check_names
from oncofed.server.app import agree, agree_with
from oncofed.server.broadcast import Broadcast
from oncofed.server.inquiry import Inquiry, greeting
from oncofed.server.roster import Roster
from oncofed.server.statistics import Frame, gather_statistics
from oncofed.server.strategy import EvidenceStrategy
from torch import Tensor

Share = Callable[[int, Sum, Mapping[str, np.ndarray]], Sum]
"""A site's training sum from the round, the weights and the experts' load."""


@dataclass(frozen=True)
class Asked:
    """A site that answers training messages, as the product does; `patients` are its training patients, `known` as many as everyone may know."""

    inquiry: Inquiry
    frame: Frame
    patients: int
    known: int

    def ask(self, setting: Setting, round_: int, weights: Sum, load: Mapping[str, np.ndarray]) -> Sum:
        """The answer to a round of the study from `weights`; raises `ValueError` with the site's reason where there is none."""
        arrays = self.frame.arrays | under("weights/", weights) | under("load/", load)
        before = len(self.inquiry.roster.left_out)
        for answer in self.inquiry.ask(TRAIN_MESSAGE, self.frame.config, arrays, phase=TRAIN, round_=round_):
            return dict(answer.arrays)
        said = "; ".join(str(x["reason"]) for x in self.inquiry.roster.left_out[before:])
        raise ValueError(f"{self.inquiry.alone} does not answer round {round_} of {setting.study.name}: {said}")


@dataclass(frozen=True)
class Setting:
    """A study about to train: `weights` are the first ones, `batch` the training patients of `fold` at `sites` together.

    `site` is the largest of them, by its messages.
    """

    study: Study
    model: Predictor
    weights: Sum
    batch: Batch
    held: Held
    promise: Promise
    sites: tuple[str, ...]
    fold: int
    site: Asked | None = None

    @property
    def steps(self) -> int:
        """Private steps of the fold."""
        return self.study.training.rounds * self.study.training.local_steps

    def epsilon(self, steps: int) -> float:
        """What so many training steps cost by the study's own account, at its delta."""
        one = self.promise.mechanisms[TRAINING]
        return epsilon_of([replace(one, count=steps)], self.promise.delta)

    @property
    def at_once(self) -> int:
        """Patients of a part of a step, as in client/privacy/train.py: of tiles a few."""
        chunk = self.study.privacy.chunk
        return min(chunk, CHUNK) if self.batch.bags is not None and PATHOLOGY in self.study.modalities else chunk

    def train(self, share: Share, rounds: int = 0) -> Sum:
        """The weights after the study's rounds, or so many, in a federation of one site whose sums `share` gives."""
        strategy = EvidenceStrategy.of(self.study.aggregation, self.model)
        strategy.weights, strategy.modalities = dict(self.weights), ()
        for round_ in range(1, (rounds or self.study.training.rounds) + 1):
            strategy.take(share(round_, strategy.weights, strategy.load))
        strategy.settle()
        return strategy.weights

    def private_share(self, batch: Batch, *, noisy: bool = True) -> Share:
        """Rounds of the product's private training on `batch`, or the same steps, clip included, without noise."""

        def share(round_: int, weights: Sum, load: Mapping[str, np.ndarray]) -> Sum:
            return train_privately(
                self.model,
                weights,
                batch,
                self.study,
                round_=round_,
                load=load,
                deviation=self.promise.deviation if noisy else 0.0,
                evidence=public_evidence(self.model, batch, self.held),
                probe=round_ == 1,
            )

        return share

    @property
    def load(self) -> dict[str, np.ndarray]:
        """The experts' load in the first round: equal."""
        return {group: np.full(n, 1.0 / n) for group, n in self.model.mixtures().items()}


def open_setting(sites: Path, study: Study, site: str = "") -> Setting:
    """The study over the site folders below `sites`, its patients pooled, or those of one `site`.

    Raises `ValueError` where the study promises nothing of patients, or no site goes by that name.
    """
    if not study.privacy.of_patients:
        raise ValueError(
            f"privacy.unit = '{study.privacy.unit}': an audit attacks what is promised of a patient; set privacy.unit = 'patient'"
        )
    # how a sum is written, and whether it is masked, comes after the noise: an audit looks at what lies below; where hospitals share
    # the noise, it takes them for one that adds all of it
    study = study.changed(
        transport__upload="float32",
        transport__download="float32",
        transport__only_evidence=False,
        privacy__secure_sum=False,
        **UNSHARED,
    )
    if study.runtime.threads:
        torch.set_num_threads(study.runtime.threads)
    folders = list_sites(sites)
    check_names(folders)
    nodes: list[dict[str, bool | int | float | str]] = [
        {"partition-id": i, "num-partitions": len(folders)} for i in range(len(folders))
    ]
    grid = InProcessGrid(client_app, nodes, {"sites": str(sites.resolve())})
    roster = Roster(grid, study.runtime.wait_sites_s, study.runtime.round_timeout_s)
    roster.gather(min(study.aggregation.min_sites, len(folders)), greeting(study))
    if study.splits.every_site:
        study = study.changed(splits__held_out_sites=roster.sites)
    if site and site not in roster.sites:
        raise ValueError(f"--site {site}: not in the federation; its sites are {', '.join(roster.sites)}")
    start = SavedModel.read(Path(study.training.start)) if study.training.start else None
    cancers, panel, beside = agree(study, roster) if start is None else agree_with(start, study, roster)
    fold = study.splits.only[0] if study.splits.only else 0
    inquiry = Inquiry(study, roster, panel, cancers, fold, Broadcast.of(study), beside)
    frame, baseline, _ = gather_statistics(inquiry, start)
    device = choose_device(study.runtime.device)
    widths = table_widths(study, beside, len(panel))
    scales = {m: Scaling.of(frame.arrays, scale_prefix(m)) for m in widths}
    covariates = frame.arrays["covariate_mean"], frame.arrays["covariate_sd"]
    lens = lens_of(study, beside, scales, covariates, frame.grid)
    sizes = Sizes(len(panel), cancers, len(frame.grid), len(input_names(study.panel.covariates)), beside)
    model = build_model(study, sizes, phase=TRAIN, fold=fold).to(device)
    assert not isinstance(model, GeneAutoencoder)
    weights: Sum = {name: np.array(value) for name, value in get_weights(model).items()}
    if start is not None:
        weights = begin_from(weights, start.weights)
    if baseline is not None and "head.log_baseline" in weights:
        weights["head.log_baseline"] = baseline
    pool = Pool.open(sites, study, panel, cancers, {site} if site else set(roster.sites), beside)
    trained = pool.split(study, fold) == "train"
    cohort = pool.all.select(trained)
    if not len(cohort):
        raise ValueError(f"{site or 'the sites'}: no training patient in fold {fold}; name another site or fold")
    batch = Batch.of(cohort, lens, device)
    patients = {name: int((trained & (pool.site == name)).sum()) for name in pool.cohorts}
    largest = max(patients, key=lambda name: patients[name])
    folder = next(f for f in folders if SiteFolder.open(f).name == largest)
    share = 1.0 if study.splits.held_out_sites else 1.0 - 1.0 / study.splits.folds
    known = max(1, round(share * known_patients(SiteFolder.open(folder), folder / ".oncofed")))
    asked = Asked(replace(inquiry, alone=largest), frame, patients[largest], known)
    return Setting(study, model, weights, batch, _held(cohort), promise_of(study), tuple(pool.cohorts), fold, asked)


def _held(cohort: Cohort) -> Held:
    cancers = frozenset(int(c) for c in np.unique(cohort.cancer))
    return Held(cancers, frozenset(m for m in MODALITIES if cohort.has(m).any()))


class _Remembered(Encoder):
    """Stands in for a frozen encoder whose patients come as its features already: it has no parameters and no experts."""

    def __init__(self, encoder: Encoder) -> None:
        torch.nn.Module.__init__(self)
        self.settings = encoder.settings

    def forward(
        self, x_BG: Tensor, cancer_B: Tensor, generator: torch.Generator | None = None, off: object = None
    ) -> ModelOutput:
        return ModelOutput(score=x_BG, latent=x_BG)

    def mixtures(self) -> dict[str, int]:
        return {}

    def removable(self) -> dict[str, int]:
        return {}


def remembered(setting: Setting) -> Setting:
    """The same training where a frozen Gene-MOE encoder has seen every patient once: many models of one head are wanted.

    The balance of experts goes, which moves nothing in a head. Other models are returned as they are.
    """
    model = setting.model
    if not isinstance(model, GeneMOE) or not model.still:
        return setting
    batch, parts = setting.batch, []
    model.load_state_dict({n: torch.from_numpy(v) for n, v in setting.weights.items()})
    with torch.no_grad():
        for rows in torch.arange(len(batch), device=batch.cancer_B.device).split(setting.study.privacy.chunk):
            part = batch.select(rows)
            parts.append(model.encoder(part.x_BG, part.cancer_B).score)
    head = GeneMOE(_Remembered(model.encoder), model.head, model.cancers)
    head.still = True
    weights = {n: v for n, v in setting.weights.items() if n.startswith("head.")}
    return replace(setting, model=head, weights=weights, batch=replace(batch, x_BG=torch.cat(parts)))
