"""Our client and server against those of grpcio, in all four pairs: the same bytes, replies and endings."""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest

from protos.contract.errors import BadFrame, InvalidRequest, PeerUnavailable
from protos.rpc import GuardInterceptor, channel_options, error_of, open_channel, parsed, server_options
from tests.support.h2_peer import METHOD, wholes
from workers.kv_wire.incoming import Incoming
from workers.kv_wire.push_client import dial
from workers.kv_wire.push_server import PushServer, ServerLimits

MOST_BYTES = 8 * 1024 * 1024
PAIRS = [(server, client) for server in ("ours", "grpcio") for client in ("ours", "grpcio")]


async def digests(messages: AsyncIterator[Any]) -> AsyncGenerator[bytes, None]:
    """Answers each message with its digest, `silent` ones not at all; words end the call in other ways."""
    async for message in messages:
        word = bytes(message[:8])
        if word == b"tree err":
            raise BadFrame("block 3: 5 bytes at 7 of 9")
        if word == b"mistake!":
            raise KeyError("secret")
        if word == b"enough!!":
            return
        yield hashlib.sha256(message).digest()


def strict(message: Any) -> Any:
    if bytes(message[:7]) == b"garbage":
        raise ValueError("no message")
    return message


async def checked(messages: AsyncIterator[Incoming]) -> AsyncGenerator[bytes, None]:
    async for reply in digests(parsed(wholes(messages), strict, METHOD)):
        yield reply


@asynccontextmanager
async def serving(kind: str) -> AsyncIterator[int]:
    if kind == "ours":
        server = PushServer({METHOD: checked}, ServerLimits(MOST_BYTES, idle_s=5.0))
        yield server.listen("127.0.0.1")
        await server.close()
        assert not server.connections
        return

    async def push(messages: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        async for reply in digests(messages):
            yield reply

    peer = grpc.aio.server(interceptors=[GuardInterceptor()], options=server_options(MOST_BYTES))
    handlers = {"Push": grpc.stream_stream_rpc_method_handler(push, strict)}
    peer.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("autan.v1.KvTransfer", handlers),))
    port = peer.add_insecure_port("127.0.0.1:0")
    await peer.start()
    yield port
    await peer.stop(0)


@asynccontextmanager
async def calling(kind: str, port: int, method: str = METHOD) -> AsyncIterator[Any]:
    if kind == "ours":
        call = await dial("127.0.0.1", port, method, bytes, 5.0)
        yield call
        call.cancel()
        return
    async with open_channel(f"127.0.0.1:{port}", channel_options(MOST_BYTES)) as channel:
        theirs: Any = channel.stream_stream(method, request_serializer=b"".join, response_deserializer=None)
        call = theirs()
        yield call
        call.cancel()


async def replies_of(call: Any) -> list[bytes]:
    return [reply async for reply in call]


@pytest.mark.parametrize(("server", "client"), PAIRS)
@pytest.mark.parametrize("seed", [1, 2])
def test_the_same_bytes_arrive_and_the_same_replies_come_back(server: str, client: str, seed: int) -> None:
    async def run() -> None:
        rng = random.Random(seed)
        sizes = [0, 1, 5, MOST_BYTES - 100, *(rng.choice([30, 16_384, 70_000, 1_000_000]) for _ in range(30))]
        rng.shuffle(sizes)
        messages = [rng.randbytes(size) for size in sizes]
        async with serving(server) as port, calling(client, port) as call:
            answers = asyncio.create_task(replies_of(call))
            for message in messages:
                begin = rng.randint(0, len(message))
                await call.write([message[:begin], memoryview(message)[begin:]])
            await call.done_writing()
            assert await answers == [hashlib.sha256(message).digest() for message in messages]

    asyncio.run(run())


@pytest.mark.parametrize(("server", "client"), PAIRS)
@pytest.mark.parametrize(
    ("words", "error", "text"),
    [
        (b"tree err", BadFrame, "block 3: 5 bytes at 7 of 9"),
        (b"garbage!", InvalidRequest, "no valid protobuf"),
        (b"mistake!", Exception, "internal error"),
    ],
)
def test_errors_come_as_the_tree_has_them(server: str, client: str, words: bytes, error: type[Exception], text: str) -> None:
    async def run() -> None:
        async with serving(server) as port, calling(client, port) as call:
            await call.write([b"first"])
            await call.write([words])
            with pytest.raises(grpc.RpcError) as caught:
                await replies_of(call)
            found = error_of(caught.value)
            assert isinstance(found, error) and text in found.message and "secret" not in found.message

    asyncio.run(run())


@pytest.mark.parametrize(("server", "client"), PAIRS)
def test_a_handler_may_end_the_call_before_its_sender(server: str, client: str) -> None:
    async def run() -> None:
        async with serving(server) as port, calling(client, port) as call:
            await call.write([b"one"])
            await call.write([b"enough!!"])
            assert await replies_of(call) == [hashlib.sha256(b"one").digest()]

    asyncio.run(run())


@pytest.mark.parametrize(("server", "client"), PAIRS)
def test_an_unknown_method_is_unimplemented_and_a_message_too_long_refused(server: str, client: str) -> None:
    async def run() -> None:
        async with serving(server) as port:
            async with calling(client, port, "/autan.v1.KvTransfer/Pull") as call:
                with pytest.raises(grpc.RpcError) as caught:
                    if client == "ours":  # grpcio begins without, and calls a write INTERNAL that meets the end of its call
                        await call.write([b"x"])
                    await replies_of(call)
                assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
            if client == "ours":
                async with calling(client, port) as call:
                    with pytest.raises(grpc.RpcError) as caught:
                        await call.write([bytes(MOST_BYTES + 1)])
                        await replies_of(call)
                    assert caught.value.code() in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE)
            async with calling(client, port) as call:
                await call.write([b"still here"])
                await call.done_writing()
                assert len(await replies_of(call)) == 1

    asyncio.run(run())


@pytest.mark.parametrize("client", ["ours", "grpcio"])
def test_a_sender_that_hangs_up_is_an_unreachable_peer(client: str) -> None:
    async def run() -> None:
        ends: asyncio.Queue[BaseException | None] = asyncio.Queue()

        async def handler(messages: AsyncIterator[Incoming]) -> AsyncGenerator[bytes, None]:
            try:
                async for _ in messages:
                    yield b"seen"
            except PeerUnavailable as error:
                ends.put_nowait(error)
                raise

        server = PushServer({METHOD: handler}, ServerLimits(MOST_BYTES, idle_s=5.0))
        async with calling(client, server.listen("127.0.0.1")) as call:
            await call.write([b"x" * 100_000])
            assert await anext(aiter(call)) == b"seen"
        async with asyncio.timeout(5):
            assert isinstance(await ends.get(), PeerUnavailable)
        await server.close()

    asyncio.run(run())


def test_a_server_that_goes_away_is_an_unreachable_peer() -> None:
    async def run() -> None:
        server = PushServer({METHOD: checked}, ServerLimits(MOST_BYTES))
        async with calling("ours", server.listen("127.0.0.1")) as call:
            await call.write([b"x"])
            await anext(aiter(call))
            await server.close()
            with pytest.raises(grpc.RpcError) as caught:
                await replies_of(call)
            assert isinstance(error_of(caught.value), PeerUnavailable)
            with pytest.raises(grpc.RpcError):
                await call.write([b"y"])

    asyncio.run(run())


def test_a_call_that_is_cancelled_reads_nothing_more_of_what_it_was_writing() -> None:
    async def run() -> None:
        async def deaf(messages: AsyncIterator[Incoming]) -> AsyncGenerator[bytes, None]:
            await asyncio.Event().wait()
            yield b""

        server = PushServer({METHOD: deaf}, ServerLimits(64 * 1024 * 1024))
        async with calling("ours", server.listen("127.0.0.1")) as call:
            memory = bytearray(48 * 1024 * 1024)
            writing = asyncio.create_task(call.write([memoryview(memory)]))
            second = asyncio.create_task(call.write([b"waits for the first"]))
            await asyncio.sleep(0)
            for _ in range(20):
                await asyncio.sleep(0)
            call.cancel()
            for task in (writing, second):
                with pytest.raises(grpc.RpcError):
                    await task
            del writing, task
        await server.close()

    asyncio.run(run())
