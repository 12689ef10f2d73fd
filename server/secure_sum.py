"""The server's half of a secure sum: it passes sealed shares on, adds sums under masks, and takes the masks off the total alone.

docs/secure_sum.md has the exchanges and what they protect.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from oncofed.common import masks, shamir, wire
from oncofed.common.blocks import Sum
from oncofed.common.sum_coding import Form, SumCoding
from oncofed.server.roster import Answer, NotEnoughSites, Roster

Shapes = Mapping[str, tuple[int, ...]]
Exchange = Callable[[str, wire.Config, Mapping[str, wire.Config]], Iterator[Answer]]
"""Asks the sites named in its last argument, each with its own part of the question beside the common one."""


@dataclass(frozen=True)
class SecureTotal:
    """A total over the sites of `answers`, whose configs alone are known: `integers` to the last bit, `total` as float64."""

    integers: dict[str, np.ndarray]
    total: Sum
    answers: list[Answer]


@dataclass
class SecureSum:
    """One sum under masks. `check` refuses what an answer says beside its sum, by `ValueError`."""

    roster: Roster
    exchange: Exchange
    kind: str
    round: int
    shapes: Shapes
    bits: int
    min_sites: int
    asked_threshold: int = 0
    check: Callable[[Answer], None] = lambda answer: None
    form: Form = "plain"
    question: str = ""
    members: dict[str, masks.Member] = field(default_factory=dict)
    threshold: int = 0

    def gather(self, answers: Iterable[Answer]) -> SecureTotal:
        """The four exchanges; too few sites at any of them raise `NotEnoughSites`, and nothing is known of anybody's sum."""
        begun = self._begin(answers)
        sealed, commitments = self._share()
        words, came = self._add(sealed)
        lost = sorted(sealed.keys() - set(came))
        self._unmask(words, came, lost, commitments)
        integers = masks.unflatten(words, self._shapes, np.int64)
        return SecureTotal(integers, self._coding.total(integers), [begun[site] for site in came])

    @property
    def _coding(self) -> SumCoding:
        return SumCoding(self.bits, self.form)

    @property
    def _shapes(self) -> Shapes:
        """Of what travels."""
        return self._coding.shapes(self.shapes)

    def _begin(self, answers: Iterable[Answer]) -> dict[str, Answer]:
        """The first exchange: who has a sum, and the keys for it. Sites that understood another question are left out."""
        found: dict[str, tuple[Answer, str, masks.Member]] = {}
        for answer in answers:
            try:
                self.check(answer)
                if answer.arrays:
                    raise ValueError("a sum in clear in the answer to a question that is summed under masks")
                found[answer.site] = (answer, *self._keys(answer))
            except (ValueError, KeyError) as error:
                self._leave_out(answer.site, self.kind, error)
        if found:
            self.question = Counter(question for _, question, _ in found.values()).most_common(1)[0][0]
        for site, (_, question, member) in sorted(found.items()):
            if question != self.question:
                self._leave_out(
                    site,
                    self.kind,
                    "it understood another question than the others; install the same oncofed version on all sides",
                )
            elif not masks.is_signed(member, question, site):
                self._leave_out(site, self.kind, "its keys are not signed by the identity of its greeting")
            else:
                self.members[site] = member
        self.members = dict(sorted(self.members.items()))
        self._enough(self.members, self.kind, 0)
        try:
            self.threshold = masks.threshold_of(len(self.members), self.asked_threshold)
        except ValueError as error:
            raise NotEnoughSites(f"'{self.kind}': {error}") from None
        return {site: found[site][0] for site in self.members}

    def _keys(self, answer: Answer) -> tuple[str, masks.Member]:
        told = {k: str(answer.config[k]) for k in ("sum", "identity", "channel_key", "mask_key", "signature")}
        known = {str(h["site"]): str(h.get("identity", "")) for h in self.roster.hellos.values()}
        if told["identity"] != known.get(answer.site):
            raise ValueError("the answer has another identity than the site's greeting")
        keys = (bytes.fromhex(told[k]) for k in ("identity", "channel_key", "mask_key", "signature"))
        return told["sum"], masks.Member(*keys)

    def _share(self) -> tuple[dict[str, dict[str, str]], dict[str, bytes]]:
        """The second exchange: sealed shares by sender and recipient, and what each sender says of its seed."""
        names = list(self.members)
        config: wire.Config = {"sum": self.question, "members": names}
        for key, of in (
            ("identities", "identity"),
            ("channel_keys", "channel"),
            ("mask_keys", "mask"),
            ("signatures", "signature"),
        ):
            config[key] = [getattr(m, of).hex() for m in self.members.values()]
        sealed, commitments = {}, {}
        for answer in self.exchange(wire.SHARES, config, {name: {} for name in names}):
            others = [name for name in names if name != answer.site]
            texts = answer.config.get("sealed")
            try:
                if not isinstance(texts, list) or len(texts) != len(others):
                    raise ValueError(f"wanted {len(others)} sealed shares, one for each other member")
                commitments[answer.site] = bytes.fromhex(str(answer.config["commitment"]))
                sealed[answer.site] = {name: str(text) for name, text in zip(others, texts, strict=True)}
            except (ValueError, KeyError) as error:
                self._leave_out(answer.site, wire.SHARES, error)
        self._enough(sealed, wire.SHARES, self.threshold)
        return dict(sorted(sealed.items())), commitments

    def _add(self, sealed: Mapping[str, Mapping[str, str]]) -> tuple[np.ndarray, list[str]]:
        """The third exchange: the sum of what the sites send under masks, added as it arrives, and whose it is."""
        shapes = self._shapes
        size = sum(int(np.prod(shape, dtype=np.int64)) for shape in shapes.values())
        words, came = np.zeros(size, dtype=np.uint64), []
        each: dict[str, wire.Config] = {
            name: {"sealed": [sealed[other][name] for other in sealed if other != name]} for name in sealed
        }
        for answer in self.exchange(wire.MASKED, {"sum": self.question, "sharers": list(sealed)}, each):
            try:
                one = answer.arrays
                if {n: v.shape for n, v in one.items()} != {n: tuple(s) for n, s in shapes.items()}:
                    odd = sorted(n for n in one.keys() | shapes.keys() if n not in one or one[n].shape != shapes.get(n))
                    raise ValueError(f"the sum has other arrays or shapes than asked for: {odd[:5]}")
                if any(v.dtype != np.uint64 for v in one.values()):
                    raise ValueError("a sum under masks must be of 64-bit words")
                words += masks.flatten(one)
                came.append(answer.site)
            except ValueError as error:
                self._leave_out(answer.site, wire.MASKED, error)
        self._enough(came, wire.MASKED, self.threshold)
        return words, sorted(came)

    def _unmask(self, words: np.ndarray, came: list[str], lost: list[str], commitments: Mapping[str, bytes]) -> None:
        """The fourth exchange: take the own masks of those in the total away, and what the lost ones have left in it."""
        number = {name: i for i, name in enumerate(self.members)}
        shares: dict[str, dict[int, bytes]] = {name: {} for name in [*came, *lost]}
        given: list[int] = []
        config: wire.Config = {"sum": self.question, "came": came, "lost": lost}
        for answer in self.exchange(wire.UNMASK, config, {name: {} for name in came}):
            told = [answer.config.get(key) for key in ("seed_shares", "key_shares")]
            try:
                if [len(t) if isinstance(t, list) else -1 for t in told] != [len(came), len(lost)]:
                    raise ValueError(f"wanted {len(came)} shares of seeds and {len(lost)} of keys")
                parts = [bytes.fromhex(str(text)) for texts in told for text in texts]  # type: ignore[union-attr]
            except ValueError as error:
                self._leave_out(answer.site, wire.UNMASK, error)
                continue
            given.append(number[answer.site])
            for name, share in zip(shares, parts, strict=True):
                shares[name][number[answer.site]] = share
        self._enough(given, wire.UNMASK, self.threshold)
        weights = shamir.weights_at_zero(sorted(given)[: self.threshold])
        context = masks.context_of(self.question, self.members)
        for name in came:
            seed = self._secret(shares[name], weights, name, "seed")
            if masks.commitment(seed, context, name) != commitments[name]:
                raise NotEnoughSites(
                    f"'{self.kind}': the shares of {name}'s seed give another one than it committed to"
                )
            masks.add_mask(words, seed, -1)
        for name in lost:
            key = self._secret(shares[name], weights, name, "mask key")
            if masks.public_key(key) != self.members[name].mask:
                raise NotEnoughSites(
                    f"'{self.kind}': the shares of {name}'s mask key give another one than its public key's"
                )
            for other in came:
                seed = masks.pair_seed(key, self.members[other].mask, context)
                masks.add_mask(words, seed, -masks.pair_sign(other, name))

    def _secret(self, shares: Mapping[int, bytes], weights: Mapping[int, int], name: str, what: str) -> bytes:
        try:
            return shamir.combine(shares, weights)
        except ValueError as error:
            raise NotEnoughSites(f"'{self.kind}': {name}'s {what}: {error}") from None

    def _enough(self, there: Iterable[object], kind: str, threshold: int) -> None:
        count, wanted = len(list(there)), max(masks.LEAST_MEMBERS, self.min_sites, threshold)
        if kind == wire.UNMASK:  # whoever gives shares, the total is of those who came
            wanted = threshold
        if count < wanted:
            reasons = [
                f"{x['site']}: {x['reason']}"
                for x in self.roster.left_out
                if x["round"] == self.round and x["kind"] in (self.kind, wire.SHARES, wire.MASKED, wire.UNMASK)
            ]
            raise NotEnoughSites(
                f"round {self.round}: {count} good answers to '{kind}' of a secure sum, wanted {wanted} (3 at least, min_sites, the "
                "threshold, and of shared noise privacy.sharing_sites less silent_sites); nothing is known of any. "
                + "; ".join(reasons)
            )

    def _leave_out(self, site: str, kind: str, reason: object) -> None:
        self.roster.leave_out(site, kind, self.round, str(reason))
