"""What every answer of the web page passes: names under which it may be asked, and headers that keep browsers from doing more than show it."""

from __future__ import annotations

from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'"
)
REPORT_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; form-action 'none'; base-uri 'none'; "
    "frame-ancestors 'none'; sandbox"
)
"""Of the report: it has its styles and pictures within it, and no script."""

HEADERS = {
    "cache-control": "no-store",
    "content-security-policy": PAGE_POLICY,
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "referrer-policy": "same-origin",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}


class Guard:
    """Wraps an application: a request under a foreign name is refused (DNS rebinding), every answer gets the headers that it lacks."""

    def __init__(self, app: ASGIApp, names: Collection[str]) -> None:
        self.app, self.names = app, frozenset(name.lower() for name in names)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # start and end of the server; websockets have no route
            await self.app(scope, receive, send)
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    if name == "cache-control":
                        headers[name] = value
                    else:
                        headers.setdefault(name, value)
            await send(message)

        app = self.app if host_of(Headers(scope=scope).get("host", "")) in self.names else _unknown_name
        await app(scope, receive, guarded)


def host_of(netloc: str) -> str:
    """The name in `name:port`; empty where it is none."""
    try:
        return (urlsplit(f"//{netloc}").hostname or "").lower()
    except ValueError:
        return ""


def from_here(request: Request) -> bool:
    """Whether a form was sent by this page: a browser says where it comes from, and other programs need no protection from it."""
    origin = request.headers.get("origin")
    if origin is not None and urlsplit(origin).netloc.lower() != request.headers.get("host", "").lower():
        return False
    return request.headers.get("sec-fetch-site", "same-origin") in ("same-origin", "none")


async def _unknown_name(scope: Scope, receive: Receive, send: Send) -> None:
    refusal = PlainTextResponse(
        "This page is not known under that name: start it with --name to allow one.\n", status_code=421
    )
    await refusal(scope, receive, send)
