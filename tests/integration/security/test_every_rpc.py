"""Peers that must not get in, on every RPC of every server: what is refused is refused with a log line that says why."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from configs.schema.network import IngressConfig
from orchestrator.ingress.parts import IngressSettings
from orchestrator.ingress.server import IngressServer
from orchestrator.store.client import Store
from protos.contract.identity import PeerRole, roles_of
from protos.rpc import channel_options, open_channel
from protos.tls import Trust
from protos.tls_files import TlsFiles
from tests.support.certificates import Lab, Showing, a_lab, forged, identity
from tests.support.ingress_world import oracle_model
from tests.support.rpc_methods import LISTENERS, Method, every_method, outcome
from tests.support.store import FreshStore
from tests.support.worker_world import NETWORK, worker_world

REFUSED = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)


@dataclass
class Servers:
    """A worker and an ingress, with certificates, and where each of the three listeners is."""

    lab: Lab
    cluster: str
    addresses: dict[str, str]

    def rpcs(self) -> list[tuple[str, Method]]:
        """Every listener with every method it serves."""
        found = [(at, one) for at, names in LISTENERS.items() for one in every_method() if one.service in names]
        assert {one.path for _, one in found} == {one.path for one in every_method()}, "no listener has it"
        return found

    def channel(self, at: str, files: TlsFiles) -> grpc.aio.Channel:
        """Dialled as the product does, whoever the files say one is."""
        role = "worker" if at == "worker" else "orchestrator"
        certificates = Showing(files)
        return open_channel(self.addresses[at], channel_options(), Trust(certificates, identity(self.cluster, role)))


@asynccontextmanager
async def serving(fresh: FreshStore, tmp_path: Path) -> AsyncIterator[Servers]:
    lab = a_lab(tmp_path / "tls", fresh.cluster)
    network = NETWORK.model_copy(update={"tls": lab.config})
    async with await fresh.connect() as store, worker_world(fresh) as world:
        host = await world.start_worker("decode-0", "decode", network=network)
        ingress = an_ingress(store, network)
        await ingress.start()
        try:
            addresses = {"worker": host.address, "orchestrator": ingress.address, "sink": ingress.sink_address}
            yield Servers(lab, fresh.cluster, addresses)
        finally:
            await ingress.stop(0.0)


def an_ingress(store: Store, network: Any) -> IngressServer:
    config = IngressConfig(address="127.0.0.1:0")
    return IngressServer(
        settings=IngressSettings(config=config, version="0"),
        network=network,
        store=store,
        model=oracle_model(),
        on_shutdown=lambda grace_s: None,
    )


def run(fresh: FreshStore, tmp_path: Path, scenario: Callable[[Servers], Awaitable[None]]) -> None:
    async def whole() -> None:
        async with serving(fresh, tmp_path) as servers:
            await scenario(servers)

    asyncio.run(whole())


def test_every_method_is_in_the_table_and_every_listener_serves_what_the_test_knows(
    fresh_store: FreshStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served: set[str] = set()
    add = grpc.aio._server.Server.add_generic_rpc_handlers

    def noting(self: Any, handlers: Any) -> None:
        for handler in handlers:
            served.update(handler._method_handlers)
        add(self, handlers)

    monkeypatch.setattr(grpc.aio._server.Server, "add_generic_rpc_handlers", noting)

    async def scenario(servers: Servers) -> None:
        known = {one.path for one in every_method()}
        assert served == known and len(known) > 25
        assert all(roles_of(path) for path in known)

    run(fresh_store, tmp_path, scenario)


def test_a_certificate_of_the_ca_gets_in_only_where_its_role_and_cluster_belong(
    fresh_store: FreshStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(servers: Servers) -> None:
        ca, cluster = servers.lab.ca, servers.cluster
        nobodies = {
            "names no identity": [],
            "names 2 identities": [identity(cluster, "worker").uri, identity(cluster, "admin").uri],
            "which is no spiffe": [f"spiffe://autan/{cluster}/root"],
            "names no  identities": [f"https://autan/{cluster}/worker"],
        }
        for number, (_, uris) in enumerate(nobodies.items()):
            pair = forged(tmp_path, f"nobody{number}", uris, issuer=ca)
            await refused_everywhere(servers, caplog, TlsFiles(ca.path, pair.cert, pair.key), "the certificate names")
        for role in PeerRole:
            pair = forged(tmp_path, f"abroad-{role}", [identity(f"{cluster}x", role).uri], issuer=ca)
            await refused_everywhere(servers, caplog, TlsFiles(ca.path, pair.cert, pair.key), f"this is cluster {cluster}")
            for at, method in servers.rpcs():
                caplog.clear()
                async with servers.channel(at, servers.lab.files(role)) as channel:
                    code, text = await outcome(channel, method)
                lines = [record.getMessage() for record in caplog.records if "is refused" in record.getMessage()]
                if role in roles_of(method.path):
                    assert code not in REFUSED and "connect" not in text, f"{role}: {method.path}: {code} {text}"
                    assert not lines
                else:
                    assert code is grpc.StatusCode.PERMISSION_DENIED, f"{role}: {method.path}: {code} {text}"
                    assert lines and f"{method.path} does not answer the {role} of cluster {cluster}" in lines[0]

    run(fresh_store, tmp_path, scenario)


async def refused_everywhere(servers: Servers, caplog: pytest.LogCaptureFixture, files: TlsFiles, why: str) -> None:
    for at, method in servers.rpcs():
        caplog.clear()
        async with servers.channel(at, files) as channel:
            code, text = await outcome(channel, method)
        assert code in REFUSED, f"{method.path}: {code} {text}"
        lines = [record for record in caplog.records if why in record.getMessage()]
        assert lines and lines[0].levelno == logging.WARNING and method.path.split("/")[1] in method.service


def test_a_server_that_is_not_the_one_dialled_is_left_alone(fresh_store: FreshStore, tmp_path: Path) -> None:
    """A worker in the place of an ingress would collect keys and prompts, an ingress in that of a worker KV blocks."""

    async def scenario(servers: Servers) -> None:
        for at, wrong in (("worker", "orchestrator"), ("orchestrator", "worker"), ("sink", "worker")):
            files = servers.lab.files("admin")
            trust = Trust(Showing(files), identity(servers.cluster, wrong))
            methods = [method for place, method in servers.rpcs() if place == at]
            for method in methods:
                async with open_channel(servers.addresses[at], channel_options(), trust) as channel:
                    code, text = await outcome(channel, method)
                assert code is grpc.StatusCode.UNAVAILABLE and "Hostname Verification Check failed" in text

    run(fresh_store, tmp_path, scenario)
