"""Errors, garbage and refusals over a real server on loopback."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
import pytest

from protos import rpc
from protos.contract.errors import (
    AutanError,
    InternalError,
    PeerUnavailable,
    PromptTooLong,
    QueueFull,
    Unauthenticated,
    error_from,
)
from protos.wire import inference

GARBAGE = [b"\xff\xff\xff\xff", b"\x0a\xff\xff\xff\xff\x0f", b"\x0a\x02\xc3\x28", b"\x08", b"\x0b" * 2000]


class Front(rpc.inference_pb2_grpc.InferenceServicer):
    """Cancel raises the error whose reason the id names; Generate sends one event first."""

    calls = 0

    async def Cancel(self, request: Any, context: Any) -> Any:
        self.calls += 1
        if request.request_id == "fine":
            return inference.CancelReply(state="CANCELLED")
        if request.request_id == "bug":
            raise KeyError("secret-detail")
        if request.request_id == "slow":
            await asyncio.sleep(30)
        raise error_from(request.request_id, "the queue holds 4096 requests ✓\nsecond line", 1.25)

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[Any]:
        yield inference.GenerateEvent(accepted=inference.Accepted(request_id="r"))
        raise PromptTooLong("é" * int(request.request_id or 3))


def served(
    test: Callable[[Any, grpc.aio.Channel, Front], Awaitable[None]],
    authorise: Callable[[str, dict[str, str]], object] | None = None,
) -> None:
    async def run() -> None:
        server = grpc.aio.server(interceptors=[rpc.GuardInterceptor(authorise)], options=rpc.server_options())
        front = Front()
        rpc.inference_pb2_grpc.add_InferenceServicer_to_server(front, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            async with rpc.open_channel(f"127.0.0.1:{port}") as channel:
                await test(rpc.inference_pb2_grpc.InferenceStub(channel), channel, front)
        finally:
            await server.stop(0)

    asyncio.run(asyncio.wait_for(run(), 30))


async def failed(call: Any) -> tuple[AutanError, grpc.StatusCode]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return rpc.error_of(caught.value), caught.value.code()


def test_errors_arrive_as_they_were_raised() -> None:
    async def test(stub: Any, channel: grpc.aio.Channel, front: Front) -> None:
        for reason in ("QUEUE_FULL", "STALE_EPOCH", "DIGEST_MISMATCH", "RESUME_GONE", "FORBIDDEN"):
            error, code = await failed(stub.Cancel(inference.CancelRequest(request_id=reason), timeout=5))
            assert (error.reason, error.message, error.retry_after_s) == (
                reason,
                "the queue holds 4096 requests ✓\nsecond line",
                1.25,
            )
            assert code.name == error.code
        assert (await stub.Cancel(inference.CancelRequest(request_id="fine"), timeout=5)).state == "CANCELLED"

    served(test)


def test_an_error_after_the_first_message_of_a_stream_arrives_too() -> None:
    async def test(stub: Any, channel: grpc.aio.Channel, front: Front) -> None:
        call = stub.Generate(inference.GenerateRequest(), timeout=5)
        assert (await call.read()).accepted.request_id == "r"
        error, code = await failed(call.read())
        assert (type(error), code) == (PromptTooLong, grpc.StatusCode.OUT_OF_RANGE)

    served(test)


def test_a_long_message_is_cut_and_keeps_its_kind() -> None:
    async def test(stub: Any, channel: grpc.aio.Channel, front: Front) -> None:
        call = stub.Generate(inference.GenerateRequest(request_id="100000"), timeout=5)
        await call.read()
        error, _ = await failed(call.read())
        assert type(error) is PromptTooLong
        assert error.message == "é" * 748 + " ..."

    served(test)


def test_garbage_is_invalid_argument_and_reaches_no_handler() -> None:
    async def test(stub: Any, channel: grpc.aio.Channel, front: Front) -> None:
        unary = channel.unary_unary("/autan.v1.Inference/Cancel")
        for garbage in GARBAGE:
            error, code = await failed(unary(garbage, timeout=5))
            assert code is grpc.StatusCode.INVALID_ARGUMENT
            assert error.message == "/autan.v1.Inference/Cancel: the request is no valid protobuf message"
        stream = channel.unary_stream("/autan.v1.Inference/Generate")
        _, code = await failed(stream(GARBAGE[0], timeout=5).read())
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert front.calls == 0
        assert (await stub.Cancel(inference.CancelRequest(request_id="fine"), timeout=5)).state == "CANCELLED"

    served(test)


def test_a_bug_is_internal_with_an_opaque_id_that_the_log_explains(caplog: pytest.LogCaptureFixture) -> None:
    async def test(stub: Any, channel: grpc.aio.Channel, front: Front) -> None:
        error, code = await failed(stub.Cancel(inference.CancelRequest(request_id="bug"), timeout=5))
        assert (type(error), code) == (InternalError, grpc.StatusCode.INTERNAL)
        assert "secret-detail" not in error.message
        token = error.message.split()[2].rstrip(":")
        assert token in caplog.text
        assert "secret-detail" in caplog.text

    with caplog.at_level(logging.ERROR, logger="protos.rpc"):
        served(test)


def test_refusal_comes_before_parsing() -> None:
    seen = []

    def authorise(method: str, metadata: dict[str, str]) -> None:
        seen.append((method, metadata.get("authorization")))
        if metadata.get("authorization") != "Bearer k":
            raise Unauthenticated("no key")

    async def test(stub: Any, channel: grpc.aio.Channel, front: Front) -> None:
        unary = channel.unary_unary("/autan.v1.Inference/Cancel")
        _, code = await failed(unary(GARBAGE[0], timeout=5))
        assert code is grpc.StatusCode.UNAUTHENTICATED
        request = inference.CancelRequest(request_id="fine")
        assert (await stub.Cancel(request, timeout=5, metadata=[("authorization", "Bearer k")])).state == "CANCELLED"
        assert front.calls == 1

    served(test, authorise)
    assert seen == [("/autan.v1.Inference/Cancel", None), ("/autan.v1.Inference/Cancel", "Bearer k")]


def test_unknown_methods_and_vanished_peers() -> None:
    async def test(stub: Any, channel: grpc.aio.Channel, front: Front) -> None:
        _, code = await failed(channel.unary_unary("/autan.v1.Inference/Nothing")(b"", timeout=5))
        assert code is grpc.StatusCode.UNIMPLEMENTED
        error, _ = await failed(stub.Cancel(inference.CancelRequest(request_id="slow"), timeout=0.2))
        assert type(error) is PeerUnavailable
        async with rpc.open_channel("127.0.0.1:1") as nowhere:
            call = rpc.inference_pb2_grpc.InferenceStub(nowhere).Cancel(inference.CancelRequest(), timeout=5)
            error, _ = await failed(call)
            assert type(error) is PeerUnavailable

    served(test)


def test_a_message_above_the_limit_is_refused_and_the_server_lives_on() -> None:
    async def test(stub: Any, channel: grpc.aio.Channel, front: Front) -> None:
        unary = channel.unary_unary("/autan.v1.Inference/Cancel")
        _, code = await failed(unary(b"\x0a" + b"\0" * rpc.DEFAULT_MESSAGE_BYTES, timeout=5))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        error, _ = await failed(stub.Cancel(inference.CancelRequest(request_id="QUEUE_FULL"), timeout=5))
        assert type(error) is QueueFull

    served(test)
