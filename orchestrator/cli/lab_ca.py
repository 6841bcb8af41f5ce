"""A certificate authority in a directory, for a lab or a first cluster: `ca.pem`, `ca.key`, and a pair for each holder.

Keys are on P-256 and in files of mode 0600. Nothing that exists is written over unless a pair is replaced on purpose; a
replaced pair is renamed into place, so that a process that reads the files again finds the old pair or the new one.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from protos.certificates import certificates_in
from protos.contract.errors import ConfigError
from protos.contract.identity import SERVING_ROLES, PeerIdentity, PeerRole

_SKEW = timedelta(minutes=10)  # clocks of the nodes may be behind this one's
_CA_DAYS = 3650
_LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")
_HOST = re.compile(r"[A-Za-z0-9*]([A-Za-z0-9.-]{0,252})\Z")
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,63}\Z")


@dataclass(frozen=True, slots=True)
class Pair:
    """Where a certificate and its key are."""

    cert: Path
    key: Path


class LabCa:
    """The authority in a directory. `create` makes it, `open` finds it again."""

    def __init__(self, directory: Path, cluster: str, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
        self.directory = directory
        self.cluster = cluster
        self.certificate = certificate
        self._key = key

    @property
    def path(self) -> Path:
        """The certificate that everybody trusts."""
        return self.directory / "ca.pem"

    @classmethod
    def create(cls, directory: Path, cluster: str) -> LabCa:
        """A new authority. Raises ConfigError when the directory has one already, or cannot be written."""
        for path in (directory / "ca.pem", directory / "ca.key"):
            if path.exists():
                raise ConfigError(f"{path} is there already: `autan tls issue` makes more certificates with it")
        key = ec.generate_private_key(ec.SECP256R1())
        organisation = x509.NameAttribute(NameOID.ORGANIZATION_NAME, cluster)
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "autan lab CA"), organisation])
        certificate = (
            _dated(_CA_DAYS)
            .subject_name(subject)
            .issuer_name(subject)
            .public_key(key.public_key())
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(signs_certificates=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .sign(key, hashes.SHA256())
        )
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        _write(directory / "ca.key", _pem_of(key), 0o600)
        _write(directory / "ca.pem", certificate.public_bytes(Encoding.PEM), 0o644)
        return cls(directory, cluster, certificate, key)

    @classmethod
    def open(cls, directory: Path) -> LabCa:
        """The authority that `create` made. Raises ConfigError."""
        path, key_path = directory / "ca.pem", directory / "ca.key"
        try:
            (certificate,) = certificates_in(path.read_bytes(), path)
            key = load_pem_private_key(key_path.read_bytes(), password=None)
        except OSError as error:
            raise ConfigError(f"{error.filename}: {error.strerror}; `autan tls init {directory}` makes an authority") from error
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{directory}: ca.pem and ca.key are not what `autan tls init` makes") from error
        clusters = certificate.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)
        if not isinstance(key, ec.EllipticCurvePrivateKey) or len(clusters) != 1:
            raise ConfigError(f"{path}: was not made by `autan tls init`; use its own tool to issue certificates")
        return cls(directory, str(clusters[0].value), certificate, key)

    def issue(
        self, role: PeerRole, *, name: str | None = None, hosts: Iterable[str] = (), days: int = 365, replace: bool = False
    ) -> Pair:
        """A certificate for a role, in `NAME.pem` and `NAME.key`. `hosts`: where clients without a certificate dial it.

        Raises ConfigError for a host that is none, a pair that exists already, or more days than the authority has left.
        """
        stem = name or role.value
        if not _NAME.match(stem) or stem == "ca":
            raise ConfigError(f"{stem!r} is no name for a pair of files: use 1 to 64 of A-Z a-z 0-9 _ . -, and not ca")
        pair = Pair(self.directory / f"{stem}.pem", self.directory / f"{stem}.key")
        if not replace and (pair.cert.exists() or pair.key.exists()):
            raise ConfigError(f"{pair.cert} is there already: say --replace to put a new one in its place, or --name another")
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self._signed(PeerIdentity(self.cluster, role), key.public_key(), hosts, days)
        _write(pair.key, _pem_of(key), 0o600)
        _write(pair.cert, certificate.public_bytes(Encoding.PEM), 0o644)
        return pair

    def _signed(
        self, identity: PeerIdentity, public: ec.EllipticCurvePublicKey, hosts: Iterable[str], days: int
    ) -> x509.Certificate:
        serves = identity.role in SERVING_ROLES
        names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(identity.uri)]
        if serves:
            names.append(x509.DNSName(identity.server_name))
        if identity.role is PeerRole.ORCHESTRATOR:
            names += [_host_name(host) for host in dict.fromkeys((*_LOCAL_HOSTS, *hosts))]
        elif tuple(hosts):
            raise ConfigError(f"a {identity.role} is not dialled by host names; leave them out")
        usages = [ExtendedKeyUsageOID.CLIENT_AUTH, *([ExtendedKeyUsageOID.SERVER_AUTH] if serves else [])]
        builder = _dated(days)
        if datetime.now(UTC) + timedelta(days=days) > self.certificate.not_valid_after_utc:
            raise ConfigError(f"{days} days are more than {self.path} has left")
        authority = self.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        common = x509.NameAttribute(NameOID.COMMON_NAME, identity.role.value)
        return (
            builder.subject_name(x509.Name([common, x509.NameAttribute(NameOID.ORGANIZATION_NAME, self.cluster)]))
            .issuer_name(self.certificate.subject)
            .public_key(public)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(authority), critical=False)
            .sign(self._key, hashes.SHA256())
        )


def _dated(days: int) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder().serial_number(x509.random_serial_number())
    return builder.not_valid_before(now - _SKEW).not_valid_after(now + timedelta(days=days))


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates, key_cert_sign=signs_certificates, crl_sign=signs_certificates,
        content_commitment=False, key_encipherment=False, data_encipherment=False, key_agreement=False,
        encipher_only=False, decipher_only=False,
    )  # fmt: skip


def _host_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host.strip("[]")))
    except ValueError:
        if not _HOST.match(host) or host.lower().endswith(".autan"):  # those names are for identities
            raise ConfigError(f"{host!r} is no host name and no IP address") from None
        return x509.DNSName(host)


def _pem_of(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _write(path: Path, content: bytes, mode: int) -> None:
    """Whole or not at all. Raises ConfigError."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.unlink(missing_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(descriptor, "wb") as out:
            out.write(content)
        temporary.replace(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror})") from error
