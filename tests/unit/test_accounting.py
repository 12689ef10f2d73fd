"""What noisy releases cost together: held against dp_accounting's own accountant and against published numbers."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oncofed.common.privacy.accounting import Mechanism, epsilon_of, gaussian_epsilon, merged, noise_for
from scipy.stats import norm

DELTA = 1e-5


def gauss(noise: float, count: int = 1) -> Mechanism:
    return Mechanism("gaussian", noise, count)


def sampled(noise: float, count: int, rate: float) -> Mechanism:
    return Mechanism("sampled_gaussian", noise, count, rate)


def pure(epsilon: float, count: int = 1) -> Mechanism:
    return Mechanism("pure", epsilon, count)


def by_dp_accounting(mechanisms: list[Mechanism], delta: float) -> float:
    """Gaussians, sampled or not, one by one and in the order given."""
    from dp_accounting import dp_event
    from dp_accounting.pld.pld_privacy_accountant import PLDAccountant

    events = []
    for m in mechanisms:
        event = dp_event.GaussianDpEvent(m.noise)
        one = event if m.kind == "gaussian" else dp_event.PoissonSampledDpEvent(m.sample_rate, event)
        events.append(dp_event.SelfComposedDpEvent(one, m.count))
    return PLDAccountant().compose(dp_event.ComposedDpEvent(events)).get_epsilon(delta)


@pytest.mark.parametrize(
    ("mechanisms", "delta"),
    [
        ([gauss(4.0)], 1e-5),
        ([gauss(9.0, 30), gauss(5.0)], 1e-6),
        ([sampled(1.2, 100, 0.1)], 1e-5),
        ([gauss(8.0), sampled(1.6, 400, 0.1)], 1e-5),
        ([sampled(1.2, 60, 0.1), gauss(6.0, 3), sampled(2.0, 200, 0.05), sampled(1.2, 40, 0.1)], 1e-6),
    ],
)
def test_costs_are_those_of_dp_accounting(mechanisms: list[Mechanism], delta: float) -> None:
    ours = epsilon_of(mechanisms, delta)
    assert ours == pytest.approx(by_dp_accounting(mechanisms, delta), abs=1e-3)


@pytest.mark.parametrize(
    ("mechanism", "epsilon"),
    [
        (sampled(1.0, 1000, 0.1), 25.21),
        (sampled(1.1, 2000, 0.02), 4.70),
        (sampled(0.7, 100, 0.05), 7.88),
        (gauss(9.9, 100), 4.43),
    ],
)
def test_costs_are_those_of_the_design(mechanism: Mechanism, epsilon: float) -> None:
    """Table 2.4 of the privacy design, its column of loss distributions."""
    assert epsilon_of([mechanism], DELTA) == pytest.approx(epsilon, abs=0.02)


@pytest.mark.parametrize(("mu", "delta"), [(0.1, 1e-5), (0.5, 1e-6), (1.0, 1e-5), (3.0, 1e-9), (30.0, 1e-3)])
def test_a_gaussian_costs_what_its_definition_says(mu: float, delta: float) -> None:
    epsilon = gaussian_epsilon(mu, delta)
    reached = norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * norm.cdf(-mu / 2 - epsilon / mu)
    assert reached == pytest.approx(delta, rel=1e-5)
    assert epsilon_of([gauss(1 / mu)], delta) == epsilon


def test_a_gaussian_at_the_edges() -> None:
    assert gaussian_epsilon(0.0, DELTA) == 0.0
    assert gaussian_epsilon(1e-9, DELTA) == 0.0
    assert gaussian_epsilon(1e4, DELTA) == pytest.approx(5e7, rel=0.01)
    with pytest.raises(ValueError, match="mu = -1"):
        gaussian_epsilon(-1.0, DELTA)


def test_gaussians_become_one_and_equal_others_add_their_counts() -> None:
    parts = [pure(0.5), gauss(2.0), sampled(1.5, 10, 0.1), gauss(3.0, 4), pure(0.5, 2), sampled(4.0, 2, 1.0)]
    parts += [sampled(1.5, 5, 0.1), sampled(1.5, 5, 0.2), gauss(7.0, 0)]
    one, *rest = merged(parts)
    assert (one.kind, one.count) == ("gaussian", 1)
    assert one.noise**-2 == pytest.approx(1 / 4 + 4 / 9 + 2 / 16, rel=1e-14)
    assert rest == [pure(0.5, 3), sampled(1.5, 15, 0.1), sampled(1.5, 5, 0.2)]
    assert merged([*reversed(parts)]) == merged(parts)
    assert merged([gauss(0.1)]) == (gauss(0.1),)  # not 1 / (1 / 0.1)
    assert merged([]) == merged([gauss(1.0, 0)]) == ()


def test_pure_releases_cost_their_sum_at_most_and_less_when_there_are_many() -> None:
    assert epsilon_of([pure(1.5)], DELTA) == pytest.approx(1.5, abs=1e-3)
    assert epsilon_of([pure(1.0, 3)], DELTA) <= 3.0
    # 50 geometric releases of 0.5 in the privacy design, 7.4: of all pure mechanisms none costs more
    assert epsilon_of([pure(0.5, 50)], DELTA) == pytest.approx(18.93, abs=0.02)
    assert epsilon_of([pure(0.03001)], DELTA) <= 0.03001  # not what the grid of losses makes of it


def test_a_pure_release_adds_less_than_its_epsilon_to_gaussians() -> None:
    """7.4 of the privacy design: 6.733, and 7.072 with a geometric release of 0.5."""
    training = [gauss(8.0), sampled(1.6, 400, 0.1)]
    assert epsilon_of(training, DELTA) == pytest.approx(6.733, abs=2e-3)
    assert epsilon_of([*training, pure(0.5)], DELTA) == pytest.approx(7.072, abs=2e-3)


@pytest.mark.parametrize(
    "mechanisms",
    [[sampled(0.001, 50, 0.1)], [pure(900.0, 2), gauss(1.0)], [sampled(1e9, 10, 0.5), gauss(1e99)], [gauss(1e-90)]],
)
def test_useless_noise_costs_a_lot_and_little_memory(mechanisms: list[Mechanism]) -> None:
    most = sum(m.count * m.noise for m in mechanisms if m.kind == "pure")
    most += gaussian_epsilon(math.hypot(*(m.count**0.5 / m.noise for m in mechanisms if m.kind != "pure")), DELTA)
    assert epsilon_of(mechanisms, DELTA) == pytest.approx(most, abs=1e-3)


KNOWN = [gauss(6.0), gauss(20.0, 5), sampled(2.0, 10, 0.1), sampled(4.0, 50, 0.2), pure(0.25), pure(0.5, 2)]


@given(st.lists(st.sampled_from(KNOWN), max_size=4), st.sampled_from(KNOWN), st.sampled_from([1e-5, 1e-7]))
@settings(max_examples=30, deadline=None)
def test_more_releases_cost_more(releases: list[Mechanism], another: Mechanism, delta: float) -> None:
    before = epsilon_of(releases, delta)
    assert epsilon_of([*releases, another], delta) > before
    assert epsilon_of([*releases, another.repeated(2)], delta) > epsilon_of([*releases, another], delta)
    assert epsilon_of(releases, delta * 10) <= before


@pytest.mark.parametrize("target", [0.5, 2.0, 8.0])
def test_noise_is_the_least_that_keeps_a_promise(target: float) -> None:
    def plan(scale: float) -> list[Mechanism]:
        return [sampled(scale, 100, 0.1), gauss(4 * scale), pure(0.2)]

    scale = noise_for(target, DELTA, plan)
    assert epsilon_of(plan(scale), DELTA) <= target
    assert epsilon_of(plan(scale * (1 - 1e-4)), DELTA) > target


def test_noise_of_gaussians_inverts_their_cost() -> None:
    target = gaussian_epsilon(10 / 7.5, DELTA)
    scale = noise_for(target, DELTA, lambda x: [gauss(x, 100)])
    assert scale == pytest.approx(7.5, rel=1e-4)
    assert epsilon_of([gauss(scale, 100)], DELTA) <= target


def test_a_promise_that_no_noise_keeps_is_refused_with_its_numbers() -> None:
    with pytest.raises(ValueError, match=r"epsilon 1 at delta 1e-05: .* costs 1\.5"):
        noise_for(1.0, DELTA, lambda x: [gauss(x, 10), pure(1.5)])
    with pytest.raises(ValueError, match="target_epsilon = 0"):
        noise_for(0.0, DELTA, lambda x: [gauss(x)])


@pytest.mark.parametrize("mechanism", [gauss(1 / 3, 7), sampled(0.1, 3, 1 / 7), pure(0.3)])
def test_a_mechanism_survives_json(mechanism: Mechanism) -> None:
    import json

    assert Mechanism.from_json(json.loads(json.dumps(mechanism.to_json()))) == mechanism


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"kind": "laplace", "noise": 1.0}, "kind = 'laplace'"),
        ({"kind": "gaussian", "noise": 0.0}, r"noise = 0\.0"),
        ({"kind": "gaussian", "noise": math.nan}, "noise = nan"),
        ({"kind": "pure", "noise": math.inf}, "noise = inf"),
        ({"kind": "gaussian", "noise": 1.0, "count": -1}, "count = -1"),
        ({"kind": "gaussian", "noise": 1.0, "count": 1.5}, r"count = 1\.5"),
        ({"kind": "sampled_gaussian", "noise": 1.0, "sample_rate": 1.1}, r"sample_rate = 1\.1"),
        ({"kind": "sampled_gaussian", "noise": 1.0, "sample_rate": 0.0}, r"sample_rate = 0\.0"),
        ({"kind": "pure", "noise": 1.0, "sample_rate": 0.5}, "of sampled_gaussian alone"),
        ({"kind": "pure"}, "noise"),
        ({"kind": "pure", "noise": 1.0, "epsilon": 2.0}, "epsilon"),
    ],
)
def test_a_mechanism_that_is_none_is_refused(fields: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Mechanism.from_json(fields)


@pytest.mark.parametrize("delta", [0.0, 1.0, math.nan])
def test_delta_is_a_small_share(delta: float) -> None:
    with pytest.raises(ValueError, match="delta = "):
        epsilon_of([gauss(1.0)], delta)
