"""The folder of a run: one server at a time, the study that it belongs to, and whether it is finished."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import tomli_w
from oncofed.common.files import write_text
from oncofed.common.study import Study
from oncofed.server.checkpoint import CHECKPOINTS
from oncofed.server.journal import JOURNAL, STUDY

log = logging.getLogger("oncofed.server")

RESULTS, EARLIER = "results.json", "earlier"
LOCK = ".lock"
"""Held by the server's process, whose id it has."""


@contextmanager
def opened(study: Study) -> Iterator[Path]:
    """The run's folder, locked and with the study in it; what another run left there is set aside unless the study resumes."""
    out = Path(study.runtime.out)
    out.mkdir(parents=True, exist_ok=True)
    with (out / LOCK).open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # falls with the process, however it ends
        except BlockingIOError:
            lock.seek(0)
            raise RuntimeError(
                f"{out.resolve()}: another run is at work in this folder (process {lock.read().strip() or 'unknown'}); wait for it, end it, "
                "or choose another runtime.out"
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        if not study.runtime.resume:
            _set_aside(out)
        file = out / STUDY
        before = file.read_text() if study.runtime.resume and file.exists() else None
        told = study.model_dump(mode="json", exclude={"runtime": {"resume"}})
        write_text(file, tomli_w.dumps(told), durable=True)
        try:
            yield out
        except ValueError:
            if before is not None:  # another study, which was refused
                write_text(file, before, durable=True)
            raise


def finished(out: Path) -> bool:
    """Whether the study in the folder has run to its end; settings of the run itself do not count."""
    try:
        results = json.loads((out / RESULTS).read_text())
        asked, ran = Study.from_toml(out / STUDY), Study.parse(results["study"], RESULTS)
    except (OSError, KeyError, TypeError, ValueError):
        return False
    if asked.splits.every_site:  # the server has put the sites' names there
        asked = asked.changed(splits__held_out_sites=ran.splits.held_out_sites)
    return "finished" in results and asked.model_dump(exclude={"runtime"}) == ran.model_dump(exclude={"runtime"})


def _set_aside(out: Path) -> None:
    """Move an earlier run's checkpoints and results out of the way: a later resume must not take them for this run's."""
    found = [out / name for name in (CHECKPOINTS, RESULTS) if (out / name).exists()]
    journal = out / JOURNAL
    if not found:
        if journal.exists():  # of a run that got nowhere: it joins the one before it, whose files stay
            (out / EARLIER).mkdir(exist_ok=True)
            with (out / EARLIER / JOURNAL).open("ab") as earlier:
                earlier.write(journal.read_bytes())
            journal.unlink()
        return
    found += [journal] if journal.exists() else []
    shutil.rmtree(out / EARLIER, ignore_errors=True)
    (out / EARLIER).mkdir()
    for path in found:
        path.rename(out / EARLIER / path.name)
    log.warning(
        "%s: an earlier run's checkpoints and results are now in its folder '%s'; to go on with them, resume",
        out,
        EARLIER,
    )
