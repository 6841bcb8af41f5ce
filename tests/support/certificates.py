"""Certificates for tests: an authority of the product's own making, and such as nobody should accept."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from cryptography.x509.oid import NameOID

from configs.schema.network import TlsConfig
from orchestrator.cli.lab_ca import LabCa, Pair
from protos.contract.identity import PeerIdentity, PeerRole
from protos.tls import Certificates
from protos.tls_files import TlsFiles


@dataclass(frozen=True)
class Lab:
    """The files of one cluster, as `autan tls init` makes them."""

    ca: LabCa

    @property
    def section(self) -> dict[str, Any]:
        """`network.tls`."""
        at = self.ca.directory
        pairs = {role: {"cert": str(at / f"{role}.pem"), "key": str(at / f"{role}.key")} for role in ("orchestrator", "worker")}
        return {"ca": str(self.ca.path), **pairs}

    @property
    def config(self) -> TlsConfig:
        """`network.tls`, validated."""
        return TlsConfig.model_validate(self.section)

    def files(self, name: str) -> TlsFiles:
        """What the holder of a pair shows and believes."""
        at = self.ca.directory
        return TlsFiles(self.ca.path, at / f"{name}.pem", at / f"{name}.key")


class Showing(Certificates):
    """Shows what the files hold, however bad; the product's own refuses to start with such."""

    def __init__(self, files: TlsFiles) -> None:
        self._shown = files

    def channel_credentials(self) -> grpc.ChannelCredentials:
        files = self._shown
        ca, key, cert = (None if path is None else path.read_bytes() for path in (files.ca, files.key, files.cert))
        return grpc.ssl_channel_credentials(ca, key, cert)


def a_lab(directory: Path, cluster: str) -> Lab:
    """An authority and a pair for each role."""
    ca = LabCa.create(directory, cluster)
    for role in PeerRole:
        ca.issue(role)
    return Lab(ca)


def forged(
    directory: Path,
    name: str,
    uris: list[str],
    *,
    names: tuple[str, ...] = (),
    issuer: LabCa | None = None,
    valid_from_days: float = -1.0,
    valid_to_days: float = 1.0,
) -> Pair:
    """A certificate as asked for, signed by the authority in `issuer`, or by itself."""
    now, key = datetime.now(UTC), ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    signer: Any = key if issuer is None else load_pem_private_key((issuer.directory / "ca.key").read_bytes(), None)
    general = [*(x509.UniformResourceIdentifier(uri) for uri in uris), *(x509.DNSName(n) for n in names)]
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject if issuer is None else issuer.certificate.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + timedelta(days=valid_from_days))
        .not_valid_after(now + timedelta(days=valid_to_days))
    )
    if general:
        builder = builder.add_extension(x509.SubjectAlternativeName(general), critical=False)
    certificate = builder.sign(signer, hashes.SHA256())
    pair = Pair(directory / f"{name}.pem", directory / f"{name}.key")
    pair.cert.write_bytes(certificate.public_bytes(Encoding.PEM))
    pair.key.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    pair.key.chmod(0o600)
    return pair


def identity(cluster: str, role: str) -> PeerIdentity:
    """The identity of a role."""
    return PeerIdentity(cluster, PeerRole(role))
