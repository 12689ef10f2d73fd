"""What a study with privacy must not ask: each refusal says what would break, and what to do instead."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from oncofed.common.study import Study


def broken_by(study: Study) -> list[str]:
    """Everything in a study that would break the promise of its `[privacy]`; empty where nothing does, or nothing is promised."""
    if not study.privacy.on:
        return []
    return [*_unpaid(study), *(_of_patients(study) if study.privacy.of_patients else _of_hospitals(study))]


def _of_hospitals(study: Study) -> list[str]:
    """What would let one hospital move a sum by more than its clip."""
    out = []
    if study.aggregation.robust != "none":
        out.append(
            f"aggregation.robust = {study.aggregation.robust!r} lets one hospital decide what becomes of the others' changes, so noise for its own "
            "clipped one covers it no more; set it to 'none': the clip bounds every hospital's change already"
        )
    if study.transport.upload != "float32":
        out.append(
            f"transport.upload = {study.transport.upload!r} rounds a change after it was clipped, and it may then be longer than the clip that the "
            "noise rests on; use 'float32'"
        )
    return out


def hidden_by_masks(study: Study) -> list[str]:
    """Everything in a study that needs a single hospital's sums, which no total under masks shows; empty without `secure_sum`."""
    if not study.privacy.secure_sum:
        if study.privacy.secure_threshold:
            return ["privacy.secure_threshold is of such sums; set privacy.secure_sum = true, or leave it at 0"]
        return []
    out = []
    if study.analysis.cross_site:
        out.append("analysis.cross_site scores every hospital's model at every hospital; leave it out")
    if study.splits.held_out_sites:
        out.append(
            "splits.held_out_sites scores a model at one hospital alone, and one hospital's sums are no total; use folds of patients"
        )
    if study.privacy.secure_threshold and study.privacy.secure_threshold < 3:
        out.append(
            f"privacy.secure_threshold = {study.privacy.secure_threshold}: of two hospitals each would know the other's sums; set it to 3 or more, "
            "or to 0"
        )
    return out


def _of_patients(study: Study) -> list[str]:
    """What couples patients within a gradient step, so that clipping bounds nothing."""
    out = []
    if study.task.kind == "survival" and study.task.loss == "cox":
        out.append(
            "task.loss = 'cox' couples patients through risk sets: one of them moved a sum of clipped gradients by 46 clips, and a run "
            "reported as epsilon 1 was 125; use 'piecewise_exponential', 'discrete_time' or 'weibull'"
        )
    if study.task.kind == "classification" and study.task.class_prior != "none":
        out.append(
            f"task.class_prior = {study.task.class_prior!r} counts the patients of each class, and every patient's loss depends on all; "
            "set it to 'none'"
        )
    if study.multimodal and study.fusion.modulation != "none":
        out.append(
            "fusion.modulation sets learning rates by what a batch's patients show, and tells their sums; set it to 'none'"
        )
    if study.model.expert_dtype != "float32":
        out.append(
            f"model.expert_dtype = {study.model.expert_dtype!r}: norms in low precision may miss the clip; use 'float32'"
        )
    if (
        study.aggregation.rule == "evidence"
        and study.privacy.evidence == "noised"
        and not study.model.encoder()["experts"]
    ):
        out.append("privacy.evidence = 'noised' pays for counts of experts that the model has not; use 'public'")
    return out


def _unpaid(study: Study) -> list[str]:
    """What would leave without noise."""
    p, out = study.privacy, []
    public = bool(study.training.start)
    if not public and study.panel.scale_by != "patient":
        out.append(
            "mean and spread of genes are sums over patients, and noise that covers them leaves nothing of them; set panel.scale_by = "
            "'patient' (ranks within a patient), or training.start to a public model, whose scale is used"
        )
    beside = [m for m in study.modalities if m != "rna"] + (["scGPT embeddings"] if study.embeds else [])
    if not public and beside:
        out.append(
            f"mean and spread of {', '.join(beside)} are sums over patients; set training.start to a public model that has them, whose scale is "
            "used, or leave them out"
        )
    if not public and study.panel.covariates:
        out.append(
            "panel.covariates are standardised by the patients' mean and spread; set training.start to a public model that has them, "
            "or leave them out"
        )
    noised = p.statistics == "noised"
    if study.task.kind == "survival" and not (public or study.task.time_edges or noised):
        out.append(
            "the time grid would follow the patients' events; set task.time_edges = [0, 12, 24, 36, 60], say, or privacy.statistics = 'noised'"
        )
    if noised and (p.unit == "hospital" or study.task.kind != "survival"):
        out.append(
            "privacy.statistics = 'noised' is for events and follow-up of patients in survival; set it to 'public'"
        )
    if p.evidence == "noised" and p.unit == "hospital":
        out.append("privacy.evidence = 'noised' would tell of a hospital beside its change; set it to 'public'")
    if study.pretraining.rounds:
        out.append(
            "pretraining.rounds spends the budget on what needs no private patient; pre-train on public data in a study of its own and name "
            "its model in training.start"
        )
    if study.splits.validation or study.training.patience:
        out.append(
            "splits.validation and training.patience choose a round by patients' outcomes, which costs more than it brings; set both to "
            "0 and fix training.rounds beforehand"
        )
    if study.task.label != "cancer_type" and not study.task.classes:
        out.append("task.classes would be those of the patients; name them")
    a = study.analysis
    asked = [k for k in ("attributions", "ablation", "attention", "network_genes", "cross_site") if getattr(a, k)]
    if asked:
        out.append(f"analysis.{asked[0]} sends sums over patients without noise; leave out {', '.join(asked)}")
    if p.unit == "hospital" and study.evaluation.epsilon:
        out.append("evaluation.epsilon covers a patient, not a hospital; set it to 0")
    if study.evaluation.epsilon >= p.epsilon:
        out.append(
            f"evaluation.epsilon = {study.evaluation.epsilon:g} leaves nothing of privacy.epsilon = {p.epsilon:g} for training; lower it"
        )
    return out
