"""Reads certificates: how long they last, and whether they can be used today."""

from __future__ import annotations

from datetime import UTC, datetime

from cryptography import x509


def read_certificate(pem: bytes, what: str) -> x509.Certificate:
    """Raises `ValueError` that begins with `what`."""
    try:
        return x509.load_pem_x509_certificate(pem)
    except ValueError:
        raise ValueError(f"{what} is no certificate in PEM") from None


def days_left(pem: bytes, what: str) -> float:
    """Days until a certificate ends, below 0 where it has."""
    return (read_certificate(pem, what).not_valid_after_utc - datetime.now(UTC)).total_seconds() / 86400


def check_valid(pem: bytes, what: str, remedy: str) -> None:
    """Raises `ValueError` where a certificate has ended or has not begun."""
    certificate, now = read_certificate(pem, what), datetime.now(UTC)
    if now > certificate.not_valid_after_utc:
        raise ValueError(f"{what} ended on {certificate.not_valid_after_utc:%Y-%m-%d}; {remedy}")
    if now < certificate.not_valid_before_utc:
        raise ValueError(
            f"{what} begins on {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC, and this machine says {now:%Y-%m-%d %H:%M} UTC; set "
            "its clock"
        )
