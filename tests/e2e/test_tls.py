"""A whole cluster with certificates: every TCP channel has TLS, and everything works as it does without."""

from __future__ import annotations

import asyncio
import hashlib
import json
from contextlib import aclosing
from pathlib import Path

import pytest

from orchestrator.cli.lab_ca import LabCa
from orchestrator.cli.local_cluster import LocalCluster
from orchestrator.client import AsyncClient, Delta
from orchestrator.ingress.certificate_checks import shown_certificate
from protos.contract.errors import ClusterUnreachable, Forbidden, Unauthenticated
from protos.contract.identity import PeerRole
from protos.tls_files import TlsFiles
from protos.wire import admin as wire
from tests.support.certificates import Lab, a_lab, identity
from tests.support.cluster import (
    assert_right,
    expected_output,
    no_block_left,
    oracle_config,
    random_prompt,
    run,
    running,
    watch,
)
from tests.support.worker_world import until

KEY = "a-key-of-the-test"
CLUSTER = "Turn_1.x"  # letters and signs that DNS names do not have
MANY = 5000  # tokens of a stream that no test waits for


def test_a_cluster_with_certificates_serves_hands_over_and_keeps_clean_books(tmp_path: Path) -> None:
    lab = a_lab(tmp_path / "tls", "tls")
    keys = tmp_path / "keys.json"
    entry = {"id": "k", "sha256": hashlib.sha256(KEY.encode()).hexdigest(), "tenant": "acme", "role": "admin"}
    keys.write_text(json.dumps([entry]))
    keys.chmod(0o600)
    config = oracle_config(
        "tls",
        network={"tls": lab.section},
        ingress={"address": "127.0.0.1:0", "keys_file": str(keys)},
    )

    async def scenario() -> None:
        async with running(config) as (cluster, _):
            endpoint = cluster.endpoint
            async with (
                AsyncClient(endpoint, api_key=KEY, tls=lab.files("admin")) as admin,
                AsyncClient(endpoint, api_key=KEY, tls=lab.files("client")) as client,
                AsyncClient(endpoint, tls=lab.files("admin")) as keyless,
                AsyncClient(endpoint, api_key=KEY, tls=TlsFiles(lab.ca.path), retry_s=0.3) as nobody,
                AsyncClient(endpoint, api_key=KEY, tls=TlsFiles(), retry_s=0.3) as plain,
                AsyncClient(cluster.ingress.local_address, api_key=KEY) as local,
            ):
                prompt = random_prompt(1, 300)
                for one in (client, admin, local):
                    seen = await watch(one, prompt, 24)
                    assert_right(seen, expected_output(config, prompt, 24))
                    assert seen.timeline.handoff_blocks + seen.timeline.handoff_reused_blocks == 5
                await no_block_left(admin)
                audit = await admin.verify_kv()
                assert len(audit.audits) == 2 and not audit.unanswered and not any(one.findings for one in audit.audits)
                report = await admin.diagnose()
                dated = {one.subject: one for one in report.checks if one.name == "certificate"}
                assert set(dated) == {"orchestrator", "prefill-0", "decode-0"}
                assert all(one.health == wire.HEALTH_OK and "in 365 days" in one.detail for one in dated.values())
                assert all(path.reachable for path in report.from_ingress)
                assert all(path.reachable and path.is_expected for one in report.workers for path in one.peers)
                with pytest.raises(Forbidden, match="does not answer the client"):
                    await client.status()
                with pytest.raises(Unauthenticated, match="API key"):
                    await keyless.status()
                for refused in (nobody, plain):
                    with pytest.raises(ClusterUnreachable):
                        await refused.status()

    run(scenario())


class Rotation:
    """A cluster whose certificates are replaced while it runs."""

    def __init__(self, lab: Lab, cluster: LocalCluster) -> None:
        self.lab = lab
        self.cluster = cluster

    async def serials(self) -> list[int]:
        """What the listeners of the decode worker and of the ingress show to a new connection, in the eyes of the admin."""
        view = await self.cluster.store.view(0)
        (decode,) = [record.addr for record in view.instances if record.instance_id == "decode-0"]
        dialled = {
            decode: "worker",
            self.cluster.ingress.address: "orchestrator",
            self.cluster.ingress.sink_address: "orchestrator",
        }
        files, name = self.lab.files("admin"), self.lab.ca.cluster
        return [(await shown_certificate(at, files, identity(name, role))).serial_number for at, role in dialled.items()]

    async def replaced(self, before: list[int]) -> None:
        """Returns when no listener shows what it showed before."""

        async def is_so() -> bool:
            return not set(before) & set(await self.serials())

        await until(is_so, "every listener shows another certificate")

    def log_of(self, instance_id: str) -> str:
        """The worker's log."""
        return (self.cluster.run_dir.logs / f"{instance_id}.0.log").read_text()


def test_certificates_and_then_the_authority_are_replaced_under_a_live_stream(tmp_path: Path) -> None:
    lab = a_lab(tmp_path / "tls", CLUSTER)
    config = oracle_config(CLUSTER, network={"tls": lab.section}, engine={"oracle": {"decode_step_s": 0.02}})
    long, short = random_prompt(1, 300), random_prompt(2, 300)

    async def asked(client: AsyncClient, prompt: list[int], max_tokens: int) -> None:
        assert_right(await watch(client, prompt, max_tokens), expected_output(config, prompt, max_tokens))

    streamed: list[int] = []

    async def follow(client: AsyncClient) -> None:
        async with aclosing(client.generate(token_ids=long, max_tokens=MANY, temperature=0.0)) as events:
            async for event in events:
                if isinstance(event, Delta):
                    assert event.first_index == len(streamed)
                    streamed.extend(event.token_ids)

    async def scenario() -> None:
        async with running(config) as (cluster, _), AsyncClient(cluster.endpoint, tls=lab.files("client")) as client:
            turn = Rotation(lab, cluster)
            stream = asyncio.create_task(follow(client))
            await asked(client, short, 4)
            first = await turn.serials()
            damaged = lab.ca.directory / "worker.pem"
            kept = damaged.read_bytes()
            damaged.write_text("half a certifi")
            assert await turn.serials() == first, "files that cannot be used leave the old ones in force"
            await until(lambda: "changed certificates are not used" in turn.log_of("decode-0"), "the log says so")
            assert any(c.health == wire.HEALTH_OK for c in (await cluster_checks(cluster)) if c.subject == "decode-0")
            damaged.write_bytes(kept)
            for role in PeerRole:
                lab.ca.issue(role, replace=True)
            await turn.replaced(first)
            await asked(client, short, 5)
            second = await turn.serials()
            old_client = copy_of_client(lab, tmp_path / "old")
            fresh = LabCa.create(tmp_path / "next", CLUSTER)
            lab.ca.path.write_bytes(lab.ca.path.read_bytes() + fresh.path.read_bytes())
            for role in PeerRole:
                pair = fresh.issue(role)
                pair.key.replace(lab.ca.directory / pair.key.name)
                pair.cert.replace(lab.ca.directory / pair.cert.name)
            await turn.replaced(second)
            lab.ca.path.write_bytes(fresh.path.read_bytes())
            await asked(client, short, 6)
            assert not stream.done(), "all of it happened under the stream"
            async with AsyncClient(cluster.endpoint, tls=old_client, retry_s=0.2) as left_behind:
                with pytest.raises(ClusterUnreachable):
                    await left_behind.models()
            seen = len(streamed)
            await until(lambda: len(streamed) > seen > 0, "the stream goes on")
            stream.cancel()
            await asyncio.gather(stream, return_exceptions=True)
            assert streamed == expected_output(config, long, len(streamed))
            async with AsyncClient(cluster.ingress.local_address) as local:
                await no_block_left(local)

    run(scenario())


async def cluster_checks(cluster: LocalCluster) -> list[wire.Check]:
    async with AsyncClient(cluster.ingress.local_address) as local:
        return list((await local.diagnose()).checks)


def copy_of_client(lab: Lab, directory: Path) -> TlsFiles:
    """The client's files as they are now, beside a CA file that believes both authorities."""
    directory.mkdir()
    files = lab.files("client")
    assert files.ca is not None and files.cert is not None and files.key is not None
    for path in (files.ca, files.cert, files.key):
        copy = directory / path.name
        copy.write_bytes(path.read_bytes())
        copy.chmod(0o600)
    return TlsFiles(directory / "ca.pem", directory / "client.pem", directory / "client.key")
