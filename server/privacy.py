"""What a promise of privacy means at this number of sites, and the statement of a study that has run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from oncofed.common.covariates import input_names
from oncofed.common.models.build import Sizes, build_empty
from oncofed.common.privacy.accounting import INTERVAL, Mechanism, epsilon_of, merged
from oncofed.common.privacy.releases import EVALUATION, STATISTICS, TRAINING, counts_of_evidence, promise_of
from oncofed.common.privacy.releases import EVIDENCE as COUNTS
from oncofed.common.saved import SavedModel
from oncofed.common.splits import ALL_PATIENTS
from oncofed.common.study import Study


@dataclass(frozen=True)
class Cost:
    """Noise on the mean change of a round beside what a change may be, both in clips: per number, and over all numbers."""

    per_number: float
    over_all: float
    parameters: int

    @property
    def drowned(self) -> bool:
        """Whether the noise is longer than any mean change can be."""
        return self.over_all > 1.0


def cost_of(study: Study, parameters: int, sites: int, patients: int) -> Cost:
    """What the promise costs: the deviation of the noise on the mean of a round, over `clip`.

    Of patients each site adds its own noise, or its share, to a step's sum, and the mean is over all `patients`; of hospitals the server adds it
    once, and the mean is over `sites`.
    """
    deviation = promise_of(study).deviation
    p = study.privacy
    of_all = deviation * math.sqrt(sites) if p.sharing is None else p.sharing.of_total(deviation, sites)
    per_number = deviation / sites if p.unit == "hospital" else of_all / (p.sample_rate * patients)
    return Cost(per_number, per_number * math.sqrt(parameters), parameters)


def foretold(study: Study, cost: Cost, sites: int, patients: int) -> str:
    """A cost in words: how long the noise is, whether it drowns what a round can say, and what would help."""
    hospital = study.privacy.unit == "hospital"
    who = f"{sites:,} hospitals" if hospital else f"{sites:,} hospitals and {patients:,} patients"
    text = (
        f"with {who} the noise on a {'round' if hospital else 'step'}'s mean is {_few(cost.per_number)} clips a number and "
        f"{_few(cost.over_all)} clips over {cost.parameters:,} numbers, a change is at most 1"
    )
    if not cost.drowned:
        return f"{text}."
    steps = study.training.rounds * (1 if hospital else study.training.local_steps)
    after = cost.over_all / math.sqrt(steps)
    if hospital:
        wants = f"hospital-level privacy wants hundreds of hospitals ({cost.over_all * sites:,.0f} for noise as long as a change)"
        remedies = ["more hospitals", "privacy.unit = 'patient'"]
    else:
        wants = f"the noise drowns what one step says ({cost.over_all * patients:,.0f} patients for noise as long as a change)"
        remedies = ["more patients"] + (["privacy.noise = 'shared'"] if study.privacy.sharing is None else [])
    remedies += [
        "fewer trained parameters (training.encoder = 'frozen' with a public model in training.start)",
        "a larger epsilon",
        "fewer rounds and folds",
    ]
    return (
        f"{text}: {wants}. Where all {steps} {'rounds' if hospital else 'steps'} of a fold agree, they add up {steps} times and their noise "
        f"{_few(math.sqrt(steps))} times: at best {_few(after)} clips of noise to one of change at the end"
        f"{'' if after < 1 else ', drowned still'}. What helps: {'; '.join(remedies)}."
    )


def counted(study: Study, genes: int, cancers: int = 10) -> int:
    """Numbers that a study trains, with its start model's sizes or as many genes and cancer types; raises where images are wanted."""
    start = SavedModel.read(Path(study.training.start)) if study.training.start else None
    covariates = len(input_names(study.panel.covariates))
    if start is not None:
        sizes = Sizes(len(start.panel), start.cancers, len(start.grid), covariates, start.beside)
    elif study.multimodal:
        raise ValueError(
            f"how wide {' and '.join(study.modalities)} are is known when the sites have met; give --parameters"
        )
    else:
        names = study.groups or tuple(f"C{i}" for i in range(cancers))
        sizes = Sizes(genes, names, len(study.task.time_edges) or study.task.intervals, covariates)
    model = build_empty(study, sizes, torch.device("meta"))
    return sum(q.numel() for q in model.parameters() if q.requires_grad)


def _few(value: float) -> str:
    """Two digits, and no exponent where a number is large."""
    return f"{value:.2g}" if value < 100 else f"{value:,.0f}"


# -- the statement -----------------------------------------------------------------------------------------------------

POINTS = 16
"""Of the curve of what is spent."""

FPR = 0.01
"""Share of patients who took no part and are accused all the same, at which membership is bounded."""

PROTECTS = {
    "patient": "one patient: all records of one patient at one hospital",
    "hospital": "one hospital: all its patients together",
}

NEIGHBOURS = {
    "patient": "add or remove one patient of a hospital",
    "hospital": "add or remove one hospital's change; that it takes part is known",
}

TRUST = {
    "patient": "each hospital adds its own noise before anything leaves: the promise holds against the server, the other hospitals, and "
    "whoever gets the model; a hospital trusts its own machine alone",
    "hospital": "the server adds the noise, and sees every hospital's clipped change before: the promise holds against the other hospitals "
    "and whoever gets the model, the server is trusted until a secure sum carries the changes",
}


def trust_of(study: Study) -> str:
    """Against whom the promise holds, and on whom it rests."""
    s = study.privacy.sharing
    if s is None:
        return TRUST[study.privacy.unit]
    share = s.of_each(1.0)
    return (
        f"{s.sites} hospitals share the noise, and no hospital's own would do: each adds {share:.3g} of the deviation that the total has. The promise "
        f"holds against the server and whoever gets the model, if of those {s.sites} no more than {s.colluding} tell the server, or each other, what "
        f"they added; a hospital refuses totals of fewer than {s.least}. It holds against {'each' if s.colluding == 1 else 'any ' + str(s.colluding)} of the other "
        "hospitals, who know their own noise. It rests on the secure sum, on the hospitals' rosters of identities, and on every other hospital's adding its part. "
        "Where one relied on its own noise alone, the promise would be weaker: "
        f"{_alone(study):.3g} in place of {promise_of(study).epsilon:.3g}"
    )


def _alone(study: Study) -> float:
    """Epsilon of everything planned to whoever sees one hospital's own sums, with its part of the noise."""
    assert study.privacy.sharing is not None
    share = study.privacy.sharing.of_each(1.0)
    planned = [
        replace(m, noise=m.noise * share) if name in (TRAINING, STATISTICS) else m
        for name, m in promise_of(study).mechanisms.items()
    ]
    return epsilon_of(planned, study.privacy.delta)


BUDGET = {
    "patient": "each hospital's ledger adds up all studies against epsilon_budget in its policy.toml; nothing refills it by itself",
    "hospital": "no ledger adds up what several such studies tell of a hospital: at most the sum of their epsilons",
}

NOT_COVERED = (
    "numbers of patients, rounded to tens",
    "cancer types and modalities that a hospital holds, the names of its genes, its units, device and name: its greeting tells them",
    "panel of genes, time edges and scale, which are public or come from the model that the study started from",
    "settings chosen beforehand (rounds, rates, clip): where they were tuned on these patients, those runs cost what they promised",
    "who answered which round, how long that took, how large the messages were, and the words of a refusal",
    "each hospital's own predictions and release log, which stay in its folder and hold rows of patients",
    "whatever a hospital publishes elsewhere of the same patients",
)

NOT_ANONYMOUS = (
    "Never call the model anonymous: after EDPB Opinion 28/2024 that wants a likelihood of extracting personal data from it, and of getting "
    "them out by questions, that is insignificant for whoever may try, shown case by case. An epsilon bounds what a release adds; it shows "
    "no such thing by itself."
)


def statement(study: Study, results: Mapping[str, Any]) -> dict[str, Any]:
    """What a study with privacy may honestly claim, for its folds so far (`results`): JSON, no patient in it.

    Epsilon of a site counts the answers that arrived, and `at_most` also those that were left out, which may have left the hospital all
    the same; a hospital's own ledger has the last word.
    """
    p, promise, folds = study.privacy, promise_of(study), results["folds"]
    sites = {site: _of_site(study, site, results) for site in _names(results)}
    most = max((s["at_most"] for s in sites.values()), default=0.0)
    mechanisms = promise.mechanisms
    ran = sum(len(f["curve"]) for f in folds)
    return {
        "unit": p.unit,
        "protects": PROTECTS[p.unit],
        "neighbours": NEIGHBOURS[p.unit],
        "epsilon": most,
        "delta": p.delta,
        "promise": {"epsilon": p.epsilon, "planned": promise.epsilon, "delta": p.delta},
        "sites": sites,
        "accountant": _accountant(mechanisms.values()),
        "clip": p.clip,
        "deviation": promise.deviation,
        "sample_rate": mechanisms[TRAINING].sample_rate,
        "steps": mechanisms[TRAINING].count,
        "rounds": ran,
        "sampling": (
            "full batch, every patient in every step: no amplification by sampling is claimed"
            if p.of_patients and p.sample_rate == 1
            else f"Poisson: each patient by herself is in a step with probability {p.sample_rate:g}, drawn anew and told to nobody"
            if p.of_patients
            else "every hospital is asked in every round: no amplification by sampling is claimed"
        ),
        "mechanisms": [
            {"name": name, **m.to_json(), "epsilon": epsilon_of([m], p.delta)} for name, m in mechanisms.items()
        ],
        "spent": _spent(study),
        "trust": trust_of(study),
        "noise": _noise(study),
        "randomness": "ChaCha20 keyed by the operating system; sums and noise lie on a lattice of 2^30 steps a clip; no seed, so nobody draws "
        "the noise again",
        "statistics": _statistics_words(study),
        "evidence": _evidence_words(study),
        "evaluation": _evaluation_words(study),
        "folds": f"{len(folds)} ran; the account counts every one as training on the {p.unit}, though each holds some patients out",
        "budget": BUDGET[p.unit],
        "not_covered": list(_not_covered(study)),
        "membership": membership(most, p.delta),
        "cost": _cost(study, folds),
        "not_anonymous": NOT_ANONYMOUS,
    }


def _names(results: Mapping[str, Any]) -> list[str]:
    """Sites that were there at the start, and those that came later."""
    return sorted(set(results["sites"]).union(*(f["site_rounds"] for f in results["folds"])))


def _of_site(study: Study, site: str, results: Mapping[str, Any]) -> dict[str, Any]:
    """Rounds that a site answered, and what they and its other releases cost together."""
    p, rounds = study.privacy, study.training.rounds
    folds = [f["fold"] for f in results["folds"]]
    trains = [f for f in folds if _held_out(study, f) != site]
    answered = {f["fold"]: int(f["site_rounds"].get(site, 0)) for f in results["folds"]}
    given, planned = sum(answered.values()), len(trains) * rounds
    lost = 0
    if p.of_patients:  # of hospitals what the server leaves out is in no sum
        lost = sum(x["site"] == site and x["kind"] == "train" for x in results["left_out"])
        lost = max(min(lost, planned - given), 0)
    counts = counts_of_evidence(study)  # of a fold at most: which rounds a site answered is not known
    others = {STATISTICS: len(trains), COUNTS: sum(min(n, counts) for n in answered.values())}
    others[EVALUATION] = sum(2 for f in folds if f != ALL_PATIENTS and _held_out(study, f) in ("", site))
    more = others | {COUNTS: min(others[COUNTS] + lost, len(trains) * counts)}
    return {
        "rounds": given,
        "planned": planned,
        "lost": lost,
        "training": _epsilon(study, given, {}),
        "epsilon": _epsilon(study, given, others),
        "at_most": _epsilon(study, given + lost, more),
        "delta": p.delta,
    }


def _held_out(study: Study, fold: int) -> str:
    """The site that takes no part in a fold's training; empty where folds are of patients."""
    sites = study.splits.held_out_sites
    return sites[fold] if sites and fold != ALL_PATIENTS else ""


def _epsilon(study: Study, rounds: int, others: Mapping[str, int]) -> float:
    """Of training in so many rounds and of so many other releases; 0 of none."""
    promise = promise_of(study)
    steps = rounds * (study.training.local_steps if study.privacy.of_patients else 1)
    counts = {TRAINING: steps, **{name: n for name, n in others.items() if name in promise.mechanisms}}
    # rounding must not lift a site above the plan that it kept to
    return min(
        epsilon_of([replace(promise.mechanisms[name], count=n) for name, n in counts.items()], promise.delta),
        promise.epsilon,
    )


def _spent(study: Study) -> list[tuple[int, float]]:
    """Epsilon after some of the rounds of all planned folds, of a site that answers all of them: (rounds, epsilon)."""
    rounds = study.training.rounds
    folds = [*(study.splits.only or range(study.splits.count)), *([ALL_PATIENTS] if study.splits.refit else [])]
    total = len(folds) * rounds
    chosen = sorted(
        {math.ceil(total * i / POINTS) for i in range(1, POINTS + 1)} | {rounds * (i + 1) for i in range(len(folds))}
    )
    out = []
    for n in chosen:
        done, in_fold = divmod(n, rounds)
        every = study.privacy.evidence_every
        counts = done * counts_of_evidence(study) + -(-in_fold // every)
        tables = 2 * sum(f != ALL_PATIENTS for f in folds[:done])
        began = done + bool(in_fold)
        out.append((n, _epsilon(study, n, {STATISTICS: began, COUNTS: counts, EVALUATION: tables})))
    return out


def _accountant(mechanisms: Iterable[Mechanism]) -> dict[str, Any]:
    if all(m.kind == "gaussian" for m in merged(list(mechanisms))):
        return {"method": "exact formula of Gaussian mechanisms (Balle and Wang 2018)", "interval": 0.0}
    return {"method": f"privacy loss distributions, dp-accounting {version('dp-accounting')}", "interval": INTERVAL}


def _noise(study: Study) -> dict[str, Any]:
    """Who adds how much of the noise."""
    s, deviation = study.privacy.sharing, promise_of(study).deviation
    if s is None:
        return {"kind": "own"}
    return {
        "kind": "shared",
        "sites": s.sites,
        "silent": s.silent,
        "colluding": s.colluding,
        "each": s.of_each(deviation),
        "alone": _alone(study),
    }


def _statistics_words(study: Study) -> str:
    if study.privacy.statistics == "noised":
        return "first baselines come from events and follow-up by cancer type with noise, which are accounted for"
    where = "the public model that training started from" if study.training.start else "public constants"
    return f"none left the hospitals: scale and first baselines are those of {where}"


def _evidence_words(study: Study) -> str:
    p = study.privacy
    if p.unit == "hospital":
        return "none left the hospitals beside their change: each stands behind all blocks with 1"
    if p.evidence == "noised":
        return f"counts of patients by expert, cancer type and modality with noise, every {p.evidence_every} rounds, which are accounted for"
    return "public: each hospital's patients, rounded to tens, behind every block of the cancer types and modalities that it is known to hold"


def _evaluation_words(study: Study) -> str:
    if study.evaluation.epsilon:
        return (
            f"tables of risk and time with noise, epsilon {study.evaluation.epsilon:g} a fold, which are accounted for"
        )
    return "nothing left the hospitals: how good the model is they see in their own predictions alone"


def _not_covered(study: Study) -> Iterable[str]:
    yield from NOT_COVERED
    if study.training.start:
        yield "the model that training started from and its name: it is taken for public, and what it tells of its own patients is not counted"
    if study.privacy.of_patients:
        yield "a patient treated at several hospitals: for her their epsilons add up, to their sum at most"
        yield "patients as families, or groups who share a trait: the promise is for one at a time"
    else:
        yield "single patients before the server, which sees each hospital's clipped change without noise"
    yield "what the model says of people like the patients: that is what it is for"


def membership(epsilon: float, delta: float) -> dict[str, Any]:
    """The most patients, of those who took part, whom any attack recognises when it accuses `FPR` of the others (Kairouz et al. 2015)."""
    most = min(1.0, math.exp(min(epsilon, 700.0)) * FPR + delta)
    if most == 1.0:
        says = f"at epsilon {epsilon:.3g} the bound is 1 and says nothing: only an audit tells what attacks achieve"
    else:
        says = f"an attack that wrongly accuses {FPR:.0%} of those who took no part recognises {most:.1%} of those who did, at most"
    return {"fpr": FPR, "tpr": most, "says": says}


def _cost(study: Study, folds: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The cost at the sites and patients of the first fold's training; None where nobody trained."""
    fold = next((f for f in folds if f["site_rounds"]), None)
    if fold is None:
        return None
    # a site's patients, rounded, stand behind the trunk in every round
    if study.privacy.secure_sum:
        patients = round(max(fold["curve"][-1]["evidence"].values()))
    else:
        patients = sum(round(max(fold["site_evidence"][s]) / n) for s, n in fold["site_rounds"].items())
    sites = len(fold["site_rounds"])
    cost = cost_of(study, fold["trained"], sites, patients)
    return {
        "per_number": cost.per_number,
        "over_all": cost.over_all,
        "parameters": cost.parameters,
        "sites": sites,
        "patients": patients if study.privacy.of_patients else None,
        "drowned": cost.drowned,
        "says": foretold(study, cost, sites, patients),
    }
