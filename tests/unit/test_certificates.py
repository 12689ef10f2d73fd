"""The consortium's certificates: a chain that TLS takes, for the names that are dialled and for no others."""

from __future__ import annotations

import socket
import ssl
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.verification import PolicyBuilder, Store
from oncofed.common.certificates import check_valid, days_left
from oncofed.deploy.consortium.certificates import LOOPBACK, Pair, make_authority, make_server


@pytest.fixture(scope="module")
def authority() -> Pair:
    return make_authority("Sarcoma", 3650)


def handshake(server: Pair, ca: bytes, name: str, folder: Path) -> str:
    """A TLS handshake on loopback, the client calling the server by `name`; returns the protocol."""
    for file, content in zip(("s.key", "s.crt", "ca.crt"), (*server, ca), strict=True):
        (folder / file).write_bytes(content)
    at_server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    at_server.load_cert_chain(folder / "s.crt", folder / "s.key")
    at_client = ssl.create_default_context(cafile=str(folder / "ca.crt"))
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        connection, _ = listener.accept()
        try:
            with at_server.wrap_socket(connection, server_side=True) as wrapped:
                wrapped.sendall(b"x")
        except OSError:  # the client refused
            connection.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with (
            socket.create_connection(listener.getsockname(), timeout=10) as plain,
            at_client.wrap_socket(plain, server_hostname=name) as wrapped,
        ):
            assert wrapped.recv(1) == b"x"
            return str(wrapped.version())
    finally:
        thread.join(10)
        listener.close()


@pytest.mark.parametrize("address", ["fl.example.org", "192.0.2.7", "2001:db8::1"])
def test_tls_takes_the_chain_for_every_name(authority: Pair, tmp_path: Path, address: str) -> None:
    server = make_server(authority, "Sarcoma", address, 397)
    for name in (address, *LOOPBACK):
        assert handshake(server, authority[1], name, tmp_path) == "TLSv1.3"
    with pytest.raises(ssl.SSLCertVerificationError, match=r"Hostname mismatch|IP address mismatch"):
        handshake(server, authority[1], "elsewhere.example.org", tmp_path)


def test_another_authority_does_not_verify_the_server(authority: Pair, tmp_path: Path) -> None:
    """One of the same name, too: it is the key that counts."""
    server = make_server(authority, "Sarcoma", "fl.example.org", 397)
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(server, make_authority("Sarcoma", 3650)[1], "fl.example.org", tmp_path)


def test_the_chain_holds_by_the_rules_of_the_web(authority: Pair) -> None:
    ca, leaf = (x509.load_pem_x509_certificate(p) for p in (authority[1], make_server(authority, "S", "a.org", 397)[1]))
    verifier = PolicyBuilder().store(Store([ca])).build_server_verifier(x509.DNSName("a.org"))
    assert verifier.verify(leaf, []) == [leaf, ca]
    constraints = ca.extensions.get_extension_for_class(x509.BasicConstraints)
    assert (constraints.critical, constraints.value.ca, constraints.value.path_length) == (True, True, 0)
    usage = ca.extensions.get_extension_for_class(x509.KeyUsage).value
    assert (usage.key_cert_sign, usage.crl_sign, usage.digital_signature) == (True, True, False)
    assert not leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert leaf.public_key().curve.name == ca.public_key().curve.name == "secp256r1"  # type: ignore[union-attr]


def test_a_server_certificate_ends_with_its_authority() -> None:
    authority = make_authority("Sarcoma", 100)
    server = make_server(authority, "Sarcoma", "fl.example.org", 397)
    assert days_left(server[1], "server.crt") == pytest.approx(100, abs=0.01)
    assert days_left(make_server(authority, "S", "a.org", 20)[1], "server.crt") == pytest.approx(20, abs=0.01)


def test_an_authority_signs_with_its_own_key_alone(authority: Pair) -> None:
    other = make_authority("Glioma", 100)
    with pytest.raises(ValueError, match=r"ca.key is not the key of ca.crt"):
        make_server((other[0], authority[1]), "Sarcoma", "fl.example.org", 397)


def test_a_certificate_out_of_its_time_is_named(authority: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    check_valid(authority[1], "ca.crt", "ask")

    class Later(datetime):
        shift = timedelta(days=4000)

        @classmethod
        def now(cls, tz: object = None) -> datetime:  # type: ignore[override]
            return datetime.now(UTC) + cls.shift

    monkeypatch.setattr("oncofed.common.certificates.datetime", Later)
    with pytest.raises(ValueError, match=r"ca.crt ended on \d{4}-\d\d-\d\d; ask the coordinator"):
        check_valid(authority[1], "ca.crt", "ask the coordinator")
    Later.shift = -timedelta(days=1)
    with pytest.raises(ValueError, match=r"ca.crt begins on .* set its clock"):
        check_valid(authority[1], "ca.crt", "ask")
    with pytest.raises(ValueError, match=r"ca.crt is no certificate in PEM"):
        check_valid(b"-----BEGIN", "ca.crt", "ask")
