"""Hand-offs over TLS: a certificate of a worker is not enough, the capability of this very hand-off is needed as well."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import grpc
import pytest

from protos.contract.capability import make_key_file
from protos.rpc import Dialer, channel_options, kv_pb2_grpc
from protos.tls import Certificates
from protos.wire import kv
from tests.integration.workers.test_capability import TOKENS, SignedWorld
from tests.support.certificates import Lab, a_lab, identity
from tests.support.store import FreshStore
from tests.support.worker_world import NETWORK, prompt, worker_world


def sink_credentials(lab: Lab) -> grpc.ServerCredentials:
    """Those of an orchestrator."""
    return Certificates(lab.files("orchestrator"), time.time, identity(lab.ca.cluster, "orchestrator")).server_credentials()


def test_a_worker_cannot_replay_the_capability_of_another(
    fresh_store: FreshStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lab, keys = a_lab(tmp_path / "tls", fresh_store.cluster), tmp_path / "handoff.keys"
    make_key_file(keys)
    changes = {"network": NETWORK.model_copy(update={"tls": lab.config}), "handoff_keys_file": str(keys)}

    async def scenario() -> None:
        async with worker_world(fresh_store, sink_credentials(lab)) as world:
            p = await world.start_worker("prefill-0", "prefill", **changes)
            d = await world.start_worker("decode-0", "decode", **changes)
            signed = SignedWorld(world, keys)
            request = await world.submit(prompt(TOKENS), 6)
            item = await signed.assign(request)
            await world.answered(request)
            await world.clean()
            for transfer in d.parts.receiver._table.all():
                d.parts.receiver._table.remove(transfer)  # as after `remember_s`
            opened = d.parts.ledger.opened
            assert opened == 1, "it went through once, over TLS"
            replay = kv.OpenRequest(
                request_id=request, epoch=item.expected_epoch + 1, source_instance="prefill-0",
                source_incarnation=p.me.number, target_instance="decode-0", target_incarnation=d.me.number,
                fingerprint=d.status().card.fingerprint, num_tokens=TOKENS, num_blocks=4,
                layers_per_group=d.engine.layout.layers_per_group, capability=kv.Capability.FromString(signed.sign(item)),
            )  # fmt: skip
            trust = Certificates(lab.files("worker"), time.time).trust(identity(lab.ca.cluster, "worker"))
            async with Dialer(channel_options(), trust).open(d.address) as channel:
                stub: Any = kv_pb2_grpc.KvTransferStub(channel)
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await stub.Open(replay, timeout=5)
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
            assert d.parts.ledger.opened == opened
            assert any("was used already" in record.getMessage() for record in caplog.records)

    asyncio.run(scenario())
