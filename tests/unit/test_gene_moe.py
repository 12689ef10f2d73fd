"""Gene-MOE without the original's defects (gene_moe.md, section 4)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from oncofed.common.models.build import build_empty, build_model, get_weights, set_weights
from oncofed.common.models.gene_moe import GeneMOE
from oncofed.common.study import Study

CANCERS = ("BRCA", "LUAD", "STAD")


def model(**keys: object) -> GeneMOE:
    study = Study().changed(
        **({"model__size": "tiny", "model__first_layer_scale": 1.0} | {f"model__{k}": v for k, v in keys.items()})
    )
    return build_model(study, genes=20, cancers=CANCERS, intervals=5)


def inputs(n: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(n, 20), torch.arange(n) % 3


def test_every_gate_is_registered_saved_and_trained() -> None:
    m = model()
    names = set(m.state_dict())
    assert {"gate.weight", "gate.noise", "gate.cancer", "attention_gate.weight", "attention_gate.noise"} <= names
    assert names == {n for n, _ in m.named_parameters()} == set(m.blocks().owners)
    x, c = inputs(64)
    out = m(x, c, torch.Generator().manual_seed(0))
    (out.risk * torch.randn(64)).sum().backward()
    for name, p in m.named_parameters():
        if name != "log_baseline":
            assert p.grad is not None, name
            assert p.grad.abs().sum() > 0, name


@pytest.mark.parametrize("dispatch", ["routed", "dense"])
def test_a_patient_does_not_depend_on_the_others(dispatch: str) -> None:
    m = model(dispatch=dispatch)
    x, c = inputs()
    whole = m(x, c).risk
    for i in range(len(x)):
        torch.testing.assert_close(m(x[i : i + 1], c[i : i + 1]).risk, whole[i : i + 1], rtol=1e-5, atol=1e-6)
    other = x.clone()
    other[1:] = torch.randn(8, 20) * 50
    torch.testing.assert_close(m(other, c).risk[:1], whole[:1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("generator_seed", [None, 3])
def test_dispatch_paths_give_the_same_numbers(generator_seed: int | None) -> None:
    dense, routed = model(dispatch="dense"), model(dispatch="routed")
    routed.load_state_dict(dense.state_dict())
    x, c = inputs(40)
    outs, grads = [], []
    for m in (dense, routed):
        g = None if generator_seed is None else torch.Generator().manual_seed(generator_seed)
        out = m(x, c, g)
        out.risk.square().sum().backward()
        outs.append(out.risk.detach())
        grads.append({n: p.grad for n, p in m.named_parameters() if p.grad is not None})
    torch.testing.assert_close(outs[0], outs[1])
    for name in grads[0]:
        torch.testing.assert_close(grads[0][name], grads[1][name], rtol=1e-4, atol=1e-5)


def test_routing_differs_between_inputs() -> None:
    m = model()
    gates = m(torch.randn(300, 20), torch.zeros(300, dtype=torch.long)).shares["expert"]
    assert (gates.sum(0) > 0).all()


def test_blocks_name_experts_cancers_and_trunk() -> None:
    m = model()
    owners = m.blocks().owners
    assert owners["experts.weight"] == tuple(f"expert/{e}" for e in range(4))
    assert owners["attention.query"] == ("attention/0", "attention/1", "attention/2")
    assert owners["log_baseline"] == owners["gate.cancer"] == tuple(f"cancer/{c}" for c in CANCERS)
    assert owners["gate.weight"] == owners["latent.weight"] == owners["shared.weight"] == "trunk"
    out = m(*inputs())
    for group, n in m.mixtures().items():
        assert out.shares[group].shape == (9, n)
        assert {f"{group}/{e}" for e in range(n)} <= set(m.blocks().names)


def test_parts_can_be_left_out() -> None:
    m = model(attention_experts=0, shared_expert=False, gate_noise=False, gate_sees_cancer=False)
    names = {n for n, _ in m.named_parameters()}
    assert not any(n.startswith(("attention", "shared", "gate.noise", "gate.cancer")) for n in names)
    assert m(*inputs()).risk.shape == (9,)


def test_first_weights_depend_on_seed_and_fold_only() -> None:
    torch.manual_seed(1)
    a = get_weights(model())
    torch.manual_seed(2)
    b = get_weights(model())
    assert all((a[k] == b[k]).all() for k in a)
    c = get_weights(build_model(Study().changed(model__size="tiny", seed=1), genes=20, cancers=CANCERS, intervals=5))
    assert (a["latent.weight"] != c["latent.weight"]).any()


def test_bfloat16_experts_stay_close() -> None:
    m = model()
    x, c = inputs()
    exact = m(x, c).risk
    m.expert_dtype = "bfloat16"
    rough = m(x, c)
    assert rough.risk.dtype == torch.float32
    torch.testing.assert_close(rough.risk, exact, rtol=0.1, atol=0.05)


def test_weights_travel_whole_or_not_at_all() -> None:
    m = model()
    weights = {k: v.copy() for k, v in get_weights(m).items()}
    empty = build_empty(
        Study().changed(model__size="tiny"), torch.device("cpu"), genes=20, cancers=CANCERS, intervals=5
    )
    set_weights(empty, weights)
    x, c = inputs()
    torch.testing.assert_close(empty(x, c).risk, m(x, c).risk)
    with pytest.raises(ValueError, match="differ in parameters"):
        set_weights(m, {k: v for k, v in weights.items() if k != "gate.weight"})
    with pytest.raises(ValueError, match=r"latent.weight has shape \(1,\)"):
        set_weights(m, weights | {"latent.weight": np.zeros(1, np.float32)})


def test_paper_size_has_the_published_parameter_count() -> None:
    """386,810,880 in the experts of the first layer, 12,582,912 in the attention experts (gene_moe.md, 1.3)."""
    study = Study().changed(model__size="paper")
    m = build_empty(study, torch.device("meta"), genes=25182, cancers=CANCERS, intervals=5)
    assert sum(p.numel() for p in m.experts.parameters()) == 386_810_880
    assert m.attention is not None
    assert sum(p.numel() for p in m.attention.parameters()) == 12_582_912
