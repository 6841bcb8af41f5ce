"""A whole cluster with certificates: every TCP channel has TLS, and everything works as it does without."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from orchestrator.client import AsyncClient
from protos.certificates import TlsFiles
from protos.contract.errors import ClusterUnreachable, Forbidden, Unauthenticated
from tests.support.certificates import a_lab
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

KEY = "a-key-of-the-test"


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
