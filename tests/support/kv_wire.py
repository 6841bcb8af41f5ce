"""A faulty wire between two workers: a KvTransfer service that passes everything on to the real one, but for its faults."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
import redis

from protos.contract.redis_names import base_key
from protos.rpc import GuardInterceptor, error_of, kv_pb2_grpc, open_channel, server_options
from protos.wire import kv
from tests.support.worker_world import WorkerWorld

_CUT = object()

Mutate = Callable[[int, kv.PushFrame], list[kv.PushFrame] | None]


class FaultyWire(kv_pb2_grpc.KvTransferServicer):
    """`mutate(n, frame)` sees the n-th frame of all streams, counted from 0: it gives the frames to pass on, none to cut
    the stream there. `drop_replies` swallows the receiver's commit and cuts the stream instead, that many times.
    """

    def __init__(self, target: str) -> None:
        self._channel = open_channel(target)
        self._stub: Any = kv_pb2_grpc.KvTransferStub(self._channel)
        self._push = self._channel.stream_stream(
            "/autan.v1.KvTransfer/Push", request_serializer=_serialised, response_deserializer=kv.PushReply.FromString
        )
        self._server: Any = None
        self.address = ""
        self.mutate: Mutate = lambda n, frame: [frame]
        self.change_open: Callable[[kv.OpenRequest], None] = lambda request: None
        self._gates: list[tuple[Callable[[kv.PushFrame], bool], asyncio.Event]] = []
        self.before_cut: Callable[[], Awaitable[None]] | None = None
        self.closed = False  # nobody can open
        self.drop_replies = 0
        self.frames = 0
        self.opens = 0
        self.streams = 0
        self.closes = 0
        self.cuts = 0

    async def start(self) -> None:
        """Serves on a port of its own."""
        self._server = grpc.aio.server(interceptors=[GuardInterceptor()], options=server_options())
        kv_pb2_grpc.add_KvTransferServicer_to_server(self, self._server)
        port = self._server.add_insecure_port("127.0.0.1:0")
        self.address = f"127.0.0.1:{port}"
        await self._server.start()

    def gate_of(self, held: Callable[[kv.PushFrame], bool]) -> asyncio.Event:
        """From now on such frames, and what follows on their streams, wait until the event is set."""
        gate = asyncio.Event()
        self._gates.append((held, gate))
        return gate

    async def stop(self) -> None:
        """Cuts everything."""
        await self._server.stop(0)
        await self._channel.close()

    async def Open(self, request: kv.OpenRequest, context: Any) -> kv.OpenReply:
        if self.closed:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the wire is down")
        self.opens += 1
        self.change_open(request)
        try:
            reply: kv.OpenReply = await self._stub.Open(request, timeout=10)
        except grpc.aio.AioRpcError as error:
            raise error_of(error) from error
        reply.push_port = 0  # which would lead around this wire
        return reply

    async def Close(self, request: kv.CloseRequest, context: Any) -> kv.CloseReply:
        self.closes += 1
        reply: kv.CloseReply = await self._stub.Close(request, timeout=10)
        return reply

    async def Push(self, request_iterator: AsyncIterator[kv.PushFrame], context: Any) -> AsyncIterator[kv.PushReply]:
        self.streams += 1
        call = self._push()
        replies: asyncio.Queue[Any] = asyncio.Queue()
        tasks = [
            asyncio.create_task(self._feed(request_iterator, call, replies)),
            asyncio.create_task(self._collect(call, replies)),
        ]
        try:
            while True:
                reply = await replies.get()
                if reply is _CUT:
                    await self._cut(context)
                if reply is grpc.aio.EOF:
                    return
                if isinstance(reply, grpc.RpcError):
                    raise error_of(reply) from reply
                if reply.WhichOneof("outcome") and self.drop_replies:
                    self.drop_replies -= 1
                    await self._cut(context)
                yield reply
        finally:
            call.cancel()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    @staticmethod
    async def _collect(call: Any, replies: asyncio.Queue[Any]) -> None:
        """Reads without a pause: a write that fails after the receiver's refusal would hide it from a later read."""
        last: Any = None
        while last is not grpc.aio.EOF and not isinstance(last, grpc.RpcError):
            try:
                last = await call.read()
            except grpc.aio.AioRpcError as error:
                last = error
            replies.put_nowait(last)

    async def _feed(self, frames: AsyncIterator[kv.PushFrame], call: Any, replies: asyncio.Queue[Any]) -> None:
        async for frame in frames:
            for held, gate in self._gates:
                if held(frame):
                    await gate.wait()
            changed = self.mutate(self.frames, frame)
            self.frames += 1
            if changed is None:
                if self.before_cut is not None:
                    await self.before_cut()
                replies.put_nowait(_CUT)
                return
            for one in changed:
                await call.write(one)
        await call.done_writing()

    async def _cut(self, context: Any) -> None:
        self.cuts += 1
        await context.abort(grpc.StatusCode.UNAVAILABLE, "the wire is cut")


async def put_wire(world: WorkerWorld, instance_id: str) -> FaultyWire:
    """From now on whoever is told to hand over to this instance reaches it through the wire. Stop it at the end."""
    wire = FaultyWire(world.hosts[instance_id].address)
    await wire.start()
    reroute(world.fresh.url, world.fresh.cluster, instance_id, wire.address)
    return wire


def reroute(url: str, cluster: str, instance_id: str, address: str) -> str:
    """From now on this is the address of the instance in Redis; returns the one before."""
    key = f"{base_key(cluster)}:i:{instance_id}"
    with redis.Redis.from_url(url, socket_timeout=10, protocol=2) as store:
        before = store.hget(key, "addr")
        store.hset(key, "addr", address)
    assert isinstance(before, bytes)
    return before.decode()


def _serialised(message: kv.PushFrame | bytes) -> bytes:
    """What a test made by hand goes out as it is."""
    return message if isinstance(message, bytes) else message.SerializeToString()
