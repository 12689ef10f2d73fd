"""A site's half of a secure sum: what it keeps between the four exchanges of a question, and what it says in each.

The answer is kept as integers; what leaves is public keys, sealed shares of two secrets, the integers under masks, and shares of
others' secrets. Every message may be handled by a new process, so all of it lies in files below the work folder, which the sum's
end removes. docs/secure_sum.md has the exchanges.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from oncofed.client.members import Identity, Pins
from oncofed.common import masks, shamir, wire
from oncofed.common.blocks import Sum
from oncofed.common.errors import Refusal
from oncofed.common.files import secret_file, write_secret
from oncofed.common.sum_coding import Form, SumCoding

FOLDER = "secure-sums"


@dataclass(frozen=True)
class State:
    """What a site knows of an open sum. Secrets are in hex; `members` has identity, channel, mask and signature by name.

    `series` names sums that are all of the same members, `least` is how many members this one wants, `colluding` how many of them may
    tell each other and the server what they know.
    """

    question: str
    slot: str
    study: str
    bits: int
    asked_threshold: int
    shapes: dict[str, list[int]]
    peaks: dict[str, float]
    channel: str
    mask: str
    form: Form = "plain"
    series: str = ""
    least: int = 0
    colluding: int = 0
    members: dict[str, list[str]] = field(default_factory=dict)
    seed: str = ""
    sealed: dict[str, str] = field(default_factory=dict)
    own_shares: list[str] = field(default_factory=list)
    sharers: list[str] = field(default_factory=list)
    shares: dict[str, list[str]] = field(default_factory=dict)

    @property
    def roster(self) -> dict[str, masks.Member]:
        return {name: masks.Member(*map(bytes.fromhex, parts)) for name, parts in self.members.items()}

    @property
    def threshold(self) -> int:
        return masks.threshold_of(len(self.members), self.asked_threshold)


@dataclass(frozen=True)
class SecureSums:
    """The open sums of one site, a folder each, and what it has said at their ends."""

    work: Path
    folder: Path
    site: str
    least: int = masks.LEAST_MEMBERS
    """Members that the hospital's policy wants in a total."""

    # -- the question itself -------------------------------------------------------------------------------------------

    def begin(
        self,
        question: str,
        slot: str,
        study: str,
        total: Sum,
        bits: int,
        threshold: int,
        *,
        form: Form = "plain",
        series: str = "",
        least: int = 0,
        colluding: int = 0,
        forget: bool = False,
    ) -> wire.Config:
        """Keep an answer that may leave, as integers, and give two fresh public keys, signed, in its stead.

        `slot` names the question's place in the study, which has one question, ever: a round asked again with other numbers would give
        the server a second total. All totals of a `series` are of the same members. `least` members must be in this one, of whom
        `colluding` may tell each other and the server all they know. Other open sums of the study are at an end. `forget` forgets what
        was before: of simulated sites.
        """
        try:
            whole, peaks = SumCoding(bits, form).integers(total, f"site {self.site}")
        except ValueError as error:
            raise Refusal(str(error)) from None
        self._clear(study)
        if forget:
            self._ended(question).unlink(missing_ok=True)
            self._slot(slot).unlink(missing_ok=True)
            self._series(series).unlink(missing_ok=True)
        elif self._slot(slot).exists() and self._slot(slot).read_text() != question:
            raise Refusal(
                f"site {self.site}: this place in the study had another question, and its total is known; go on where the study stands, or "
                "begin one of another name"
            )
        channel, mask = masks.new_private_key(), masks.new_private_key()
        shapes = {name: list(value.shape) for name, value in whole.items()}
        secrets = channel.hex(), mask.hex()
        state = State(question, slot, study, bits, threshold, shapes, peaks, *secrets, form, series, least, colluding)
        self._write(state)
        with secret_file(self._place(question) / "words.npy") as file:
            np.save(file, masks.flatten(whole))
        me = Identity.of(self.work, self.site).signed(
            question, self.site, masks.public_key(channel), masks.public_key(mask)
        )
        return {
            "sum": question,
            "identity": me.identity.hex(),
            "channel_key": me.channel.hex(),
            "mask_key": me.mask.hex(),
            "signature": me.signature.hex(),
        }

    # -- the second exchange -------------------------------------------------------------------------------------------

    def share(self, question: str, ask: wire.Config) -> wire.Config:
        """Hold every member's keys against signature and pin; share the site's two secrets among all, sealed for each."""
        state = self._read(question)
        names, parts = (
            texts(ask, "members"),
            [texts(ask, k) for k in ("identities", "channel_keys", "mask_keys", "signatures")],
        )
        if names != sorted(set(names)) or any(len(p) != len(names) for p in parts):
            raise Refusal(
                f"site {self.site}: the members of the sum are {names[:5]}, wanted sorted names with one key of each kind"
            )
        members = {name: list(keys) for name, keys in zip(names, zip(*parts, strict=True), strict=True)}
        if state.members:
            if state.members != members:
                raise Refusal(
                    f"site {self.site}: its secrets of this sum are shared already, among other members or keys"
                )
        else:
            state = self._shared(dataclasses.replace(state, members=members))
        others = [name for name in names if name != self.site]
        seed_commitment = masks.commitment(
            bytes.fromhex(state.seed), masks.context_of(question, state.roster), self.site
        )
        return {"sealed": [state.sealed[name] for name in others], "commitment": seed_commitment.hex()}

    def _shared(self, state: State) -> State:
        self._enough(len(state.members), "members", state.least)
        try:
            members, threshold = state.roster, state.threshold
        except ValueError as error:
            raise Refusal(f"site {self.site}: {error}") from None
        if state.colluding >= (both := 2 * threshold - len(members)):
            raise Refusal(
                f"site {self.site}: {both} of {len(members)} members could, with the server, read one hospital's own sum where {threshold} must be "
                f"there, and the study reckons with {state.colluding} who collude (privacy.colluding_sites); raise privacy.secure_threshold"
            )
        own = members.get(self.site)
        identity = Identity.of(self.work, self.site)
        private_channel, private_mask = bytes.fromhex(state.channel), bytes.fromhex(state.mask)
        mine = identity.public, masks.public_key(private_channel), masks.public_key(private_mask)
        if own is None or (own.identity, own.channel, own.mask) != mine:
            raise Refusal(
                f"site {self.site}: the members of the sum do not hold the keys that it gave for this question"
            )
        for name, member in members.items():
            if not masks.is_signed(member, state.question, name):
                raise Refusal(
                    f"site {self.site}: the keys of '{name}' are not signed by its identity for this question"
                )
        if len({m.mask for m in members.values()} | {m.channel for m in members.values()}) != 2 * len(members):
            raise Refusal(f"site {self.site}: two members of the sum have one key")
        Pins(self.folder, self.work, self.site, own=state.colluding > 0).check(
            {name: m.identity for name, m in members.items()}
        )
        try:
            SumCoding(state.bits, state.form).check_reach(state.peaks, len(members), f"site {self.site}")
        except ValueError as error:
            raise Refusal(str(error)) from None
        seed, context = os.urandom(masks.KEY_BYTES), masks.context_of(state.question, members)
        of_seed = shamir.split(seed, len(members), threshold)
        of_mask = shamir.split(private_mask, len(members), threshold)
        sealed, own_shares = {}, []
        for i, name in enumerate(sorted(members)):
            if name == self.site:
                own_shares = [of_seed[i].hex(), of_mask[i].hex()]
                continue
            try:
                text = masks.seal(
                    of_seed[i] + of_mask[i], private_channel, members[name].channel, context, self.site, name
                )
            except ValueError:
                raise Refusal(f"site {self.site}: the channel key of '{name}' is none") from None
            sealed[name] = text.hex()
        state = dataclasses.replace(state, seed=seed.hex(), sealed=sealed, own_shares=own_shares)
        self._write(state)
        return state

    # -- the third exchange --------------------------------------------------------------------------------------------

    def masked(self, question: str, ask: wire.Config) -> dict[str, np.ndarray]:
        """The integers under the site's own mask and one with each member that has shared, uint64 by name."""
        state = self._read(question)
        sharers, sealed = texts(ask, "sharers"), texts(ask, "sealed")
        others = [name for name in sharers if name != self.site]
        if not state.seed:
            raise Refusal(f"site {self.site}: its secrets of this sum are not shared yet")
        if (
            sharers != sorted(set(sharers))
            or self.site not in sharers
            or not set(sharers) <= state.members.keys()
            or len(sealed) != len(others)
        ):
            raise Refusal(
                f"site {self.site}: those who shared are {sharers[:5]}, wanted sorted members of the sum, itself among them"
            )
        self._enough(len(sharers), "members who shared", max(state.threshold, state.least))
        members, context = state.roster, masks.context_of(question, state.roster)
        if state.sharers and state.sharers != sharers:
            raise Refusal(f"site {self.site}: it has sent this sum already, masked for other members")
        if not state.sharers:
            shares = {self.site: state.own_shares}
            for name, text in zip(others, sealed, strict=True):
                channel = bytes.fromhex(state.channel)
                try:
                    both = masks.unseal(bytes.fromhex(text), channel, members[name].channel, context, name, self.site)
                    if len(both) != 2 * shamir.SHARE_BYTES:
                        raise ValueError(f"{name} has sealed {len(both)} bytes for {self.site}")
                except ValueError as error:
                    raise Refusal(f"site {self.site}: {error}") from None
                shares[name] = [both[: shamir.SHARE_BYTES].hex(), both[shamir.SHARE_BYTES :].hex()]
            state = dataclasses.replace(state, sharers=sharers, shares=shares)
            self._write(state)
        words = np.load(self._place(question) / "words.npy")
        masks.add_mask(words, bytes.fromhex(state.seed))
        for name in others:
            try:
                seed = masks.pair_seed(bytes.fromhex(state.mask), members[name].mask, context)
            except ValueError:
                raise Refusal(f"site {self.site}: the mask key of '{name}' is none") from None
            masks.add_mask(words, seed, masks.pair_sign(self.site, name))
        return masks.unflatten(words, {name: tuple(shape) for name, shape in state.shapes.items()})

    # -- the fourth exchange -------------------------------------------------------------------------------------------

    def unmask(self, question: str, ask: wire.Config) -> wire.Config:
        """Shares of the own mask of those whose sums came, and of the pair masks of those whose did not: once for a question."""
        came, lost = texts(ask, "came"), texts(ask, "lost")
        ended = self._ended(question)
        before = json.loads(ended.read_text()) if ended.exists() else None
        if before is not None and before["came"] != came:
            raise Refusal(
                f"site {self.site}: it has answered this question for the total of {', '.join(before['came'])}; another total, of "
                f"{', '.join(came)}, would tell of those who are in one alone; go on with the same hospitals, or begin a study of another name"
            )
        if before is not None and not self._place(question).exists():
            if before["lost"] != lost:
                raise Refusal(f"site {self.site}: it has answered this question, with other hospitals lost")
            return {"seed_shares": before["seed_shares"], "key_shares": before["key_shares"]}
        state = self._read(question)
        if not state.sharers:
            raise Refusal(f"site {self.site}: it has sent no sum under masks, so there is nothing to unmask")
        if came != sorted(set(came)) or lost != sorted(set(lost)) or set(came) & set(lost):
            raise Refusal(
                f"site {self.site}: a hospital is both in the total and lost, or named twice; nothing is told of either"
            )
        if set(came) | set(lost) != set(state.sharers):
            raise Refusal(
                f"site {self.site}: the total and the lost are not those who shared ({', '.join(state.sharers)})"
            )
        if self.site not in came:
            raise Refusal(f"site {self.site}: the total is said to be without it, though it has sent its sum")
        self._enough(len(came), "members in the total", max(state.threshold, state.least))
        series = self._series(state.series)
        if state.series and series.exists() and json.loads(series.read_text()) != came:
            raise Refusal(
                f"site {self.site}: the totals of this analysis are of {', '.join(json.loads(series.read_text()))}; one of {', '.join(came)} "
                "would tell of those who are in one alone; ask the same hospitals, or begin an analysis of another name"
            )
        said = {
            "came": came,
            "lost": lost,
            "seed_shares": [state.shares[name][0] for name in came],
            "key_shares": [state.shares[name][1] for name in lost],
        }
        # on the disk before it leaves: no crash makes a second answer possible
        write_secret(self._slot(state.slot), question.encode(), lasting=True)
        if state.series:
            write_secret(series, json.dumps(came).encode(), lasting=True)
        write_secret(ended, json.dumps(said).encode(), lasting=True)
        shutil.rmtree(self._place(question))
        return {"seed_shares": said["seed_shares"], "key_shares": said["key_shares"]}

    # -- files ---------------------------------------------------------------------------------------------------------

    def _place(self, question: str) -> Path:
        return self.work / FOLDER / question

    def _ended(self, question: str) -> Path:
        return self.work / FOLDER / "ended" / f"{question}.json"

    def _slot(self, slot: str) -> Path:
        return self.work / FOLDER / "ended" / f"{slot}.question"

    def _series(self, series: str) -> Path:
        return self.work / FOLDER / "ended" / f"{series}.members"

    def study_of(self, question: str) -> str:
        """The study of an open sum; empty where none is open."""
        return self._read(question).study if (self._place(question) / "state.json").exists() else ""

    def _write(self, state: State) -> None:
        self._place(state.question).mkdir(parents=True, exist_ok=True, mode=0o700)
        write_secret(self._place(state.question) / "state.json", json.dumps(dataclasses.asdict(state)).encode())

    def _read(self, question: str) -> State:
        file = self._place(question) / "state.json"
        if not file.exists():
            raise Refusal(
                f"site {self.site}: no sum of question {question[:16]} is open here; it has ended, or was never asked. Ask the question again"
            )
        return State(**json.loads(file.read_text()))

    def _clear(self, study: str) -> None:
        for file in (self.work / FOLDER).glob("*/state.json"):
            if json.loads(file.read_text())["study"] == study:
                shutil.rmtree(file.parent)

    def _enough(self, count: int, what: str, threshold: int = 0) -> None:
        least = max(masks.LEAST_MEMBERS, self.least, threshold)
        if count < least:
            raise Refusal(
                f"site {self.site}: {count} {what} of a secure sum, wanted {least} (its policy's min_members, the sum's threshold, and of shared "
                "noise privacy.sharing_sites less privacy.silent_sites)"
            )


def texts(ask: wire.Config, key: str) -> list[str]:
    """A list of text in a message; an empty one travels as any empty list."""
    value = ask.get(key)
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise Refusal(f"the message's {key} must be a list of text")
    return [str(v) for v in value]
