"""A front door with a certificate of its own: clients dial it by name, show a key, and no certificate of the cluster."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from configs.schema.network import IngressConfig
from orchestrator.cli.lab_ca import LabCa
from orchestrator.client import AsyncClient
from protos.contract.errors import ClusterUnreachable, ConfigError, Unauthenticated
from protos.contract.identity import PeerRole
from protos.tls_files import TlsFiles
from tests.support.certificates import forged
from tests.support.ingress_world import a_world
from tests.support.store import FreshStore

KEY = "the-key"


def keys_file(tmp_path: Path) -> str:
    path = tmp_path / "keys.json"
    entry = {"id": "k", "sha256": hashlib.sha256(KEY.encode()).hexdigest(), "tenant": "acme", "role": "admin"}
    path.write_text(json.dumps([entry]))
    path.chmod(0o600)
    return str(path)


def run(fresh: FreshStore, config: dict[str, Any], scenario: Callable[[str], Any]) -> None:
    async def whole() -> None:
        settings = IngressConfig.model_validate({"address": "127.0.0.1:0", **config})
        async with a_world(fresh.url, fresh.cluster, settings) as world:
            await scenario(world.ingress.address)

    asyncio.run(whole())


def test_clients_check_the_name_and_the_server_the_key(fresh_store: FreshStore, tmp_path: Path) -> None:
    public = LabCa.create(tmp_path / "public", "public")
    named = forged(tmp_path, "named", [], names=("localhost",), issuer=public)
    tls = {"cert": str(named.cert), "key": str(named.key)}

    async def scenario(address: str) -> None:
        by_name = address.replace("127.0.0.1", "localhost")
        believing = TlsFiles(public.path)
        async with AsyncClient(by_name, tls=believing, api_key=KEY) as client:
            assert [model.name for model in await client.models()] == ["oracle"]
            assert (await client.status()).store_reachable
        async with AsyncClient(by_name, tls=believing, api_key="other") as client:
            with pytest.raises(Unauthenticated):
                await client.models()
        other = LabCa.create(tmp_path / "other", "public")
        doubts = {
            (address, public.path): "of another role, cluster or host",
            (by_name, other.path): "comes from another CA",
        }
        for (dialled, ca), why in doubts.items():
            async with AsyncClient(dialled, tls=TlsFiles(ca), api_key=KEY, retry_s=0.1, timeout_s=2.0) as client:
                with pytest.raises(ClusterUnreachable, match=why):
                    await client.models()

    run(fresh_store, {"tls": tls, "keys_file": keys_file(tmp_path)}, scenario)


def test_a_door_may_ask_for_certificates_of_an_authority_of_its_own(fresh_store: FreshStore, tmp_path: Path) -> None:
    public, clients = LabCa.create(tmp_path / "public", "public"), LabCa.create(tmp_path / "clients", "clients")
    named = forged(tmp_path, "named", [], names=("localhost",), issuer=public)
    known = forged(tmp_path, "known", ["https://example.org/someone"], issuer=clients)
    stranger = public.issue(PeerRole.CLIENT)
    tls = {"cert": str(named.cert), "key": str(named.key), "client_ca": str(clients.path)}

    async def scenario(address: str) -> None:
        by_name = address.replace("127.0.0.1", "localhost")
        async with AsyncClient(by_name, tls=TlsFiles(public.path, known.cert, known.key), api_key=KEY) as client:
            assert [model.name for model in await client.models()] == ["oracle"]
        for files in (TlsFiles(public.path), TlsFiles(public.path, stranger.cert, stranger.key)):
            async with AsyncClient(by_name, tls=files, api_key=KEY, retry_s=0.1, timeout_s=2.0) as client:
                with pytest.raises(ClusterUnreachable):
                    await client.models()

    run(fresh_store, {"tls": tls, "keys_file": keys_file(tmp_path)}, scenario)


def test_a_door_whose_certificate_cannot_be_used_does_not_open(fresh_store: FreshStore, tmp_path: Path) -> None:
    past = forged(tmp_path, "past", [], names=("localhost",), valid_from_days=-3, valid_to_days=-1)

    async def never(address: str) -> None:
        raise AssertionError(f"it serves at {address}")

    with pytest.raises(ConfigError, match=r"past\.pem: expired at"):
        run(fresh_store, {"tls": {"cert": str(past.cert), "key": str(past.key)}, "keys_file": keys_file(tmp_path)}, never)
