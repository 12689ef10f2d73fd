"""Path-GPTOmic: the sum over modalities that are there, and nothing from those that are not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from oncofed.client.bags import Bags
from oncofed.client.train import train_locally
from oncofed.common.blocks import EVIDENCE, Sum
from oncofed.common.modalities import ALTERATIONS, MODALITIES, PATHOLOGY, RNA
from oncofed.common.models.branches import TileEncoder, alpha_dropout, softmax_by_owner
from oncofed.common.models.build import get_weights
from oncofed.common.models.inputs import Inputs
from oncofed.common.modulation import BRANCHES
from oncofed.common.study import Study
from oncofed.server.aggregate import Accumulator
from oncofed.server.strategy import EvidenceStrategy
from toy_multimodal import BAGS, CANCERS, TILE, batch, build, study
from toy_slides import write_h5

ALL = {"fusion__modalities": MODALITIES}


def test_log_hazard_is_the_sum_of_the_modalities_that_a_patient_has() -> None:
    model, data = (
        build(study(**ALL), covariates=2),
        batch(lacks={PATHOLOGY: slice(0, 5), RNA: slice(5, 9)}, covariates=2),
    )
    with torch.no_grad():
        model.head.covariates.shared.normal_()
        for m in model.modalities:
            model.head.risks[m].shared.normal_()
    out = data.through(model)
    parts = torch.stack([out.branches[m] for m in MODALITIES]).sum(0)
    covariates = (data.v_BV @ model.head.covariates.shared).squeeze(1)
    torch.testing.assert_close(out.score, parts + covariates)
    assert (out.branches[PATHOLOGY][:5] == 0).all()
    assert (out.branches[RNA][5:9] == 0).all()
    assert (out.branches[PATHOLOGY][5:] != 0).all()
    z = torch.tanh(model.branches[PATHOLOGY].latent(torch.tanh(
        data.image_BP @ model.branches[PATHOLOGY].shared.weight[0] + model.branches[PATHOLOGY].shared.bias[0]
    )))  # fmt: skip
    risk = model.head.risks[PATHOLOGY]
    own = risk.ratio * (z * risk.own[data.cancer_B]).sum(1)
    torch.testing.assert_close(out.branches[PATHOLOGY][5:], (z @ risk.shared + own)[5:])


@pytest.mark.parametrize("kind", ["additive", "concat"])
def test_what_stands_in_an_absent_modality_does_not_matter(kind: str) -> None:
    model, data = build(study(fusion__kind=kind)), batch(lacks={PATHOLOGY: slice(0, 5)})
    other = replace(data, image_BP=data.image_BP.clone())
    other.image_BP[:5] = 1e6
    assert torch.equal(data.through(model).score, other.through(model).score)
    gone = replace(data, has=data.has | {PATHOLOGY: torch.zeros(20, dtype=torch.bool)})
    assert torch.equal(data.through(model, off=(PATHOLOGY, 0)).score, gone.through(model).score)
    assert not torch.equal(data.through(model).score[5:], gone.through(model).score[5:])


@pytest.mark.parametrize("kind", ["additive", "concat"])
def test_a_patient_does_not_depend_on_the_others(kind: str) -> None:
    model, data = build(study(fusion__kind=kind, **ALL)), batch(lacks={PATHOLOGY: slice(0, 5), RNA: slice(5, 9)})
    whole = data.through(model).score
    for i in (0, 6, 12):
        alone = data.select(torch.tensor([i])).through(model).score
        torch.testing.assert_close(alone, whole[i : i + 1], rtol=1e-5, atol=1e-6)


def of_modality(names: set[str], modality: str, s: Study) -> set[str]:
    model = build(s)
    return {n for n in names if model.modality_of(n) == modality}


@pytest.mark.parametrize("absent", [PATHOLOGY, RNA, ALTERATIONS])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_hospital_without_a_modality_leaves_its_encoder_untouched_to_the_last_bit(
    absent: str, optimizer: str
) -> None:
    """Decay, balance, noise and modulation are on: none of them may reach an encoder that saw nobody."""
    s = study(
        training__optimizer=optimizer,
        training__weight_decay=0.5,
        training__balance=0.1,
        training__local_steps=3,
        training__batch_size=8,
        training__clip_norm=1.0,
        model__dropout=0.2,
        fusion__modulation="local",
        fusion__modality_dropout=0.3,
        **ALL,
    )
    model, strategies = build(s), []
    have, lack = batch(seed=1), batch(seed=2, lacks={absent: slice(None)})
    for members in ([have], [have, lack]):
        strategy = EvidenceStrategy.of(s.aggregation, build(s))
        sums: list[Sum] = []
        for i, data in enumerate(members):
            total, _ = train_locally(model, strategy.weights, data, s, round_=1, seed=i, load=strategy.load)
            sums.append(total)
        accumulator = Accumulator({name: value.shape for name, value in sums[0].items()})
        for total in sums:
            accumulator.add(total)
        strategy.take(accumulator.total())
        strategies.append(strategy)
    own = of_modality(set(strategies[0].weights), absent, s)
    assert len(own) > 5
    start = get_weights(build(s))
    blocks = strategies[0].blocks
    for name in own:
        assert np.array_equal(strategies[0].weights[name], strategies[1].weights[name]), name
        assert not sums[1][name].any(), name
    named = [b for b in blocks.names if b == absent or b.endswith(f"@{absent}") or (absent == RNA and "expert/" in b)]
    assert named
    assert all(sums[1][EVIDENCE][blocks.names.index(b)] == 0 for b in named)
    assert all(not np.array_equal(strategies[0].weights[n], start[n]) for n in own if n.endswith("latent.weight"))
    others = set(strategies[0].weights) - own - {"head.log_baseline"}
    assert any(not np.array_equal(strategies[0].weights[n], strategies[1].weights[n]) for n in others)


def test_a_federation_of_hospitals_with_other_modalities_follows_the_pooled_path() -> None:
    """One full-batch step a round: each encoder's step is the mean over all patients who have its modality."""
    s = study(model__top_k=4, model__attention_top_k=3, training__learning_rate=0.01, **ALL)
    parts = [
        batch(60, 1, {PATHOLOGY: slice(None), ALTERATIONS: slice(None)}),
        batch(50, 2, {RNA: slice(0, 12), ALTERATIONS: slice(20, 50)}),
        batch(40, 3, {PATHOLOGY: slice(3, 20)}),
    ]
    joined = {f: torch.cat([getattr(p, f) for p in parts]) for f in ("x_BG", "v_BV", "cancer_B", "time_B", "event_B")}
    joined |= {f: torch.cat([getattr(p, f) for p in parts]) for f in ("exposure_BK", "interval_B", "image_BP")}
    joined |= {"alteration_BA": torch.cat([p.alteration_BA for p in parts])}
    pooled = replace(parts[0], has={m: torch.cat([p.has[m] for p in parts]) for m in MODALITIES}, **joined)

    def run(members: list[object]) -> Sum:
        model, strategy = build(s), EvidenceStrategy.of(s.aggregation, build(s))
        strategy.weights["head.log_baseline"][:] = -3.0
        for r in range(1, 11):
            total: Sum = {}
            for data in members:
                one, _ = train_locally(model, strategy.weights, data, s, round_=r, seed=r, load=strategy.load)  # type: ignore[arg-type]
                total = {k: total.get(k, 0.0) + v.astype(np.float64) for k, v in one.items()}
            strategy.take(total)
        return strategy.weights

    a, b, start = run(list(parts)), run([pooled]), get_weights(build(s))
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=0, atol=3e-6, err_msg=name)
    assert min(np.abs(a[n] - start[n]).max() for n in a if n.endswith("latent.weight")) > 0.002


def test_modality_dropout_spares_the_last_modality_and_is_off_without_a_generator() -> None:
    model = build(study(fusion__modality_dropout=0.5))
    data = batch(2000, lacks={PATHOLOGY: slice(0, 1000)})
    out = model(data.inputs(), torch.Generator().manual_seed(0))
    there = torch.stack(list(out.present.values()))
    assert (there.sum(0) >= 1).all()
    assert (out.present[RNA][:1000] == 1).all()
    lost = 2 - there[:, 1000:].sum(0)
    assert 0.45 < lost.mean() < 0.55
    assert 0.2 < (out.present[RNA][1000:] == 0).float().mean() < 0.3
    again = model(data.inputs(), torch.Generator().manual_seed(0))
    assert torch.equal(out.score, again.score)
    assert torch.equal(model(data.inputs()).present[PATHOLOGY], data.has[PATHOLOGY].float())


def test_evidence_counts_patients_who_have_the_modality_after_dropout() -> None:
    s = study()
    model, data = build(s), batch(lacks={PATHOLOGY: slice(0, 5), RNA: slice(5, 9)})
    total, _ = train_locally(model, get_weights(model), data, s, round_=1, seed=0, load={})
    evidence = dict(zip(model.blocks().names, total[EVIDENCE], strict=True))
    assert evidence[PATHOLOGY] == 15
    assert evidence[RNA] == 16
    np.testing.assert_allclose(sum(v for k, v in evidence.items() if k.startswith("expert/")), 16, rtol=1e-6)
    cancer = data.cancer_B[5:].bincount(minlength=3).tolist()
    assert [evidence[f"cancer/{c}@{PATHOLOGY}"] for c in CANCERS] == cancer
    assert [evidence[f"cancer/{c}"] for c in CANCERS] == data.cancer_B.bincount(minlength=3).tolist()
    assert total[BRANCHES][:, 0].tolist() == [16, 15]


# -- bags ----------------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 6), min_size=1, max_size=6), st.integers(0, 99), st.floats(0.1, 500))
def test_softmax_by_owner_is_a_softmax_of_each_patients_tiles(sizes: list[int], seed: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    owner = torch.from_numpy(rng.permutation(np.repeat(np.arange(len(sizes)), sizes)))
    score = torch.from_numpy(rng.normal(0, scale, len(owner)))
    a = softmax_by_owner(score, owner, len(sizes))
    for p in range(len(sizes)):
        torch.testing.assert_close(a[owner == p], torch.softmax(score[owner == p], 0))


def test_tile_encoder_is_gated_attention_pooling() -> None:
    encoder = TileEncoder(TILE, 9, 4, dropout=0.0)
    x, owner = torch.randn(11, TILE), torch.tensor([0] * 4 + [2] * 7)
    z, a = encoder(x, owner, 3, None)
    for p in (0, 2):
        h = F.relu(encoder.embed(F.layer_norm(x[owner == p], (TILE,), encoder.norm.weight, encoder.norm.bias)))
        gated = torch.tanh(encoder.tanh(h)) * torch.sigmoid(encoder.gate(h))
        weights = torch.softmax((gated @ encoder.score.weight.T).squeeze(1), 0)
        torch.testing.assert_close(a[owner == p], weights)
        torch.testing.assert_close(z[p], torch.tanh(encoder.latent((weights[:, None] * h).sum(0))))
    torch.testing.assert_close(z[1], torch.tanh(encoder.latent.bias))


def bags(folder: Path, sizes: list[int], most: int = 0) -> tuple[Bags, list[np.ndarray]]:
    rng, files, tiles = np.random.default_rng(0), [], []
    for i, n in enumerate(sizes):
        tiles.append(rng.normal(size=(n, TILE)).astype(np.float32))
        files.append(str(write_h5(folder / f"P{i}.h5", tiles[-1])) if n else "")
    return Bags(np.array(files), TILE, most, torch.device("cpu")), tiles


def test_bags_are_read_patient_by_patient_and_scored_in_parts(tmp_path: Path) -> None:
    sizes = [3, 0, 5, 4, 2, 6, 1, 7, 2, 3, 4]
    held, tiles = bags(tmp_path, sizes)
    x, owner = held.load(None)
    np.testing.assert_array_equal(x.numpy(), np.concatenate(tiles))
    assert owner.tolist() == np.repeat(np.arange(11), sizes).tolist()
    model, data = build(study(), BAGS), batch(11)
    with torch.no_grad():
        model.branches[PATHOLOGY].score.weight.mul_(5)  # attention that is not flat
    has = data.has | {PATHOLOGY: torch.tensor([n > 0 for n in sizes])}
    data = replace(data, image_BP=None, bags=held, has=has)
    whole = model(data.inputs())
    parts = data.through(model)  # in parts of eight patients
    torch.testing.assert_close(parts.score, whole.score)
    torch.testing.assert_close(parts.attention, whole.attention)
    torch.testing.assert_close(parts.latent, whole.latent)
    sums = torch.zeros(11).index_add(0, owner, parts.attention)
    torch.testing.assert_close(sums, has[PATHOLOGY].float())
    alone = data.select(torch.tensor([7, 1])).through(model).score
    torch.testing.assert_close(alone, whole.score[[7, 1]])
    without = model(data.inputs(), off=(PATHOLOGY, 0))
    assert (without.branches[PATHOLOGY] == 0).all()


def test_a_training_step_sees_a_drawn_part_of_a_patients_tiles(tmp_path: Path) -> None:
    held, tiles = bags(tmp_path, [30, 2], most=4)
    x, owner = held.load(torch.Generator().manual_seed(1))
    again, _ = held.load(torch.Generator().manual_seed(1))
    other, _ = held.load(torch.Generator().manual_seed(2))
    assert owner.tolist() == [0] * 4 + [1] * 2
    assert torch.equal(x, again)
    assert not torch.equal(x, other)
    assert {tuple(t) for t in x[:4].tolist()} <= {tuple(t) for t in tiles[0].tolist()}
    assert held.load(None)[0].shape == (32, TILE)


def test_tiles_learn_and_a_hospital_without_slides_leaves_them(tmp_path: Path) -> None:
    s = study(training__local_steps=2, training__batch_size=4)
    held, _ = bags(tmp_path, [3, 0, 5, 4, 2, 6])
    model, data = build(s, BAGS), batch(6)
    with_slides = replace(
        data, image_BP=None, bags=held, has=data.has | {PATHOLOGY: torch.tensor([n > 0 for n in [3, 0, 5, 4, 2, 6]])}
    )
    start = get_weights(model)
    weights = {n: v.copy() for n, v in start.items()}
    total, _ = train_locally(model, weights, with_slides, s, round_=1, seed=0, load={})
    names = [n for n in weights if n.startswith("branches.pathology.")]
    assert all(total[n].any() for n in names)
    nobody = Bags(np.full(6, ""), TILE, 0, torch.device("cpu"))
    none = replace(data, image_BP=None, bags=nobody, has=data.has | {PATHOLOGY: torch.zeros(6, dtype=torch.bool)})
    total, _ = train_locally(model, weights, none, s, round_=1, seed=0, load={})
    assert not any(total[n].any() for n in names)
    assert total["encoder.latent.weight"].any()


# -- alterations -----------------------------------------------------------------------------------------------------------


def test_alpha_dropout_keeps_mean_and_variance() -> None:
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(3))
    y = alpha_dropout(x, 0.25, torch.Generator().manual_seed(4))
    assert abs(float(y.mean())) < 0.01
    assert abs(float(y.std()) - 1.0) < 0.01
    changed = (y.unsqueeze(0) == y.mode().values).float().mean()
    assert 0.24 < changed < 0.26
    assert torch.equal(alpha_dropout(x, 0.25, None), x)


def test_a_model_of_one_modality_and_of_joint_features() -> None:
    data = batch()
    for modality in MODALITIES:
        model = build(study(fusion__modalities=(modality,)))
        out = data.through(model)
        torch.testing.assert_close(out.score, out.branches[modality])
        assert set(model.removable()) <= {"expert", "attention", "shared"}
    joint = build(study(fusion__kind="concat", **ALL))
    assert not joint.additive
    assert not data.through(joint).branches
    assert joint.blocks().owners["joint.weight"] == "trunk"
    assert {"rna", "pathology", "alterations"} <= set(joint.removable())


def test_inputs_without_what_a_study_asks_for_are_refused() -> None:
    with pytest.raises(ValueError, match="no site has"):
        build(study(), beside=BAGS.__class__())
    with pytest.raises(ValueError, match=r"alterations.csv"):
        build(study(**ALL), beside=BAGS)
    with pytest.raises(ValueError, match=r"fusion.modalities = \['rna', 'smell'\]"):
        study(fusion__modalities=("rna", "smell"))
    with pytest.raises(ValueError, match="predicts survival"):
        study(task__kind="classification", panel__scale_by="all")
    assert isinstance(Inputs(torch.zeros(1, 2), torch.zeros(1), torch.zeros(1, 0)).has, dict)
