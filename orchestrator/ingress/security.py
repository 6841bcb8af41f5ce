"""The certificates of an ingress: what its two listeners show and ask for, and how it dials workers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import grpc

from configs.address import Address
from configs.schema.network import IngressConfig, NetworkConfig
from orchestrator.ingress.certificate_checks import CertificateChecks
from orchestrator.ingress.clock import wall_clock_s
from protos.contract.errors import ConfigError
from protos.contract.identity import PeerGate, PeerIdentity, PeerRole
from protos.rpc import Dialer, channel_options
from protos.tls import Certificates
from protos.tls_files import TlsFiles


@dataclass(frozen=True, slots=True)
class Door:
    """One listener: its credentials (none: plain), and who looks at the certificates that callers show (none: nobody)."""

    credentials: grpc.ServerCredentials | None = None
    gate: PeerGate | None = None


@dataclass(frozen=True, slots=True)
class IngressSecurity:
    """The doors of the ingress, and the way from it to the workers."""

    clients: Door
    workers: Door
    to_workers: Dialer
    checks: CertificateChecks | None = None  # for the doctor; none: there are no certificates


def security_of(cluster: str, network: NetworkConfig, ingress: IngressConfig) -> IngressSecurity:
    """What the cluster file says. Raises ConfigError for certificates that cannot be used."""
    options = channel_options(network.max_message_bytes, network.keepalive_s, network.ping_timeout_s)
    own, tls = _own_certificates(ingress), network.tls
    front = None
    if own is not None and ingress.tls is not None:
        # The API key says who calls, so no gate looks at certificates.
        front = Door(own.server_credentials(ask_clients=ingress.tls.client_ca is not None))
    named = {} if own is None else {"ingress": own}
    if tls is None:
        checks = CertificateChecks(named, None, cluster) if named else None
        return IngressSecurity(front or Door(), Door(), Dialer(options), checks)
    files = TlsFiles(Path(tls.ca), Path(tls.orchestrator.cert), Path(tls.orchestrator.key))
    certificates = Certificates(files, wall_clock_s, PeerIdentity(cluster, PeerRole.ORCHESTRATOR))

    def door() -> Door:  # credentials are one listener's: gRPC takes their first certificate once
        return Door(certificates.server_credentials(), PeerGate(cluster))

    to_workers = Dialer(options, certificates.trust(PeerIdentity(cluster, PeerRole.WORKER)))
    checks = CertificateChecks({"orchestrator": certificates, **named}, files, cluster)
    return IngressSecurity(front or door(), door(), to_workers, checks)


def sink_host(network: NetworkConfig, node_address: str | None) -> str:
    """Where workers bring tokens. Raises ConfigError for a host that other machines reach, without TLS or `insecure`."""
    if network.bind == "loopback":
        return "127.0.0.1"
    host = node_address or "127.0.0.1"
    if not Address(host=host).is_local and network.tls is None and not network.insecure:
        raise ConfigError(
            f"network.bind: node: workers would dial {host} without TLS; set network.tls, use loopback, "
            "or say network.insecure: true"
        )
    return host


def _own_certificates(ingress: IngressConfig) -> Certificates | None:
    own = ingress.tls
    if own is None:
        return None
    return Certificates(TlsFiles(Path(own.client_ca) if own.client_ca else None, Path(own.cert), Path(own.key)), wall_clock_s)
