"""Who a certificate of the cluster speaks for, and which services its role may call.

A certificate names exactly one identity, `spiffe://autan/CLUSTER/ROLE`, as a URI among its subject alternative names. One of
a role that serves also carries the DNS name `server_name` of that identity: gRPC compares that name with the one that the
client demands, so whoever dials a worker reaches a worker, at any address, and no other holder of a certificate.

Deny by default: a service that the table does not name is closed to everybody.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from protos.contract.errors import Forbidden, Unauthenticated

_SCHEME = "spiffe://autan/"
_URI = re.compile(r"spiffe://autan/(?P<cluster>[A-Za-z0-9_.-]{1,64})/(?P<role>[a-z]{1,16})\Z")
_LABEL_CHARS = 60
_PLAIN = re.compile(r"[a-z0-9-]")


class PeerRole(StrEnum):
    """What the holder of a certificate is."""

    ORCHESTRATOR = "orchestrator"
    WORKER = "worker"
    CLIENT = "client"
    ADMIN = "admin"


SERVING_ROLES = frozenset({PeerRole.ORCHESTRATOR, PeerRole.WORKER})

SERVICE_ROLES: Mapping[str, frozenset[PeerRole]] = {
    "autan.v1.Inference": frozenset({PeerRole.CLIENT, PeerRole.ADMIN}),
    "autan.v1.Admin": frozenset({PeerRole.ADMIN}),
    "autan.v1.TokenSink": frozenset({PeerRole.WORKER}),
    "autan.v1.KvTransfer": frozenset({PeerRole.WORKER}),
    "autan.v1.PrefixTransfer": frozenset({PeerRole.WORKER}),
    "autan.v1.Worker": frozenset({PeerRole.ORCHESTRATOR}),
    "grpc.health.v1.Health": frozenset(PeerRole),
}
"""Whom each service answers, but for the methods below. A service that is not here answers nobody."""

METHOD_ROLES: Mapping[str, frozenset[PeerRole]] = {
    "/autan.v1.Worker/JoinGroup": frozenset({PeerRole.WORKER}),
    "/autan.v1.Worker/Diagnose": frozenset({PeerRole.ORCHESTRATOR, PeerRole.WORKER}),
}
"""Methods that answer others than their service does."""


@dataclass(frozen=True, slots=True)
class PeerIdentity:
    """A role in a cluster."""

    cluster: str
    role: PeerRole

    @property
    def uri(self) -> str:
        """As the certificate has it."""
        return f"{_SCHEME}{self.cluster}/{self.role}"

    @property
    def server_name(self) -> str:
        """The DNS name that a client demands of this server: another one for every cluster and role.

        DNS names know no case, few characters and short labels: what is none of `a-z 0-9 -` is written `_` and two hex digits,
        and a dot follows every 60 characters.
        """
        text = "".join(c if _PLAIN.match(c) else f"_{ord(c):02x}" for c in self.cluster)
        labels = [text[begin : begin + _LABEL_CHARS] for begin in range(0, len(text), _LABEL_CHARS)]
        return ".".join([self.role, *labels, "autan"])

    def __str__(self) -> str:
        return f"{self.role} of cluster {self.cluster}"


def identity_of(uris: Iterable[str]) -> PeerIdentity:
    """The identity that a certificate with these URIs names. Raises Unauthenticated for none, several or an unknown role."""
    named = [uri for uri in uris if uri.startswith("spiffe:")]
    if len(named) != 1:
        raise Unauthenticated(f"the certificate names {len(named) or 'no'} identities; it needs one {_SCHEME}CLUSTER/ROLE")
    match = _URI.match(named[0])
    if match is None or match["role"] not in list(PeerRole):
        raise Unauthenticated(f"the certificate names {named[0][:200]!r}, which is no {_SCHEME}CLUSTER/ROLE")
    return PeerIdentity(match["cluster"], PeerRole(match["role"]))


def roles_of(method: str) -> frozenset[PeerRole]:
    """The roles that a method, `/package.Service/Name`, answers; none for a service that is not in the table."""
    _, service, _ = (*method.split("/", 2), "", "")[:3]
    return METHOD_ROLES.get(method, SERVICE_ROLES.get(service, frozenset()))


class PeerGate:
    """Lets the calls of one server in: those of peers with a certificate of this cluster and a role that the method answers.

    TLS has verified by then that the certificate comes from the cluster's CA and is in its time. A unix socket has no TLS:
    whoever may open it is the user that the cluster belongs to.
    """

    def __init__(self, cluster: str) -> None:
        self._cluster = cluster

    def admit(self, method: str, peer: str, auth: Mapping[str, Sequence[bytes]]) -> PeerIdentity | None:
        """The caller, None on a unix socket. `peer` and `auth` are what gRPC says of the connection.

        Raises Unauthenticated for a connection without a certificate or one that names nobody, Forbidden for another
        cluster or a role that the method does not answer.
        """
        if list(auth.get("transport_security_type", ())) != [b"ssl"]:
            if peer.startswith("unix:"):
                return None
            raise Unauthenticated(f"{method}: the connection has no TLS")
        identity = identity_of(value.decode("utf-8", "replace") for value in auth.get("peer_uri", ()))
        if identity.cluster != self._cluster:
            raise Forbidden(f"{method}: the certificate is that of {identity}; this is cluster {self._cluster}")
        if identity.role not in roles_of(method):
            raise Forbidden(f"{method} does not answer the {identity}")
        return identity
