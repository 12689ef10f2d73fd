"""Makes the consortium's own authority and the server's certificate under it: ECDSA P-256, X.509 version 3 (RFC 5280)."""

from __future__ import annotations

import ipaddress
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import (
    SECP256R1,
    EllipticCurvePrivateKey,
    generate_private_key,
)
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from oncofed.common.certificates import read_certificate

LOOPBACK = ("localhost", "127.0.0.1", "::1")
"""The server's own processes call it by these."""

CLOCKS = timedelta(hours=1)
"""A certificate begins this much earlier, as hospitals' clocks differ."""

Pair = tuple[bytes, bytes]
"""Private key and certificate, PEM."""


def make_authority(consortium: str, days: int) -> Pair:
    """A certificate authority that signs server certificates and nothing below them."""
    key = generate_private_key(SECP256R1())
    name = _name(consortium, f"{consortium} CA")
    certificate = (
        _builder(name, name, key, datetime.now(UTC) + timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(key_cert_sign=True, crl_sign=True), critical=True)
        .sign(key, SHA256())
    )
    return _pem(key), certificate.public_bytes(Encoding.PEM)


def make_server(authority: Pair, consortium: str, address: str, days: int) -> Pair:
    """The server's certificate for its address and loopback; it ends with its authority at the latest."""
    ca_key = load_pem_private_key(authority[0], None)
    ca = read_certificate(authority[1], "ca.crt")
    if not isinstance(ca_key, EllipticCurvePrivateKey) or ca_key.public_key() != ca.public_key():
        raise ValueError("ca.key is not the key of ca.crt; restore both from one backup")
    key = generate_private_key(SECP256R1())
    names = dict.fromkeys((address, *LOOPBACK))
    end = min(datetime.now(UTC) + timedelta(days=days), ca.not_valid_after_utc)
    certificate = (
        _builder(_name(consortium, address[:64]), ca.subject, key, end)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([_alternative(n) for n in names]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        .sign(ca_key, SHA256())
    )
    return _pem(key), certificate.public_bytes(Encoding.PEM)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: EllipticCurvePrivateKey, end: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime.now(UTC) - CLOCKS)
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _name(consortium: str, common: str) -> x509.Name:
    return x509.Name(
        [x509.NameAttribute(NameOID.ORGANIZATION_NAME, consortium), x509.NameAttribute(NameOID.COMMON_NAME, common)]
    )


def _usage(**used: bool) -> x509.KeyUsage:
    kinds = (
        "digital_signature",
        "content_commitment",
        "key_encipherment",
        "data_encipherment",
        "key_agreement",
        "key_cert_sign",
        "crl_sign",
        "encipher_only",
        "decipher_only",
    )
    return x509.KeyUsage(**{kind: used.get(kind, False) for kind in kinds})


def _alternative(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _pem(key: EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
