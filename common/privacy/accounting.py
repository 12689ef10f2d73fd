"""What noisy releases about one patient cost together: epsilon at a delta, by privacy loss distributions (PLD).

Neighbours differ by one patient more or less. Every number is an upper bound: losses are rounded up to a grid
(Koskela et al. 2020; Doroshenko et al. 2022). It holds for releases whose noise is fixed without looking at the
answers of earlier ones.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal, get_args

Kind = Literal["gaussian", "sampled_gaussian", "pure"]

INTERVAL = 1e-4
"""Of the grid of losses; an epsilon is too high by about as much at most."""

SPAN = 50.0
"""Losses up to here lie on the grid of `INTERVAL`. Beyond, where no epsilon protects anybody, it is coarser, to save memory."""

BEYOND = 1000.0
"""Losses from here on are not composed any more: the bound without sampling takes their place."""

SCALES = 2.0**-10, 2.0**24
"""Between these `noise_for` looks."""


@dataclass(frozen=True)
class Mechanism:
    """One kind of noisy release about a patient, `count` times.

    `noise` is the standard deviation over the L2 sensitivity; of `pure`, which stands for every mechanism that is
    differentially private without a delta, it is epsilon. Raises `ValueError` with field, value seen and value wanted.
    """

    kind: Kind
    noise: float
    count: int = 1
    sample_rate: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"mechanism: kind = {self.kind!r}; write one of {', '.join(get_args(Kind))}")
        for name, value, low, high in (
            ("noise", self.noise, 1e-100, 1e100),
            ("sample_rate", self.sample_rate, 1e-100, 1),
        ):
            if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
                raise ValueError(
                    f"{self.kind} mechanism: {name} = {value!r}; write a number above zero, up to {high:g}"
                )
        if self.sample_rate != 1 and self.kind != "sampled_gaussian":
            raise ValueError(
                f"{self.kind} mechanism: sample_rate = {self.sample_rate:g} is of sampled_gaussian alone; leave it at 1"
            )
        if isinstance(self.count, bool) or not isinstance(self.count, int) or self.count < 0:
            raise ValueError(f"{self.kind} mechanism: count = {self.count!r}; write a whole number, zero or more")

    def repeated(self, n: int) -> Mechanism:
        """The same, `n` times over."""
        return replace(self, count=self.count * n)

    def to_json(self) -> dict[str, Any]:
        """The four fields; `from_json` gives an equal mechanism."""
        return {"kind": self.kind, "noise": self.noise, "count": self.count, "sample_rate": self.sample_rate}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Mechanism:
        """Raises `ValueError` where a field is absent, unknown or wrong."""
        try:
            return cls(**data)
        except TypeError as error:
            raise ValueError(f"mechanism: {error}") from None


def merged(mechanisms: Sequence[Mechanism]) -> tuple[Mechanism, ...]:
    """Equal cost in as few mechanisms as can be: one Gaussian for all, counts of equal others added, in a fixed order.

    Gaussians compose exactly: the squares of sensitivity over standard deviation add up (Dong et al. 2022).
    """
    gaussians: Counter[float] = Counter()
    others: Counter[tuple[str, float, float]] = Counter()
    for m in mechanisms:
        if m.kind == "gaussian" or (m.kind == "sampled_gaussian" and m.sample_rate == 1):
            gaussians[m.noise] += m.count
        else:
            others[m.kind, m.noise, m.sample_rate] += m.count
    plain = [(noise, n) for noise, n in sorted(gaussians.items()) if n]
    one: tuple[Mechanism, ...] = ()
    if len(plain) == 1 and plain[0][1] == 1:
        one = (Mechanism("gaussian", plain[0][0]),)
    elif plain:
        one = (Mechanism("gaussian", 1 / math.hypot(*(math.sqrt(n) / noise for noise, n in plain))),)
    rest = (Mechanism(kind, noise, n, rate) for (kind, noise, rate), n in sorted(others.items()) if n)  # type: ignore[arg-type]
    return (*one, *rest)


def epsilon_of(mechanisms: Sequence[Mechanism], delta: float) -> float:
    """Epsilon of all of them together at `delta`; 0 of none."""
    _check_delta(delta)
    return _epsilon(merged(mechanisms), float(delta))


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Epsilon of a Gaussian of sensitivity over standard deviation `mu`, exact (Balle & Wang 2018, theorem 8), rounded up."""
    from scipy.special import log_ndtr

    _check_delta(delta)
    if not mu >= 0:
        raise ValueError(f"mu = {mu!r}: sensitivity over standard deviation is zero or more")
    if mu == 0:
        return 0.0

    def exceeds(epsilon: float) -> bool:
        upper = log_ndtr(mu / 2 - epsilon / mu)
        lower = epsilon + log_ndtr(-mu / 2 - epsilon / mu)  # below `upper`, but for rounding
        return bool(math.exp(upper) * -math.expm1(min(lower - upper, 0.0)) > delta)

    if not exceeds(0.0):
        return 0.0
    low, high = 0.0, mu * mu / 2 + mu * math.sqrt(2 * math.log(1 / delta))  # the latter by Rényi divergences
    if high > 1e6:  # of no use to anybody, and differences of logarithms get coarse
        return high
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if exceeds(middle) else (low, middle)
    return high


def noise_for(target_epsilon: float, delta: float, plan: Callable[[float], Sequence[Mechanism]]) -> float:
    """The smallest scale x, to 1e-4 of itself, at which `plan(x)` costs no more than `target_epsilon`; never one that costs more.

    More scale must mean more noise, for example `lambda x: [Mechanism("sampled_gaussian", x, 200, 0.1)]`. Looks between
    the two `SCALES`; raises `ValueError` where even the highest costs more.
    """
    from scipy.optimize import brentq

    if not 0 < target_epsilon < math.inf:
        raise ValueError(f"target_epsilon = {target_epsilon!r}; write a finite number above zero")
    _check_delta(delta)

    def cost(scale: float) -> float:
        return epsilon_of(plan(scale), delta)

    low = high = 1.0
    while cost(high) > target_epsilon:
        if high >= SCALES[1]:
            raise ValueError(
                f"no noise brings the plan to epsilon {target_epsilon:g} at delta {delta:g}: at a scale of {high:g} it still costs "
                f"{cost(high):.4g}; plan fewer releases, give those without a scale a smaller epsilon, or allow a larger epsilon"
            )
        low, high = high, 2 * high
    while low == high or cost(low) <= target_epsilon:
        if low <= SCALES[0]:
            return low
        low, high = low / 2, low

    def excess(power: float) -> float:
        return math.log(max(min(cost(2.0**power), 1e6), 1e-9) / target_epsilon)

    # cost falls smoothly, so interpolation needs a third of bisection's evaluations, each of which may take a second
    root = brentq(excess, math.log2(low), math.log2(high), xtol=1e-5)
    step = 1e-5
    while cost(scale := min(2.0 ** (root + step), high)) > target_epsilon:
        step *= 2
    return scale


@lru_cache(maxsize=4096)
def _epsilon(mechanisms: tuple[Mechanism, ...], delta: float) -> float:
    """Of merged mechanisms."""
    unsampled = math.hypot(*(math.sqrt(m.count) / m.noise for m in mechanisms if m.kind != "pure"))
    pure = math.fsum(m.count * m.noise for m in mechanisms if m.kind == "pure")
    # sampling lowers a cost, and epsilons add up, so this holds always; for one Gaussian, or one pure release, nothing is tighter
    bound = gaussian_epsilon(unsampled, delta) + pure
    if all(m.kind == "gaussian" for m in mechanisms) or _span(mechanisms) > BEYOND:
        return bound
    return min(bound, float(_composed(mechanisms).get_epsilon_for_delta(delta)))


def _span(mechanisms: Sequence[Mechanism]) -> float:
    """About how large losses get, of one release and of all together; it need not be exact, it chooses a grid."""
    single = max(m.noise if m.kind == "pure" else _square(m) / 2 + 10 / m.noise for m in mechanisms)
    mu2 = pure = 0.0
    for m in mechanisms:
        if m.kind == "pure":
            pure += m.noise * min(m.count, m.count * math.tanh(m.noise / 2) + 10 * math.sqrt(m.count))
        else:
            sampled = m.sample_rate**2 * math.expm1(min(_square(m), 700.0))  # of many releases (Bu et al. 2020)
            mu2 += m.count * min(_square(m), 2 * sampled)
    return max(single, mu2 / 2 + 10 * math.sqrt(mu2) + pure)


def _square(m: Mechanism) -> float:
    return (1 / m.noise) * (1 / m.noise)


@lru_cache(maxsize=4)
def _composed(mechanisms: tuple[Mechanism, ...]) -> Any:
    """Their privacy loss distribution: a few megabytes, kept for another delta."""
    interval = INTERVAL * 2.0 ** max(0, math.ceil(math.log2(_span(mechanisms) / SPAN)))
    whole = None
    for m in mechanisms:
        part = _single(m.kind, m.noise, m.sample_rate, interval)
        part = part.self_compose(m.count) if m.count > 1 else part
        whole = part if whole is None else whole.compose(part)
    return whole


@lru_cache(maxsize=16)
def _single(kind: Kind, noise: float, sample_rate: float, interval: float) -> Any:
    """The distribution of one release; half a second where patients are sampled, so it is kept."""
    # slow to import, and needed here alone
    from dp_accounting.pld import common  # type: ignore[import, unused-ignore]
    from dp_accounting.pld import privacy_loss_distribution as pld

    if kind == "pure":  # randomised response, which no mechanism of this epsilon exceeds (Kairouz et al. 2015)
        return pld.from_privacy_parameters(common.DifferentialPrivacyParameters(noise, 0.0), interval)
    return pld.from_gaussian_mechanism(
        noise,
        value_discretization_interval=interval,
        sampling_prob=sample_rate,
        neighboring_relation=pld.NeighborRel.ADD_OR_REMOVE_ONE,
    )


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise ValueError(f"delta = {delta!r}; write a number between 0 and 1, far below one over the patients")
