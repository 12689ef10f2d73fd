"""Who is in the federation: sites that have said hello, by node, and the question to all of them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from oncofed.common import wire
from oncofed.common.blocks import Sum
from oncofed.common.errors import Refusal, one_line
from oncofed.server.journal import Journal
from oncofed.server.membership import Membership

log = logging.getLogger("oncofed.server")

POLL_S = 0.2
RETRY_S = 600.0
"""A node that was refused is asked again after this long."""
MOST_WIDE = 100_000
"""Numbers of an embedding, far beyond any model's: one of that width would be built for it."""
LONGEST_NAME, LONGEST_REASON = 80, 3000
MOST_GENES, MOST_CANCERS = 500_000, 500
"""Names in a greeting; what a site refuses as too many to be asked about, one that says so many must not bring upon all."""
LONGEST_WORD = 200
"""Characters of a gene or a cancer type."""
SHOWN = 5
"""Refusals that a message names."""
NEWCOMER_S = 60.0
"""How long the sites at work wait for the greeting of one that comes late."""
GRACE_S = 60.0
"""How long after the deadline the SuperLink still takes an answer: only to say so in the log."""
NODE_GONE = 5
"""Flower's code for a node whose heartbeat has stopped."""
BUSY = 4.0
"""The server sleeps so many times as long as it took to ask for replies: a hundred sites must not keep the SuperLink busy."""


class NotEnoughSites(RuntimeError):
    """Fewer sites than the study's `aggregation.min_sites` are online or gave a good answer."""


@dataclass(frozen=True)
class Answer:
    """A good reply: who, what it says, what it sums, and how many bytes came."""

    site: str
    config: wire.Config
    arrays: Sum
    bytes: int


def _check_printable(config: wire.Config) -> None:
    """Refuse a greeting with text that a terminal would obey: its units are shown and compared as they are. Lists come as lines."""
    odd = [k for k, value in config.items() if isinstance(value, str) and not value.replace("\n", "").isprintable()]
    if odd:
        raise Refusal(f"the greeting's {odd[0]} = {config[odd[0]]!r} has characters that cannot be shown; remove them")


def check_study_greeting(config: wire.Config) -> None:
    """Refuse a greeting that a study cannot use."""
    for key in ("genes", "cancers"):
        value = config.get(key)
        empty = key == "cancers" and not value
        if not isinstance(value, list) or empty or not all(isinstance(v, str) for v in value):
            raise Refusal(f"the greeting's {key} must be a list of names")
        most = MOST_GENES if key == "genes" else MOST_CANCERS
        if len(value) > most or any(len(v) > LONGEST_WORD or not v.isprintable() for v in map(str, value)):
            raise Refusal(
                f"the greeting's {key} must be at most {most} names of printable characters, {LONGEST_WORD} at most each"
            )
    if not isinstance(config.get("unit_family"), str):
        raise Refusal("the greeting lacks its unit family")
    for name in ("images", "alterations", "embedding"):
        if not isinstance(config.get(name, ""), str):
            raise Refusal(f"the greeting's {name} must be text")
    if not isinstance(config.get("identity", ""), str):
        raise Refusal("the greeting's identity must be text")
    width = config.get("embedding_width", 0)
    if not isinstance(width, int) or not 0 <= width <= MOST_WIDE:
        raise Refusal(f"the greeting's embedding_width is {width!r}, wanted a whole number up to {MOST_WIDE}")


@dataclass
class Roster:
    """Sites by node id. `left_out` keeps every site that was left out of a round, with the reason.

    `greeting` is the kind of message that asks who is there, `check` refuses an answer to it that cannot be used.
    """

    grid: Grid
    wait_s: float
    timeout_s: float
    greeting: str = wire.HELLO
    check: Callable[[wire.Config], None] = check_study_greeting
    membership: Membership | None = None
    """The consortium's, where greetings are held against it."""
    hellos: dict[int, wire.Config] = field(default_factory=dict)
    refused: dict[int, tuple[str, float]] = field(default_factory=dict)
    left_out: list[dict[str, object]] = field(default_factory=list)
    silent: set[int] = field(default_factory=set)
    """Nodes without an answer to the last question: a restarted site may take its name back from such a one."""
    twins: dict[int, int] = field(default_factory=dict)
    """Refused nodes, and the nodes whose names they bear."""
    late: dict[str, tuple[str, str, int, float]] = field(default_factory=dict)
    """Messages that were not answered in time: site, kind, round, and until when an answer may come."""
    sent: int = 0
    received: int = 0
    plain: int = 0
    """What `sent` would be with every question in full, as it is, once to each site."""
    holds: dict[str, str] = field(default_factory=dict)
    """The hash of the weights that each site holds, as far as its answers tell (server/broadcast.py)."""
    journal: Journal = field(default_factory=Journal)
    met: set[str] = field(default_factory=set)
    """Sites that have greeted, whether or not they are still there."""

    def name(self, node: int) -> str:
        return str(self.hellos[node]["site"]) if node in self.hellos else f"node {node}"

    @property
    def sites(self) -> list[str]:
        return sorted(str(h["site"]) for h in self.hellos.values())

    def gather(self, min_sites: int, request: wire.Config, quiet_s: float = 2.0) -> None:
        """Greet nodes until `min_sites` have answered and no new node came for `quiet_s`; raise after `wait_s`, and at once
        where all nodes are there from the start and too few of them take part."""
        begin = last_new = time.monotonic()
        while True:
            fresh = [n for n in self.grid.get_node_ids() if n not in self.hellos and n not in self.refused]
            if fresh:
                last_new = time.monotonic()
                self._greet(fresh, request)
            known = set(self.grid.get_node_ids())
            settled = known <= self.hellos.keys() | self.refused.keys()
            # A simulator registers all its nodes at once; real sites trickle in, so wait a little for late ones.
            if (
                len(self.hellos) >= min_sites
                and settled
                and (time.monotonic() - last_new >= quiet_s or self._is_local())
            ):
                return
            waited = time.monotonic() - begin
            if waited > self.wait_s or (settled and self._is_local()):
                if len(self.hellos) >= min_sites:
                    return
                raise NotEnoughSites(
                    f"{len(self.hellos)} sites take part after {waited:.0f} s, wanted {min_sites} (min_sites)"
                    + "".join(f"; {reason}" for reason, _ in list(self.refused.values())[:SHOWN])
                    + (f"; and {len(self.refused) - SHOWN} more" if len(self.refused) > SHOWN else "")
                )
            time.sleep(POLL_S)

    def greet_newcomers(self, request: wire.Config) -> None:
        """Learn the names of nodes that came since; a restarted site has a new node id."""
        online = set(self.grid.get_node_ids())
        for node in [n for n in self.hellos if n not in online]:
            del self.hellos[node]
        gone = {n for n, twin in self.twins.items() if twin not in self.hellos or twin in self.silent}
        for node in [
            n
            for n, (_, since) in self.refused.items()
            if time.monotonic() - since > RETRY_S or n not in online or n in gone
        ]:
            del self.refused[node]
            self.twins.pop(node, None)
        fresh = [n for n in online if n not in self.hellos and n not in self.refused]
        if fresh:
            self._greet(fresh, request, patience_s=NEWCOMER_S)

    def ask(
        self,
        kind: str,
        config: wire.Config,
        arrays: Sum | None,
        *,
        round_: int,
        concerns: Callable[[str], bool] = lambda site: True,
        each: Mapping[str, wire.Config] | None = None,
        written: Mapping[str, RecordDict] | None = None,
        again: bool = False,
    ) -> Iterator[Answer]:
        """Send one question to the sites that it concerns and yield good answers as they arrive; others are logged with their reason.

        `each` adds to the question what is for one site alone; `written` is the question as it is written for each site, in place of
        `config` and `arrays`. One that is asked `again` counts no more in `plain`.
        """
        self._ignore_late()
        nodes = sorted((n for n in self.hellos if concerns(self.name(n))), key=self.name)
        if written is not None:
            contents = [written[self.name(n)] for n in nodes]
        else:
            content = wire.request(config, arrays)
            contents = [content if not each else wire.request(config | each[self.name(n)], arrays) for n in nodes]
            del content
        messages = [
            Message(c, n, kind, ttl=self.timeout_s + GRACE_S, group_id=str(round_))
            for c, n in zip(contents, nodes, strict=True)
        ]
        size = sum(wire.sizes(c)[0] for c in contents)
        self.sent += size
        self.plain += 0 if again else len(messages) * sum(value.nbytes for value in (arrays or {}).values())
        by_id = dict(zip(self.grid.push_messages(messages), nodes, strict=True))
        asked, about = time.monotonic(), {"kind": kind, "round": round_}
        about |= {"fold": config.get("fold"), "phase": config.get("phase", "")}
        self.journal.write("question", **about, sites=len(messages), bytes=size)
        del messages, contents, written
        # Idle time only: neither the server's own work nor a site in this process counts against the others.
        waited = 0.0
        while by_id and waited < self.timeout_s:
            begin, quiet = time.monotonic(), True
            for reply in self._pull(list(by_id)):
                quiet = False
                node = by_id.pop(reply.metadata.reply_to_message_id)
                gone = reply.has_error() and reply.error.code == NODE_GONE
                (self.silent.add if gone else self.silent.discard)(node)
                answer = self._read(reply, node, kind, round_)
                del reply  # the next reply is fetched while this name still holds the last
                if answer is not None:
                    self.received += answer.bytes
                    self._heard(answer, time.monotonic() - asked, **about)
                    yield answer
                    del answer
            if by_id and quiet:
                waited += self._pause(begin)
        until = time.monotonic() + GRACE_S
        for identifier, node in by_id.items():
            self.silent.add(node)
            self.late[identifier] = (self.name(node), kind, round_, until)
            self.leave_out(
                self.name(node), kind, round_, f"no answer within {self.timeout_s:g} s (runtime.round_timeout_s)"
            )

    def _pull(self, identifiers: list[str]) -> Iterator[Message]:
        """Replies that are there. One is fetched at a time: all at once, as many models as sites would have to be held."""
        for some in [identifiers] if self._is_local() else [[i] for i in identifiers]:
            yield from self.grid.pull_messages(some)

    def _pause(self, begin: float) -> float:
        """Sleep before the next look for replies, when the last look began at `begin`; returns the seconds slept."""
        pause = POLL_S if self._is_local() else max(POLL_S, BUSY * min(time.monotonic() - begin, 1.0))
        time.sleep(pause)
        return pause

    def _ignore_late(self) -> None:
        """Take answers that came after their deadline off the SuperLink, and say once of each that it does not count."""
        for reply in self._pull(list(self.late)) if self.late else ():
            site, kind, round_, _ = self.late.pop(reply.metadata.reply_to_message_id)
            if not reply.has_error():
                log.warning("%s: answer to '%s' of round %d came after its deadline: ignored", site, kind, round_)
        self.late = {i: entry for i, entry in self.late.items() if time.monotonic() < entry[3]}

    def leave_out(self, site: str, kind: str, round_: int, reason: str) -> None:
        """Log, and keep for the report, that a site was left out and why: on one line, whatever the site worded."""
        site, reason = one_line(site, LONGEST_NAME), one_line(reason, LONGEST_REASON)
        log.warning("round %d: %s left out of '%s': %s", round_, site, kind, reason)
        self.left_out.append({"site": site, "kind": kind, "round": round_, "reason": reason})
        self.journal.write("left_out", site=site, kind=kind, round=round_, reason=reason)

    def _heard(self, answer: Answer, seconds: float, **about: object) -> None:
        self.journal.write("answer", site=answer.site, **about, seconds=round(seconds, 3), bytes=answer.bytes)

    def _greet(self, nodes: list[int], request: wire.Config, patience_s: float | None = None) -> None:
        messages = [Message(wire.request(request), n, self.greeting, ttl=self.timeout_s) for n in nodes]
        by_id = dict(zip(self.grid.push_messages(messages), nodes, strict=True))
        asked, waited = time.monotonic(), 0.0
        patience_s = min(self.wait_s, self.timeout_s, patience_s or self.wait_s)
        while by_id and waited < patience_s:
            begin, quiet = time.monotonic(), True
            for reply in self._pull(list(by_id)):
                quiet = False
                node = by_id.pop(reply.metadata.reply_to_message_id)
                answer = self._read(reply, node, self.greeting, 0, greets=True)
                if answer is None:
                    self._refuse(node, str(self.left_out[-1]["reason"]))
                    continue
                twin = next((n for n, h in self.hellos.items() if h["site"] == answer.site and n != node), None)
                if twin is not None and (twin in self.silent or twin not in set(self.grid.get_node_ids())):
                    log.info("%s is back as another node", answer.site)
                    del self.hellos[twin]
                    # listed for a while yet: nobody waits for its greeting
                    self._refuse(twin, f"{answer.site} is back as another node")
                    self.twins[twin] = node
                elif twin is not None:
                    self.twins[node] = twin
                    reason = f"a second node calls itself {answer.site}; give every site a name of its own"
                    self.leave_out(answer.site, self.greeting, 0, reason)
                    self._refuse(node, reason)
                    continue
                self.hellos[node] = answer.config
                self._heard(answer, time.monotonic() - asked, kind=self.greeting, fold=None, phase="", round=0)
                if answer.site in self.met:
                    self.journal.write("back", site=answer.site)
                self.met.add(answer.site)
            if by_id and quiet:
                waited += self._pause(begin)

        for node in by_id.values():
            self.leave_out(f"node {node}", self.greeting, 0, f"no answer to the greeting within {patience_s:g} s")
            self._refuse(node, f"node {node} does not answer")

    def _refuse(self, node: int, reason: str) -> None:
        self.refused[node] = (reason, time.monotonic())

    def _read(self, reply: Message, node: int, kind: str, round_: int, *, greets: bool = False) -> Answer | None:
        name = self.name(node)
        if reply.has_error():
            self.leave_out(name, kind, round_, f"Flower error {reply.error.code}: {reply.error.reason}")
            return None
        try:
            config = wire.read_config(reply.content, "from")
            wire.check_protocol(config, name)
            name = _checked_name(config["site"])
            if node in self.hellos and name != self.name(node):
                name, claimed = self.name(node), name
                raise Refusal(f"answers in the name of {claimed!r}")
            if "refusal" in config:
                raise Refusal(str(config["refusal"]))
            if greets:
                _check_printable(config)
                self.check(config)
                if self.membership:
                    self.membership.check(self.grid, node, config)
            return Answer(name, config, wire.read_arrays(reply.content), wire.sizes(reply.content)[0])
        except (Refusal, KeyError, TypeError, ValueError) as error:
            self.leave_out(name, kind, round_, str(error))
            return None

    def _is_local(self) -> bool:
        return bool(getattr(self.grid, "all_present", False))


def _checked_name(told: object) -> str:
    """A site's name, which goes into logs, files and reports; raises `Refusal` on what is none."""
    if (
        not isinstance(told, str)
        or not 0 < len(told) <= LONGEST_NAME
        or not told.isprintable()
        or {"/", "\\"} & set(told)
    ):
        raise Refusal(
            f"calls itself {told!r:.100}, wanted a name of up to {LONGEST_NAME} printable characters, no / or \\"
        )
    return told
