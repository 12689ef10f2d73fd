"""What a small site's update tells of its patients, by closed forms, with and without the study's noise.

A linear layer's gradient is a sum of outer products x_i d_i. Of one patient it is x d, and her inputs are dW_j / db_j; of n
patients it spans their inputs, so that anybody's distance from its row space says whether she is one of them. An expert that
saw one patient gives her alone away (privacy.md, 3). A head without bias tells residual times input: all but its length.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from oncofed.client.batch import Batch
from oncofed.client.privacy.dp_sgd import PatientGradients, cover
from oncofed.client.privacy.train import losses_by_patient
from oncofed.common.modalities import RNA
from oncofed.common.models.build import set_weights, trainable
from oncofed.common.models.heads import ClassHead
from oncofed.common.models.path_gptomic import PathGPTOmic
from oncofed.common.models.t_gem import TGEM
from oncofed.common.noise import SecureNoise
from oncofed.deploy.audit.setting import Setting
from torch import Tensor

FEW = 6
"""Patients of a small site."""

DRAWS = 20
"""Small sites that are tried."""

Gradient = dict[str, Tensor]


@dataclass(frozen=True)
class Layer:
    """A linear layer that is trained: its name, whether it is stacked by expert, and what it sees of a patient."""

    name: str
    what: str
    weight: str
    bias: str = ""
    stacked: bool = False

    def of(self, gradient: Mapping[str, Tensor], expert: int = 0) -> tuple[np.ndarray, np.ndarray | None]:
        """Gradient `[inputs, outputs]` of the weight and `[outputs]` of the bias."""
        w = gradient[self.weight][expert] if self.stacked else gradient[self.weight]
        w = w[:, None] if w.ndim == 1 else w if self.stacked else w.t()
        bias = gradient[self.bias] if self.bias else None
        b = bias if bias is None or not self.stacked else bias[expert]
        return w.double().cpu().numpy(), None if b is None else b.double().cpu().numpy()


def audit_inversion(setting: Setting, seed: int) -> dict[str, Any]:
    """Reconstructions from a site of one patient, of six, and from an expert that saw one, without protection and with noise.

    Gradients are those of a first full step, which plain SGD sends as they are. Under noise the attacker has what all steps of the
    fold would send if the gradient stayed, which is more than any has.
    """
    set_weights(setting.model, setting.weights)
    layers = layers_of(setting)
    draw = np.random.default_rng(seed)
    out: dict[str, Any] = {
        "first_layer_travels": first_layer_travels(setting),
        "patients": FEW,
        "steps": setting.steps,
    }
    for name in ("shared", "head"):
        if name in layers:
            layer = layers[name]
            out["layer"] = {"name": layer.weight, "tells": layer.what}
            out["one"] = {k: _one(setting, layer, draw, protected=p) for k, p in KINDS.items()}
            out["six"] = {k: _few(setting, layer, draw, protected=p) for k, p in KINDS.items()}
            break
    if "experts" in layers:
        out["lone_expert"] = {k: _lone(setting, layers["experts"], draw, protected=p) for k, p in KINDS.items()}
    return out


KINDS = {"unprotected": False, "protected": True}


def layers_of(setting: Setting) -> dict[str, Layer]:
    """The linear layers whose update travels: the encoder's first one and its experts, or, where it is frozen, the head."""
    moving, found = trainable(setting.model), {}
    for name in ("shared", "experts"):
        weight = f"encoder.{name}.weight"
        if weight in moving:
            found[name] = Layer(name, "expression", weight, f"encoder.{name}.bias", stacked=True)
    head = getattr(setting.model, "head", None)
    what = "expression" if isinstance(setting.model, TGEM) and not len(setting.model.layers) else "features"
    if isinstance(head, ClassHead):
        found["head"] = Layer("head", what, "head.linear.weight", "head.linear.bias")
    elif "head.shared" in moving:
        found["head"] = Layer("head", what, "head.shared")
    return found


def first_layer_travels(setting: Setting) -> bool:
    """Whether anything that sees genes themselves is trained, so that its change leaves; of a frozen encoder it does not."""
    moving = trainable(setting.model)
    if isinstance(setting.model, TGEM):
        return not len(setting.model.layers) or any(name.startswith("layers.") for name in moving)
    return any(name.startswith(("encoder.shared.", "encoder.experts.", "encoder.gate.")) for name in moving)


def gradient_of(setting: Setting, batch: Batch, *, protected: bool) -> Gradient:
    """What a step on these patients sends, by parameter: the sum of their gradients, or the clipped one with the study's noise.

    The noise is that of the mean of all the fold's steps.
    """
    model, study = setting.model, setting.study
    losses_of = losses_by_patient(model, study, setting.load)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    if isinstance(model, PathGPTOmic):
        model.in_step = True
    try:
        if not protected:
            model.zero_grad(set_to_none=True)
            losses_of(batch).sum().backward()
            found = {n: model.get_parameter(n).grad for n in names}
            model.zero_grad(set_to_none=True)
            return {n: torch.zeros_like(model.get_parameter(n)) if g is None else g for n, g in found.items()}
        clip, deviation = study.privacy.clip, setting.promise.deviation / setting.steps**0.5
        with PatientGradients.opened(model, clip) as gradients:
            total = gradients.clipped_sum([partial(losses_of, batch)])
        return dict(zip(names, cover(total, clip=clip, deviation=deviation, noise=SecureNoise()), strict=True))
    finally:
        if isinstance(model, PathGPTOmic):
            model.in_step = False


def inputs_of(setting: Setting, layer: Layer, batch: Batch) -> np.ndarray:
    """What the layer sees of each patient `[B, inputs]`."""
    if layer.name != "head":
        return batch.x_BG.double().cpu().numpy()
    seen: list[Tensor] = []
    head = setting.model.head
    hook = (head.linear if isinstance(head, ClassHead) else head).register_forward_pre_hook(
        lambda _, arguments: seen.append(arguments[0].detach())
    )
    try:
        with torch.no_grad():
            batch.through(setting.model)
    finally:
        hook.remove()
    return torch.cat(seen).double().cpu().numpy()


# -- attacks -----------------------------------------------------------------------------------------------------------


def reconstruct(w: np.ndarray, b: np.ndarray | None) -> np.ndarray:
    """Inputs of one patient from gradients `[inputs, outputs]` and `[outputs]`: dW db / |db|^2; without a bias all but the length."""
    if b is None:
        return w[:, int(np.argmax(np.square(w).sum(0)))]
    return w @ b / max(float(b @ b), 1e-300)


def distances(w: np.ndarray, x: np.ndarray, n: int) -> np.ndarray:
    """Relative distance `[B]` of patients' inputs `[B, inputs]` from the span of the `n` strongest directions of an update."""
    u, s, _ = np.linalg.svd(w, full_matrices=False)
    basis = u[:, : min(n, int((s > 1e-6 * s[0]).sum()) if s[0] else 0)]
    return np.linalg.norm(x - x @ basis @ basis.T, axis=1) / np.maximum(np.linalg.norm(x, axis=1), 1e-300)


def likeness(found: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Correlation of a reconstruction with the truth, its size alone, and the relative error."""
    spread = np.std(found) * np.std(truth)
    r = float(np.corrcoef(found, truth)[0, 1]) if spread > 0 else 0.0
    return {
        "correlation": abs(r),
        "error": float(np.linalg.norm(found - truth) / np.maximum(np.linalg.norm(truth), 1e-300)),
    }


def _median(rows: list[dict[str, float]]) -> dict[str, float]:
    return {key: float(np.median([row[key] for row in rows])) for key in rows[0]} | {"tried": len(rows)}


def _some(setting: Setting, draw: np.random.Generator, n: int) -> tuple[Batch, Batch]:
    """`n` patients with expression, and as many others."""
    batch = setting.batch
    there = torch.nonzero(batch.has[RNA]).squeeze(1) if RNA in batch.has else torch.arange(len(batch))
    order = there[torch.from_numpy(draw.permutation(len(there))).to(there.device)]
    return setting.batch.select(order[:n]), setting.batch.select(order[n : 2 * n])


def _one(setting: Setting, layer: Layer, draw: np.random.Generator, *, protected: bool) -> dict[str, float]:
    """A site of one patient: her inputs, and how like another patient the same reconstruction is."""
    rows = []
    for _ in range(DRAWS):
        patient, other = _some(setting, draw, 1)
        found = reconstruct(*layer.of(gradient_of(setting, patient, protected=protected)))
        like, unlike = (likeness(found, inputs_of(setting, layer, b)[0]) for b in (patient, other))
        rows.append(like | {"of_another": unlike["correlation"]})
    return _median(rows)


def _few(setting: Setting, layer: Layer, draw: np.random.Generator, *, protected: bool) -> dict[str, float]:
    """A site of six: the best of all columns for any patient, and how often a member lies nearer to the update's span than others.

    `auc` is over pairs of a member and another patient.
    """
    rows = []
    for _ in range(DRAWS):
        members, others = _some(setting, draw, FEW)
        w, b = layer.of(gradient_of(setting, members, protected=protected))
        columns = [reconstruct(w, b), *w.T]
        x, z = inputs_of(setting, layer, members), inputs_of(setting, layer, others)
        best, unlike = (
            float(np.max([likeness(c, p)["correlation"] for c in columns for p in group])) for group in (x, z)
        )
        near, far = distances(w, x, FEW), distances(w, z, FEW)
        auc = float(((near[:, None] < far) + 0.5 * (near[:, None] == far)).mean())
        rows.append(
            {
                "correlation": best,
                "of_another": unlike,
                "auc": auc,
                "distance": float(near.mean()),
                "others": float(far.mean()),
            }
        )
    return _median(rows)


def _lone(setting: Setting, layer: Layer, draw: np.random.Generator, *, protected: bool) -> dict[str, float]:
    """Experts that one of six patients passes alone; `sites` is the share of small sites that have one."""
    rows, tried = [], 0
    for _ in range(DRAWS):
        members, others = _some(setting, draw, FEW)
        with torch.no_grad():
            share_BE = members.through(setting.model).shares["expert"]
        lone = torch.nonzero((share_BE > 0).sum(0) == 1).squeeze(1).tolist()
        tried += bool(lone)
        gradient = gradient_of(setting, members, protected=protected) if lone else {}
        for e in lone:
            who = int(torch.nonzero(share_BE[:, e] > 0)[0])
            found = reconstruct(*layer.of(gradient, e))
            like, unlike = (likeness(found, inputs_of(setting, layer, b)[who]) for b in (members, others))
            rows.append(like | {"of_another": unlike["correlation"]})
    return (_median(rows) if rows else {}) | {"sites": tried / DRAWS}
