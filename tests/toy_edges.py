"""Servers on loopback that stand where a consortium's edge should be: good ones, and ones with one thing wrong."""

from __future__ import annotations

import http.server
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import NameOID
from oncofed.deploy.consortium.certificates import Pair


def certificate(authority: Pair, address: str = "127.0.0.1", begins_days: float = -1, ends_days: float = 30) -> Pair:
    """A server's key and certificate that may be of another time or name."""
    ca, ca_key = x509.load_pem_x509_certificate(authority[1]), load_pem_private_key(authority[0], None)
    key, now = generate_private_key(SECP256R1()), datetime.now(UTC)
    try:
        name: x509.GeneralName = x509.IPAddress(ip_address(address))
    except ValueError:
        name = x509.DNSName(address)
    made = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, address)]))
        .issuer_name(ca.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + timedelta(days=begins_days))
        .not_valid_after(now + timedelta(days=ends_days))
        .add_extension(x509.SubjectAlternativeName([name]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca.public_key()), critical=False)
        .sign(ca_key, SHA256())  # type: ignore[arg-type]
    )
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return pem, made.public_bytes(Encoding.PEM)


@contextmanager
def standing_in(
    port: int, folder: Path, shown: Pair | None, *, clock_s: float = 0.0, status: int = 200, date: bool = True
) -> Iterator[None]:
    """A server on loopback that shows this certificate (none: speaks no TLS) and whose clock is that many seconds ahead of ours."""

    class Answering(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response_only(status)
            if date:
                self.send_header("Date", format_datetime(datetime.now(UTC) + timedelta(seconds=clock_s), usegmt=True))
            self.send_header("Content-Length", "0")
            self.end_headers()

    server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Answering)
    if shown:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "shown.pem").write_bytes(shown[0] + shown[1])
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(folder / "shown.pem")
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
