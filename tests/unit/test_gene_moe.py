"""Gene-MOE without the original's defects (gene_moe.md, section 4)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from oncofed.common.models.build import Sizes, build_empty, build_model, get_weights, set_weights
from oncofed.common.models.gene_moe import GeneMOE
from oncofed.common.models.inputs import Inputs
from oncofed.common.study import Study

CANCERS = ("BRCA", "LUAD", "STAD")
SIZES = Sizes(20, CANCERS, 5, 2)


def model(**keys: object) -> GeneMOE:
    study = Study().changed(
        **({"model__size": "tiny", "model__first_layer_scale": 1.0} | {f"model__{k}": v for k, v in keys.items()})
    )
    m = build_model(study, SIZES)
    assert isinstance(m, GeneMOE)
    return m


def draw(n: int = 9) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Expression, cancer type, covariates."""
    return torch.randn(n, 20), torch.arange(n) % 3, torch.randn(n, 2)


def inputs(n: int = 9) -> Inputs:
    return Inputs(*draw(n))


def test_every_gate_is_registered_saved_and_trained() -> None:
    m = model()
    names = set(m.state_dict())
    gates = ("gate.weight", "gate.noise", "gate.cancer", "attention_gate.weight", "attention_gate.noise")
    assert {f"encoder.{name}" for name in gates} <= names
    assert names == {n for n, _ in m.named_parameters()} == set(m.blocks().owners)
    out = m(inputs(64), torch.Generator().manual_seed(0))
    (out.risk * torch.randn(64)).sum().backward()
    for name, p in m.named_parameters():
        if name != "head.log_baseline":
            assert p.grad is not None, name
            assert p.grad.abs().sum() > 0, name


@pytest.mark.parametrize("dispatch", ["routed", "dense"])
def test_a_patient_does_not_depend_on_the_others(dispatch: str) -> None:
    m = model(dispatch=dispatch)
    x, c, v = draw()
    whole = m(Inputs(x, c, v)).risk
    for i in range(len(x)):
        alone = m(Inputs(x[i : i + 1], c[i : i + 1], v[i : i + 1])).risk
        torch.testing.assert_close(alone, whole[i : i + 1], rtol=1e-5, atol=1e-6)
    other = x.clone()
    other[1:] = torch.randn(8, 20) * 50
    torch.testing.assert_close(m(Inputs(other, c, v)).risk[:1], whole[:1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("generator_seed", [None, 3])
def test_dispatch_paths_give_the_same_numbers(generator_seed: int | None) -> None:
    dense, routed = model(dispatch="dense"), model(dispatch="routed")
    routed.load_state_dict(dense.state_dict())
    patients = inputs(40)
    outs, grads = [], []
    for m in (dense, routed):
        g = None if generator_seed is None else torch.Generator().manual_seed(generator_seed)
        out = m(patients, g)
        out.risk.square().sum().backward()
        outs.append(out.risk.detach())
        grads.append({n: p.grad for n, p in m.named_parameters() if p.grad is not None})
    torch.testing.assert_close(outs[0], outs[1])
    for name in grads[0]:
        torch.testing.assert_close(grads[0][name], grads[1][name], rtol=1e-4, atol=1e-5)


def test_routing_differs_between_inputs() -> None:
    m = model(gate_prior=0.0)
    gates = m(Inputs(torch.randn(300, 20), torch.zeros(300, dtype=torch.long), torch.zeros(300, 2))).shares["expert"]
    assert (gates.sum(0) > 0).all()


def test_by_a_prior_each_cancer_begins_at_experts_of_its_own() -> None:
    m = model(gate_prior=2.0)
    x, _, v = draw(30)
    first = []
    for c in range(3):
        gates = m(Inputs(x, torch.full((30,), c), v)).shares["expert"]
        chosen = gates.sum(0) > 0
        assert int(chosen.sum()) == 2  # at first the input hardly counts: all patients of a cancer go one way
        first.append(tuple(chosen.tolist()))
    assert len(set(first)) == 3
    assert np.any(first, axis=0).all()  # and no expert is left without
    assert (model(gate_prior=0.0).encoder.gate.cancer == 0).all()
    assert model(gate_sees_cancer=False, gate_prior=2.0).encoder.gate.cancer is None


def test_blocks_name_experts_cancers_and_trunk() -> None:
    m = model()
    owners = m.blocks().owners
    assert owners["encoder.experts.weight"] == tuple(f"expert/{e}" for e in range(4))
    assert owners["encoder.attention.query"] == ("attention/0", "attention/1", "attention/2")
    assert owners["head.log_baseline"] == owners["encoder.gate.cancer"] == tuple(f"cancer/{c}" for c in CANCERS)
    trunk = ("encoder.gate.weight", "encoder.latent.weight", "encoder.shared.weight", "head.shared")
    assert {owners[name] for name in trunk} == {"trunk"}
    out = m(inputs())
    for group, n in m.mixtures().items():
        assert out.shares[group].shape == (9, n)
        assert {f"{group}/{e}" for e in range(n)} <= set(m.blocks().names)


def test_parts_can_be_left_out() -> None:
    m = model(attention_experts=0, shared_expert=False, gate_noise=False, gate_sees_cancer=False)
    names = {n.removeprefix("encoder.") for n, _ in m.named_parameters()}
    assert not any(n.startswith(("attention", "shared", "gate.noise", "gate.cancer")) for n in names)
    assert m(inputs()).risk.shape == (9,)


def test_without_experts_it_is_a_perceptron_and_minus_one_asks_for_the_sizes_own() -> None:
    m = model(experts=0, attention_experts=0, shared_expert=False)
    assert {n for n, _ in m.encoder.named_parameters()} == {
        "shared.weight",
        "shared.bias",
        "latent.weight",
        "latent.bias",
    }
    x, c, v = draw()
    e = m.encoder
    h = torch.tanh(x @ e.shared.weight[0] + e.shared.bias[0])
    torch.testing.assert_close(m(Inputs(x, c, v)).latent, torch.tanh(h @ e.latent.weight.T + e.latent.bias))
    assert m.mixtures() == m.removable() == {}
    assert model(experts=-1).mixtures() == model().mixtures() == {"expert": 4, "attention": 3}


def test_first_weights_depend_on_seed_and_fold_only() -> None:
    torch.manual_seed(1)
    a = get_weights(model())
    torch.manual_seed(2)
    b = get_weights(model())
    assert all((a[k] == b[k]).all() for k in a)
    study = Study().changed(model__size="tiny")
    for other in (build_model(study.changed(seed=1), SIZES), build_model(study, SIZES, fold=1)):
        assert (a["encoder.latent.weight"] != get_weights(other)["encoder.latent.weight"]).any()


def test_bfloat16_experts_stay_close() -> None:
    m = model()
    patients = inputs()
    exact = m(patients).risk
    rough = model(expert_dtype="bfloat16")(patients)
    assert rough.risk.dtype == torch.float32
    assert not torch.equal(rough.risk, exact)
    torch.testing.assert_close(rough.risk, exact, rtol=0.1, atol=0.05)


def test_weights_travel_whole_or_not_at_all() -> None:
    m = model()
    weights = {k: v.copy() for k, v in get_weights(m).items()}
    empty = build_empty(Study().changed(model__size="tiny"), SIZES, torch.device("cpu"))
    set_weights(empty, weights)
    patients = inputs()
    torch.testing.assert_close(empty(patients).risk, m(patients).risk)
    with pytest.raises(ValueError, match="differ in parameters"):
        set_weights(m, {k: v for k, v in weights.items() if k != "encoder.gate.weight"})
    with pytest.raises(ValueError, match=r"encoder.latent.weight has shape \(1,\)"):
        set_weights(m, weights | {"encoder.latent.weight": np.zeros(1, np.float32)})


def test_paper_size_has_the_published_parameter_count() -> None:
    """386,810,880 in the experts of the first layer, 12,582,912 in the attention experts (gene_moe.md, 1.3)."""
    study = Study().changed(model__size="paper")
    m = build_empty(study, Sizes(25182, CANCERS, 5), torch.device("meta"))
    assert m.encoder.experts is not None
    assert sum(p.numel() for p in m.encoder.experts.parameters()) == 386_810_880
    assert m.encoder.attention is not None
    assert sum(p.numel() for p in m.encoder.attention.parameters()) == 12_582_912


@pytest.mark.parametrize("dispatch", ["routed", "dense"])
def test_an_expert_switched_off_stands_behind_nobody_and_all_others_as_before(dispatch: str) -> None:
    m = model(dispatch=dispatch, gate_prior=0.0)
    patients = inputs(60)
    whole = m(patients)
    assert m.removable() == {"expert": 4, "attention": 3, "shared": 1}
    for group, experts in m.mixtures().items():
        for e in range(experts):
            out = m(patients, off=(group, e))
            assert (out.shares[group][:, e] == 0).all()
            torch.testing.assert_close(out.shares[group].sum(1), torch.ones(60))
            untouched = whole.shares[group][:, e] == 0  # patients who did not pass it
            torch.testing.assert_close(out.risk[untouched], whole.risk[untouched], rtol=1e-5, atol=1e-6)
            assert not torch.allclose(out.risk[~untouched], whole.risk[~untouched])
    assert not torch.allclose(m(patients, off=("shared", 0)).risk, whole.risk)


def test_what_cannot_be_missed_cannot_be_switched_off() -> None:
    """Without the only expert of a mixture there is nobody to route to: the gate's softmax would be over nothing."""
    m = model(experts=1, top_k=1, attention_experts=1, attention_top_k=1, shared_expert=False)
    assert m.mixtures() == {"expert": 1, "attention": 1}
    for group, experts in m.removable().items():
        for e in range(experts):
            assert torch.isfinite(m(inputs(), off=(group, e)).risk).all(), (group, e)
    assert "shared" not in model(experts=0).removable()


def test_routed_experts_are_held_small_beside_the_shared_one_and_count_whole_without_it() -> None:
    patients = inputs()
    keys = {"attention_experts": 0, "dropout": 0.0}

    def hidden(m: GeneMOE, off: tuple[str, int] | None = None) -> torch.Tensor:
        return m.encoder(patients.x_BG, patients.cancer_B, None, off).latent

    small, whole = model(expert_scale=0.25, **keys), model(expert_scale=1.0, **keys)
    routed = hidden(whole, ("shared", 0))
    torch.testing.assert_close(hidden(small, ("shared", 0)), 0.25 * routed)
    torch.testing.assert_close(hidden(whole) - hidden(small), 0.75 * routed, rtol=1e-4, atol=1e-5)
    alone = {"shared_expert": False, **keys}
    torch.testing.assert_close(hidden(model(expert_scale=0.25, **alone)), hidden(model(expert_scale=1.0, **alone)))
