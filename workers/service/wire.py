"""The sockets of one worker: where it listens, whom it lets in, and how it dials the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc.aio

from configs.address import parse_address
from configs.worker_spec import WorkerSpec
from protos.contract.errors import ConfigError
from protos.contract.identity import PeerGate, PeerIdentity, PeerRole
from protos.rpc import Dialer, GuardInterceptor, channel_options, server_options
from protos.tls import Certificates
from protos.tls_files import TlsFiles
from workers.service.clock import wall_clock_s

_MAX_CONCURRENT_RPCS = 4096


def bind_host(spec: WorkerSpec) -> str:
    """The host part to listen on. Raises ConfigError for one that other machines reach without TLS and without `insecure`."""
    if spec.network.bind == "loopback":
        return "127.0.0.1"
    host = spec.node_address
    if host is None:
        raise ConfigError("network.bind: node needs the address of the node")
    network = spec.network
    if parse_address(f"{host}:0").is_local or network.insecure:
        return host
    if network.tls is None:
        raise ConfigError(
            f"network.bind: {host} can be reached from other machines: it needs network.tls, "
            "or network.insecure: true on a private network, or bind loopback"
        )
    if spec.ranks > 1:
        raise ConfigError(
            f"network.bind: the {spec.ranks} ranks of {spec.instance_id} compute over connections that have no TLS; "
            "set network.insecure: true when the network between the nodes is private (everything else keeps its TLS)"
        )
    return host


class Wire:
    """How this worker serves and dials. With `network.tls` every TCP connection is TLS with certificates on both sides.

    `peers` dials other workers, `ingresses` those who take tokens. Raises ConfigError for certificates that cannot be used.
    """

    def __init__(self, spec: WorkerSpec) -> None:
        network, tls = spec.network, spec.network.tls
        self._network = network
        options = channel_options(network.max_message_bytes, network.keepalive_s, network.ping_timeout_s)
        self._certificates: Certificates | None = None
        if tls is not None:
            files = TlsFiles(Path(tls.ca), Path(tls.worker.cert), Path(tls.worker.key))
            self._certificates = Certificates(files, wall_clock_s, PeerIdentity(spec.cluster, PeerRole.WORKER))
        self._gate = None if tls is None else PeerGate(spec.cluster)

        def dialer(role: PeerRole) -> Dialer:
            if self._certificates is None:
                return Dialer(options)
            return Dialer(options, self._certificates.trust(PeerIdentity(spec.cluster, role)))

        self.peers, self.ingresses = dialer(PeerRole.WORKER), dialer(PeerRole.ORCHESTRATOR)

    def server(self) -> Any:
        """A gRPC server without services."""
        network = self._network
        return grpc.aio.server(
            interceptors=[GuardInterceptor(gate=self._gate)],
            options=server_options(network.max_message_bytes, network.keepalive_s, network.ping_timeout_s),
            maximum_concurrent_rpcs=_MAX_CONCURRENT_RPCS,
        )

    def listen(self, server: Any, host: str) -> str:
        """Binds a free port; the address that others dial."""
        if self._certificates is None:
            port = server.add_insecure_port(f"{host}:0")
        else:
            port = server.add_secure_port(f"{host}:0", self._certificates.server_credentials())
        return f"{host}:{port}"
