"""Identities in certificates, and whom the gate lets in."""

from __future__ import annotations

import random
import string

import pytest

from protos.contract.errors import AuthError, Forbidden, Unauthenticated
from protos.contract.identity import METHOD_ROLES, SERVICE_ROLES, PeerGate, PeerIdentity, PeerRole, identity_of, roles_of
from tests.support.rpc_methods import every_method

NAME = string.ascii_letters + string.digits + "_.-"


def test_every_name_survives_its_uri_and_has_server_names_of_its_own() -> None:
    rng = random.Random(4)
    clusters = {"".join(rng.choice(NAME) for _ in range(rng.randint(1, 64))) for _ in range(2000)}
    clusters |= {"a", "A", "_61", "a.b", "a-b", "a_b", "a_2eb", "x" * 64}
    identities = [PeerIdentity(cluster, role) for cluster in clusters for role in PeerRole]
    assert all(identity_of([one.uri, "https://elsewhere"]) == one for one in identities)
    names = {one.server_name.lower() for one in identities}
    assert len(names) == len(identities), "DNS knows no case: no two identities may look the same to it"
    assert all(len(name) <= 253 and name.isascii() and max(map(len, name.split("."))) <= 63 for name in names)


@pytest.mark.parametrize(
    "uris",
    [
        [],
        ["https://autan/c/worker"],
        ["spiffe://autan/c/worker", "spiffe://autan/c/admin"],
        ["spiffe://autan/c/worker", "spiffe://autan/c/worker"],
        ["spiffe://autan/c/root"],
        ["spiffe://autan/c/worker/x"],
        ["spiffe://autan/c/worker\n"],
        ["spiffe://autan//worker"],
        ["spiffe://autan/c/Worker"],
        ["spiffe://other/c/worker"],
        ["spiffe://autan/" + "c" * 65 + "/worker"],
    ],
)
def test_what_names_nobody_is_refused(uris: list[str]) -> None:
    with pytest.raises(Unauthenticated, match="the certificate names"):
        identity_of(uris)


def test_the_table_names_what_there_is_and_nothing_else_is_open() -> None:
    methods = every_method()
    assert set(SERVICE_ROLES) == {one.service for one in methods}
    assert set(METHOD_ROLES) <= {one.path for one in methods}
    assert all(roles_of(one.path) for one in methods)
    for unknown in ("", "/", "x", "/autan.v1.Nothing/Status", "/autan.v1.workeR/Status", "autan.v1.Worker/Status"):
        assert roles_of(unknown) == frozenset()


def shown(*uris: str, transport: str = "ssl") -> dict[str, list[bytes]]:
    """What gRPC says of a connection."""
    return {"transport_security_type": [transport.encode()], "peer_uri": [uri.encode() for uri in uris]}


def test_the_gate() -> None:
    gate, method = PeerGate("c"), "/autan.v1.KvTransfer/Open"
    worker = PeerIdentity("c", PeerRole.WORKER)
    assert gate.admit(method, "ipv4:10.0.0.1:1", shown(worker.uri)) == worker
    assert gate.admit(method, "unix:", {}) is None
    refused: list[tuple[str, str, dict[str, list[bytes]], type[AuthError], str]] = [
        (method, "ipv4:10.0.0.1:1", {}, Unauthenticated, "no TLS"),
        (method, "ipv4:10.0.0.1:1", shown(worker.uri, transport="insecure"), Unauthenticated, "no TLS"),
        (method, "unix:", shown(), Unauthenticated, "no identities"),
        (method, "ipv4:10.0.0.1:1", shown(), Unauthenticated, "no identities"),
        (method, "ipv4:10.0.0.1:1", shown("spiffe://autan/d/worker"), Forbidden, "cluster d; this is cluster c"),
        (method, "ipv4:10.0.0.1:1", shown("spiffe://autan/c/admin"), Forbidden, "does not answer the admin of cluster c"),
        ("/autan.v1.New/Call", "ipv4:10.0.0.1:1", shown(worker.uri), Forbidden, "does not answer the worker"),
    ]
    for called, peer, auth, error, words in refused:
        with pytest.raises(error, match=words):
            gate.admit(called, peer, auth)
