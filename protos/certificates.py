"""Certificates as files: read, bounded, checked. What passes here is what a TLS handshake of the cluster accepts.

Checked are: PEM of a bounded size, a key that is the certificate's own and that others cannot read, a chain that ends at an
authority of the CA file, all of it in its time, and for certificates of the cluster the identity that they must name.
"""

from __future__ import annotations

import stat
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

from protos.contract.errors import AutanError, ConfigError
from protos.contract.identity import SERVING_ROLES, PeerIdentity, identity_of
from protos.tls_files import TlsFiles

_MAX_FILE_BYTES = 1024 * 1024
_MAX_CHAIN = 8
_OTHERS = stat.S_IRWXO | stat.S_IWGRP  # a group may read a key: that is how mounted secrets come


@dataclass(frozen=True, slots=True, repr=False)
class TlsBundle:
    """What the files held, checked: PEM as gRPC takes it, and who the certificate says it is."""

    ca: bytes | None
    chain: bytes | None
    key: bytes | None
    leaf: x509.Certificate | None
    identity: PeerIdentity | None


def read_bundle(files: TlsFiles, now_s: float, expected: PeerIdentity | None = None) -> TlsBundle:
    """Reads and checks the files as they are at `now_s`, seconds since 1970.

    Raises ConfigError, naming the file, for anything that a peer would refuse. `expected`: the certificate must name this
    identity; none: whatever identity it names, if any.
    """
    ca = None if files.ca is None else _read(files.ca)
    authorities = () if files.ca is None or ca is None else certificates_in(ca, files.ca)
    if files.cert is None or files.key is None:
        return TlsBundle(ca, None, None, None, None)
    chain, key = _read(files.cert), _read(files.key)
    found = certificates_in(chain, files.cert)
    _check_key(files.key, key, found[0], files.cert)
    _check_dates(found, files.cert, datetime.fromtimestamp(now_s, UTC))
    identity = _identity(found[0], files.cert, expected)
    # The CA file of a public door is for the certificates of its clients, not for its own.
    if authorities and identity is not None:
        _check_chain(found, authorities, files.cert, files.ca, datetime.fromtimestamp(now_s, UTC))
    return TlsBundle(ca, chain, key, found[0], identity)


def certificates_in(pem: bytes, path: Path) -> tuple[x509.Certificate, ...]:
    """The certificates of a PEM file, at least one. Raises ConfigError."""
    try:
        return tuple(x509.load_pem_x509_certificates(pem))
    except ValueError as error:
        raise ConfigError(f"{path}: holds no PEM certificates that can be read ({error})") from error


def named_identity(certificate: x509.Certificate) -> PeerIdentity:
    """The identity of the cluster that a certificate names. Raises Unauthenticated."""
    return identity_of(_names(certificate, x509.UniformResourceIdentifier))


def server_names(certificate: x509.Certificate) -> list[str]:
    """The DNS names and addresses that a certificate may be dialled under."""
    addresses = [str(address) for address in _names(certificate, x509.IPAddress)]
    return _names(certificate, x509.DNSName) + addresses


def _names(certificate: x509.Certificate, kind: type[x509.GeneralName]) -> list[str]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        return [name.value for name in names if isinstance(name, kind)]
    except (x509.ExtensionNotFound, ValueError):
        return []


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); `autan tls init` makes certificates") from error
    if len(raw) > _MAX_FILE_BYTES:
        raise ConfigError(f"{path}: has more than {_MAX_FILE_BYTES} bytes; that is no file of certificates")
    return raw


def _check_key(path: Path, pem: bytes, leaf: x509.Certificate, cert: Path) -> None:
    if path.stat().st_mode & _OTHERS:
        raise ConfigError(f"{path}: others may read this key; run chmod 600 on it")
    try:
        public = load_pem_private_key(pem, password=None).public_key()
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path}: holds no PEM private key without a password") from error
    if _spki(public) != _spki(leaf.public_key()):
        raise ConfigError(f"{path}: is not the key of {cert}")


def _spki(key: object) -> bytes:
    encoded: bytes = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)  # type: ignore[attr-defined]
    return encoded


def _check_dates(chain: Sequence[x509.Certificate], path: Path, now: datetime) -> None:
    for certificate in chain[:_MAX_CHAIN]:
        if now >= certificate.not_valid_after_utc:
            raise ConfigError(f"{path}: expired at {certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC; issue a new one")
        if now < certificate.not_valid_before_utc:
            raise ConfigError(f"{path}: is not valid before {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC")


def _identity(leaf: x509.Certificate, path: Path, expected: PeerIdentity | None) -> PeerIdentity | None:
    try:
        identity = named_identity(leaf)
    except AutanError as error:
        if expected is None:
            return None
        raise ConfigError(f"{path}: {error.message}; this process is {expected.uri}") from error
    if expected is not None and identity != expected:
        raise ConfigError(f"{path}: is that of the {identity}; this process is the {expected}")
    if identity.role in SERVING_ROLES and identity.server_name not in _names(leaf, x509.DNSName):
        raise ConfigError(f"{path}: lacks the DNS name {identity.server_name}, which those who dial the {identity.role} demand")
    return identity


def _check_chain(
    chain: Sequence[x509.Certificate], authorities: Sequence[x509.Certificate], path: Path, ca: Path | None, now: datetime
) -> None:
    """From the first certificate, over those below it in the file, to an authority of the CA file."""
    current = chain[0]
    for _ in range(_MAX_CHAIN):
        issuer = next((one for one in authorities if _issued(current, one)), None)
        if issuer is not None:
            _check_dates([issuer], ca or path, now)
            return
        below = next((one for one in chain[1:] if one != current and _issued(current, one)), None)
        if below is None:
            break
        current = below
    raise ConfigError(
        f"{path}: no authority in {ca} has issued it: certificate and CA are of different clusters, or files mixed up"
    )


def _issued(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        if not issuer.extensions.get_extension_for_class(x509.BasicConstraints).value.ca:
            return False
        certificate.verify_directly_issued_by(issuer)
    except (x509.ExtensionNotFound, ValueError, TypeError, InvalidSignature):
        return False
    return True
