"""Clients that read slowly, or not at all."""

from __future__ import annotations

import asyncio

from configs.schema.network import IngressConfig
from protos.contract.errors import Cancelled
from protos.rpc import channel_options, inference_pb2_grpc, open_channel
from tests.integration.ingress.test_requests import refused
from tests.support.ingress_worker import expected_token, expected_tokens
from tests.support.ingress_world import Answer, a_prompt, a_world, drain, until
from tests.support.store import FreshStore

NUM_TOKENS = 150_000
CONFIG = IngressConfig(address="127.0.0.1:0", max_buffered_tokens=64)


def test_one_that_does_not_read_loses_its_stream_and_nobody_else_does(fresh_store: FreshStore) -> None:
    async def body() -> None:
        async with (
            asyncio.timeout(50),
            a_world(fresh_store.url, fresh_store.cluster, CONFIG, context_tokens=NUM_TOKENS + 100, stall_s=0.5) as world,
            # Without probing the window stays at 64 KiB, so that what gRPC itself buffers is small.
            open_channel(world.ingress.address, [*channel_options(), ("grpc.http2.bdp_probe", 0)]) as narrow,
        ):
            world.worker.token = lambda seed, index: expected_token(seed, index % 1000)
            stub = inference_pb2_grpc.InferenceStub(narrow)  # type: ignore[no-untyped-call]
            call = stub.Generate(a_prompt("r-slow", max_tokens=NUM_TOKENS))
            events = aiter(call)
            assert (await anext(events)).accepted.request_id == "r-slow"
            metrics = world.ingress.parts.metrics
            await until(lambda: metrics.value("streams_stalled") == 1, "the stall is noticed", 20)
            answer = Answer()
            assert type(await refused(drain(events, answer))) is Cancelled
            period = expected_tokens(11, 1000)
            assert 0 < len(answer.ids) < NUM_TOKENS
            assert all(token_id == period[index % 1000] for index, token_id in enumerate(answer.ids))
            assert (await world.ask(a_prompt("r-quick", max_tokens=8))).ids == expected_tokens(11, 8)
            await until(lambda: not len(world.ingress.parts.table), "nothing of it is left")

    asyncio.run(body())
