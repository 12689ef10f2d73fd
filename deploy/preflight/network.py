"""The way to the coordinator, step by step: name, port, TLS, clock, answer. The first step that fails ends it."""

from __future__ import annotations

import http.client
import socket
import ssl
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

from cryptography import x509
from cryptography.x509.oid import NameOID
from oncofed.deploy.preflight.findings import Check, fail, ok, warn

PATIENCE_S = 5.0
AHEAD_S, BEHIND_S = 4.0, 240.0
"""Flower refuses a signature from more than 5 s in the future or 305 s in the past; the answer's date is whole seconds."""
SOON_DAYS = 30

_EXPIRED, _NOT_YET, _OTHER_NAME, _OTHER_IP = 10, 9, 62, 64
"""OpenSSL's verification results (x509_vfy.h)."""


@dataclass(frozen=True)
class Target:
    """Whom the node dials, and the authority (PEM) that it trusts."""

    host: str
    port: int
    authority: str

    @property
    def proxy(self) -> str:
        """The proxy of the environment that Flower would go through, empty without one."""
        found = urllib.request.getproxies().get("https", "")
        return "" if urllib.request.proxy_bypass(self.host) else found


def network_checks(target: Target) -> Iterator[Check]:
    """The steps, until one fails."""
    if target.proxy:
        where = target.proxy.rpartition("@")[2]  # without its password
        yield warn(
            "proxy",
            f"HTTPS_PROXY names {where}",
            f"the node goes through it, and it must not open TLS; to go past it: export NO_PROXY={target.host}",
        )
    for step in (_name, _port, _tls, _answer):
        found = list(step(target))
        yield from found
        if any(c.level == "fail" for c in found):
            return


def _name(target: Target) -> Iterator[Check]:
    if target.proxy:
        return  # the proxy looks it up
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(socket.getaddrinfo, target.host, target.port, type=socket.SOCK_STREAM)
        try:
            found = sorted({str(a[4][0]) for a in waiting.result(2 * PATIENCE_S)})
            yield ok("name", f"{target.host} is {', '.join(found)}")
        except (OSError, TimeoutError) as error:
            yield fail(
                "name",
                f"{target.host} is not found ({error or 'no answer'})",
                "ask who runs your DNS to resolve this name, or the coordinator whether it is right",
            )


def _port(target: Target) -> Iterator[Check]:
    where = f"TCP {target.host}:{target.port}"
    try:
        _connect(target).close()
        yield ok("port", f"{where} is open")
    except ConnectionRefusedError:
        yield fail(
            "port",
            f"{where}: refused",
            "the coordinator's server is not running, or a firewall rejects: show the text below to its team",
        )
    except TimeoutError:
        yield fail(
            "port", f"{where}: no answer in {PATIENCE_S:g} s", "a firewall drops it: show the text below to its team"
        )
    except (OSError, http.client.HTTPException) as error:
        yield fail("port", f"{where}: {error}", "show the text below to the firewall team")


def _tls(target: Target) -> Iterator[Check]:
    try:
        with _wrapped(target, _context(target)) as tls:
            presented = x509.load_der_x509_certificate(tls.getpeercert(binary_form=True) or b"")
            version = tls.version()
    except ssl.SSLCertVerificationError as error:
        yield _distrusted(target, error)
        return
    except (ssl.SSLError, OSError) as error:
        yield fail(
            "TLS",
            f"no TLS on port {target.port}: {_short(error)}",
            "a proxy or a firewall is in between, or the port is another service's; it must pass TLS through as it is",
        )
        return
    days = presented.not_valid_after_utc.timestamp() / 86400 - time.time() / 86400
    yield ok("TLS", f"{version}, under the consortium's authority")
    told = f"the server's certificate lasts {days:.0f} days"
    yield (
        ok("certificate", told)
        if days >= SOON_DAYS
        else warn("certificate", told, "the coordinator renews it: oncofed consortium rotate server")
    )


def _distrusted(target: Target, error: ssl.SSLCertVerificationError) -> Check:
    """Why the certificate that came is not the consortium's, from what it says of itself."""
    try:
        with _wrapped(target, _anything()) as tls:
            presented = x509.load_der_x509_certificate(tls.getpeercert(binary_form=True) or b"")
    except (OSError, ValueError):
        return fail("TLS", error.verify_message, "ask the coordinator")
    if error.verify_code in (_EXPIRED, _NOT_YET):
        word = "ended" if error.verify_code == _EXPIRED else "begins"
        when = presented.not_valid_after_utc if error.verify_code == _EXPIRED else presented.not_valid_before_utc
        seen = f"the server's certificate {word} on {when:%Y-%m-%d %H:%M} UTC"
        offset = _offset(target, _anything())
        if offset is not None and not -BEHIND_S < offset < AHEAD_S:
            return fail(
                "TLS",
                f"{seen}, but this machine's clock is {_clock(offset)}",
                "set the clock (chrony or ntpd), then try again",
            )
        return fail("TLS", seen, "the coordinator renews it: oncofed consortium rotate server")
    if error.verify_code in (_OTHER_NAME, _OTHER_IP):
        return fail(
            "TLS",
            f"the server's certificate is for {_names(presented)}, not for {target.host}",
            "the name leads to another server, or the coordinator's address has changed: ask the coordinator",
        )
    if _signed_by(presented, target.authority):
        return fail("TLS", error.verify_message, "ask the coordinator")
    return fail(
        "TLS",
        f"the certificate comes from '{_common(presented.issuer)}', not from the consortium's authority '{_common(_authority(target).subject)}'",
        "a proxy or a firewall opens TLS on the way (show the text below to its team), or the coordinator has made a new consortium (ask for a new kit)",
    )


def _answer(target: Target) -> Iterator[Check]:
    try:
        status, offset = _ask(target, _context(target))
    except (OSError, http.client.HTTPException) as error:
        yield fail(
            "answer",
            f"none from {target.host}:{target.port} ({_short(error)})",
            "ask the coordinator whether the server runs",
        )
        return
    if offset is None:
        yield warn(
            "clock",
            "the answer has no date",
            "see that the clock is set by NTP: the server refuses one that is 5 s ahead",
        )
    elif -BEHIND_S < offset < AHEAD_S:
        yield ok("clock", f"{_clock(offset)}")
    else:
        yield fail(
            "clock",
            f"this machine's clock is {_clock(offset)}",
            "set the clock (chrony or ntpd): the server refuses a node that is 5 s ahead or 5 min behind",
        )
    if status == 200:
        yield ok("server", "it answers")
    else:
        yield warn(
            "server",
            f"the edge answers with {status} for the SuperLink behind it",
            "the coordinator's server is being started or is down; the node waits for it",
        )


def _connect(target: Target) -> socket.socket:
    """A connection to the server, through the proxy where there is one."""
    if not target.proxy:
        return socket.create_connection((target.host, target.port), PATIENCE_S)
    proxy = urllib.parse.urlsplit(target.proxy if "://" in target.proxy else f"http://{target.proxy}")
    tunnel = http.client.HTTPConnection(str(proxy.hostname), proxy.port or 8080, timeout=PATIENCE_S)
    tunnel.set_tunnel(target.host, target.port)
    tunnel.connect()
    return tunnel.sock


def _wrapped(target: Target, context: ssl.SSLContext) -> ssl.SSLSocket:
    plain = _connect(target)
    try:
        return context.wrap_socket(plain, server_hostname=target.host)
    except BaseException:
        plain.close()
        raise


def _context(target: Target) -> ssl.SSLContext:
    """As Flower's node has it: the consortium's authority and no other."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=target.authority)
    return context


def _anything() -> ssl.SSLContext:
    """To look at a certificate that is not trusted; nothing is sent to it but a request for its date."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def _ask(target: Target, context: ssl.SSLContext) -> tuple[int, float | None]:
    """Status of /health, and seconds that this clock is ahead of the answer's date."""
    with _wrapped(target, context) as tls:
        link = http.client.HTTPConnection(target.host, target.port, timeout=2 * PATIENCE_S)
        link.sock = tls
        begin = time.time()
        link.request("GET", "/health")
        answer = link.getresponse()
        middle = (begin + time.time()) / 2
        date = answer.headers.get("Date")
    try:
        # a date of whole seconds is half a second behind on average
        return answer.status, middle - (parsedate_to_datetime(date).timestamp() + 0.5) if date else None
    except ValueError:
        return answer.status, None


def _offset(target: Target, context: ssl.SSLContext) -> float | None:
    try:
        return _ask(target, context)[1]
    except (OSError, http.client.HTTPException):
        return None


def _clock(offset: float) -> str:
    if abs(offset) < 1.5:
        return "as the server's"
    size = abs(offset)
    told = f"{size:.0f} s" if size < 120 else f"{size / 60:.0f} min" if size < 7200 else f"{size / 3600:.0f} h"
    return f"{told} {'ahead of' if offset > 0 else 'behind'} the server's"


def _authority(target: Target) -> x509.Certificate:
    return x509.load_pem_x509_certificate(target.authority.encode())


def _signed_by(presented: x509.Certificate, authority: str) -> bool:
    issuer = x509.load_pem_x509_certificate(authority.encode())
    try:
        presented.verify_directly_issued_by(issuer)
    except Exception:  # a bad signature, another algorithm or another name: all say no
        return False
    return True


def _names(certificate: x509.Certificate) -> str:
    try:
        held = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return _common(certificate.subject)
    return ", ".join(str(n.value) for n in held)


def _common(name: x509.Name) -> str:
    found = name.get_attributes_for_oid(NameOID.COMMON_NAME) or list(name)
    return str(found[0].value) if found else "nobody"


def _short(error: Exception) -> str:
    return str(getattr(error, "reason", "") or error or type(error).__name__)
