"""Who may read the web page of a run: one token, sessions of those who gave it, and a limit on wrong ones."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import time
from collections.abc import Callable
from pathlib import Path

from oncofed.common.files import write_secret

TOKEN = "web.token"
"""The token's file in a run's folder."""
SESSION_S = 12 * 3600.0
SESSIONS = 100
"""Sessions that are open at once; one more closes the oldest."""
TRIES, PAUSE_S = 5, 300.0
"""So many wrong tokens from one address, and none is looked at for so long after the last."""
ADDRESSES = 10_000
"""Addresses whose wrong tokens are remembered."""


def token_of(out: Path) -> str:
    """The token of a run's folder, made at the first call; raises where others may read the file, or where it is too short to be one."""
    file = out / TOKEN
    if not file.exists():
        write_secret(file, f"{secrets.token_urlsafe(32)}\n".encode(), lasting=True)
    told = file.stat()
    if told.st_mode & 0o077:
        raise ValueError(
            f"{file}: mode {told.st_mode & 0o777:o}, others may read it; remove it and start again: a new token is made"
        )
    if told.st_uid != os.geteuid():
        raise ValueError(f"{file}: belongs to another user; remove it and start again: a new token is made")
    token = file.read_text(errors="replace").strip()
    if not re.fullmatch(r"[\w-]{32,200}", token, re.ASCII):
        raise ValueError(f"{file}: is no token; remove it and start again: a new one is made")
    return token


class Access:
    """Decides who reads. Sessions live in memory, as digests: they end with the process, on logout, or after twelve hours."""

    def __init__(self, token: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._token, self._clock = _digest(token), clock
        self._sessions: dict[bytes, float] = {}
        self._wrong: dict[str, tuple[int, float]] = {}

    def right(self, token: str) -> bool:
        """Whether it is the token, in a time that does not depend on how much of it is right."""
        return hmac.compare_digest(_digest(token), self._token)

    def try_token(self, address: str, token: str) -> bool:
        """Whether it is the token; a wrong one counts against the address. Ask `pause` first."""
        if self.right(token):
            self._wrong.pop(address, None)
            return True
        count, _ = self._wrong.pop(address, (0, 0.0))
        self._wrong[address] = count + 1, self._clock()
        if len(self._wrong) > ADDRESSES:
            del self._wrong[next(iter(self._wrong))]
        return False

    def pause(self, address: str) -> float:
        """Seconds until a token from this address is looked at again; 0: now."""
        count, last = self._wrong.get(address, (0, 0.0))
        left = last + PAUSE_S - self._clock()
        if count and left <= 0:
            del self._wrong[address]
        return max(left, 0.0) if count >= TRIES else 0.0

    def open(self) -> str:
        """Begin a session; returns what its cookie holds."""
        now = self._clock()
        self._sessions = {s: end for s, end in self._sessions.items() if end > now}
        if len(self._sessions) >= SESSIONS:
            del self._sessions[next(iter(self._sessions))]
        session = secrets.token_urlsafe(32)
        self._sessions[_digest(session)] = now + SESSION_S
        return session

    def close(self, session: str) -> None:
        """End a session."""
        self._sessions.pop(_digest(session), None)

    def session(self, session: str) -> bool:
        """Whether a cookie belongs to an open session. Looked up by digest: how long that takes says nothing of any session."""
        return self._sessions.get(_digest(session), 0.0) > self._clock()


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode(errors="surrogatepass")).digest()
