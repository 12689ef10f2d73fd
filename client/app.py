"""The Flower ClientApp: one handler a message type, a few lines each; what they do stands in the modules they call."""

from __future__ import annotations

import functools
import logging
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from oncofed.client import answers, score
from oncofed.client.admission import Admission
from oncofed.client.analyse import analyse as answer_analysis
from oncofed.client.analysis_session import AnalysisSession
from oncofed.client.data.site import SiteFolder, list_sites
from oncofed.client.message_check import NEEDED, check_arrays, check_question, check_room, check_size
from oncofed.client.policy import Policy
from oncofed.client.privacy.ledger import ledger_of
from oncofed.client.reference import Lacking
from oncofed.client.release import Answer, Answered, Door, refusal
from oncofed.client.release_log import FILE as LOG
from oncofed.client.release_log import LONGEST, ReleaseLog
from oncofed.client.resident import Resident
from oncofed.client.session import Session
from oncofed.client.sum_session import SumSession
from oncofed.client.tabulate import tabulate
from oncofed.common import wire
from oncofed.common.errors import Refusal, one_line

log = logging.getLogger("oncofed.client")
resident = Resident()

Handler = Callable[[Any], Answer]


def site_of(context: Context) -> tuple[Path, Path]:
    """The site's folder and its working folder.

    A hospital names its own in the node config (`site-dir`, `work-dir`). Only where the node config comes from a
    simulator (`partition-id` and no `site-dir`) may the run config name a folder of sites.
    """
    node = context.node_config
    if "site-dir" in node:
        folder = Path(str(node["site-dir"]))
    elif "partition-id" in node and context.run_config.get("sites"):
        folder = list_sites(Path(str(context.run_config["sites"])))[int(node["partition-id"])]
    else:
        raise Refusal("the node has no data: start it with --node-config 'site-dir=\"/path/to/site\"'")
    return folder, Path(str(node["work-dir"])) if "work-dir" in node else folder / ".oncofed"


def handler(
    kind: str, opening: type[Session] | type[AnalysisSession] | type[SumSession] = Session
) -> Callable[[Handler], Callable[[Message, Context], Message]]:
    """Wrap a handler of sessions of the type `opening`: check versions and policy, call it, pass its answer through the door, and turn errors into refusals.

    Flower would show the text of any exception to the server; here only a `Refusal`'s text leaves, of other errors
    the type alone, and the traceback goes to the site's own log.
    """

    def wrap(function: Handler) -> Callable[[Message, Context], Message]:
        @functools.wraps(function)
        def answer(message: Message, context: Context) -> Message:
            name, door, releases, simulated = "unknown site", None, None, False
            study = ""
            try:
                folder, work = site_of(context)
                # a simulator's own processes say so; what a node config holds is the hospital's own word
                simulated = bool(context.node_config.get("simulated", "site-dir" not in context.node_config))
                name = folder.name
                releases = ReleaseLog(work / LOG, name, simulated)
                site = SiteFolder.open(folder)
                name = site.name
                releases = ReleaseLog(work / LOG, name, simulated)
                policy = Policy.read(folder, simulated=simulated)
                door = Door(name, policy, work / LOG, simulated, ledger_of(folder, work))
                Admission(name, policy, folder, simulated).message()
                if not simulated:
                    check_room(work, name, policy.min_free_mb)
                check_size(message.content, name, policy.max_incoming_mb)
                ask = wire.read_config(message.content, "ask")
                wire.check_protocol(ask, "the server")
                check_question(kind, ask, name)
                check_arrays(wire.read_arrays(message.content), name)
                own_device = str(context.node_config.get("device", ""))
                session = opening.of(message.content, site, work, resident, own_device, policy)
                study = str(session.stamp.get("study") or session.stamp.get("analysis") or "")
                session.admit(door, kind)
                return Message(door.release(kind, session.stamp, function(session)), reply_to=message)
            except Answered as known:
                return Message(known.content, reply_to=message)
            except Lacking as lack:
                assert door is not None
                return Message(door.lacks(kind, lack.wanted), reply_to=message)
            except Refusal as error:
                # of a simulated site the server's own log says it, in the same window
                log.log(
                    logging.INFO if simulated else logging.WARNING,
                    "%s: refused '%s': %s",
                    name,
                    kind,
                    one_line(str(error), LONGEST),
                )
                reason = str(error)
            except Exception as error:
                log.error("%s: '%s' failed:\n%s", name, kind, told(error))
                reason = f"{type(error).__name__} while answering '{kind}'; the site's own log has the details"
            if door is not None and door.reserved:  # what went wrong with patients' data may tell of one of them
                reason = f"site {name}: no answer to '{kind}'; its engineer finds the reason in the site's own log"
            content = refusal(releases, kind, reason, study) if releases else wire.refusal(name, reason)
            return Message(content, reply_to=message)

        return answer

    return wrap


def told(error: Exception) -> str:
    """Where an error arose; its text, in which a library may quote a cell of a table, only where ONCOFED_DEBUG is set."""
    if os.environ.get("ONCOFED_DEBUG"):
        return "".join(traceback.format_exception(error))
    where = "".join(traceback.format_tb(error.__traceback__))
    return f"{where}{type(error).__name__} (set ONCOFED_DEBUG=1 to see its text, which may quote patients' data)"


class Client(ClientApp):
    """Flower's, which refuses kinds of messages that it does not know: Flower's own error would stand in no log."""

    def __call__(self, message: Message, context: Context) -> Message:
        kind = str(message.metadata.message_type)
        if kind in NEEDED:
            return super().__call__(message, context)
        return handler(kind)(lambda _: Answer({}))(message, context)


app = Client()


@app.query("hello")
@handler(wire.HELLO)
def hello(session: Session) -> Answer:
    """Who is there: genes, cancer types and the family of units; no patient data."""
    return Answer(session.greeting())


@app.query("statistics")
@handler(wire.STATISTICS)
def statistics(session: Session) -> Answer:
    """Sums over training patients: moments of genes and covariates; per cancer type events and exposure by month."""
    return answers.statistics(session)


@app.train()
@handler(wire.TRAIN)
def train(session: Session) -> Answer:
    """A round's local steps: evidence and evidence-weighted change of each block."""
    return answers.train(session)


@app.evaluate()
@handler(wire.EVALUATE)
def evaluate(session: Session) -> Answer:
    """Sums over the held-out fold: pairs or confusion, losses and routing by cancer type; or its table of risk and time."""
    return tabulate(session) if session.ask.get("table") else score.evaluate(session)


@app.query("explain")
@handler(wire.EXPLAIN)
def explain(session: Session) -> Answer:
    """Sums over training patients: how risks lie, and which genes drive them."""
    from oncofed.client.explain import explain as attribute  # captum is slow to import, and other messages do without

    return attribute(session)


@app.query("analyse")
@handler(wire.ANALYSE, AnalysisSession)
def analyse(session: AnalysisSession) -> Answer:
    """A step of a classical analysis: sums by cell of time over the clinical table."""
    return answer_analysis(session)


@app.query("shares")
@handler(wire.SHARES, SumSession)
def shares(session: SumSession) -> Answer:
    """The second exchange of a sum under masks: the site's two secrets, shared among all members, each share sealed for one."""
    return session.share()


@app.query("masked")
@handler(wire.MASKED, SumSession)
def masked(session: SumSession) -> Answer:
    """The third: the site's sum under masks."""
    return session.masked()


@app.query("unmask")
@handler(wire.UNMASK, SumSession)
def unmask(session: SumSession) -> Answer:
    """The fourth: shares that take the masks off the total."""
    return session.unmask()
