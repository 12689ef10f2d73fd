"""The web page of a run for its coordinator: what the terminal shows, for reading only, behind a token."""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Callable, Collection, Mapping
from ipaddress import ip_address
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING
from urllib.parse import parse_qs

import uvicorn
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from oncofed.deploy.operate.access import SESSION_S, Access, token_of
from oncofed.deploy.operate.guard import REPORT_POLICY, Guard, from_here
from oncofed.deploy.operate.metrics import exposed
from oncofed.deploy.operate.shown import shown
from oncofed.deploy.operate.state import RunState
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

if TYPE_CHECKING:
    from oncofed.deploy.operate.control import Watch

log = logging.getLogger("oncofed.deploy")

PAGES = Path(__file__).parent / "pages"
REPORT = "report.html"
LONGEST = 4096
"""Bytes of a login form."""
HOME = ("127.0.0.1", "localhost", "::1")


class Page:
    """The routes of one run's page; `state` gives the run now and raises `ValueError` where there is none."""

    def __init__(self, out: Path, access: Access, state: Callable[[], RunState]) -> None:
        self.out, self.access, self._state = out, access, state
        # cookies know no ports: pages of several runs on one machine would log each other out
        self.cookie = f"oncofed_{hashlib.sha256(str(out.resolve()).encode()).hexdigest()[:8]}"
        self.env = Environment(loader=FileSystemLoader(PAGES), autoescape=True, undefined=StrictUndefined)

    def app(self) -> Starlette:
        """The application; every route but the login and the page's own look asks for the token."""
        return Starlette(
            routes=[
                Route("/", self.home),
                Route("/login", self.login, methods=["GET", "POST"]),
                Route("/logout", self.logout, methods=["POST"]),
                Route("/api/state", self.api),
                Route("/metrics", self.metrics),
                Route("/report", self.report),
                Mount("/static", StaticFiles(directory=PAGES / "static")),
            ]
        )

    async def home(self, request: Request) -> Response:
        """The page, whole: it needs no script."""
        if not self._logged_in(request):
            return RedirectResponse("/login", 303)
        try:
            state = await run_in_threadpool(self._state)
        except ValueError as error:
            return self._html("unknown.html", {"reason": str(error)}, 503)
        parts = shown(self.env, state, time.time(), report=self._has_report(state), folder=str(self.out))
        return self._html("run.html", {"study": state.study or "study", "status": state.status} | parts)

    async def api(self, request: Request) -> Response:
        """The state as JSON, and the parts of the page that show it."""
        refusal = self._refusal(request)
        if refusal is not None:
            return refusal
        try:
            state = await run_in_threadpool(self._state)
        except ValueError as error:
            return JSONResponse({"error": str(error)}, 503)
        parts = shown(self.env, state, time.time(), report=self._has_report(state), folder=str(self.out))
        return JSONResponse({"state": state.json(), "parts": parts})

    async def metrics(self, request: Request) -> Response:
        """The state for Prometheus."""
        refusal = self._refusal(request)
        if refusal is not None:
            return refusal
        try:
            state = await run_in_threadpool(self._state)
        except ValueError as error:
            return PlainTextResponse(f"{error}\n", 503)
        return Response(exposed(state), media_type=CONTENT_TYPE_LATEST)

    async def report(self, request: Request) -> Response:
        """The report of a finished run."""
        if not self._logged_in(request):
            return RedirectResponse("/login", 303)
        try:
            there = self._has_report(await run_in_threadpool(self._state))
        except ValueError:
            there = False
        if not there:
            return self._html("unknown.html", {"reason": "This run has no report yet."}, 404)
        return FileResponse(
            self.out / REPORT, media_type="text/html", headers={"content-security-policy": REPORT_POLICY}
        )

    async def login(self, request: Request) -> Response:
        """Take the token, and give a session."""
        if request.method != "POST":
            if self._logged_in(request):
                return RedirectResponse("/", 303)
            return self._html("login.html", {"error": ""})
        if not from_here(request):
            return PlainTextResponse("The form was sent by another page.\n", 403)
        address = _address(request)
        pause = self.access.pause(address)
        if pause:
            return self._paused(pause)
        token = await _token_in(request)
        if token is None:
            return self._html("login.html", {"error": "The form could not be read."}, 400)
        if not self.access.try_token(address, token):
            log.warning("web page: wrong token from %s", address)
            return self._html("login.html", {"error": "This is not the token."}, 403)
        response = RedirectResponse("/", 303)
        response.set_cookie(
            self._cookie(request),
            self.access.open(),
            max_age=int(SESSION_S),
            httponly=True,
            samesite="strict",
            secure=request.url.scheme == "https",
        )
        return response

    async def logout(self, request: Request) -> Response:
        """End the session."""
        if not from_here(request):
            return PlainTextResponse("The form was sent by another page.\n", 403)
        cookie = self._cookie(request)
        self.access.close(request.cookies.get(cookie, ""))
        response = RedirectResponse("/login", 303)
        response.delete_cookie(cookie, httponly=True, samesite="strict", secure=request.url.scheme == "https")
        return response

    def _cookie(self, request: Request) -> str:
        """Over TLS a name that no other host and no plain connection can set."""
        return f"__Host-{self.cookie}" if request.url.scheme == "https" else self.cookie

    def _logged_in(self, request: Request) -> bool:
        return self.access.session(request.cookies.get(self._cookie(request), ""))

    def _refusal(self, request: Request) -> Response | None:
        """Why a program may not read: it needs a session, or the token in the header Authorization."""
        if self._logged_in(request):
            return None
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            address = f"bearer {_address(request)}"  # a scraper's old token must not lock the coordinator out
            pause = self.access.pause(address)
            if pause:
                return PlainTextResponse("too many wrong tokens\n", 429, headers={"retry-after": str(math.ceil(pause))})
            if self.access.try_token(address, token.strip()):
                return None
        return PlainTextResponse("a token is needed\n", 401, headers={"www-authenticate": "Bearer"})

    def _paused(self, seconds: float) -> Response:
        error = f"Too many wrong tokens: try again in {math.ceil(seconds / 60)} min."
        response = self._html("login.html", {"error": error}, 429)
        response.headers["retry-after"] = str(math.ceil(seconds))
        return response

    def _has_report(self, state: RunState) -> bool:
        """Whether the report is of this run: an earlier one's may lie there."""
        try:
            written = (self.out / REPORT).stat().st_mtime
        except OSError:
            return False
        return state.status == "finished" and written >= (state.started or 0.0)

    def _html(self, page: str, about: Mapping[str, str], code: int = 200) -> HTMLResponse:
        return HTMLResponse(self.env.get_template(page).render(about), code)


class Watched:
    """The state of a folder's run for many readers, one at a time; another run in the same folder is seen."""

    def __init__(self, out: Path) -> None:
        self.out, self._lock = out, Lock()
        self._watch: Watch | None = None
        self._submitted: tuple[int, int] | None = None

    def __call__(self) -> RunState:
        from oncofed.deploy.operate.control import FILE, Watch

        with self._lock:
            try:
                told = (self.out / FILE).stat()
                submitted = (told.st_ino, told.st_mtime_ns)
            except OSError:
                submitted = None
            if self._watch is None or submitted != self._submitted:
                self._watch, self._submitted = Watch(self.out), submitted
            return self._watch.state()


def application(out: Path, token: str, state: Callable[[], RunState], names: Collection[str] = ()) -> Guard:
    """The application for a run's folder, asked under the names of this machine's loopback or one of `names`."""
    return Guard(Page(out, Access(token), state).app(), (*HOME, *names))


def served(out: Path, host: str, port: int, names: Collection[str] = (), tls: tuple[Path, Path] | None = None) -> None:
    """Serve the page until a signal ends it; `tls` is certificate and key.

    Raises where the folder holds no run, and where the token would cross a network in the clear.
    """
    checked(out, host, names, tls)
    state = Watched(out)
    certificate, key = tls or (None, None)
    uvicorn.run(
        application(out, token_of(out), state, (host, *names)),
        host=host,
        port=port,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=bool(names),  # without a proxy anyone here could claim an address, and log in too often from many
        limit_concurrency=100,
        ssl_certfile=certificate,
        ssl_keyfile=key,
    )


def checked(out: Path, host: str, names: Collection[str], tls: tuple[Path, Path] | None) -> None:
    """Raise where `served` would."""
    try:
        address = ip_address(host)
    except ValueError:
        home, everywhere = host == "localhost", False
    else:
        home, everywhere = address.is_loopback, address.is_unspecified
    if not home and not tls:
        raise ValueError(
            f"--host {host}: without TLS the token would cross the network in the clear; give --certificate and --key, "
            "or listen on 127.0.0.1 behind an SSH tunnel or a proxy with TLS"
        )
    if everywhere and not names:
        raise ValueError(f"--host {host} listens on every address; say with --name under which names the page is asked")
    for file in tls or ():
        if not file.is_file():
            raise ValueError(f"{file}: no such file; --certificate and --key name PEM files")
    Watched(out)()


def _address(request: Request) -> str:
    return request.client.host if request.client else "unknown"


async def _token_in(request: Request) -> str | None:
    """The token of a login form; None where it is no such form."""
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/x-www-form-urlencoded":
        return None
    body = b""
    async for piece in request.stream():
        body += piece
        if len(body) > LONGEST:
            return None
    try:
        return parse_qs(body.decode(), max_num_fields=5).get("token", [""])[0].strip()
    except ValueError:
        return None
