"""T-GEM: the authors' model when asked for, a linear model without layers, and layers that can be looked into."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from oncofed.common.models.build import Sizes, build_model
from oncofed.common.models.inputs import Inputs
from oncofed.common.models.t_gem import TGEM, GeneNorm
from oncofed.common.study import Study
from torch import Tensor

CLASSES = tuple(f"C{i}" for i in range(4))


def study(**keys: object) -> Study:
    return Study().changed(**{"model__name": "t_gem", "task__kind": "classification", **keys})


def model_of(genes: int = 30, classes: tuple[str, ...] = CLASSES, **keys: object) -> TGEM:
    model = build_model(study(**keys), Sizes(genes, classes, 3))
    assert isinstance(model, TGEM)
    return model


def inputs_of(patients: int = 6, genes: int = 30, classes: int = len(CLASSES)) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(patients, genes, generator=generator)
    return Inputs(x, torch.arange(patients) % classes, torch.zeros(patients, 0), {})


def authors_form(model: TGEM, x: Tensor) -> Tensor:
    """The released code, one head and layer after the other: G x G scores, diagonal cleared after the softmax."""
    norm = model.norms[0]
    for layer in model.attention:
        total = torch.zeros_like(x)
        for h in range(len(layer.mix.weight)):
            q, k, v = (x * scale.weight[h] for scale in (layer.query, layer.key, layer.value))
            weight = torch.softmax(q[:, :, None] * k[:, None, :], dim=2)
            weight = weight * (1 - torch.eye(x.shape[1]))
            total = total + layer.mix.weight[h] * (weight @ v[:, :, None]).squeeze(2)
        u = total
        scaled = (u - u.mean(-1, keepdim=True)) / (u.std(-1, keepdim=True) + 1e-6)
        x = x + norm.weight * scaled + norm.bias
    return model.head.linear(torch.nn.functional.leaky_relu(x, 0.1))  # type: ignore[union-attr]


def test_the_authors_model_with_its_switches() -> None:
    keys = {
        "model__self_attention": "after",
        "model__head_mix": 0.001,
        "model__branch_scale": 1.0,
        "model__first_layer_scale": 1.0,
    }
    model, inputs = model_of(**keys), inputs_of()
    np.testing.assert_allclose(
        model(inputs).score.detach(), authors_form(model, inputs.x_BG).detach(), atol=2e-4, rtol=1e-3
    )
    assert model.attention[0].mix.weight[0].item() == pytest.approx(0.001)


def test_live_parameters_are_as_many_as_the_papers() -> None:
    model = build_model(study(), Sizes(1708, tuple(f"C{i}" for i in range(34)), 1))
    assert sum(p.numel() for p in model.parameters()) == 138_397  # t_gem.md, fact 4


def test_first_branch_is_alive() -> None:
    """With the deviation under a root and torch's epsilon it would begin 1e4 times smaller (t_gem.md, fact 5)."""
    model, inputs = model_of(genes=800, model__branch_scale=1.0), inputs_of(genes=800)
    seen = model.trace(inputs)
    moved = (seen[1].x - seen[0].x).square().mean().sqrt()
    assert 0.5 < moved.item() < 1.5


def test_without_layers_it_is_logistic_regression() -> None:
    model, inputs = model_of(model__layers=0, model__activation="none", model__first_layer_scale=1.0), inputs_of()
    linear = model.head.linear  # type: ignore[union-attr]
    np.testing.assert_allclose(
        model(inputs).score.detach(), (inputs.x_BG @ linear.weight.T + linear.bias).detach(), atol=1e-6
    )
    assert sum(p.numel() for p in model.parameters()) == 30 * 4 + 4


@pytest.mark.parametrize("shared", [True, False])
def test_a_layer_can_be_looked_into_and_gone_on_from(shared: bool) -> None:
    model, inputs = model_of(model__shared_norm=shared, model__first_layer_scale=1.0), inputs_of()
    score = model(inputs).score
    assert len(model.norms) == (1 if shared else 3)
    for n, seen in enumerate(model.trace(inputs)):
        np.testing.assert_allclose(model.score_from(n, seen.x, seen.o, inputs).detach(), score.detach(), atol=1e-5)
        other = model.score_from(n, seen.x, seen.o.flip(-1), inputs)
        assert not torch.allclose(other, score, atol=1e-4)


def test_heads_can_be_taken_out() -> None:
    model, inputs = model_of(model__first_layer_scale=1.0), inputs_of()
    assert model.removable() == {"layer-1": 5, "layer-2": 5, "layer-3": 5}
    without = model(inputs, off=("layer-2", 3)).score
    with torch.no_grad():
        model.attention[1].mix.weight[3] = 0.0
    np.testing.assert_allclose(without.detach(), model(inputs).score.detach(), atol=1e-6)
    assert model_of(model__heads=1).removable() == {}


def test_noise_comes_from_the_generator_alone() -> None:
    model, inputs = model_of(model__first_layer_scale=1.0, model__dropout=0.5), inputs_of()
    draws = [model(inputs, torch.Generator().manual_seed(s)).score for s in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert torch.equal(model(inputs).score, model(inputs).score)


def test_patients_do_not_meet() -> None:
    model, inputs = model_of(model__first_layer_scale=1.0), inputs_of()
    alone = Inputs(inputs.x_BG[:1], inputs.cancer_B[:1], inputs.v_BV[:1], {})
    np.testing.assert_allclose(model(alone).score.detach(), model(inputs).score[:1].detach(), atol=1e-5)


def test_each_class_owns_its_row_of_the_head() -> None:
    blocks = model_of().blocks()
    assert blocks.owners["head.linear.weight"] == tuple(f"class/{c}" for c in CLASSES)
    assert {o for n, o in blocks.owners.items() if not n.startswith("head.")} == {"trunk"}


def test_survival_reads_all_genes() -> None:
    model = build_model(Study().changed(model__name="t_gem"), Sizes(30, CLASSES, 3))
    assert isinstance(model, TGEM)
    out = model(inputs_of())
    assert out.score.shape == (6,)
    assert model.head.log_baseline.shape == (4, 3)
    assert model.blocks().owners["head.log_baseline"] == tuple(f"cancer/{c}" for c in CLASSES)


def test_a_patient_whose_genes_are_all_the_same_has_a_gradient() -> None:
    norm, u = GeneNorm(7, 1.0), torch.full((2, 7), 3.0, requires_grad=True)
    norm(u).sum().backward()
    assert u.grad is not None
    assert torch.isfinite(u.grad).all()


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"pretraining__rounds": 3}, "no encoder to pre-train"),
        ({"analysis__network_genes": 50}, "analysis.attributions = true"),
        (
            {"analysis__network_genes": 5, "analysis__attributions": True, "model__self_attention": "keep"},
            "use 'before' or 'after'",
        ),
        ({"analysis__attention": True, "model__layers": 0}, "model.name = 't_gem' with layers"),
        ({"analysis__ablation": True}, "analysis.attributions = true"),
        ({"analysis__pathways": "sets.gmt"}, "analysis.attributions = true"),
        ({"task__kind": "survival", "task__label": "oncotree_code"}, "are of classification"),
    ],
)
def test_what_does_not_go_together_is_refused(keys: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        study(**keys)


def test_attention_of_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"set model\.name = 't_gem'"):
        Study().changed(analysis__attention=True)
